"""`merge`, and `--adapter` of the commands that load a model."""

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import ADAPTERS, AUDIO, KIT_PAIR, PAIR, THREE, watch
from safetensors.torch import load_file

import mimo_fast
from mimo_fast.cli.arguments import check_arguments
from mimo_fast.cli.common import load_options
from mimo_fast.cli.main import main
from mimo_fast.cli.parser import build_parser
from mimo_fast.runtime.engine.engine import Engine

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


NAMED = [f"--adapter={name}={folder}" for name, folder in THREE.items()]


def options_of(*arguments: str) -> dict[str, Any]:
    """What `serve` loads with."""
    args = build_parser().parse_args(["serve", *PAIR, *arguments])
    check_arguments(args)
    return {**load_options(args)}


def test_a_server_takes_several_by_their_names():
    options = options_of(*NAMED)
    assert options["adapters"] == THREE
    assert options["merge_adapters"] is False
    with mimo_fast.load(*KIT_PAIR, **options) as model:
        assert model.adapters == (*THREE,)
    # One with a name is chosen too, one without is merged.
    assert options_of(NAMED[0])["merge_adapters"] is False
    assert options_of("--adapter", str(QKVO))["merge_adapters"] is None
    assert options_of()["adapters"] is None


def test_a_variable_names_several_and_options_come_before_it(monkeypatch):
    named = ",".join(f"{name}={folder}" for name, folder in THREE.items())
    monkeypatch.setenv("MIMO_FAST_ADAPTER", named)
    assert options_of()["adapters"] == THREE
    assert options_of(NAMED[0], NAMED[1])["adapters"].keys() == {*[*THREE][:2]}
    monkeypatch.setenv("MIMO_FAST_ADAPTER", str(QKVO))
    assert options_of()["adapters"] == {"qkvo": QKVO}
    assert options_of()["merge_adapters"] is None


def test_a_folder_with_a_name_like_one_begins_with_a_dot(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").symlink_to(QKVO)
    assert options_of("--adapter", "./a=b")["adapters"] == {"qkvo": Path("a=b")}
    assert options_of("--adapter", "a=b")["adapters"] == {"a": Path("b")}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options_of("--adapter", "a=~/b")["adapters"] == {"a": tmp_path / "b"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["a=x", "a=y"], "two adapters are called a"),
        (["a=x", "y"], "'y' needs a name beside others: give NAME=DIR for each"),
        (["x", "y"], "'x' needs a name beside others"),
        (["a=x", "b:c=y"], "'b:c=y' needs a name beside others"),
        (["a=\udcff"], "is not valid UTF-8"),
    ],
)
def test_names_that_do_not_go_together(given, problem, capsys):
    with pytest.raises(SystemExit):
        options_of(*(f"--adapter={each}" for each in given))
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_info_lists_them(capsys):
    assert main(["info", *PAIR, *NAMED]) == 0
    shown = capsys.readouterr().out
    for name, folder in THREE.items():
        assert f"  adapter         {name}: {folder}, " in shown
    assert "  merged  " not in shown


def test_one_beside_quantized_weights_is_for_every_request(tmp_path, capsys):
    small = tmp_path / "small"
    assert main(["quantize", MODEL[1], str(small), "--format", "int8"]) == 0
    end = ["--text", "hello", "--max-tokens", "12", "--seed", "3", "--device", "cpu"]
    said = []
    for more in (["--adapter", str(QKVO)], []):
        capsys.readouterr()
        assert main(["chat", "--model", str(small), *PAIR[2:], *more, *end]) == 0
        said.append(capsys.readouterr())
    assert f"with {QKVO} beside the weights" in said[0].err
    assert said[0].out != said[1].out
    with mimo_fast.load(small, KIT_PAIR[1], device="cpu", adapters={"q": QKVO}) as model:
        messages = [{"role": "user", "content": "hello"}]
        how: dict[str, Any] = {"max_new_tokens": 12, "seed": 3, "adapter": "q"}
        text = model.text_dialogue_sft_multiturn(messages, **how)
    assert said[0].out.strip() == text.strip()


WAV = str(AUDIO)
COMMANDS = {
    "tts": ["tts", "hello", "-o", "out.wav"],
    "lines": ["tts", "--lines", "lines.txt", "-o", "folder"],
    "asr": ["asr", WAV],
    "asr of several": ["asr", WAV, "again.wav"],
    "asr --whole": ["asr", "--whole", WAV],
    "understand": ["understand", WAV, "what?"],
    "chat": ["chat", WAV, "-o", "out.wav"],
    "chat --text": ["chat", "--text", "hello"],
    "continue": ["continue", WAV, "-o", "out.wav"],
    "convert": ["convert", "--instruction", "a", "--example", WAV, WAV, "b", WAV, "-o", "out.wav"],
    "demo": ["demo", WAV],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The kit's language model stored in int8, into which nothing is merged."""
    folder = str(tmp_path_factory.mktemp("stored") / "int8")
    assert main(["quantize", MODEL[1], folder, "--format", "int8"]) == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_sequence_of_a_command_has_it(command, small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("hello\nagain\n")
    Path("again.wav").write_bytes(AUDIO.read_bytes())
    seen = list[int]()
    watch(
        monkeypatch, Engine, "start", before=lambda _, each, *rest, **o: seen.append(each.adapter)
    )
    name, *rest = COMMANDS[command]
    pair = ["--model", small, *PAIR[2:], "--adapter", str(QKVO), "--device", "cpu"]
    main([name, *rest, *pair, "--max-tokens", "4", "--seed", "1"])
    assert seen
    assert {*seen} == {1}
