"""Files that others share: what is taken in and under which name, and what is refused and why."""

import copy
import json
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from benchmarks import community
from benchmarks.__main__ import main
from benchmarks.community import METRICS, add, check, section
from benchmarks.records import RESULTS, Measured
from benchmarks.report import document
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.command import Row
from mimo_fast.bench.pipeline import Metrics, Spread
from mimo_fast.bench.shared import PRIVATE_METRICS, SCHEMA

CARD = {
    "type": "cuda",
    "name": "NVIDIA GeForce RTX 4090",
    "capability": "sm_89",
    "memory": 25_300_000_000,
    "multiprocessors": 128,
    "cuda": "13.0",
    "driver_version": "580.65.06",
    "clocks.sm": "2520",
    "clocks.mem": "10501",
    "clocks.max.sm": "3105",
    "clocks.max.mem": "10501",
    "power.limit": "[N/A]",
}
PROCESSOR = {
    "type": "cpu",
    "name": "AMD Ryzen 7 7840U w/ Radeon 780M Graphics",
    "cores": 16,
    "instructions": "AVX512",
}


def row(streams: int, factor: float) -> dict[str, Any]:
    """A row whose requests have 8 s of audio each, and take `factor` times as long."""
    took, one = Spread(8 * factor, 8 * factor, 8 * factor, streams), Spread(0.1, 0.2, 0.3, 9)
    metrics = Metrics(
        task="tts",
        batch=streams,
        requests=streams,
        prompt_groups=107,
        text_groups=12 * streams,
        audio_groups=50 * streams,
        audio_seconds=8.0 * streams,
        wall=8 * factor + 0.01,
        encode=0.001,
        prefill=0.05,
        ttft=one,
        audio_ttfp=one,
        itl=one,
        e2el=took,
        audio_rtf=factor,
        audio_rtfx=streams / factor,
        audio_underrun=0.0,
        audio_continuity=1.0,
        peak_bytes=8_000_000_000,
        joules=None,
        joules_source=None,
        unmeasured={},
    )
    values = asdict(Row(streams, metrics, 0.4 * 8 * factor))
    for name in PRIVATE_METRICS:
        del values["metrics"][name]
    return values


def record(device: dict[str, Any] = CARD, **changes: Any) -> dict[str, Any]:
    rows = [row(1, 0.1), row(2, 0.3), row(4, 1.2)]
    ceiling = Ceiling(9.4e11, 9e11, {"float32": 5e13, "float16": 1.6e14, "bfloat16": 1.6e14})
    made = {
        "schema": SCHEMA,
        "kind": "quick",
        "command": "mimo-fast bench --device cuda",
        "environment": {
            "date": "2026-11-29T12:00:00+00:00",
            "device": device,
            "packages": {"mimo-fast": "0.1.0.dev0", "torch": "2.13.0+cu130"},
            "python": "3.12.1",
            "os": "Linux x86_64",
            "load": [0.1, 0.2, 0.3],
            "threads": 16,
            "commit": None,
            "dirty": None,
        },
        "model": "the published dimensions in int4, random weights: real speed, no real speech",
        "preset": "7b",
        "quantization": "int4",
        "ceiling": asdict(ceiling),
        "dtype": "bfloat16",
        "of_integer_peak": {},
        "streams": 2,
        "line": "2 simultaneous streams in real time; take int4",
        "rows": rows,
    }
    return copy.deepcopy(made | changes)


def changed(path: str, value: Any, **changes: Any) -> dict[str, Any]:
    """A record with another value at a path of keys and indices."""
    made = record(**changes)
    inner: Any = made
    *before, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
    for key in before:
        inner = inner[key]
    inner[last] = value
    return made


