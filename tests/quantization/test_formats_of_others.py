"""Checkpoints as other tools write them (tests/golden/formats), against the values that those tools
unpack them to."""

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import KIT, KIT_PAIR, fault, refuses, seeded, source_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import mimo_fast
from mimo_fast.checkpoint.files import find_checkpoint, open_weights
from mimo_fast.checkpoint.gguf import GGUF, TYPES
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.cli.main import main
from mimo_fast.config import LMConfig, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.quantization import (
    from_gptq,
    import_checkpoint,
    integers,
    stored_formats,
    stored_shapes,
)
from mimo_fast.quantization.gguf import _unpacked
from mimo_fast.quantization.integers import Integers, stream_bits, unpack_stream
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.loading import open_lm

FORMS = KIT / "formats"
BASE = FORMS / "base"
WEIGHTS, VALUES = "model.safetensors", "values.safetensors"

KEPT = {
    "autoround": {"int4-g32": 8, "int8": 13, "int8-g32": 1},
    "autoround-asym": {"int4-g32": 15, "int4-g64": 4, "int8": 2},
    "autoround-gptq": {"int4-g32": 23},
    "gptqmodel": {"int4-g32": 21},
    "gptqmodel-v2": {},
    "ct-w4a16": {"int4-sym-g32": 7, "int4-g32": 14, "int8": 5},
    "ct-activation-order": {},
    "ct-int8": {"int8": 7},
    "ct-fp8": {},
    "fp8": {},
    "gguf": {"int8-g32": 1, "int4-sym-g32": 3, "int8": 1},
}
"""How many matrices of each form stay packed, and in which of ours."""

SCALED = ["ct-fp8", "ct-int8", "fp8"]
"""Forms that quantize activations too."""


@pytest.fixture(scope="module", params=KEPT)
def outcome(request, tmp_path_factory):
    """The name of a form, what it became with nothing rounded, and what was said about it."""
    form, folder = request.param, tmp_path_factory.mktemp(request.param)
    source = folder / "in"
    shutil.copytree(BASE if form == "gguf" else FORMS / form, source)
    write_config(source, torch_dtype="float32")
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        assert converted(form, source, folder / "out") == {}
    said = [str(each.message) for each in remarks if each.category is UserWarning]
    return form, folder / "out", said


def converted(form: str, source: Path, target: Path, **options: object) -> dict[str, float]:
    if form == "gguf":
        source, options = FORMS / "gguf/backbone.gguf", options | {"speech_from": source}
    return import_checkpoint(source, target, progress=False, **options)


def write_config(folder: Path, **changed: object) -> None:
    raw = read_json(folder / "config.json") | changed
    (folder / "config.json").write_text(json.dumps(raw))


def altered(form: str, directory: Path, config: dict[str, object] | None = None, **changed: object):
    """A copy of a form with tensors changed, removed where None, and its quantization_config."""
    directory.mkdir()
    tensors = load_file(FORMS / form / WEIGHTS)
    for name, value in changed.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(FORMS / form / "config.json", directory)
    about = read_json(FORMS / form / "config.json")["quantization_config"]
    write_config(directory, quantization_config=about | (config or {}))
    return directory


def test_values_are_those_of_the_tool(outcome):
    form, target, _ = outcome
    config = read_json(target / "config.json")
    shapes, formats = lm_shapes(LMConfig.from_dict(config)), stored_formats(config, "")
    assert open_weights(target).names() == stored_shapes(shapes, formats).keys()
    kept = [str(chosen) for chosen in formats.values()]
    assert {name: kept.count(name) for name in kept} == KEPT[form]
    values, base = (load_file(FORMS / each) for each in (f"{form}/{VALUES}", f"base/{WEIGHTS}"))
    source = source_of(target)
    for name in shapes:
        want = values.get(name, base[name])
        assert torch.equal(source(name).to(want.dtype), want), name


