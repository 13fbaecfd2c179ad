"""The study of launch orders, on tiny dimensions: it says the same in every way."""

import json
from pathlib import Path

import pytest

from benchmarks.studies import overlap


def test_it_compares_the_orders_of_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overlap, "REPLIES", (("tts", 2, 13, 1), ("tts", 2, 13, 2)))
    monkeypatch.setenv(overlap.EXPERIMENTAL, "")
    output = tmp_path / "overlap.json"
    options = ["--preset", "tiny", "--quantization", "none", "--device", "cpu", "--rounds", "1"]
    result = overlap.main([*options, "-o", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == result
    assert [(r["streams"], r["way"]) for r in result["records"]] == [
        (count, way) for count in (1, 2) for way in ("waits", "overlap")
    ]
    assert len(result["left_out"]) == 6
    assert all(same == {"tokens": True, "samples": True} for same in result["equal"].values())
    for record in result["records"]:
        assert len(set(record["tokens"])) == record["streams"]
        assert 0 < record["first_audio"] < record["wall"]
        assert 0 < record["audio_chunk_p50"] <= record["audio_chunk_p95"]
    assert capsys.readouterr().out.count("audio chunk p50") == 4