def written(folder: Path, name: str, content: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_every_figure_of_a_row_has_its_bounds():
    assert METRICS.keys() == {f.name for f in fields(Metrics)} - set(PRIVATE_METRICS)


@pytest.mark.parametrize("device", [CARD, PROCESSOR])
def test_a_file_is_taken_in_under_its_own_name(tmp_path, device, capsys):
    source = written(tmp_path, "my machine.json", record(device))
    assert main(["add", str(source), "--results", str(tmp_path)]) == 0
    (taken,) = (tmp_path / "community").iterdir()
    named = {
        "cuda": "2026-11-29-nvidia-geforce-rtx-4090-7b-int4.json",
        "cpu": "2026-11-29-amd-ryzen-7-7840u-w-radeon-780m-graphics-16-cores-avx512-7b-int4.json",
    }
    assert taken.name == named[device["type"]]
    assert json.loads(taken.read_text()) == record(device)
    assert "python -m benchmarks --report" in capsys.readouterr().out


def test_the_same_run_is_there_once_and_another_has_another_name(tmp_path, capsys):
    first = add(written(tmp_path, "a.json", record()), tmp_path)
    # Another name of the file and another line make no other run.
    again = written(tmp_path, "b.json", record(line="another"))
    assert main(["add", str(again), "--results", str(tmp_path)]) == 2
    assert f"b.json is there already: community/{first.name}" in capsys.readouterr().err
    rows = record()["rows"]
    for i in (2, 3):
        rows[0]["metrics"]["encode"] = 0.001 * i
        other = add(written(tmp_path, "c.json", record(rows=rows)), tmp_path)
        assert other.name == f"{first.stem}-{i}.json"


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("schema", 2, "it has schema 2"),
        ("schema", True, "its schema cannot be"),
        ("kind", "groups", "its kind cannot be"),
        ("hostname", "abacus", "a field of another kind, 'hostname'"),
        ("command", "mimo-fast bench; rm", "its command cannot be"),
        ("command", "cat x", "its command cannot be"),
        ("environment/user", "me", "its environment cannot be"),
        ("environment/device/serial", "1", "its environment cannot be"),
        ("environment/device/name", "a | b", "its environment cannot be"),
        ("environment/device/name", "[a](http://b)", "its environment cannot be"),
        ("environment/device/name", "<script>", "its environment cannot be"),
        ("environment/device/name", "a\nb", "its environment cannot be"),
        ("environment/device/type", "tpu", "its environment cannot be"),
        ("environment/date", "2026-13-29T12:00:00+00:00", "its date cannot be"),
        ("environment/date", "2025-11-29T12:00:00+00:00", "its date cannot be: 2025-11-29"),
        ("environment/date", "2126-11-29T12:00:00+00:00", "its date cannot be: 2126-11-29"),
        ("environment/packages", {"torch": "2.13"}, "lacks the version of mimo-fast"),
        ("environment/packages/mimo-fast", "/home/me", "its environment cannot be"),
        ("environment/device", {"type": "cuda", "name": "NVIDIA L4"}, "device lacks capability"),
        ("environment/device", {"name": "NVIDIA L4"}, "its device lacks type"),
        ("model", "/home/me/model: mine\n", "its model cannot be"),
        ("preset", "tiny", "can be compared with nothing"),
        ("preset", None, "can be compared with nothing"),
        ("quantization", "int3", "its quantization cannot be"),
        ("ceiling/read_Bps", 1e16, "its ceiling cannot be"),
        ("ceiling/read_Bps", "fast", "its ceiling cannot be"),
        ("ceiling/flops/float32", float("nan"), "its ceiling cannot be"),
        ("of_integer_peak", {"64": 50}, "its of_integer_peak cannot be"),
        ("streams", 4, "its rows carry 2 streams, not 4"),
        ("streams", 3, "its streams cannot be"),
        ("rows", [], "its rows cannot be"),
        ("rows/0/streams", 2, "not of one stream and then of more"),
        ("rows/2/streams", 2, "not of one stream and then of more"),
        ("rows/0/floor", -1.0, "its rows cannot be"),
        ("rows/0/floor", 1.7, "faster than the machine reads: 0.8 s, and at least 1.7 s"),
        ("rows/1/metrics/batch", 1, "its metrics of 2 streams are of 1"),
        ("rows/0/metrics/audio_rtf", 0.01, "0.01, and its times make 0.1"),
        ("rows/0/metrics/audio_rtf", True, "its rows cannot be"),
        ("rows/0/metrics/audio_rtf", float("inf"), "its rows cannot be"),
        ("rows/0/metrics/e2el/p95", 0.1, "percentiles of e2el of 1 streams are out of order"),
        ("rows/0/metrics/e2el", None, "did not end"),
        ("rows/0/metrics/wall", 0.5, "took longer than all of them"),
        ("rows/0/metrics/peak_bytes", 10**15, "its rows cannot be"),
        ("rows/0/metrics/unmeasured", {}, "its rows cannot be"),
        ("line", "`a`", "its line cannot be"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, capsys, path, value, problem):
    source = written(tmp_path, "x.json", changed(path, value))
    assert main(["add", str(source), "--results", str(tmp_path)]) != 0
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1
    assert not (tmp_path / "community").exists()


@pytest.mark.parametrize("missing", [*record()])
def test_every_field_is_needed(missing):
    made = record()
    del made[missing]
    with pytest.raises(ValueError, match=rf"it (lacks {missing}|has schema None)"):
        check(made)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"schema": 1, "schema": 1}', "null"])
