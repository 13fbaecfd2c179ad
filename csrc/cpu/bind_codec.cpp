// Python's view of the codec's kernels; see bindings.cpp.

#include "bindings.h"

#include <set>

#include "codec_tables.h"

namespace {

// Positions whose rotations are in a table.
constexpr int64_t ROTATIONS = 256;

template <class T>
Pooled<T> pooled(const std::tuple<uintptr_t, int64_t, int64_t>& of) {
    // Without values it has no address.
    return {address<T>(std::get<0>(of)), std::get<1>(of), std::get<2>(of)};
}

TransposedConv transposed_conv(
    const Linear& weight, uintptr_t bias, uintptr_t norm_weight, uintptr_t norm_bias, int64_t kernel, int64_t stride,
    int64_t outputs
) {
    check(stride > 0 && kernel >= stride && outputs > 0, "a kernel is smaller than its stride");
    check_shape(weight, kernel * outputs, weight.columns, "a convolution");
    check(bias && norm_weight && norm_bias, "a bias or a norm is missing");
    return {weight, address<const float>(bias), address<const float>(norm_weight), address<const float>(norm_bias),
            kernel, stride, outputs};
}

void check_decoder(const CodecDecoder& d) {
    const int64_t dim = d.decoder.dim;
    if (d.pools) {
        check_shape(d.unpool.weight, d.unpool.kernel * dim, dim, "unpool");
        check(d.unpool.kernel == d.unpool.stride, "unpool's outputs overlap");
    }
    check(d.to_mel.weight.columns == dim, "to_mel is of another width");
    check_shape(d.vocoder_in, d.vocoder.dim, d.to_mel.outputs, "vocoder_in");
    check_shape(d.vocoder_out, d.stft.size + 2, d.vocoder.dim, "vocoder_out");
    check(d.stft.size > 0 && d.stft.size % 2 == 0, "windows are of no even size");
    check(d.stft.hop > 0 && d.stft.hop <= d.stft.size, "windows do not overlap");
    check(d.context >= 0 && d.left >= 0 && d.right >= 0, "a window is negative");
    check(d.decoder_block > 0 && d.vocoder_block > 0, "blocks are empty");
}

// What a chunk would read or write outside of its buffers.
void check_chunk(const CodecDecoder& d, const CodecChunk& c) {
    const CodecBuffers& b = *c.buffers;
    check(c.row >= 0 && c.row < b.rows, "row " + std::to_string(c.row) + " is not below " + std::to_string(b.rows));
    check_present(c.codes, uintptr_t(c.hidden));
    const int64_t pending = b.entered_rows * d.to_mel.stride, least = int64_t(d.vocoder.layers.size()) * d.right;
    check(pending >= least, "fewer frames are pending than the vocoder looks ahead");
    check(b.ring >= d.context + d.decoder_block, "the ring is smaller than a block and its context");
    check(c.lookahead >= 0 && c.lookahead <= pending, "more frames are held back than are pending");
    check(c.frames >= 0 && c.frames % (d.pool() * d.to_mel.stride) == 0, "frames are of no whole codes");
    check(c.committed >= 0 && (!c.frames || c.committed >= c.frames - pending), "frames were dropped");
    check(c.committed <= c.frames_after(d), "more frames were committed than there are");
    check(c.known >= 0 && c.known <= 2, "known is none of 0, 1 and 2");
    check_present(c.samples_after(d), uintptr_t(c.samples));
}

}  // namespace

