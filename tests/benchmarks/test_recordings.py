"""The report's section on recordings: the newest of each condition counts."""

import json

from benchmarks.recordings import section
from mimo_fast.bench.environment import ROOT


def write(folder, name, date, conditions):
    device = {"type": "cpu", "name": "X", "cores": 2, "instructions": "AVX2"}
    about = {"date": date, "device": device, "commit": "a" * 40}
    record = {"environment": about, "conditions": conditions}
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


def test_the_newest_of_each_condition_counts(tmp_path):
    clean = {"words": 9, "wrong": 0.25, "real_time_factor": 0.1, "one_pass": 0.5}
    long = {"words": 5941, "wrong": 0.04, "real_time_factor": 0.0153, "peak_mb": 418}
    first, later = {"clean": clean, "1 hour": long}, {"clean": {**clean, "wrong": 0.125}}
    del later["clean"]["one_pass"]
    write(tmp_path, "2026-01-02-robustness.json", "2026-01-02T01", later)
    write(tmp_path, "2026-01-02-robustness-long.json", "2026-01-02T00", first)
    text = "\n".join(section(tmp_path))
    assert "| clean | 9 | 12.5% |" in text
    assert "25.0%" not in text
    assert "| 1 hour | 5,941 | 4.0% | 0.015 | 418 MB |" in text
    assert "2026-01-02-robustness-long.json" in text


def test_nothing_is_made_up(tmp_path):
    assert "Not measured yet" in "\n".join(section(tmp_path))


def test_what_is_committed_is_shown():
    text = "\n".join(section(ROOT / "benchmarks" / "results"))
    for name in ("clean", "noise, 10 dB below", "telephone, mu-law", "1 hour"):
        assert f"| {name} |" in text
