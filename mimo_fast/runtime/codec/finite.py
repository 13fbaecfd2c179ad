"""Codes and samples of the codec that are not finite: found where they are on the host, and why.

Codes of values that are not finite are NOT_FINITE (kernels/rvq.py), such samples are NaN. On a GPU
both stay on the device, and whoever copies them to the host checks the copy.
"""

from torch import Tensor

from mimo_fast.audio.mel import log_mel
from mimo_fast.checkpoint.layout import codec_shapes
from mimo_fast.errors import AudioError, NumericError
from mimo_fast.kernels.matmul.product import AnyWeight, matmul
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.codec.layers import CodecStack, Norm
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.persistent import persistent
from mimo_fast.runtime.lm.finite import Named, cause, of_matrix


def checked_codes(codec: CodecNetwork, codes: Tensor, wav: Tensor) -> Tensor:
    """The codes of a waveform [n].

    Raises:
        NumericError: they are on the host, and the encoder's output was not finite.
        AudioError: the waveform itself is not.
    """
    if codes.device.type == "cpu" and bool((codes == NOT_FINITE).any()):
        if not bool(wav.isfinite().all()):
            raise AudioError("the waveform holds NaN or infinite samples: record or read it again")
        why = cause(tensors(codec), _encode_steps(codec, wav), codec.dtype)
        raise NumericError(f"the codec's encoder gives values that are not finite: {why}")
    return codes


def checked_samples(codec: CodecNetwork, wav: Tensor, codes: Tensor | None) -> Tensor:
    """Samples [m] decoded from codes [n, T], or from those and earlier ones.

    Raises:
        NumericError: they are on the host and not finite.
    """
    if wav.device.type == "cpu" and not bool(wav.isfinite().all()):
        raise samples_error(codec, codes)
    return wav


def samples_error(codec: CodecNetwork, codes: Tensor | None) -> NumericError:
    """Why samples decoded from codes [n, T] are not finite."""
    launched = persistent(codec)
    if launched is not None and launched.gave_up():
        why = "its persistent kernel gave up; later streams go on without it"
        return NumericError(f"the codec's samples are not finite: {why}")
    steps = iter(()) if codes is None else _decode_steps(codec, codes)
    why = cause(tensors(codec), steps, codec.dtype)
    return NumericError(f"the codec's samples are not finite: {why}")


def tensors(codec: CodecNetwork) -> Named:
    """Every tensor of a codec that inference reads, by its name in a checkpoint."""
    rows = {name: shape[0] for name, shape in codec_shapes(codec.config).items()}

    def of(weight: AnyWeight, *modules: str) -> Named:
        return of_matrix(weight, modules, [rows[f"{module}.weight"] for module in modules])

    def pair(name: str, weight: Tensor, bias: Tensor | None) -> Named:
        yield f"{name}.weight", weight
        if bias is not None:
            yield f"{name}.bias", bias

    def norm(name: str, norm: Norm) -> Named:
        return pair(name, norm.weight, norm.bias)

    def stack(prefix: str, stack: CodecStack) -> Named:
        for i, layer in enumerate(stack.layers):
            name = f"{prefix}.{i}"
            yield from norm(f"{name}.self_attn_layer_norm", layer.attention_norm)
            yield from of(layer.qkv, *(f"{name}.self_attn.{part}_proj" for part in "qkv"))
            yield from of(layer.out, f"{name}.self_attn.out_proj")
            yield from norm(f"{name}.final_layer_norm", layer.ffn_norm)
            yield from of(layer.up, f"{name}.fc1")
            yield from of(layer.down, f"{name}.fc2")

    yield from pair("encoder.conv1", *codec.conv1)
    yield from pair("encoder.conv2", *codec.conv2)
    yield from stack("encoder.layers", codec.encoder)
    yield from norm("encoder.layer_norm", codec.encoder_norm)
    if codec.config.pool != 1:
        yield "encoder.down_sample_layer.0.weight", codec.pool_conv
        yield from norm("encoder.down_sample_norm", codec.pool_norm)
    for i, book in enumerate(codec.codebooks.books):
        yield f"encoder.quantizer.vq.layers.{i}._codebook.embed", book
    yield from stack("decoder.layers", codec.decoder)
    yield from norm("decoder.layer_norm", codec.decoder_norm)
    for name, conv in (("dconv1", codec.unpool), ("dconv2", codec.to_mel)):
        if conv is not None:
            yield from pair(f"decoder.{name}.conv", conv.weight, conv.bias)
            yield from pair(f"decoder.{name}.norm", conv.norm_weight, conv.norm_bias)
    yield from of(codec.vocoder_in, "decoder.vocoder.embeddings")
    yield from stack("decoder.vocoder.layers", codec.vocoder)
    yield from norm("decoder.vocoder.layer_norm", codec.vocoder_norm)
    yield from of(codec.vocoder_out, "decoder.vocoder.head.out")
    yield "decoder.vocoder.head.istft.window", codec.window


def _stack_steps(prefix: str, stack: CodecStack, x: Tensor) -> Named:
    for i, out in enumerate(stack.outputs(x, stack.attend_to_all(x))):
        yield f"{prefix}.{i}", out


def _encode_steps(codec: CodecNetwork, wav: Tensor) -> Named:
    """The results of encoding a waveform, layer by layer, in segments."""
    mel = log_mel(wav.to(codec.device), codec.config)
    for part in mel.split(codec.encode_segment):
        yield "the log-mel spectrogram", part
        x = codec.convolved(part, padded=False)
        yield "encoder.conv2", x
        yield from _stack_steps("encoder.layers", codec.encoder, x)
        yield "encoder.quantizer", codec.encode_mel(part)


def _decode_steps(codec: CodecNetwork, codes: Tensor) -> Named:
    """The results of decoding codes [n, T] in one shot, layer by layer, in segments."""
    for part in codes.split(codec.decode_segment, dim=1):
        x = codec.dequantize(part)
        yield "encoder.quantizer", x
        x = x.to(codec.dtype)
        if codec.unpool is not None:
            x = codec.unpool(x)
            yield "decoder.dconv1", x
        yield from _stack_steps("decoder.layers", codec.decoder, x)
        mel = codec.to_mel(codec.decoder_norm(codec.decoder(x)))
        yield "decoder.dconv2", mel
        x = matmul(mel, codec.vocoder_in)
        yield "decoder.vocoder.embeddings", x
        yield from _stack_steps("decoder.vocoder.layers", codec.vocoder, x)
        yield (
            "decoder.vocoder.head",
            matmul(codec.vocoder_norm(codec.vocoder(x)), codec.vocoder_out),
        )