void bind_codec(py::module_& module) {
    py::class_<Norm>(module, "Norm")
        .def(py::init([](uintptr_t weight, uintptr_t bias) {
                 check(weight, "the weight is missing");
                 return Norm{address<const float>(weight), address<const float>(bias)};
             }),
             py::kw_only(), py::arg("weight"), py::arg("bias"));
    bind_struct<CodecAttention, const float*, float*, float*, const int64_t*, const bool*, int64_t>(
        module, "CodecAttention", "table", "k", "v", "slots", "visible", "places");
    bind_struct<CodecSequences, const int64_t*, int64_t, const float*, int64_t, int64_t>(
        module, "CodecSequences", "lengths", "count", "table", "left", "right");
    py::class_<CodecStack>(module, "CodecStack")
        .def(py::init([](int64_t dim, int64_t heads, float eps) {
                 check(heads > 0 && dim > 0 && dim % (8 * heads) == 0, "heads are no multiple of 8 wide");
                 return CodecStack{{}, dim, heads, eps};
             }),
             py::kw_only(), py::arg("dim"), py::arg("heads"), py::arg("eps"))
        .def("add_layer",
             [](CodecStack& self, const Norm& attention_norm, const Linear& qkv, const Linear& out,
                const Norm& ffn_norm, const Linear& up, const Linear& down) {
                 check_shape(qkv, 3 * self.dim, self.dim, "qkv");
                 check_shape(out, self.dim, self.dim, "out");
                 check_shape(up, up.rows, self.dim, "up");
                 check_shape(down, self.dim, up.rows, "down");
                 self.layers.push_back({attention_norm, qkv, out, ffn_norm, up, down});
             },
             py::kw_only(), py::arg("attention_norm"), py::arg("qkv"), py::arg("out"), py::arg("ffn_norm"),
             py::arg("up"), py::arg("down"))
        .def("run",
             [](const CodecStack& self, uintptr_t x, int64_t rows, const CodecAttention& attention) {
                 check_present(rows, x, uintptr_t(attention.table), uintptr_t(attention.k), uintptr_t(attention.v),
                               uintptr_t(attention.slots), uintptr_t(attention.visible));
                 check_slots(attention.slots, rows, attention.places);
                 kernels->run_codec_stack(self, address<float>(x), rows, attention);
             },
             py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("attention"), Unlocked())
        .def("run_sequences",
             [](const CodecStack& self, uintptr_t x, int64_t rows, const CodecSequences& sequences, int64_t skip) {
                 check_present(rows, x, uintptr_t(sequences.lengths), uintptr_t(sequences.table));
                 check(sequences.left >= 0 && sequences.right >= 0, "a window is negative");
                 int64_t total = 0;
                 for (int64_t i = 0; i < sequences.count; ++i) {
                     check(sequences.lengths[i] >= 0, "a sequence has fewer than no rows");
                     total += sequences.lengths[i];
                 }
                 check(total == rows, "the sequences are not of " + std::to_string(rows) + " rows");
                 check(skip >= 0 && skip <= int64_t(self.layers.size()), "there is no such layer to skip");
                 kernels->run_codec_sequences(self, address<float>(x), sequences, skip);
             },
             py::kw_only(), py::arg("x"), py::arg("rows"), py::arg("sequences"), py::arg("skip"), Unlocked());
    py::class_<TransposedConv>(module, "TransposedConv")
        .def(py::init(&transposed_conv), py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("norm_weight"),
             py::arg("norm_bias"), py::arg("kernel"), py::arg("stride"), py::arg("outputs"));
    using Buffer = std::tuple<uintptr_t, int64_t, int64_t>;
    py::class_<CodecBuffers>(module, "CodecBuffers")
        .def(py::init([](int64_t rows, int64_t entered_rows, int64_t ring, const Buffer& position, const Buffer& frame,
                         const Buffer& unpool_expected, const Buffer& to_mel_expected, const Buffer& unpool_sums,
                         const Buffer& to_mel_sums, const Buffer& prior, const Buffer& entered, const Buffer& added,
                         const Buffer& history, const Buffer& tail, const Buffer& given, const Buffer& decoder_k,
                         const Buffer& decoder_v, const Buffer& vocoder_k, const Buffer& vocoder_v) {
                 return CodecBuffers{rows, entered_rows, ring, pooled<int64_t>(position), pooled<int64_t>(frame),
                                     pooled<int64_t>(unpool_expected), pooled<int64_t>(to_mel_expected),
                                     pooled<double>(unpool_sums), pooled<double>(to_mel_sums), pooled<double>(prior),
                                     pooled<float>(entered), pooled<float>(added), pooled<float>(history),
                                     pooled<float>(tail), pooled<float>(given), pooled<float>(decoder_k),
                                     pooled<float>(decoder_v), pooled<float>(vocoder_k), pooled<float>(vocoder_v)};
             }),
             py::kw_only(), py::arg("rows"), py::arg("entered_rows"), py::arg("ring"), py::arg("position"),
             py::arg("frame"), py::arg("unpool_expected"), py::arg("to_mel_expected"), py::arg("unpool_sums"),
             py::arg("to_mel_sums"), py::arg("prior"), py::arg("entered"), py::arg("added"), py::arg("history"),
             py::arg("tail"), py::arg("given"), py::arg("decoder_k"), py::arg("decoder_v"), py::arg("vocoder_k"),
             py::arg("vocoder_v"));
    py::class_<CodecChunk>(module, "CodecChunk")
        .def(py::init([](const CodecBuffers& buffers, int64_t row, uintptr_t hidden, int64_t codes, int64_t frames,
                         int64_t committed, int64_t lookahead, int known, bool ended, bool settled) {
                 return CodecChunk{&buffers, row, address<const float>(hidden), codes, frames, committed, lookahead,
                                   known, ended, settled, nullptr};
             }),
             py::keep_alive<1, 2>(), py::arg("buffers"), py::arg("row"), py::arg("hidden"), py::arg("codes"),
             py::arg("frames"), py::arg("committed"), py::arg("lookahead"), py::arg("known"), py::arg("ended"),
             py::arg("settled"));
    py::class_<CodecDecoder>(module, "CodecDecoder")
        .def(py::init([](const CodecStack& decoder, const CodecStack& vocoder, const TransposedConv* unpool,
                         const TransposedConv& to_mel, const Norm& decoder_norm, const Norm& vocoder_norm,
                         const Linear& vocoder_in, const Linear& vocoder_out, int64_t context, int64_t left,
                         int64_t right, int64_t decoder_block, int64_t vocoder_block, uintptr_t decoder_frequencies,
                         uintptr_t vocoder_frequencies, uintptr_t window, int64_t size, int64_t hop) {
                 check(decoder_frequencies && vocoder_frequencies && window, "frequencies or the window are missing");
                 check(size > 0 && size % 2 == 0, "windows are of no even size");
                 CodecDecoder d;
                 d.decoder = decoder;
                 d.vocoder = vocoder;
                 d.pools = unpool != nullptr;
                 if (unpool) d.unpool = *unpool;
                 d.to_mel = to_mel;
                 d.decoder_norm = decoder_norm;
                 d.vocoder_norm = vocoder_norm;
                 d.vocoder_in = vocoder_in;
                 d.vocoder_out = vocoder_out;
                 d.context = context;
                 d.left = left;
                 d.right = right;
                 d.decoder_block = decoder_block;
                 d.vocoder_block = vocoder_block;
                 d.decoder_rotations = make_rotations(address<const float>(decoder_frequencies),
                                                      decoder.dim / decoder.heads / 2, ROTATIONS);
                 d.vocoder_rotations = make_rotations(address<const float>(vocoder_frequencies),
                                                      vocoder.dim / vocoder.heads / 2, ROTATIONS);
                 d.stft = make_inverse_stft(address<const float>(window), size, hop);
                 check_decoder(d);
                 return d;
             }),
             py::kw_only(), py::arg("decoder"), py::arg("vocoder"), py::arg("unpool"), py::arg("to_mel"),
             py::arg("decoder_norm"), py::arg("vocoder_norm"), py::arg("vocoder_in"), py::arg("vocoder_out"),
             py::arg("context"), py::arg("left"), py::arg("right"), py::arg("decoder_block"),
             py::arg("vocoder_block"), py::arg("decoder_frequencies"), py::arg("vocoder_frequencies"),
             py::arg("window"), py::arg("size"), py::arg("hop"))
        .def("sizes",
             [](const CodecDecoder& self, const std::vector<CodecChunk>& chunks) {
                 std::vector<std::tuple<int64_t, int64_t, int64_t>> sizes;
                 for (const CodecChunk& c : chunks)
                     sizes.emplace_back(c.samples_after(self), c.frames_after(self), c.committed_after(self));
                 return sizes;
             },
             py::kw_only(), py::arg("chunks"), "Samples of each chunk; frames and committed frames after it.")
        .def("decode",
             [](const CodecDecoder& self, std::vector<CodecChunk> chunks, uintptr_t samples) {
                 float* at = address<float>(samples);
                 std::set<std::pair<const CodecBuffers*, int64_t>> rows;
                 for (CodecChunk& c : chunks) {
                     check(rows.insert({c.buffers, c.row}).second, "two chunks are of one row");
                     c.samples = at;
                     check_chunk(self, c);
                     at += c.samples_after(self);
                 }
                 kernels->decode_chunks(self, chunks.data(), int64_t(chunks.size()));
             },
             py::kw_only(), py::arg("chunks"), py::arg("samples"), Unlocked());
}
