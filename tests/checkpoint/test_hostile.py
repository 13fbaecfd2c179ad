"""Checkpoints that somebody has changed: refused by name, before anything large happens."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KIT_PAIR, copy_tree, fault
from memory import peak_memory
from safetensors.torch import load_file, save_file

import mimo_fast
from mimo_fast.checkpoint.files import find_checkpoint, open_weights
from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.quantization import import_checkpoint, quantize_checkpoint
from mimo_fast.runtime.loading import open_codec, open_lm

MIB = 2**20

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path) -> Pair:
    """A copy of the kit's pair, to be altered."""
    for source in KIT_PAIR:
        copy_tree(source, tmp_path / source.name)
    return tmp_path / "lm", tmp_path / "codec"


def load(pair: Pair) -> mimo_fast.MimoAudio:
    return mimo_fast.load(*pair, device="cpu", max_batch=1, max_seq_len=64)


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(directory: Path, **tensors: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replaces tensors by what a function makes of them; `tensors` by name."""
    path = directory / "model.safetensors"
    held = load_file(path)
    for name, make in tensors.items():
        held[name] = make(held[name].clone())
    path.unlink()
    save_file(held, path, metadata={"format": "pt"})


COUNTS = [
    ("lm", "num_hidden_layers", "model.layers.N."),
    ("lm", "local_layers", "local_transformer.layers.N."),
    ("lm", "input_local_layers", "input_local_transformer.layers.N."),
    ("codec", "encoder_layers", "encoder.layers.N."),
    ("codec", "decoder_layers", "decoder.layers.N."),
    ("codec", "vocoder_num_layers", "decoder.vocoder.layers.N."),
    ("codec", "num_quantizers", "encoder.quantizer.vq.layers.N."),
]


class TestCounts:
    @pytest.mark.parametrize(("part", "key", "names"), COUNTS)
    def test_a_count_beyond_the_files_is_named(self, pair, part, key, names):
        configure(pair[part == "codec"], **{key: 900})
        message = fault(lambda: load(pair))
        assert f"'{key}' is 900, but the files hold" in message
        assert f"{names}*" in message

    def test_channels_beyond_the_files(self, pair):
        raw = {"audio_channels": 900, "delay_pattern": 0}
        configure(pair[0], **raw, speech_vocab_size=17, speech_zeroemb_idx=16)
        assert "'audio_channels' is 900, but the files hold 8" in fault(lambda: load(pair))

    @pytest.mark.parametrize("value", [10**9, 10**30])
    @pytest.mark.parametrize(("part", "key", "names"), COUNTS)
    def test_a_billion_fails_at_once(self, pair, part, key, names, value):
        configure(pair[part == "codec"], **{key: value})
        assert f"'{key}'" in fault(lambda: load(pair), ConfigError)

    def test_it_takes_no_memory_to_refuse(self, pair):
        configure(pair[0], num_hidden_layers=4000, intermediate_size=2**20)
        assert peak_memory(lambda: fault(lambda: load(pair))) < 64 * MIB

    @pytest.mark.parametrize("convert", [quantize_checkpoint, import_checkpoint])
    def test_conversions_count_too(self, pair, tmp_path, convert):
        gptq = {"quant_method": "gptq", "bits": 4} if convert is import_checkpoint else None
        configure(pair[0], num_hidden_layers=900, quantization_config=gptq)
        message = fault(lambda: convert(pair[0], tmp_path / "out", "int8", progress=False))
        assert "'num_hidden_layers' is 900, but the files hold 2" in message
        assert not (tmp_path / "out").exists()


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "it is a FIFO"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
    "a folder": (Path.mkdir, "it is a folder"),
    "a loop": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "a dangling link": (lambda path: path.symlink_to("nothing"), "is missing"),
}


class TestNoFiles:
    @pytest.mark.parametrize("kind", NO_FILES)
    def test_weights(self, pair, kind):
        make, says = NO_FILES[kind]
        path = pair[0] / "model.safetensors"
        path.unlink()
        make(path)
        began = time.perf_counter()
        message = fault(lambda: load(pair))
        assert time.perf_counter() - began < 60, "it waits for a writer"
        assert "model.safetensors" in message
        assert says in message

    @pytest.mark.parametrize("kind", NO_FILES)
    def test_a_shard(self, pair, kind):
        path = pair[0] / "model.safetensors"
        names = [*load_file(path)]
        path.unlink()
        NO_FILES[kind][0](pair[0] / "shard.safetensors")
        table = {"weight_map": dict.fromkeys(names, "shard.safetensors")}
        (pair[0] / "model.safetensors.index.json").write_text(json.dumps(table))
        assert "shard.safetensors" in fault(lambda: load(pair))

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("kind", NO_FILES)
    def test_json(self, pair, kind, name):
        path = pair[0] / name
        path.unlink()
        NO_FILES[kind][0](path)
        assert fault(lambda: load(pair), MimoFastError)

    @pytest.mark.parametrize("name", ["a\nb", "\0", "\x1b[2J", "a\u2028b", "é" * 128])
    def test_a_shard_with_an_unprintable_name(self, pair, name):
        (pair[0] / "model.safetensors").unlink()
        (pair[0] / "other.safetensors").touch()
        table = {"weight_map": {"model.norm.weight": name}}
        (pair[0] / "model.safetensors.index.json").write_text(json.dumps(table))
        assert repr(name) in fault(lambda: load(pair))


class TestValues:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -2.6e36])
    @pytest.mark.parametrize(
        ("part", "name"),
        [
            ("lm", "model.layers.1.mlp.up_proj.weight"),
            ("lm", "model.embed_tokens.weight"),
            ("lm", "speech_embeddings.7.weight"),
            ("codec", "decoder.vocoder.head.out.bias"),
            ("codec", "encoder.quantizer.vq.layers.3._codebook.embed"),
        ],
    )
    def test_a_tensor_that_is_not_finite_is_named_at_load(self, pair, part, name, value):
        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            tensor.view(-1)[-3] = value
            return tensor

        change(pair[part == "codec"], **{name: spoil})
        assert f"{name} holds NaN or infinite values" in fault(lambda: load(pair))

    @pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
    def test_and_in_what_is_quantized(self, pair, tmp_path, name):
        change(pair[0], **{name: lambda tensor: tensor.fill_(torch.nan)})
        target = tmp_path / "out"
        message = fault(lambda: quantize_checkpoint(pair[0], target, "int4", progress=False))
        assert f"{name} holds NaN" in message
        assert {path.name for path in tmp_path.iterdir()} == {"lm", "codec"}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_check_makes_no_copy(self, tmp_path, dtype):
        save_file({"x": torch.zeros(2**25, dtype=dtype)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        weights = open_weights(tmp_path)
        weights.get("x").sum()
        assert peak_memory(lambda: weights.finite("x")) < 16 * MIB

    def test_types_that_no_kernel_computes_with(self, pair):
        change(pair[1], **{"encoder.conv1.bias": lambda x: x.to(torch.float8_e4m3fn)})
        message = fault(lambda: load(pair))
        assert "1 not floating point (encoder.conv1.bias is F8_E4M3)" in message

    def test_tensors_of_mixed_types_are_converted(self, pair):
        change(
            pair[1],
            **{
                "decoder.layers.0.self_attn.out_proj.bias": lambda x: x.double(),
                "encoder.layers.0.fc1.weight": lambda x: x.bfloat16(),
            },
        )
        model = load(pair)
        assert torch.isfinite(model.codec.decode(torch.zeros(8, 16, dtype=torch.int64))).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("small") / "lm"
    quantize_checkpoint(KIT_PAIR[0], target, "int4", progress=False)
    return target


class TestQuantized:
    @pytest.mark.parametrize(
        ("field", "dtype", "wanted"),
        [
            ("words", torch.float32, "I32"),
            ("words", torch.int64, "I32"),
            ("scales", torch.int16, "BF16 or F16 or F32"),
            ("zeros", torch.float32, "F16"),
            ("zeros", torch.int8, "F16"),
        ],
    )
    def test_packed_tensors_of_another_type(self, small, tmp_path, field, dtype, wanted):
        copy_tree(small, tmp_path)
        name = f"model.layers.0.mlp.up_proj.weight.{field}"
        change(tmp_path, **{name: lambda x: torch.zeros(x.shape, dtype=dtype)})
        message = fault(lambda: open_lm(tmp_path))
        assert f"1 of a wrong type ({name} is" in message
        assert f"not {wanted})" in message

    def test_scales_that_are_not_finite(self, small, tmp_path):
        copy_tree(small, tmp_path)
        name = "model.layers.0.mlp.up_proj.weight.scales"
        change(tmp_path, **{name: lambda x: x.fill_(torch.inf)})
        assert f"{name} holds NaN or infinite" in fault(lambda: load((tmp_path, KIT_PAIR[1])))

    @pytest.mark.parametrize(
        ("name", "form"),
        [
            ("model.norm.weight", "int8"),
            ("nothing.weight", "int8"),
            ("speech_group_downcast.bias", "int4"),
            ("hidden_states_downcast.weight", "int8-g128"),
        ],
    )
    def test_a_format_that_no_matrix_can_have(self, small, tmp_path, name, form):
        copy_tree(small, tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["mimo_fast_quantization"]["tensors"][name] = {"format": form}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert f"{name} is stored as {form}" in fault(lambda: open_lm(tmp_path))

    @pytest.mark.parametrize(
        "entry",
        [
            *(1, [], {"version": 1}, {"version": [1]}, {"version": 1, "tensors": []}),
            {"version": 1, "tensors": {"lm_head.weight": {"format": ["int8"]}}},
            {"version": 1, "tensors": {"lm_head.weight": {"format": "x" * 10_000}}},
        ],
    )
    def test_a_damaged_description(self, small, tmp_path, entry):
        copy_tree(small, tmp_path)
        configure(tmp_path, mimo_fast_quantization=entry)
        assert len(fault(lambda: open_lm(tmp_path))) < 700


def spoiled(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a GPTQ layer [96, 64] in groups of 32, one of them changed."""
    layer = {
        "qweight": torch.zeros(8, 96, dtype=torch.int32),
        "qzeros": torch.zeros(2, 12, dtype=torch.int32),
        "scales": torch.ones(2, 96, dtype=torch.float16),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }
    layer[name] = make(layer[name]).contiguous()
    return {f"model.layers.0.mlp.up_proj.{field}": tensor for field, tensor in layer.items()}


GPTQ: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    *((name, lambda x: x[0]) for name in ("qweight", "qzeros", "scales", "g_idx")),
    *((name, lambda x: x[:0]) for name in ("qweight", "qzeros", "scales", "g_idx")),
    *((name, lambda x: x.double()) for name in ("qweight", "qzeros")),
    ("qweight", lambda x: x[:, :-1]),
    ("scales", lambda x: x.fill_(torch.inf)),
    ("scales", lambda x: x.int()),
    ("g_idx", lambda x: x + 9),
]


