"""The end-to-end sweep: rows, records, what is skipped by name, what fails."""

import json
from shlex import split

import pytest
import torch

from benchmarks import e2e
from benchmarks.__main__ import main
from mimo_fast.bench.ceiling import Ceiling

SMALL = split("e2e --preset tiny --dtype float32 --batch 1 2 --groups 3 --words 2 --patches 3")
SMALL += split("--seconds 0.5 --device cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(e2e, "ceiling", lambda device: Ceiling(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def sweep(tmp_path, arguments: str) -> tuple[int, list[dict]]:
    path = tmp_path / "rows.jsonl"
    code = main([*SMALL, *arguments.split(), "-o", str(path)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_for_each_batch_context_and_task(tmp_path, capsys):
    code, rows = sweep(tmp_path, "--quantization bf16 --context 32 --task tts asr")
    assert code == 0
    assert [row["kind"] for row in rows] == ["groups"] * 2 + ["request"] * 4
    for row in rows:
        assert (row["model"], row["random_weights"], row["steered"]) == ("tiny", True, True)
        assert {"ceiling", "environment", "floor", "of_floor"} <= set(row)
    steady = rows[0]
    assert steady["prompt_groups"] == 32 - 3 - 2
    assert steady["of_floor"]["audio_group"] == pytest.approx(
        steady["floor"]["audio_group"] / steady["audio_group"]["p50"]
    )
    read = sum(steady["bytes"].values()) - steady["cached_bytes"]
    assert steady["floor"]["audio_group"] * 1e9 >= read > 0
    request = rows[2]
    asked = [request[name] for name in ("task", "batch", "text_groups", "audio_groups")]
    assert asked == ["tts", 1, 2, 3]
    assert request["of_floor"] == pytest.approx(request["floor"] / request["e2el"]["p50"])
    out, err = capsys.readouterr()
    assert out.startswith("ceiling: reads 1.0 GB/s")
    # A floor before each measurement.
    assert err.count("floor") == len(rows)
    assert "tiny fp32" in out


def test_what_does_not_fit_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mimo_fast.bench.target.free_bytes", lambda device: 10**6)
    code, rows = sweep(tmp_path, "--quantization int8 --context 32 --task tts")
    assert code == 0
    assert [row["kind"] for row in rows] == ["skipped"]
    assert "needs" in rows[0]["reason"]
    assert "skipped tiny int8: it needs" in capsys.readouterr().err


def test_what_takes_too_long_is_skipped_by_name(tmp_path, capsys):
    limited = "--quantization bf16 --context 4 32 --task tts --limit 0.000001"
    code, rows = sweep(tmp_path, limited)
    assert code == 0
    assert {row["kind"] for row in rows} == {"skipped"}
    assert "do not fit into it" in rows[0]["reason"]
    assert all("--limit" in row["reason"] for row in rows[2:])


@pytest.mark.slow
def test_a_failure_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(*arguments: object) -> None:
        raise RuntimeError("a fuse has blown")

    monkeypatch.setattr(e2e, "time_groups", broken)
    code, rows = sweep(tmp_path, "--quantization bf16 --context 32 --task asr")
    assert code == 1
    assert [row["kind"] for row in rows] == ["request"] * 2
    failed = "FAILED tiny bf16, groups at batch 1, context 32: RuntimeError: a fuse has blown"
    assert failed in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_checkpoint_answers_as_it_will(tmp_path, kit):
    pair = f"--model {kit}/checkpoint/lm --codec {kit}/checkpoint/codec --quantization stored"
    heard = f"--task spoken_dialogue --audio {kit}/audio/en_m_24k.wav"
    code, rows = sweep(tmp_path, f"{pair} --context {heard}")
    assert code == 0
    for row in rows:
        assert (row["random_weights"], row["steered"], row["dtype"]) == (False, False, "float32")
        # As many groups as they are at most, or fewer; of its own mix.
        assert 0 < row["text_groups"] + row["audio_groups"] <= 5 * row["batch"]
    code, rows = sweep(tmp_path, f"{pair} --steer --context --task tts")
    assert code == 0
    assert rows[-1]["text_groups"] == 2 * 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "x"], "--model and --codec go together"),
        (["--groups", "0"], "must be at least 1"),
    ],
)
def test_bad_usage(capsys, arguments, problem):
    assert main([*SMALL, *arguments]) == 2
    assert problem in capsys.readouterr().err
