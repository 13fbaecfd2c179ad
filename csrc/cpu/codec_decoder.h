// The next chunk of several streams of an audio tokenizer's decoder, as mimo_fast/runtime/codec/incremental.py computes it.
#pragma once

#include "buffer.h"
#include "parameters.h"

namespace mimo_fast::MIMO_FAST_SET {

// Samples go to each chunk's `samples`; states are updated in place. Streams are divided among threads where there is
// enough work; a stream's samples and state do not depend on the others.
void decode_chunks(const CodecDecoder& d, const CodecChunk* chunks, int64_t count);

// A stream of a group whose rows are computed together. Rows of all its streams lie one after the other.
struct Stream {
    const CodecChunk* chunk = nullptr;
    int64_t codes_at = 0;   // first of its codes
    int64_t added_rows = 0, added_at = 0;  // new inputs of the decoder's layers
    int64_t rows = 0, rows_at = 0;         // pending inputs and new ones
    int64_t position = 0;                  // of the first new one
    int64_t mel_at = 0;                    // first of its `rows` times stride vocoder frames
};

// mel: normed, of the streams' pending and new vocoder frames [..., n_mels].
void vocode(const CodecDecoder& d, const Buffer<Stream>& streams, const float* mel);

// Cosines and sines [count, half] of `count` positions from `first` on.
void rotation_rows(const Rotations& table, int64_t first, int64_t count, float* cosines, float* sines);

}  // namespace mimo_fast::MIMO_FAST_SET
