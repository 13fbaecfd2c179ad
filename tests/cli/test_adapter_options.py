"""`merge`, and `--adapter` of the commands that load a model."""

import os
from pathlib import Path

import pytest
from helpers import ADAPTERS, KIT_PAIR, PAIR
from safetensors.torch import load_file

import mimo_fast
from mimo_fast.cli.common import load_options
from mimo_fast.cli.main import build_parser, main

MODEL = PAIR[:2]
QKVO = ADAPTERS / "qkvo"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    target = tmp_path / "merged"
    assert main(["merge", *MODEL, "--adapter", str(QKVO), "-o", str(target)]) == 0
    return target


def test_merge_writes_what_a_model_loads(tmp_path, capsys):
    merged = tmp_path / "merged"
    assert main(["merge", *MODEL, "--adapter", str(QKVO), "-o", str(merged)]) == 0
    said = capsys.readouterr().err
    assert f"wrote {merged}: 0.001 GB, 24 tensors changed by {QKVO}; it loads without" in said
    golden = load_file(ADAPTERS / "golden.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    found = load_file(merged / "model.safetensors")
    assert (found[name] == golden[f"qkvo.merged.{name}"]).all()


def test_merge_does_not_overwrite(merged, capsys):
    before = (merged / "model.safetensors").stat()
    assert main(["merge", *MODEL, "--adapter", str(QKVO), "-o", str(merged)]) == 1
    assert "already holds weights: choose another directory" in capsys.readouterr().err
    assert (merged / "model.safetensors").stat() == before


def test_merge_refuses_what_does_not_fit(tmp_path, capsys):
    # nano, which the adapter was not trained on.
    target = tmp_path / "out"
    assert main(["merge", "--model", "nano", "--adapter", str(QKVO), "-o", str(target)]) == 1
    error = capsys.readouterr().err
    assert "use the model that the adapter was trained on" in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_reply_is_the_merged_checkpoints(merged, tmp_path, capsys):
    said = []
    end = ["--text", "hello", "--max-tokens", "12", "--seed", "3", "--device", "cpu"]
    for model in (["--adapter", str(QKVO), *MODEL], ["--model", str(merged)], MODEL):
        assert main(["chat", *model, *PAIR[2:], *end]) == 0
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out != said[2].out
    assert f"with {QKVO} merged" in said[0].err


def test_info(merged, capsys):
    assert main(["info", *PAIR, "--adapter", str(ADAPTERS / "all_linear_saved")]) == 0
    adapter = ADAPTERS / "all_linear_saved"
    line = f"  adapter         {adapter}, LoRA of rank 2 on 52 matrices, 10 tensors replaced\n"
    shown = capsys.readouterr().out
    assert line in shown
    assert "  merged  " not in shown
    assert main(["info", "--model", str(merged), *PAIR[2:]]) == 0
    shown = capsys.readouterr().out
    assert "  merged          adapters in the checkpoint's weights: 1\n" in shown
    assert "  adapter  " not in shown


@pytest.mark.parametrize("command", [["serve"], ["talk"], ["tts", "a", "-o", "a.wav"], ["bench"]])
def test_commands_pass_it_on(command, monkeypatch, tmp_path):
    monkeypatch.chdir(QKVO)
    args = build_parser().parse_args([*command, *PAIR, "--adapter", "."])
    assert load_options(args)["adapters"] == {"qkvo": Path()}
    with mimo_fast.load(*KIT_PAIR, **load_options(args)) as model:
        assert len(model.setup.merged) == 24


def test_random_weights_have_no_adapter(capsys, monkeypatch):
    for variable in ("MIMO_FAST_MODEL", "MIMO_FAST_CODEC"):
        monkeypatch.delenv(variable, raising=False)
    assert main(["bench", "--adapter", str(QKVO)]) == 1
    assert "--adapter goes with --model" in capsys.readouterr().err
