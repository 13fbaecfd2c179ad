"""Import of GPTQ checkpoints, and what every import refuses."""

import json
import shutil

import pytest
import torch
from helpers import KIT, fault, kit_config, source_of
from safetensors.torch import load_file, save_file

from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig
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


def gptq_layer(
    n: int, k: int, group: int, *, v1: bool, order: list[int] | None = None, seed: int = 0
):
    """A layer packed one integer at a time, and its values: an implementation that shares nothing
    with ours."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(16, (n, k), generator=generator)
    zeros = torch.randint(1, 16, (k // group, n), generator=generator)
    scales = (torch.rand(k // group, n, generator=generator) * 0.01 + 0.001).half()
    g_idx = order or [i // group for i in range(k)]

    def word(nibbles):
        value = sum(int(nibble) * 16**i for i, nibble in enumerate(nibbles))
        return value - 2**32 if value >= 2**31 else value

    kept = zeros - 1 if v1 else zeros
    layer = {
        "qweight": torch.tensor(
            [[word(q[j, i : i + 8]) for j in range(n)] for i in range(0, k, 8)], dtype=torch.int32
        ),
        "qzeros": torch.tensor(
            [[word(row[j : j + 8]) for j in range(0, n, 8)] for row in kept], dtype=torch.int32
        ),
        "scales": scales,
        "g_idx": torch.tensor(g_idx, dtype=torch.int32),
    }
    wide = scales.float()
    want = torch.tensor(
        [
            [float(wide[g_idx[i], j]) * int(q[j, i] - zeros[g_idx[i], j]) for i in range(k)]
            for j in range(n)
        ]
    )
    return layer, want


@pytest.mark.parametrize("v1", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(16, 128, 32), (8, 128, 64), (8, 256, 128), (8, 256, 256)]
)
def test_gptq_values_are_kept_exactly(v1, n, k, group):
    layer, want = gptq_layer(n, k, group, v1=v1)
    imported = from_gptq(**layer, v1=v1)
    assert isinstance(imported, QuantizedWeight)
    assert torch.equal(dequantize(imported), want)


def test_gptq_in_activation_order_is_unpacked_exactly():
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3)) // 32
    layer, want = gptq_layer(8, 128, 32, v1=True, order=order.tolist())
    imported = from_gptq(**layer)
    assert isinstance(imported, torch.Tensor)
    assert torch.equal(imported, want)


def test_gptq_with_a_group_we_lack_is_unpacked_exactly():
    layer, want = gptq_layer(8, 64, 16, v1=True)
    assert torch.equal(from_gptq(**layer), want)


def test_gptq_tensors_that_do_not_fit_are_refused():
    layer, _ = gptq_layer(16, 64, 32, v1=True)
    with pytest.raises(CheckpointError, match="4-bit GPTQ"):
        from_gptq(layer["qweight"], layer["qzeros"], layer["scales"][:, :8])
    with pytest.raises(CheckpointError, match="g_idx"):
        from_gptq(**layer | {"g_idx": layer["g_idx"] + 1})


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The kit's checkpoint with the matrices of the backbone in GPTQ form, one of them in
    activation order."""
    directory = tmp_path_factory.mktemp("gptq")
    tensors, want = load_file(KIT / "checkpoint" / "lm" / "model.safetensors"), {}
    for name in [n for n in tensors if n.startswith("model.layers.") and n.endswith("proj.weight")]:
        n, k = tensors.pop(name).shape
        order = (
            [i % (k // 32) for i in range(k)]
            if name == "model.layers.1.mlp.down_proj.weight"
            else None
        )
        layer, want[name] = gptq_layer(n, k, 32, v1=True, order=order)
        tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in layer.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(KIT / "checkpoint" / "lm" / "tokenizer.json", directory)
    return directory, want


@pytest.fixture
def write_config(packed):
    """Says in config.json how the checkpoint was quantized."""

    def write(about, **changed):
        raw = kit_config("lm") | changed | {"quantization_config": about}
        (packed[0] / "config.json").write_text(json.dumps(raw))
        return packed[0]

    return write


@pytest.mark.parametrize(
    "about",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    ],
)
def test_gptq_checkpoint(tmp_path, packed, write_config, about):
    want = packed[1]
    errors = import_checkpoint(
        write_config(about), tmp_path / "out", {"lm_head": "int8"}, progress=False
    )
    assert list(errors) == ["lm_head.weight"]
    source = source_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (
        open_weights(tmp_path / "out").names()
        == stored_shapes(lm_shapes(LMConfig.from_dict(config)), stored_formats(config, "")).keys()
    )
    for name, values in want.items():
        weight = source.weight(name.removesuffix(".weight"))
        unpacked = name == "model.layers.1.mlp.down_proj.weight"
        if unpacked:
            assert torch.equal(weight.blocks[0], values.bfloat16().float())
        else:
            assert torch.equal(dequantize(weight), values)


@pytest.mark.parametrize(
    ("about", "match"),
    [
        ({}, "by None"),
        (None, "by None"),
        ({"quant_method": "awq", "bits": 4}, "by 'awq'"),
        ({"quant_method": "gptq", "bits": 8}, "8-bit"),
        (
            {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"},
            "only GPTQ",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "fp4",
        ),
    ],
)
def test_other_quantized_checkpoints_are_refused(tmp_path, write_config, about, match):
    source = write_config(about)
    assert match in fault(lambda: import_checkpoint(source, tmp_path / "out", progress=False))


def test_a_checkpoint_to_import_is_neither_loaded_nor_quantized(tmp_path, write_config):
    source = write_config({"quant_method": "gptq", "bits": 4})
    assert "mimo-fast quantize" in fault(lambda: open_lm(source))
    assert "import_checkpoint" in fault(
        lambda: quantize_checkpoint(source, tmp_path / "out", "int4")
    )


def test_tensors_of_another_model_are_refused(tmp_path, write_config):
    source = write_config({"quant_method": "gptq", "bits": 4}, intermediate_size=160)
    assert "gate_proj" in fault(lambda: import_checkpoint(source, tmp_path / "out", progress=False))
