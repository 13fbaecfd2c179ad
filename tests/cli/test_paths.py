"""What the command line knows of files and texts before it loads anything, and what it keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import KIT, PAIR

import mimo_fast
from mimo_fast.audio.writing import save_wav
from mimo_fast.checkpoint.embedded import NANO, QUESTION
from mimo_fast.cli.main import main

SHORT = ["--seed", "1", "--max-tokens", "30"]
REFUSED, FAILED = 2, 1


@pytest.fixture
def unloaded(monkeypatch):
    """No model may be loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mimo_fast.cli.common.MimoAudio", load)


def ends(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the only line on standard error, besides what names the model."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("using", "loading"))]
    assert (out, len(lines)) == ("", 1), err
    return code, lines[0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none/a.wav", "there is no folder"),
        ("folder.wav", "not a regular file but a folder"),
        ("fifo.wav", "not a regular file; give -o - and redirect"),
        ("/dev/null", "not a regular file; give -o -"),
        ("dangling.wav", "there is no folder"),
        ("loop.wav", "symbolic links"),
        ("old.wav/a.wav", "Not a directory"),
        ("/proc/a.wav", "cannot write /proc/a.wav"),
        ("x" * 260 + ".wav", "File name too long"),
        ("a.m4a", "use one of the suffixes"),
        ("a.txt", "use one of the suffixes"),
        ("a", "use one of the suffixes"),
    ],
)
@pytest.mark.parametrize("command", [["tts", "Hi."], ["continue", QUESTION], ["chat", QUESTION]])
def test_outputs_that_cannot_be_written(capsys, tmp_path, unloaded, command, name, problem):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "old.wav").touch()
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "none" / "a.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    before = sorted(tmp_path.rglob("*"))
    code, line = ends(capsys, *command, "-o", tmp_path / name)
    assert code == REFUSED
    assert line.startswith(f"mimo-fast {command[0]}: error: argument -o/--output: cannot write ")
    assert problem in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "-o", "-"],
        ["demo", "-o", "/proc/demo"],
        ["demo", "-o", "old.wav"],
        ["demo", "-o", "x" * 260],
        ["demo", "--json", "none/a.json"],
        ["demo", "--json", "-"],
        ["bench", "--json", "/dev/null"],
        ["init-checkpoint", "/proc/pair"],
        ["quantize", "nano", "old.wav/small"],
        ["quality", "--text", "seven", "-o", "old.wav"],
    ],
)
def test_folders_and_tables_that_cannot_be_written(
    capsys, tmp_path, monkeypatch, unloaded, arguments
):
    monkeypatch.chdir(tmp_path)
    Path("old.wav").touch()
    assert ends(capsys, *arguments)[0] == REFUSED
    assert list(tmp_path.iterdir()) == [tmp_path / "old.wav"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "a-1.wav", "a-2.wav", "-o", "a.wav"],
        ["chat", "b.wav", "hard.wav", "-o", "a.wav"],
        ["chat", "a.wav", "-o", "link.wav"],
        ["chat", "b.wav", "-o", "a.wav", "--voice", "a.wav"],
        ["continue", "a.wav", "-o", "a.wav", "--join"],
        ["continue", "a.wav", "-o", "folder/../a.wav"],
        ["continue", "a.wav", "-o", "hard.wav"],
        ["tts", "Hi.", "--natural", "--voice", "a.wav", "-o", "linked/a.wav"],
        ["demo", "reply.wav", "-o", "."],
        ["demo", "a.wav", "--json", "a.wav"],
        ["demo", "a.wav", "-o", ".", "--json", "said.wav"],
        ["demo", *PAIR, "--json", KIT / "checkpoint" / "lm" / "config.json"],
        ["demo", "--json", QUESTION],
        ["demo", "--json", NANO / "lm" / "config.json"],
    ],
)
def test_an_output_that_is_an_input(capsys, tmp_path, monkeypatch, unloaded, arguments):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a-1", "a-2", "reply"):
        save_wav(f"{name}.wav", torch.zeros(4800), 24000)
    Path("hard.wav").hardlink_to("a-1.wav" if "b.wav" in arguments else "a.wav")
    Path("link.wav").symlink_to("a.wav")
    Path("folder").mkdir()
    Path("linked").symlink_to(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.wav")}
    code, line = ends(capsys, *arguments)
    assert code == REFUSED
    assert "is an input and would be overwritten" in line or "would be written twice" in line
    assert {path: path.read_bytes() for path in tmp_path.glob("*.wav")} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["asr", "PATH"],
        ["asr", "PATH", "PATH"],
        ["understand", "PATH", "What?"],
        ["chat", QUESTION, "PATH", "-o", "out.wav"],
        ["chat", QUESTION, "-o", "out.wav", "--voice", "PATH"],
        ["continue", "PATH", "-o", "out.wav"],
        ["tts", "Hi.", "--natural", "-o", "out.wav", "--voice", "PATH"],
        ["demo", "PATH"],
        ["quality", "--audio", "PATH", "-o", "report"],
    ],
)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.wav", "No such file"),
        (".", "a folder"),
        ("fifo.wav", "give - in its place and pipe it in"),
        ("empty.wav", "is empty"),
        ("x" * 260, "File name too long"),
        (os.fsdecode(b"caf\xe9.wav"), "No such file"),
    ],
)
def test_inputs_that_cannot_be_read(
    capsys, tmp_path, monkeypatch, unloaded, arguments, name, problem
):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.wav")
    Path("empty.wav").touch()
    try:
        code = main([str(name if each == "PATH" else each) for each in arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out) == (FAILED, "")
    lines = err.splitlines()
    assert len(lines) == arguments.count("PATH") or (lines and arguments.count("PATH") == 2)
    assert all(line.startswith("mimo-fast: error: ") and problem in line for line in lines)
    assert not Path("out.wav").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["understand", "bad.wav", "What?"],
        ["chat", "bad.wav", "-o", "out.wav"],
        ["tts", "Hi.", "--natural", "-o", "out.wav", "--voice", "bad.wav"],
        ["continue", "bad.wav", "-o", "out.wav"],
        ["asr", "bad.wav"],
        ["demo", "bad.wav"],
    ],
)
def test_a_recording_that_cannot_be_decoded(capsys, tmp_path, monkeypatch, unloaded, arguments):
    monkeypatch.chdir(tmp_path)
    Path("bad.wav").write_bytes(b"RIFF")
    code, line = ends(capsys, *arguments)
    assert (code, "cannot decode bad.wav" in line) == (FAILED, True)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--max-tokens", "0"], "argument --max-tokens: must be a whole number from 1 up, not 0"),
        (["--max-tokens", "-1"], "argument --max-tokens: must be a whole number from 1 up"),
        (["--max-tokens", "many"], "from 1 up, not many"),
        (["--max-seq-len", "1.5"], "argument --max-seq-len: must be a whole number from 1 up"),
        (["--seed", "x"], "argument --seed: must be a whole number from 0 to 9223372036854775807"),
        (["--seed", str(2**63)], "argument --seed: must be a whole number from 0 to"),
        (["--seed", "9" * 5000], "argument --seed: must be a whole number from 0 to"),
        (["--instruct", "caf\udce9"], "the instruct is not valid UTF-8"),
        (["--model", "caf\udce9"], "is not valid UTF-8: rename the folder"),
    ],
)
def test_options_are_refused_in_words(capsys, tmp_path, unloaded, option, problem):
    code, line = ends(capsys, "tts", "Hi.", "-o", tmp_path / "a.wav", *option)
    assert code == REFUSED
    assert problem in line
    assert len(line) < 300
    assert line.endswith("(usage: mimo-fast tts --help)")


