"""`mimo-fast eval`: nano in its formats, kills and interrupts, and what is wrong, in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import slow_after

from mimo_fast.batches import read_lines
from mimo_fast.cli.main import main
from mimo_fast.evaluation.run import FINDINGS
from mimo_fast.evaluation.sets import SETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    for name in ("MIMO_FAST_MODEL", "MIMO_FAST_CODEC"):
        monkeypatch.delenv(name, raising=False)


def evaluate(*arguments):
    return main(["eval", *map(str, arguments)])


def report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("quantization", slow_after(1, [None, "int8", "int4"]), ids=str)
def test_nano(capsys, data, tmp_path, quantization):
    format_ = [] if quantization is None else ["--quantization", quantization]
    heard, said = tmp_path / "heard", tmp_path / "said"
    assert evaluate("librispeech", "--data", data, "-o", heard, *format_) == 0
    told = capsys.readouterr()
    assert "WER, mean of utterances  0.00%   4  3.76% MiMo-Audio-7B-Instruct" in told.out
    assert "runtime: the released one's" in told.out
    assert f"weights: {quantization or 'the checkpoint'}" in told.out
    assert report(heard)["format"] == quantization
    own = ["--recogniser", "self", *format_]
    assert evaluate("seedtts", "--data", data, "-o", said, *own) == 0
    told = capsys.readouterr()
    assert "words heard: by the model itself" in told.out
    assert report(said)["figures"]["WER, corpus"]["value"] <= 10
    assert {f"{i}.wav" for i in range(4)} < {path.name for path in said.iterdir()}


def test_as_evaluated(capsys, data, tmp_path):
    options = ["--as-evaluated", "--limit", 2, "--max-tokens", 40]
    assert evaluate("librispeech", "--data", data, "-o", tmp_path, *options) == 0
    told = capsys.readouterr().out
    assert "runtime: as MiMo-Audio-Eval's" in told
    assert "the first 2 items" in told
    lines = read_lines(tmp_path / "results.jsonl")
    assert "Transcribe the following voice message." in lines[0]["request"]


def test_without_a_tool_the_rest_is_measured(capsys, data, tmp_path):
    assert evaluate("seedtts", "--data", data, "-o", tmp_path, "--limit", 1) == 0
    told = capsys.readouterr()
    assert "words heard will not be measured without --recogniser" in told.err
    assert "not measured: give --recogniser" in told.out


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(data, tmp_path):
    """Its process is killed while the third answer is heard."""
    command = [sys.executable, "-m", "mimo_fast", "eval", "seedtts", "--data", data, "-o", tmp_path]
    there = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    options = {"cwd": ROOT, "env": os.environ | there, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--recogniser", "evaluations:killed"], check=False, **options)
    assert done.returncode == -signal.SIGKILL
    assert [line["id"] for line in read_lines(tmp_path / FINDINGS)] == ["0", "1"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")}
    assert len(written) == 4
    assert evaluate("seedtts", "--data", data, "-o", tmp_path, "--recogniser", "self") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")} == written
    assert len(read_lines(tmp_path / FINDINGS)) == 2 + 4


def test_the_list(capsys):
    assert evaluate("--list") == 0
    told = capsys.readouterr().out
    for name, chosen in SETS.items():
        assert f"{name}: {chosen.title}, splits {', '.join(chosen.splits)}" in told
    assert "https://www.openslr.org/12" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a set, or --list"),
        (["librispeech"], "give --data DIR"),
        (["librispeech", "--data", "nowhere"], "--data: nowhere is no folder"),
        (["librispeech", "--data", "DATA", "--limit", "0"], "must be a whole number from 1 up"),
    ],
)
def test_bad_usage_is_one_line(capsys, data, arguments, message):
    with pytest.raises(SystemExit) as ended:
        evaluate(*[data if each == "DATA" else each for each in arguments])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["librespeech"], "no set 'librespeech': did you mean 'librispeech'?"),
        (["librispeech", "--split", "dev"], "no split 'dev': there are test_clean, test_other"),
        (["librispeech", "--mode", "voice"], "LibriSpeech has no mode 'voice': it has none"),
        (["aishell1"], "holds no AISHELL-1 test: looked for aishell1/test/manifest.txt"),
        (["seedtts", "--recogniser", "no.such:thing"], "cannot be used: ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    capsys, data, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("mimo_fast.cli.evaluate.load_model", None)
    assert evaluate(*arguments, "--data", data, "-o", tmp_path) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_another_checkpoints_answers_are_refused(capsys, data, tmp_path):
    given = ["librispeech", "--data", data, "-o", tmp_path, "--limit", 1]
    assert evaluate(*given) == 0
    capsys.readouterr()
    assert evaluate(*given, "--seed", 4) == 1
    assert "holds another evaluation (seed 0 instead of 4)" in capsys.readouterr().err
    assert evaluate(*given, "--seed", 4, "--overwrite") == 0
