// The table of one instruction set.

#include "kernels.h"

#include "codec_decoder.h"
#include "codec_stack.h"
#include "decode_attention.h"
#include "integer_peak.h"
#include "linear.h"
#include "patch_decoder.h"
#include "quantized_matmul.h"
#include "sampler.h"
#include "transformer.h"

#define NAME_OF(set) #set
#define SET_NAME(set) NAME_OF(set)

namespace mimo_fast::MIMO_FAST_SET {

extern const Kernels kernels = {
    SET_NAME(MIMO_FAST_SET), quantized_matmul, multiply_registers, decode_attention, multiply_rows, step, encode,
    decode_patch, run_codec_stack, run_codec_sequences, decode_chunks, sample, gumbel,
};

}  // namespace mimo_fast::MIMO_FAST_SET
