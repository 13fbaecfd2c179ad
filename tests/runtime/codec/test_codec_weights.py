"""The codec's weights: quantized at load, and the encoder's kept in host memory."""

from functools import partial

import pytest
import torch
from helpers import snr_db, write_pair

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.quantization import (
    Format,
    QuantizationConfig,
    WeightSource,
    quantize,
    quantize_checkpoint,
)
from mimo_fast.runtime.codec.layers import CodecStack, LayerByLayer
from mimo_fast.runtime.codec.offload import HostLayers

WIDE_ENOUGH = {"decoder_ffn_dim": 256, "encoder_ffn_dim": 256, "d_model": 128}
"""Every matrix has whole groups of 32 columns."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), {}, WIDE_ENOUGH)


def matrices_of(codec):
    layers = [*codec.encoder.layers, *codec.decoder.layers, *codec.vocoder.layers]
    return [matrix for each in layers for matrix in (each.qkv, each.out, each.up, each.down)]


def test_an_int8_codec_is_the_dense_one_up_to_rounding(pair):
    dense = mimo_fast.load(*pair, device="cpu").codec
    codec = mimo_fast.load(*pair, device="cpu", quantization={"codec": "int8"}).codec
    for matrix in matrices_of(codec):
        assert isinstance(matrix, QuantizedWeight)
        assert matrix.bits == 8
    assert torch.equal(codec.codebooks.table, dense.codebooks.table)
    assert codec.codebooks.table.dtype == torch.float32
    want = dense.decoder.layers[0].qkv
    rows = torch.cat([dequantize(quantize(block, Format.parse("int8"))) for block in want.blocks])
    torch.testing.assert_close(dequantize(codec.decoder.layers[0].qkv), rows)
    q_bias, k_bias, v_bias = codec.decoder.layers[0].qkv.bias.chunk(3)
    assert torch.equal(q_bias.float(), want.biases[0])
    assert torch.equal(v_bias.float(), want.biases[2])
    assert not k_bias.any()
    codes = torch.stack([torch.arange(60) % size for size in codec.config.codebook_sizes[:8]])
    assert 15 < snr_db(codec.decode(codes), dense.decode(codes)) < 60
    stream = codec.stream(moments=codec.moments(codes)).finish(codes)
    assert snr_db(stream, codec.decode(codes)) > 80


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_named_choices_leave_the_codec_dense(pair, name):
    codec = mimo_fast.load(*pair, device="cpu", quantization=name).codec
    assert all(isinstance(matrix, Weight) for matrix in matrices_of(codec))


def test_a_quantized_language_model_takes_a_quantized_codec(pair, tmp_path):
    quantize_checkpoint(pair[0], tmp_path, "int8", progress=False)
    load = partial(mimo_fast.load, tmp_path, pair[1], device="cpu")
    codec = load(quantization={"codec": "int8"}).codec
    assert isinstance(codec.decoder.layers[0].up, QuantizedWeight)
    with pytest.raises(mimo_fast.MimoFastError, match="quantized already"):
        load(quantization="int8")


def test_the_codec_is_a_part():
    chosen = QuantizationConfig.parse({"codec": "int8"})
    assert chosen == QuantizationConfig(codec=Format.parse("int8"))
    assert chosen.format_of("decoder.vocoder.layers.3.fc1.weight", (64, 32)) == Format.parse("int8")
    assert chosen.format_of("decoder.vocoder.embeddings.weight", (64, 32)) is None
    assert chosen.format_of("model.layers.0.mlp.up_proj.weight", (64, 32)) is None


def test_a_key_without_a_bias_joins_the_others():
    tensors = {f"{part}.weight": torch.randn(4, 32) for part in "qkv"}
    tensors |= {f"{part}.bias": torch.randn(4) for part in "qv"}
    bias = (True, False, True)
    dense = WeightSource(tensors.__getitem__, torch.float32).weight(*"qkv", bias=bias)
    assert isinstance(dense, Weight)
    assert dense.biases[1] is None
    requested = QuantizationConfig(codec=Format.parse("int8"))
    named = {f"encoder.layers.0.{name}": tensor for name, tensor in tensors.items()}
    source = WeightSource(named.__getitem__, torch.float32, requested=requested)
    packed = source.weight(*(f"encoder.layers.0.{part}" for part in "qkv"), bias=bias)
    assert isinstance(packed, QuantizedWeight)
    assert packed.shape == (12, 32)
    torch.testing.assert_close(packed.bias[:4].float(), tensors["q.bias"])
    assert not packed.bias[4:8].any()


@pytest.mark.parametrize("quantization", [None, {"codec": "int8"}])
def test_an_encoder_in_host_memory_encodes_the_same(pair, audio, quantization, monkeypatch):
    # A native call, with other rounding, takes layers that stay where they are.
    monkeypatch.setattr(CodecStack, "executor", property(LayerByLayer))
    codec = mimo_fast.load(*pair, device="cpu", quantization=quantization).codec
    wav = load_audio(audio[0], codec.sample_rate)
    want = codec.encode_mel(mel := log_mel(wav, codec.config))
    codes = codec.encode(wav)
    codec.offload_encoder()
    assert isinstance(codec.encoder.layers, HostLayers)
    assert torch.equal(codec.encode_mel(mel), want)
    assert torch.equal(codec.encode(wav), codes)
    layers = codec.encoder.layers
    codec.offload_encoder()
    assert codec.encoder.layers is layers


def test_a_layer_is_on_the_device_only_while_it_runs(model):
    """The meta device stands for a GPU."""
    host = HostLayers((*model.codec.encoder.layers,), torch.device("cpu"))
    away = HostLayers((*model.codec.encoder.layers,), torch.device("meta"))
    assert len(host) == len(away) == len(model.codec.encoder.layers)
    for here, there, want in zip(host, away, model.codec.encoder.layers, strict=True):
        assert there.up.blocks[0].device.type == "meta"
        assert there.attention_norm.bias.device.type == "meta"
        assert torch.equal(here.qkv.blocks[1], want.qkv.blocks[1])
        assert here.qkv.biases[1] is None