@pytest.mark.parametrize("device", ["cuda:99", "meta", "abacus", "cpu:x", ""])
@pytest.mark.parametrize("command", ["asr", "bench", "verify"])
def test_devices_that_are_not_there(capsys, unloaded, command, device):
    more = {
        "asr": [QUESTION],
        "bench": [],
        "verify": ["--checkpoint", KIT / "checkpoint", "--golden", KIT],
    }
    code, line = ends(capsys, command, *more[command], "--device", device)
    assert code == FAILED
    assert line.startswith(f"mimo-fast: error: there is no device {device}")
    assert line.endswith("cpu")


def test_devices_are_tried_by_load_as_well():
    with pytest.raises(ValueError, match="there is no device cuda:99 here"):
        mimo_fast.load(device="cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_on_a_machine_without(capsys, unloaded):
    code, line = ends(capsys, "asr", QUESTION, "--device", "cuda")
    assert (code, line.endswith("use cpu")) == (FAILED, True)


def test_quantize_takes_hub_ids_and_names(capsys, tmp_path):
    code, line = ends(capsys, "quantize", "no/such", tmp_path / "small", "--offline")
    assert (code, "no/such is not in the cache" in line) == (FAILED, True)
    assert main(["quantize", "nano", str(tmp_path / "small"), "--format", "int8"]) == 0
    assert (tmp_path / "small" / "config.json").is_file()


def test_a_tilde_is_the_home_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_wav(tmp_path / "a.wav", torch.zeros(24000), 24000)
    arguments = ["chat", "~/a.wav", "-o", "~/b.flac", "--voice=~/a.wav"]
    assert main([*arguments, *PAIR, *SHORT]) == 0
    assert soundfile.info(tmp_path / "b.flac").format == "FLAC"
    capsys.readouterr()
    assert "No such file" in ends(capsys, "asr", "~nobody-of-this-name/a.wav")[1]


def test_names_of_any_bytes(capsys, tmp_path):
    folder = os.fsencode(tmp_path)
    first, other = os.path.join(folder, b"\xe9.wav"), os.path.join(folder, b"\xef.ogg")
    try:
        open(first, "wb").close()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    save_wav(os.fsdecode(first), torch.zeros(24000), 24000)
    assert main(["chat", os.fsdecode(first), "-o", os.fsdecode(other), *PAIR, *SHORT]) == 0
    assert os.path.getsize(other)
    assert main(["asr", os.fsdecode(first), os.fsdecode(first), *PAIR, *SHORT]) == 0
    # On one line and as it is, though no terminal can show it.
    assert capsys.readouterr().out.count(r"\udce9.wav': ") == 2


def test_what_is_refused_is_refused_before_torch_is_imported(tmp_path):
    code = """if True:
        import sys
        from mimo_fast.cli.main import main
        for arguments, expected in (
            (["--version"], 0),
            (["--help"], 0),
            (["tts", "--help"], 0),
            (["tts", "Hi.", "-o", "none/a.wav"], 2),
            (["tts", "Hi.", "-o", "a.m4a"], 2),
            (["chat", "a-1.wav", "a-2.wav", "-o", "a.wav"], 2),
            (["asr", "none.wav"], 1),
        ):
            try:
                found = main(arguments)
            except SystemExit as end:
                found = end.code
            assert found == expected, (arguments, found)
        assert not {"torch", "numpy", "soundfile", "tqdm"} & set(sys.modules)
    """
    for name in ("a-1.wav", "a-2.wav"):
        (tmp_path / name).write_bytes(b"RIFF")
    package = {**os.environ, "PYTHONPATH": str(KIT.parents[1])}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=package
    )
    assert result.returncode == 0, result.stderr
