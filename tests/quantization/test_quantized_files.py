"""Quantized checkpoints: sizes, files, and what a model is built from."""

import json
import math
from importlib.resources import files

import pytest
import torch
from helpers import KIT, gaussian, kit_config, refuses, source_of
from safetensors.torch import load_file

from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.product import Weight, matmul
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization import (
    QuantizationConfig,
    checkpoint_bytes,
    quantize,
    quantize_checkpoint,
    relative_error,
    stored_formats,
    stored_shapes,
)
from mimo_fast.quantization.formats import CONFIG_KEY

LM = KIT / "checkpoint/lm"


def published() -> LMConfig:
    return LMConfig.from_dict(read_json(files("mimo_fast") / "presets/7b-lm.json"))


def test_size_at_the_published_dimensions():
    assert checkpoint_bytes(published(), QuantizationConfig.parse("int4")) <= 5.2e9
    dense = sum(map(math.prod, lm_shapes(published()).values())) * 2
    assert checkpoint_bytes(published(), None) == dense
    int8 = checkpoint_bytes(published(), QuantizationConfig.parse("int8"))
    assert 0.5 * dense < int8 < 0.6 * dense


EVERY_PART = {"backbone": "int4-sym-g32", "lm_head": "nf4", "text_embeddings": "int4-g64"}
EVERY_PART |= {"patch_decoder": "int8-g128", "patch_encoder": "int4"}
CHOICES = {"int4": "int4", "int8": "int8", "nf4": "nf4", "every part": EVERY_PART}


@pytest.fixture(scope="module", params=CHOICES)
def written(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("quantized") / "lm"
    chosen = CHOICES[request.param]
    return chosen, target, quantize_checkpoint(LM, target, chosen, progress=False)


def test_a_checkpoint_survives_the_disk_bit_for_bit(written):
    name, target, errors = written
    config = LMConfig.from_dict(kit_config("lm"))
    chosen, shapes = QuantizationConfig.parse(name), lm_shapes(config)
    formats = chosen.formats(shapes)
    dense, stored = open_weights(LM), load_file(target / "model.safetensors")
    assert {key: tuple(t.shape) for key, t in stored.items()} == stored_shapes(shapes, formats)
    stored_bytes = sum(tensor.nbytes for tensor in stored.values())
    assert stored_bytes == checkpoint_bytes(config, chosen, torch.float32)
    assert errors.keys() == formats.keys()
    for matrix, shape in shapes.items():
        if matrix not in formats:
            assert torch.equal(stored[matrix], dense.get(matrix))
            continue
        want = quantize(dense.get(matrix), formats[matrix])
        assert torch.equal(stored[f"{matrix}.words"], want.words)
        assert torch.equal(stored[f"{matrix}.scales"], want.scales)
        assert (want.zeros is None) or torch.equal(stored[f"{matrix}.zeros"], want.zeros)
        assert want.shape == shape
        assert errors[matrix] == pytest.approx(relative_error(dense.get(matrix), want))


def test_errors_and_formats_are_kept_in_the_config(written):
    _, target, errors = written
    raw = json.loads((target / "config.json").read_text())
    kept = raw[CONFIG_KEY]["tensors"]
    rounded = {name: round(error, 6) for name, error in errors.items()}
    assert {name: about["error"] for name, about in kept.items()} == rounded
    assert raw["hidden_size"] == kit_config("lm")["hidden_size"]
    assert 0 < max(errors.values()) < 0.12
    copied, original = (path / "tokenizer.json" for path in (target, LM))
    assert copied.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_at_load_equals_loading_quantized(written, dtype):
    name, target, _ = written
    loaded = source_of(target, dtype)
    made = source_of(LM, dtype, QuantizationConfig.parse(name))
    layer = "model.layers.0.self_attn"
    names = [f"{layer}.{part}_proj" for part in "qkv"]
    qkv = [source.weight(*names, bias=True) for source in (loaded, made)]
    assert all(isinstance(weight, QuantizedWeight) for weight in qkv)
    x = gaussian(3, 64).to(dtype)
    assert torch.equal(matmul(x, qkv[0]), matmul(x, qkv[1]))
    embeddings = "model.embed_tokens.weight"
    assert loaded(embeddings).dtype == dtype
    assert torch.equal(loaded(embeddings), made(embeddings))
    assert torch.equal(loaded("model.norm.weight"), made("model.norm.weight"))


def test_source_of_a_dense_checkpoint():
    source = source_of(LM)
    modules = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    weight = source.weight(*modules)
    assert isinstance(weight, Weight)
    blocks = [source(f"{module}.weight") for module in modules]
    assert all(torch.equal(*pair) for pair in zip(weight.blocks, blocks, strict=True))


def test_shards(tmp_path):
    quantize_checkpoint(LM, tmp_path / "a", "int4", progress=False)
    quantize_checkpoint(LM, tmp_path / "b", "int4", progress=False, shard_bytes=20_000)
    whole, shards = open_weights(tmp_path / "a"), open_weights(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert all(torch.equal(whole.get(name), shards.get(name)) for name in whole.names())


def test_quantizing_twice_is_refused(written):
    _, target, _ = written
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(target, target.parent / "again", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        source_of(target, requested=QuantizationConfig.parse("int8"))


DAMAGED = [{"version": 1, "tensors": tensors} for tensors in ([], {"a": {"format": "int3"}})]
ENTRIES = [(entry, "is unknown") for entry in ({"version": 9}, [])]
ENTRIES += [(entry, "damaged") for entry in ({"version": 1}, *DAMAGED)]


@pytest.mark.parametrize(("entry", "match"), ENTRIES)
def test_damaged_entries_are_refused(entry, match):
    refuses(match, stored_formats, {CONFIG_KEY: entry}, "config.json", kind=CheckpointError)