@pytest.mark.parametrize("form", ["autoround-asym", "gptqmodel", "ct-w4a16", "gguf"])
def test_rows_at_a_time_change_nothing(tmp_path, monkeypatch, form):
    source = BASE if form == "gguf" else FORMS / form
    converted(form, source, tmp_path / "whole")
    monkeypatch.setattr(integers, "UNPACKED_AT_ONCE", 7 * 64)
    converted(form, source, tmp_path / "parts")
    whole, parts = (load_file(tmp_path / each / WEIGHTS) for each in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_model_is_made_of_it(outcome):
    config, _, stored = open_lm(outcome[1])
    LM(config, 0, source_of(outcome[1]))
    assert len(stored) == sum(KEPT[outcome[0]].values())


def test_activations_that_stay_as_they_are_get_a_remark(outcome):
    form, _, said = outcome
    assert len(said) == (form in SCALED)
    assert all("is not applied" in remark and "\n" not in remark for remark in said)


@pytest.mark.parametrize("form", ["autoround-asym", "gptqmodel", "gguf"])
def test_what_is_unpacked_is_rounded_once_to_the_type_of_the_config(tmp_path, form):
    source = BASE if form == "gguf" else FORMS / form
    exact = tmp_path / "exact"
    shutil.copytree(source, exact)
    write_config(exact, torch_dtype="float32")
    for folder in (source, exact):
        converted(form, folder, tmp_path / f"from-{folder.name}")
    got, want = (open_weights(tmp_path / f"from-{folder.name}") for folder in (source, exact))
    unpacked = [name for name in got.names() if want.dtype(name) == torch.float32]
    unpacked = [name for name in unpacked if got.dtype(name) == torch.bfloat16]
    assert unpacked
    for name in unpacked:
        assert torch.equal(got.get(name), want.get(name).bfloat16())


def test_k_quants():
    file, values = (
        GGUF(FORMS / "gguf-k/blocks.gguf"),
        load_file(FORMS / "gguf-k/values.safetensors"),
    )
    assert file.tensors.keys() == {"Q4_K", "Q5_K", "Q6_K"}
    for kind, want in values.items():
        got = _unpacked(kind, file.blocks(kind)).view(want.shape)
        assert torch.equal(got, want.float()), kind


def test_what_is_unpacked_is_quantized_if_asked(tmp_path):
    chosen, target = {"backbone": "int8"}, tmp_path / "out"
    with pytest.warns(UserWarning, match="not applied"):
        errors = converted("ct-fp8", FORMS / "ct-fp8", target, quantization=chosen)
    values, source = load_file(FORMS / "ct-fp8" / VALUES), source_of(target)
    assert errors.keys() == {name for name in values if name.startswith("model.layers.")}
    for name, error in errors.items():
        found = (source(name) - values[name].float()).norm() / values[name].float().norm()
        assert 0 < error < 0.02
        assert float(found) == pytest.approx(error, rel=0.2)


# What the fixtures do not have.


def stream(values: list[int], bits: int) -> list[int]:
    """Words of int32, made with Python's integers."""
    total = sum(value << bits * i for i, value in enumerate(values))
    words = [total >> 32 * i & 0xFFFFFFFF for i in range(-(-len(values) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [32, 40, 96])
def test_streams_of_bits(bits, count):
    values = torch.randint(2**bits, (3, count), generator=seeded(bits))
    words = torch.tensor([stream(row.tolist(), bits) for row in values], dtype=torch.int32)
    assert torch.equal(unpack_stream(words, bits)[:, :count].long(), values)
    assert stream_bits(words.shape[1], count) == bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("own_zeros", [False, True])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_integers_keep_their_values(bits, own_zeros, size):
    rng = seeded(bits)
    q = torch.randint(2**bits, (8, 256), generator=rng, dtype=torch.int32)
    # AutoRound's symmetric scales have either sign.
    scales = torch.randn(8, 256 // size, generator=rng).half()
    zeros = torch.randint(2**bits, scales.shape, generator=rng, dtype=torch.int32)
    zeros = zeros if own_zeros else None
    layout = Integers(bits, 256, size, zeros=own_zeros, middle=not own_zeros, in_order=True)
    got = layout.converted(q, scales, zeros)
    middle = 2 ** (bits - 1) if zeros is None else zeros.repeat_interleave(size, dim=1)
    want = scales.float().repeat_interleave(size, dim=1) * (q - middle).float()
    assert isinstance(got, QuantizedWeight) == (bits < 8 or not own_zeros)
    assert torch.equal(dequantize(got) if isinstance(got, QuantizedWeight) else got, want)


def test_a_last_group_that_is_shorter():
    """AutoRound pads it, and writes no g_idx."""
    rng = seeded(0)
    q = torch.randint(16, (32, 96), generator=rng)
    words = torch.tensor([stream(row.tolist(), 4) for row in q], dtype=torch.int32).T
    zeros = torch.full((2, 4), 0x77777777, dtype=torch.int32)
    scales = torch.rand(2, 32, generator=rng).half()
    got = from_gptq(words, zeros, scales, group_size=64)
    assert isinstance(got, Tensor)
    groups = torch.arange(96) // 64
    assert torch.equal(got, scales.T.float()[:, groups] * (q - 8).float())


@pytest.mark.parametrize("empty", [True, False])
def test_a_bias_of_a_layer_that_has_none(tmp_path, empty):
    """Some versions of AutoGPTQ give one of zeros to every layer."""
    bias = torch.zeros(64) if empty else torch.ones(64)
    source = altered("gptqmodel", tmp_path / "in", **{"model.layers.0.mlp.up_proj.bias": bias})
    if empty:
        import_checkpoint(source, tmp_path / "out", progress=False)
        assert "model.layers.0.mlp.up_proj.bias" not in open_weights(tmp_path / "out").names()
    else:
        message = fault(lambda: import_checkpoint(source, tmp_path / "out", progress=False))
        assert "1 unexpected (model.layers.0.mlp.up_proj.bias)" in message


def test_tensors_of_nothing_are_refused(tmp_path):
    for form in ("autoround", "ct-w4a16", "fp8"):
        more = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
        source = altered(form, tmp_path / form, **more)
        message = fault(lambda source=source: import_checkpoint(source, tmp_path / "out"))
        assert "1 unexpected (model.layers.0.mlp.up_proj.lora_A.weight)" in message
        assert not (tmp_path / "out").exists()


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.filterwarnings("ignore:.*activations")
@pytest.mark.parametrize(
    ("form", "config", "changed", "match"),
    [
        ("ct-w4a16", {"format": "nvfp4-pack-quantized"}, {}, "'nvfp4-pack-quantized'"),
        ("ct-w4a16", {"transform_config": {"config_groups": {}}}, {}, "rotated"),
        ("ct-w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparse"),
        ("ct-w4a16", {}, {f"{UP}.weight_shape": torch.tensor([64, 96])}, "up_proj"),
        ("ct-w4a16", {}, {f"{UP}.weight_scale": torch.ones(64, 3)}, "equal size"),
        ("ct-w4a16", {}, {f"{UP}.weight_scale": None}, "weight_scale"),
        ("ct-int8", {}, {f"{UP}.weight_scale": torch.full((64, 1), torch.nan)}, "NaN"),
        ("ct-fp8", {}, {f"{UP}.weight_scale": None}, "has no scale"),
        ("fp8", {}, {f"{UP}.weight_scale_inv": torch.ones(3, 3)}, "no block"),
        ("fp8", {}, {f"{UP}.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}, "uint8"),
        ("autoround", {"packing_format": "auto_round"}, {}, "'sym'"),
        ("autoround-gptq", {"checkpoint_format": "gptq_p"}, {}, "gptq and gptq_v2"),
        ("autoround-gptq", {}, {f"{UP}.qweight": torch.zeros(8, 64)}, "up_proj|GPTQ layer"),
    ],
)  # fmt: skip
def test_forms_that_are_refused(tmp_path, form, config, changed, match):
    source = altered(form, tmp_path / "in", config, **changed)
    with pytest.raises(CheckpointError, match=match) as caught:
        import_checkpoint(source, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*activations")
@pytest.mark.parametrize("form", ["autoround-asym", "ct-w4a16", "ct-int8", "ct-fp8", "fp8"])
def test_spoiled_parts_are_explained(tmp_path, form):
    """Every kind of part of one layer, of other shapes and types."""
    stem = "local_transformer.layers.0.mlp.up_proj."
    parts = load_file(FORMS / form / WEIGHTS)
    for i, name in enumerate(name for name in parts if name.startswith(stem)):
        part = parts[name]
        spoiled = [part.reshape(-1), part[:0], part.repeat(2, *[1] * (part.ndim - 1)), None]
        for j, other in enumerate([*spoiled, part.to(torch.int16), part.to(torch.float64)]):
            source, target = altered(form, tmp_path / f"{i}-{j}", **{name: other}), tmp_path / "out"
            with contextlib.suppress(CheckpointError):
                import_checkpoint(source, target, progress=False)
                # Zeros and a shape may be left out: they are the middle and config.json's then.
                assert name.endswith(("zero_point", "shape", "input_scale")) or j == 0
                shutil.rmtree(target)
            assert not target.exists()


# GGUF.


def test_a_gguf_file_needs_its_speech_parts(tmp_path):
    path, target = FORMS / "gguf/backbone.gguf", tmp_path / "out"
    assert "--speech-from DIR" in fault(lambda: import_checkpoint(path, target))
    assert "--speech-from DIR" in fault(lambda: find_checkpoint(path))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(path, folder)
    shutil.copy(BASE / "config.json", folder)
    assert "--speech-from DIR" in fault(lambda: find_checkpoint(folder))
    refuses("belongs to a GGUF", import_checkpoint, FORMS / "fp8", target, speech_from=BASE)
    quantized = FORMS / "fp8"
    assert "is quantized" in fault(lambda: import_checkpoint(path, target, speech_from=quantized))
    kit = KIT / "checkpoint/lm"
    assert "block_count" in fault(lambda: import_checkpoint(path, target, speech_from=kit))
    assert not target.exists()


def test_other_gguf_files_are_refused(tmp_path):
    data = (FORMS / "gguf/backbone.gguf").read_bytes()
    path = tmp_path / "a.gguf"

    def message(changed: bytes) -> str:
        path.write_bytes(changed)
        return fault(lambda: import_checkpoint(path, tmp_path / "out", speech_from=BASE))

    assert "there is no file" in fault(lambda: GGUF(tmp_path / "none.gguf"))
    assert "'llama'" in message(data.replace(b"qwen2", b"llama", 1))
    assert "rope.freq_base" in message(data.replace(b"rope.freq_base", b"rope.freq_bass"))
    assert "tensors that the backbone lacks (blk.0.attn_x" in message(
        data.replace(b"attn_q.w", b"attn_x.w")
    )
    for size in (0, 3, 20, 100, len(data) // 8, len(data) - 5000):
        assert "cut short" in message(data[:size])
    # A type that is not read: Q2_K, in the header of the first matrix.
    place = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    assert data[place] == 8
    assert "type 10, which is not read: quantize to one of F32" in message(
        data[:place] + bytes([10]) + data[place + 1 :]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_damaged_gguf_files_are_explained(tmp_path):
    data, rng = bytearray((FORMS / "gguf/backbone.gguf").read_bytes()), seeded(0)
    headers = data.index(b"output_norm") + 500
    path, imports = tmp_path / "a.gguf", 0
    for i in range(200):
        changed = bytearray(data)
        place = int(torch.randint(headers, (), generator=rng))
        changed[place] = int(torch.randint(256, (), generator=rng))
        path.write_bytes(changed)
        target = tmp_path / f"out{i}"
        with contextlib.suppress(CheckpointError):
            import_checkpoint(path, target, speech_from=BASE, progress=False)
            imports += 1
    assert len([*tmp_path.glob("out*")]) == imports
    assert 0 < imports < 200


def test_blocks_have_the_sizes_of_their_types():
    file = GGUF(FORMS / "gguf/backbone.gguf")
    kinds = {stored.type.name for stored in file.tensors.values()}
    assert kinds | {"Q4_K", "Q5_K", "Q6_K"} == {each.name for each in TYPES.values()}
    assert file.metadata["general.architecture"] == "qwen2"


# The command.


def test_from_the_command_line(tmp_path, capsys):
    path, out = str(FORMS / "gguf/backbone.gguf"), [str(tmp_path / name) for name in "abcd"]
    assert main(["quantize", path, out[0], "--speech-from", str(BASE)]) == 0
    assert "GB, was" in capsys.readouterr().err
    assert main(["quantize", path, out[1]]) == 1
    assert "--speech-from DIR" in capsys.readouterr().err
    assert main(["quantize", str(FORMS / "fp8"), out[2]]) == 0
    said = capsys.readouterr()
    assert "is not applied" in said.err
    # An import keeps its values unless a format is asked for.
    assert said.out == ""
    assert main(["quantize", str(FORMS / "fp8"), out[3], "--format", "int8"]) == 0
    assert "model.layers.0.mlp.up_proj.weight" in capsys.readouterr().out
    assert stored_formats(read_json(tmp_path / "c/config.json"), "") == {}
    assert stored_formats(read_json(tmp_path / "d/config.json"), "")


def test_a_model_of_which_all_matrices_were_quantized_speaks(tmp_path):
    """The kit's, in int8 by row as compressed-tensors stores it, speech parts and tables too."""
    tensors = load_file(KIT_PAIR[0] / WEIGHTS)
    for name in [name for name in tensors if tensors[name].ndim == 2]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors[name.removesuffix("weight") + "weight_scale"] = scale
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
    lm = tmp_path / "in"
    shutil.copytree(KIT_PAIR[0], lm, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(tensors, lm / WEIGHTS, metadata={"format": "pt"})
    about = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
    write_config(lm, quantization_config=about)
    import_checkpoint(lm, tmp_path / "out", progress=False)
    formats = stored_formats(read_json(tmp_path / "out/config.json"), "")
    # Those of the patch encoder, of 48 columns, have no form of ours.
    wide = {name for name, tensor in tensors.items()
            if tensor.dtype == torch.int8 and tensor.shape[1] % 32 == 0}  # fmt: skip
    assert formats.keys() == wide
    assert {"speech_group_downcast.weight", "local_transformer_lm_heads.0.weight"} <= wide
    model = mimo_fast.load(tmp_path / "out", KIT_PAIR[1], device="cpu")
    chunks = [*model.stream("tts", "Hi.", seed=1, max_new_tokens=6)]
    assert sum(len(chunk.audio) for chunk in chunks)
