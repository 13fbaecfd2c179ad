"""`mimo-fast bench` as a user meets it; the machine's ceiling is given, so that nothing large is
read."""

import getpass
import json
import os
import platform
import pwd
import re
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from helpers import ADAPTERS, PAIR, watch

from benchmarks.__main__ import main as benchmarks
from mimo_fast.bench import command
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.target import Target
from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.cli.main import main
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.kernels.matmul.adapted import AdaptedWeight


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(command, "ceiling", lambda device: Ceiling(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr(command, "STREAMS", (1, 2))
    monkeypatch.setattr(command, "FAST", 0.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def test_without_a_model_the_tiny_preset_and_why(capsys, tmp_path):
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("cpu: ")
    # The ceiling comes before any figure.
    assert lines[1].startswith("ceiling: reads 1.0 GB/s")
    assert lines[2].startswith(
        "model: a tiny one with random weights, since the published dimensions in int4"
    )
    assert lines[3].startswith("floor: ")
    assert lines[5].split()[:3] == ["streams", "real-time", "factor"]
    assert lines[6].split()[0] == "1"
    # Known machines, and at the end one line to act on.
    assert "\n  NVIDIA H100 80GB HBM3 (measured 2026-" in out
    assert lines[-1].startswith("this machine: the published dimensions (computed, not measured): ")
    assert lines[-1].endswith("; take int4")
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (record["schema"], record["command"]) == (1, "mimo-fast bench --device cpu")
    assert lines[-1] == f"this machine: {record['line']}"
    first = record["rows"][0]
    assert first["streams"] == 1
    assert first["metrics"]["audio_groups"] == command.PATCHES
    assert first["metrics"]["audio_seconds"] == pytest.approx(command.PATCHES * 0.16)
    assert record["ceiling"]["read_Bps"] == 1e9
    assert {"date", "commit", "device", "packages"} <= set(record["environment"])
    carried = [row["streams"] for row in record["rows"] if row["metrics"]["audio_rtf"] < 1]
    assert record["streams"] == max(carried, default=0)


def test_a_given_model(capsys, tmp_path):
    assert (
        main(["bench", *PAIR, "--max-seq-len", "200", "--json", str(tmp_path / "bench.json")]) == 0
    )
    assert f"model: {PAIR[1]}, replies of a set length\n" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "bench.json").read_text())["rows"][0]["metrics"]
    assert (metrics["text_groups"], metrics["audio_groups"]) == (command.WORDS, command.PATCHES)
    # At the end of the context.
    assert metrics["prompt_groups"] + command.WORDS + command.PATCHES + 2 == 200


def test_an_adapter_beside_quantized_weights_is_measured(capsys, tmp_path, monkeypatch):
    small, adapted = str(tmp_path / "small"), list[bool]()
    assert main(["quantize", PAIR[1], small, "--format", "int8"]) == 0

    def see(_args: object, target: Target, *_rest: object) -> None:
        adapted.append(isinstance(target.lm.backbone.layers[0].qkv, AdaptedWeight))

    watch(monkeypatch, command, "_rows", before=see)
    monkeypatch.setattr(command, "STREAMS", (1,))
    pair = ["--model", small, *PAIR[2:], "--max-seq-len", "200"]
    assert main(["bench", *pair, "--adapter", str(ADAPTERS / "qkvo")]) == 0
    assert adapted == [True]


def test_the_embedded_model_by_its_name_in_a_file_that_is_taken_in(capsys, tmp_path, monkeypatch):
    # One that no machine of today is far from: requests faster than their floor are refused.
    fast = Ceiling(1e12, 1e12, {"float32": 1e13})
    monkeypatch.setattr(command, "ceiling", lambda device: fast)
    output, results = tmp_path / "nano.json", tmp_path / "results"
    assert main(["bench", "--model", "nano", "--json", str(output)]) == 0
    assert f"model: {NANO / 'lm'}, replies of a set length\n" in capsys.readouterr().out
    assert benchmarks(["add", str(output), "--results", str(results)]) == 0
    (taken,) = (results / "community").iterdir()
    assert json.loads(taken.read_text()) == json.loads(output.read_text())
    assert "-nano-fp32" in taken.name
    assert json.loads(taken.read_text())["command"] == "mimo-fast bench --model nano --device cpu"


def test_one_stream_that_does_not_fit_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(command.Target, "sized", _too_large)
    assert main(["bench"]) == 1
    assert capsys.readouterr().err.endswith(
        "mimo-fast: error: it needs 9.0 GB and cpu has 1.0 GB free\n"
    )


def _too_large(*arguments: object) -> None:
    raise DeviceMemoryError("it needs 9.0 GB and cpu has 1.0 GB free")


def test_published_dimensions_are_taken_where_they_fit_in_time(monkeypatch):
    monkeypatch.setattr("mimo_fast.bench.target.free_bytes", lambda device: 20 * 10**9)
    fast = Ceiling(100e9, 100e9, {"float32": 1e12})
    arguments = "int4", torch.bfloat16, torch.device("cpu")
    assert command._unfit(*arguments, fast) is None
    assert "would take about" in command._unfit(*arguments, Ceiling(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr("mimo_fast.bench.target.free_bytes", lambda device: 5 * 10**9)
    assert "do not fit: it needs" in command._unfit(*arguments, fast)


def test_streams_stop_where_they_come_slower_than_they_play(monkeypatch, capsys):
    measure = command.measure

    def slower(target, request, streams, **options):
        return replace(measure(target, request, streams, **options), audio_rtf=0.75 * streams)

    monkeypatch.setattr(command, "STREAMS", (1, 2, 4))
    monkeypatch.setattr(command, "measure", slower)
    assert main(["bench"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[6:8]] == [["1", "0.750"], ["2", "1.500"]]
    assert lines[8] == ""
    assert lines[-1].startswith("this machine: ")


def test_a_given_models_streams_first_audio_and_format_are_told(monkeypatch, capsys):
    def slower(target, request, streams, **options):
        found = measure(target, request, streams, **options)
        first = replace(found.audio_ttfp, p50=0.1 * streams)
        return replace(found, audio_rtf=0.4 * streams, audio_ttfp=first)

    measure = command.measure
    monkeypatch.setattr(command, "STREAMS", (1, 2, 4))
    monkeypatch.setattr(command, "measure", slower)
    assert main(["bench", *PAIR, "--max-seq-len", "200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "this machine: 2 simultaneous streams in real time, first audio after 100 ms with 1 and "
        "200 ms with 2 (measured in fp32); take fp32, the most exact"
    )


def test_a_given_model_of_which_no_audio_came(monkeypatch, capsys):
    monkeypatch.setattr(command, "BUDGET", 0.0)
    assert main(["bench", *PAIR, "--max-seq-len", "200"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("this machine: no stream in real time: no audio came")


def test_the_written_file_says_nothing_of_its_owner(monkeypatch, tmp_path, capsys):
    """No folder, host or user name, whatever was named on the way."""
    private = tmp_path / "private-person"
    small, home = private / "private-model", private / "private-home"
    private.mkdir()
    assert main(["quantize", PAIR[1], str(small), "--format", "int8"]) == 0
    adapter = shutil.copytree(ADAPTERS / "qkvo", private / "private-adapter")
    codec = shutil.copytree(PAIR[3], private / "private-codec")
    for name in ("HOME", "USER", "LOGNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, str(home) if name == "HOME" else "private-name")
    for module, name in ((socket, "gethostname"), (platform, "node"), (getpass, "getuser")):
        monkeypatch.setattr(module, name, lambda: "private-name")
    monkeypatch.setattr(command, "STREAMS", (1,))
    named = ["--model", small, "--codec", codec, "--adapter", adapter, "--cache-dir", home]
    more = ["--max-seq-len", "200", "--revision", "private-branch", "--offline"]
    output = private / "private-file.json"
    assert main(["bench", *map(str, named), *more, "--json", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "private" not in text
    # The names of this machine as they are, too, and no path at all.
    for word in {os.uname().nodename, pwd.getpwuid(os.getuid()).pw_dir, str(tmp_path)}:
        assert f'"{word}' not in text
    assert not re.search(r"(?<![\w])/\w|\\\\|~", text)
    record = json.loads(text)
    assert record["model"] == "a checkpoint of its owner's"
    assert record["command"] == (
        "mimo-fast bench --model DIR --codec DIR --adapter DIR --revision NAME --cache-dir DIR "
        "--device cpu --max-seq-len 200"
    )


def test_all_that_was_tried_is_carried(monkeypatch, capsys):
    def carried(target, request, streams, **options):
        return replace(measure(target, request, streams, **options), audio_rtf=0.5)

    measure = command.measure
    monkeypatch.setattr(command, "measure", carried)
    assert main(["bench"]) == 0
    # Of the tiny model the line says nothing, and the record all.
    assert "this machine: the published dimensions (computed" in capsys.readouterr().out
    assert main(["bench", *PAIR, "--max-seq-len", "200"]) == 0
    assert "this machine: 2 or more simultaneous streams" in capsys.readouterr().out


def test_time_is_kept(monkeypatch, capsys):
    given = []

    def carried(target, request, streams, **options):
        given.append(options["seconds"])
        return replace(measure(target, request, streams, **options), audio_rtf=0.5)

    measure = command.measure
    monkeypatch.setattr(command, "measure", carried)
    monkeypatch.setattr(command, "BUDGET", 0.0)
    assert main(["bench"]) == 0
    out, err = capsys.readouterr()
    # One row is always there, and what it has left to take is no time at all.
    assert out.splitlines()[6].split()[0] == "1"
    assert len(given) == 1
    assert given[0] < 0
    assert "not measured: 2 streams and more, for want of time" in err
    assert out.splitlines()[6].split()[-3] == "-"
    assert "not measured: the worst silence of 1: no audio came" in err


def test_a_reply_shorter_than_the_look_ahead_says_nothing_of_silence(monkeypatch, capsys):
    monkeypatch.setattr(command, "STREAMS", (1,))
    monkeypatch.setattr(command, "PATCHES", 10)
    assert main(["bench"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[6].split()[-3] == "-"
    assert "not measured: the worst silence of 1: the replies were shorter than the" in err


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--model", "somewhere"], 1, "no directory somewhere"),
        (["--model", "no/such/folder", "--codec", "neither", "--offline"], 1, "mimo-fast: error: "),
        (["--quality"], 1, "mimo-fast quality --audio WAV... -o DIR"),
        (["--device", "abacus"], 1, "abacus"),
        (["--json", "no/such/folder/bench.json"], 2, "there is no folder no/such/folder"),
        (["--quantization", "int3"], 2, "invalid choice: 'int3'"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, code, problem):
    try:
        found = main(["bench", *arguments])
    except SystemExit as usage:
        found = usage.code
    err = capsys.readouterr().err
    assert found == code
    assert problem in err
    assert "Traceback" not in err
    if code == 1:
        assert (
            len([line for line in err.splitlines() if line.startswith("mimo-fast: error: ")]) == 1
        )
