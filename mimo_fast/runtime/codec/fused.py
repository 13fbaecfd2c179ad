"""The decoder of a small codec on a CPU as one native call, `kernels/cpu/codec_decoder.py`."""

from __future__ import annotations

from torch import Tensor

from mimo_fast.kernels.cpu import codec_stack as small_codec
from mimo_fast.kernels.cpu.codec_decoder import Buffers, CodecDecoder, TransposedConv, Window
from mimo_fast.kernels.cpu.transformer import is_plain
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.rope import rope_frequencies
from mimo_fast.runtime.codec.geometry import streamable
from mimo_fast.runtime.codec.incremental import VOCODER_BLOCK
from mimo_fast.runtime.codec.layers import CodecStack, Norm
from mimo_fast.runtime.codec.layers import TransposedConv as Convolution
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import BLOCK, StateTensors, decoder_context


def fused_decoder(codec: CodecNetwork) -> CodecDecoder | None:
    """What decodes chunks of this codec natively, or None where plain torch must.

    It takes float32 on a CPU, dense weights, stacks that are `fused`, and windows of even size.
    """
    config = codec.config
    decoder, vocoder = codec.decoder.executor, codec.vocoder.executor
    if not isinstance(decoder, small_codec.CodecStack) or not isinstance(
        vocoder, small_codec.CodecStack
    ):
        return None
    matrices = codec.vocoder_in, codec.vocoder_out
    if not all(isinstance(weight, Weight) and is_plain(weight) for weight in matrices):
        return None
    convolutions = [codec.to_mel] if codec.unpool is None else [codec.unpool, codec.to_mel]
    if not all(map(_takes, convolutions)) or (codec.unpool and codec.unpool.overlap):
        return None
    if not streamable(config) or config.n_fft % 2 or config.hop > config.n_fft:
        return None
    assert isinstance(codec.vocoder_in, Weight)
    assert isinstance(codec.vocoder_out, Weight)
    return CodecDecoder(
        decoder=decoder,
        vocoder=vocoder,
        unpool=None if codec.unpool is None else _parts(codec.unpool),
        to_mel=_parts(codec.to_mel),
        decoder_norm=_norm(codec.decoder_norm),
        vocoder_norm=_norm(codec.vocoder_norm),
        vocoder_in=codec.vocoder_in,
        vocoder_out=codec.vocoder_out,
        context=decoder_context(config.decoder_window),
        vocoder_window=Window(*config.vocoder_window),
        blocks=(BLOCK, VOCODER_BLOCK),
        frequencies=(_frequencies(codec.decoder, decoder), _frequencies(codec.vocoder, vocoder)),
        window=codec.window,
        hop=config.hop,
    )


def buffers_of(state: StateTensors) -> Buffers:
    """The native view of rows of state."""
    tensors = dict(state.named())
    unpool, to_mel = tensors.pop("expected").unbind(1)
    sums = {f"{name}_sums": tensors.pop(name) for name in ("unpool", "to_mel")}
    return Buffers(**tensors, **sums, unpool_expected=unpool, to_mel_expected=to_mel)


def _takes(conv: Convolution) -> bool:
    """Whether a convolution's weights are plain, its kernel no smaller than its stride."""
    inputs, outputs, kernel = conv.weight.shape
    parts = conv.weight, conv.bias, conv.norm_weight, conv.norm_bias
    return (
        kernel >= conv.stride and not inputs % 8 and not outputs % 8 and all(map(is_plain, parts))
    )


def _parts(conv: Convolution) -> TransposedConv:
    return TransposedConv(conv.weight, conv.bias, conv.norm_weight, conv.norm_bias, conv.stride)


def _norm(norm: Norm) -> small_codec.Norm:
    return norm.weight, norm.bias


def _frequencies(stack: CodecStack, fused: small_codec.CodecStack) -> Tensor:
    return rope_frequencies(fused.head_dim, stack.rope_theta, "cpu", stack.rounding)
