"""The study of turns on a CPU, with stand-ins for graphs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.studies import turns
from mimo_fast.runtime.codec.encoder_graphs import PaddedEncoder

TINY = ("--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--quantization", "bf16")


def study(monkeypatch: pytest.MonkeyPatch, target: Path, *parts: str) -> tuple[int, list[dict]]:
    """Its exit code and records, of few and small things."""
    for name, value in (("SECONDS", (0.8,)), ("TURN", 1.6), ("LENGTHS", (9,)), ("RUNS", 1)):
        monkeypatch.setattr(turns, name, value)
    monkeypatch.setattr(turns, "PATCHES", 14)
    arguments = ["turns", *TINY, "--capacity", "128", "--out", str(target), "--part", *parts]
    monkeypatch.setattr(sys, "argv", arguments)
    code = turns.main()
    return code, json.loads(target.read_text())["records"]


def test_every_part_has_its_records(monkeypatch, tmp_path, capsys):
    code, records = study(monkeypatch, tmp_path / "a.json", "encode", "turn", "packed", "first")
    assert code == 0
    assert [record["part"] for record in records] == (
        ["encode"] * 2 + ["turn"] + ["packed"] * 3 + ["first"] * (len(records) - 6)
    )
    assert records[1]["equal_codes"] == 1
    assert records[2]["difference"] < 1e-5
    assert [record["same_bits"] for record in records[4:6]] == [True] * 2
    assert {record["lookahead"] for record in records[6:]} <= {"exact", "elastic"}
    assert all(record["first_audio_ms"] > 0 for record in records[6:])
    assert len(capsys.readouterr().out.splitlines()) == len(records)


def test_a_wrong_mask_is_a_fault(monkeypatch, tmp_path):
    attend = PaddedEncoder._attend
    monkeypatch.setattr(
        PaddedEncoder,
        "_attend",
        lambda encoder, places, real: attend(encoder, places, torch.ones_like(real)),
    )
    code, records = study(monkeypatch, tmp_path / "a.json", "encode")
    assert code == 1
    assert records[-1]["faults"] == ["other codes"]
