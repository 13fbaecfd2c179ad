"""bitsandbytes as the yardstick of the formats, and the import of its NF4 checkpoints."""

import json
import shutil
import sys

import pytest
import torch
from bitsandbytes import functional, nn
from helpers import KIT, error, fault, gaussian, kit_config, outliers, quantized, source_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.cli.main import main
from mimo_fast.config import LMConfig
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.quantization import (
    Format,
    from_bitsandbytes,
    import_checkpoint,
    stored_formats,
    stored_shapes,
)

ABOUT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def nf4(weight: Tensor, **options: object) -> Tensor:
    """weight after NF4 in blocks of 64, as bitsandbytes rounds it."""
    stored = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", **options)
    return functional.dequantize_4bit(*stored)


@pytest.mark.parametrize("make", [gaussian, outliers])
def test_nf4_is_that_of_bitsandbytes(make):
    weight = make(64, 512)
    assert torch.equal(dequantize(quantized(weight, "nf4")), nf4(weight))


@pytest.mark.parametrize("columns", [4096, 11008])
@pytest.mark.parametrize("make", [gaussian, outliers])
def test_int4_is_no_worse_than_its_nf4(make, columns):
    weight = make(128, columns)
    yardstick = float((nf4(weight) - weight).norm() / weight.norm())
    assert error(weight, "int4-g64") <= yardstick
    assert error(weight, "nf4") == pytest.approx(yardstick, rel=1e-5)
    if make is gaussian:
        assert error(weight, "int8-g128") <= 0.007
        assert error(weight, "int8") <= 0.009


def packed(weight: Tensor, size: int, nested: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Packed values and state as they are saved, and the values that they stand for."""
    about = {"blocksize": size, "quant_type": "nf4", "compress_statistics": nested}
    data, state = functional.quantize_4bit(weight, **about)
    return data, state.as_dict(packed=True), functional.dequantize_4bit(data, state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(256, 64), (256, 128), (512, 256)])
def test_values_are_kept_exactly(columns, size, nested):
    data, state, want = packed(outliers(48, columns), size, nested)
    imported = from_bitsandbytes(data, state)
    assert isinstance(imported, QuantizedWeight)
    assert imported.group == min(size, 128)
    assert torch.equal(dequantize(imported), want)


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_across_rows_are_unpacked_exactly(nested):
    data, state, want = packed(outliers(16, 96), 64, nested)
    imported = from_bitsandbytes(data, state)
    assert isinstance(imported, Tensor)
    assert torch.equal(imported, want)


def test_half_precision_models_keep_what_is_stored():
    weight = gaussian(32, 128).bfloat16()
    data, state, rounded = packed(weight, 64, True)
    got = dequantize(from_bitsandbytes(data, state))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(got.bfloat16(), rounded)


def test_tensors_that_do_not_fit_are_refused():
    data, state, _ = packed(gaussian(32, 128), 64, False)
    assert "not of one matrix" in fault(lambda: from_bitsandbytes(data[:-1], state))
    short = state | {"absmax": state["absmax"][1:]}
    assert "not of one matrix" in fault(lambda: from_bitsandbytes(data, short))
    assert "cannot read" in fault(lambda: from_bitsandbytes(data, {"absmax": state["absmax"]}))


def write_nf4(directory, nested):
    """The kit's checkpoint with linear layers but lm_head as bitsandbytes saves them."""
    directory.mkdir()
    tensors, want = load_file(KIT / "checkpoint/lm" / "model.safetensors"), {}
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = tensors.pop(name)
        about = {"bias": False, "quant_type": "nf4", "compress_statistics": nested}
        layer = nn.Linear4bit(*weight.T.shape, **about)
        layer.load_state_dict({"weight": weight})
        saved = layer.to("cpu").state_dict()
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{key}": value.clone() for key, value in saved.items()}
        want[name] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = kit_config("lm") | {"quantization_config": ABOUT}
    (directory / "config.json").write_text(json.dumps(config))
    for path in (KIT / "checkpoint/lm").glob("*token*"):
        shutil.copy(path, directory)
    return want


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint(tmp_path, nested):
    want = write_nf4(tmp_path / "in", nested)
    assert len(want) > 10
    source, target = tmp_path / "in", tmp_path / "out"
    errors = import_checkpoint(source, target, {"lm_head": "int8"}, progress=False)
    assert list(errors) == ["lm_head.weight"]
    source = source_of(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    stored = stored_formats(config, "")
    shapes = lm_shapes(LMConfig.from_dict(config))
    assert open_weights(target).names() == stored_shapes(shapes, stored).keys()
    assert set(stored.values()) == {Format("nf4", 64), Format("int8", None)}
    for name, values in want.items():
        # Blocks of narrower matrices lie across rows.
        assert (name in stored) == (values.shape[1] % 64 == 0)
        assert torch.equal(source(name), values)


def test_from_the_command_line_to_speech(tmp_path, capsys):
    write_nf4(tmp_path / "in", True)
    files = [str(tmp_path / name) for name in ("in", "out", "a.wav")]
    assert main(["quantize", *files[:2], "--format", "int8"]) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    codec = str(KIT / "checkpoint/codec")
    speak = ["tts", "Hi.", "-o", files[2], "--codec", codec, "--seed", "1"]
    assert main([*speak, "--model", files[1], "--max-tokens", "30"]) == 0
    assert main([*speak, "--model", files[0]]) == 1
    assert "mimo-fast quantize" in capsys.readouterr().err


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    write_nf4(tmp_path / "in", False)
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    source, target = tmp_path / "in", tmp_path / "out"
    assert "mimo-fast[bitsandbytes]" in fault(lambda: import_checkpoint(source, target))
    assert not (tmp_path / "out").exists()