def test_no_record_at_all(tmp_path, capsys, content):
    source = tmp_path / "x.json"
    source.write_text(content)
    assert main(["add", str(source), "--results", str(tmp_path)]) != 0
    assert capsys.readouterr().err.startswith("error: ")


def test_a_day_on_which_it_is_not_yet_everywhere():
    now = datetime(2026, 11, 28, 13, tzinfo=UTC)
    check(record(), now)
    with pytest.raises(ValueError, match="its date cannot be"):
        check(record(), now.replace(day=27))


def test_nano_and_the_published_checkpoints_can_be_compared():
    for model in ("nano", "XiaomiMiMo/MiMo-Audio-7B-Instruct"):
        check(record(preset=None, model=model, quantization=None))


def test_the_report_shows_them_as_submitted(tmp_path):
    assert "None has been submitted yet: `mimo-fast bench --json FILE`" in _section(tmp_path)
    add(written(tmp_path, "a.json", record(PROCESSOR, streams=4, rows=_fast())), tmp_path)
    add(written(tmp_path, "b.json", record()), tmp_path)
    text = _section(tmp_path)
    assert "not measured by the project" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    link = "[community/2026-11-29-nvidia-geforce-rtx-4090-7b-int4.json]"
    assert rows[0].startswith(
        "| NVIDIA GeForce RTX 4090 | 7b int4 | 2 | 0.100 | 40.0% | 100 ms | 8.00 GB | 0.1.0.dev0 | "
        f"2026-11-29 | {link}(../benchmarks/results/community/"
    )
    assert rows[1].startswith("| AMD Ryzen 7 7840U w/ Radeon 780M Graphics, 16 cores, AVX512 |")
    assert " | 4 or more | " in rows[1]
    # What the project measured is not mixed with them.
    whole = document(Measured.read(tmp_path), tmp_path, [])
    assert whole.count("RTX 4090 | 7b int4") == 1
    assert "**NVIDIA GeForce RTX 4090**" not in whole


def _section(results: Path) -> str:
    return "\n".join(section(results))


def _fast() -> list[dict[str, Any]]:
    return [row(1, 0.1), row(2, 0.2), row(4, 0.3)]


def test_a_file_put_there_by_hand_is_checked_too(tmp_path):
    folder = tmp_path / community.FOLDER
    folder.mkdir()
    written(folder, "x.json", changed("streams", 1))
    with pytest.raises(ValueError, match=r"x\.json: its rows carry 2 streams, not 1"):
        list(section(tmp_path))


def test_the_committed_ones_are_what_add_would_write():
    for entry in community.entries(RESULTS):
        path = RESULTS / entry["file"]
        assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1) + "\n"