class TestImports:
    @pytest.mark.parametrize(("name", "make"), GPTQ)
    def test_a_damaged_gptq_layer(self, pair, tmp_path, name, make):
        path = pair[0] / "model.safetensors"
        held = load_file(path)
        del held["model.layers.0.mlp.up_proj.weight"]
        path.unlink()
        save_file(held | spoiled(name, make), path)
        configure(pair[0], quantization_config={"quant_method": "gptq", "bits": 4})
        message = fault(lambda: import_checkpoint(pair[0], tmp_path / "out", progress=False))
        assert len(message) < 700
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("method", [None, 1, [], ["gptq"], {"a": 1}, "awq", "x" * 9000])
    def test_an_unknown_method(self, pair, tmp_path, method):
        configure(pair[0], quantization_config={"quant_method": method})
        message = fault(lambda: import_checkpoint(pair[0], tmp_path / "out", progress=False))
        assert "and FP8 are imported" in message
        assert len(message) < 700


def test_the_whole_of_the_kit_still_opens(pair):
    open_lm(pair[0])
    open_codec(pair[1])


@pytest.mark.parametrize("name", ["two\nlines", "a\u2028b\x1b[31m", "x\udcff"])
def test_a_name_cannot_break_a_message_into_lines(tmp_path, name):
    message = fault(lambda: find_checkpoint(tmp_path / name))
    assert message.isprintable()
    assert ascii(name)[1:-1] in message


def test_a_message_is_bounded_and_keeps_its_fix():
    message = fault(lambda: find_checkpoint("./" + "y" * 9000))
    assert len(message) <= 4000
    assert message.startswith("no directory")
    assert message.endswith("give a checkpoint directory or a hub id OWNER/NAME")
