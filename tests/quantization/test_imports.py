"""Import of GPTQ checkpoints, and what every import refuses."""

import json
import shutil

import pytest
import torch
from helpers import KIT, fault, kit_config, refuses, seeded, source_of
from safetensors.torch import load_file, save_file

from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.quantization import (
    from_gptq,
    import_checkpoint,
    quantize_checkpoint,
    stored_formats,
    stored_shapes,
)
from mimo_fast.runtime.loading import open_lm

IN_ACTIVATION_ORDER = "model.layers.1.mlp.down_proj.weight"
GPTQ = {"quant_method": "gptq", "bits": 4}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4}
BITSANDBYTES = {"quant_method": "bitsandbytes"}


def gptq_layer(n: int, k: int, group: int, *, v1: bool, order: list[int] | None = None):
    """A layer packed one integer at a time, independently of our code, and its values."""
    rng = seeded(0)
    q = torch.randint(16, (n, k), generator=rng)
    zeros = torch.randint(1, 16, (k // group, n), generator=rng)
    scales = (torch.rand(k // group, n, generator=rng) * 0.01 + 0.001).half()
    g_idx = order or [i // group for i in range(k)]

    def word(nibbles):
        value = sum(int(nibble) * 16**i for i, nibble in enumerate(nibbles))
        return value - 2**32 if value >= 2**31 else value

    kept = zeros - 1 if v1 else zeros
    weights = [[word(q[j, i : i + 8]) for j in range(n)] for i in range(0, k, 8)]
    packed_zeros = [[word(row[j : j + 8]) for j in range(0, n, 8)] for row in kept]
    layer = {"qweight": weights, "qzeros": packed_zeros, "g_idx": g_idx}
    layer = {name: torch.tensor(values, dtype=torch.int32) for name, values in layer.items()}
    layer["scales"] = scales
    wide = scales.float()

    def value(j, i):
        return float(wide[g_idx[i], j]) * int(q[j, i] - zeros[g_idx[i], j])

    want = torch.tensor([[value(j, i) for i in range(k)] for j in range(n)])
    return layer, want


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize("shape", [(16, 128, 32), (8, 128, 64), (8, 256, 128), (8, 256, 256)])
def test_gptq_values_are_kept_exactly(v1, shape):
    layer, want = gptq_layer(*shape, v1=v1)
    imported = from_gptq(**layer, v1=v1)
    assert isinstance(imported, QuantizedWeight)
    assert torch.equal(dequantize(imported), want)


IN_ORDER = (torch.randperm(128, generator=seeded(3)) // 32).tolist()


@pytest.mark.parametrize(("k", "group", "order"), [(64, 16, None), (128, 32, IN_ORDER)])
def test_gptq_with_no_format_of_ours_is_unpacked_exactly(k, group, order):
    layer, want = gptq_layer(8, k, group, v1=True, order=order)
    imported = from_gptq(**layer)
    assert isinstance(imported, torch.Tensor)
    assert torch.equal(imported, want)


def test_gptq_tensors_that_do_not_fit_are_refused():
    layer, _ = gptq_layer(16, 64, 32, v1=True)
    with pytest.raises(CheckpointError, match="4-bit GPTQ"):
        from_gptq(layer["qweight"], layer["qzeros"], layer["scales"][:, :8])
    refuses("g_idx", from_gptq, **layer | {"g_idx": layer["g_idx"] + 1}, kind=CheckpointError)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The kit's checkpoint with a GPTQ backbone, one matrix of it in activation order."""
    directory = tmp_path_factory.mktemp("gptq")
    tensors, want = load_file(KIT / "checkpoint/lm" / "model.safetensors"), {}
    for name in [n for n in tensors if n.startswith("model.layers.") and n.endswith("proj.weight")]:
        n, k = tensors.pop(name).shape
        order = [i % (k // 32) for i in range(k)] if name == IN_ACTIVATION_ORDER else None
        layer, want[name] = gptq_layer(n, k, 32, v1=True, order=order)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in layer.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(KIT / "checkpoint/lm" / "tokenizer.json", directory)
    return directory, want


@pytest.fixture
def write_config(packed):
    """Says in config.json how the checkpoint was quantized."""

    def write(about, **changed):
        raw = kit_config("lm") | changed | {"quantization_config": about}
        (packed[0] / "config.json").write_text(json.dumps(raw))
        return packed[0]

    return write


@pytest.mark.parametrize("about", [GPTQ, AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}])
def test_gptq_checkpoint(tmp_path, packed, write_config, about):
    want = packed[1]
    source, target = write_config(about), tmp_path / "out"
    errors = import_checkpoint(source, target, {"lm_head": "int8"}, progress=False)
    assert list(errors) == ["lm_head.weight"]
    source, config = source_of(target), read_json(target / "config.json")
    assert "quantization_config" not in config
    shapes = stored_shapes(lm_shapes(LMConfig.from_dict(config)), stored_formats(config, ""))
    assert open_weights(target).names() == shapes.keys()
    for name, values in want.items():
        weight = source.weight(name.removesuffix(".weight"))
        if name == IN_ACTIVATION_ORDER:
            assert torch.equal(weight.blocks[0], values)
        else:
            assert torch.equal(dequantize(weight), values)


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({}, "by None"),
        (None, "by None"),
        ({"quant_method": "awq", "bits": 4}, "by 'awq'"),
        (GPTQ | {"bits": 8}, "in 4 bits, and config.json says 8"),
        (GPTQ | {"group_size": 64}, "groups"),
        (GPTQ | {"checkpoint_format": "marlin"}, "gptq and gptq_v2"),
        (GPTQ | {"sym": True}, "symmetric"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8_static"}, "only GPTQ"),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, "only GPTQ"),
        (BITSANDBYTES | {"load_in_8bit": True}, "8-bit"),
        (BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ],
)
def test_other_quantized_checkpoints_are_refused(tmp_path, write_config, about, match):
    source = write_config(about)
    assert match in fault(lambda: import_checkpoint(source, tmp_path / "out", progress=False))


def test_a_checkpoint_to_import_is_neither_loaded_nor_quantized(tmp_path, write_config):
    source = write_config(GPTQ)
    assert "mimo-fast quantize" in fault(lambda: open_lm(source))
    target = tmp_path / "out"
    assert "import_checkpoint" in fault(lambda: quantize_checkpoint(source, target, "int4"))


def test_tensors_of_another_model_are_refused(tmp_path, write_config):
    source = write_config(GPTQ, intermediate_size=160)
    assert "gate_proj" in fault(lambda: import_checkpoint(source, tmp_path / "out", progress=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16])
def test_scales_of_a_type_that_no_kernel_takes_are_refused(tmp_path, packed, dtype):
    tensors = load_file(packed[0] / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.scales"
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = kit_config("lm") | {"quantization_config": GPTQ}
    (source / "config.json").write_text(json.dumps(config))
    message = fault(lambda: import_checkpoint(source, target, progress=False))
    assert f"o_proj.weight.scales is of type {dtype}" in message
    assert not target.exists()
