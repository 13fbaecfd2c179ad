"""The report's section on load: what was measured, what was simulated, what is missing."""

import json

import pytest

from benchmarks.load import report
from benchmarks.records import RESULTS

ENVIRONMENT = {
    "date": "2027-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "dirty": False,
    "device": {"type": "cpu", "name": "a CPU", "cores": 2, "instructions": "AVX2"},
}


def point(side="now", profile="listeners", streams=16, **fields):
    first = {"p50": 0.1, "p95": 0.25, "p99": 0.3, "n": 9}
    found = {"side": side, "target": "engine", "profile": profile, "streams": streams}
    found |= {"continuity": 0.9995, "gaps": 2, "first_audio": first, "groups_a_second": 123.4}
    found |= {"of_ceiling": 0.123, "cpus": 1.5, "peak_bytes": 4e8, "load": 2.5, "errors": {}}
    return found | fields


def text_of(folder, **records):
    for name, record in records.items():
        path = folder / f"2027-01-02-load-{name}.json"
        path.write_text(json.dumps({"environment": ENVIRONMENT} | record), encoding="utf-8")
    return "\n".join(report.section(folder))


def measured(*points, **fields):
    most = {"now": {"carried": 16, "without_gap": 8}}
    found = {"kind": "load", "points": list(points), "most": most, "compared_with": None}
    return found | fields


def test_what_nothing_has_measured_is_said(tmp_path):
    assert text_of(tmp_path).count("not measured yet") == 3


def test_a_point_is_a_row(tmp_path):
    text = text_of(tmp_path, a=measured(point(), point(profile="closed", continuity=0.5)))
    listeners = (
        "| listeners | 16 | yes | 99.95% | 2 | 100 ms | 250 ms | 300 ms | 123 | 12.3% | 1.50 | "
        "82 | 400 MB | 2.5 |"
    )
    assert listeners in text
    assert "| closed | 16 | - | - | - |" in text
    assert "16 streams carried, 8 without a gap" in text
    assert "commit 0123456789" in text


def test_sides_are_told_apart(tmp_path):
    pairs = [{"profile": "listeners", "streams": 16, "groups_a_second_ratio": 2.5}]
    both = measured(point("before"), point("now"), compared_with="HEAD~9", pairs=pairs)
    text = text_of(tmp_path, a=both | {"most": {}})
    assert "| before | listeners | 16 |" in text
    assert "| now | listeners | 16 |" in text
    assert "listeners 16: groups a second now / before 2.50." in text
    assert "beside HEAD~9" in text


def test_the_newest_of_each_kind_counts(tmp_path):
    text = text_of(tmp_path, a=measured(point(streams=1)), b=measured(point(streams=2)))
    assert "| listeners | 2 |" in text
    assert "| listeners | 1 |" not in text
    over = text_of(tmp_path, c=measured(point(target="server", streams=3)))
    assert "| listeners | 2 |" in over
    assert "| listeners | 3 |" in over
    assert "`mimo-fast serve`" in over


def test_a_line_of_make_bench_counts_too(tmp_path):
    line = {"environment": ENVIRONMENT} | measured(point(streams=5))
    (tmp_path / "2027-01-02-cpu.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert "| listeners | 5 |" in text_of(tmp_path)


def test_the_simulation_says_what_is_predicted(tmp_path):
    fits = {"streams": 300, "groups": 1100}
    one = {"card": "H100 SXM", "quantization": "int8", "codec": "in batches", "replies": "long"}
    one |= {"carried": 256, "memory": fits, "limit": "time", "sources": ["predicted: all"]}
    rows = [
        {
            "profile": "listeners",
            "streams": 8,
            "engine": {"groups_a_second": 100.0},
            "simulated": {"groups_a_second": 95.0},
            "groups_ratio": 0.95,
        }
    ]
    checked = {"agrees": True, "within": 0.1, "carried": {"engine": 8, "simulated": 8}}
    record = {"kind": "load simulation", "published": [one], "check": checked | {"rows": rows}}
    text = text_of(tmp_path, a=record)
    assert "| H100 SXM | int8 | in batches | long | 256 | 300 of 1100 groups | time |" in text
    assert "- predicted: all" in text
    assert "| listeners | 8 | 100 | 95 | 0.950 |" in text
    assert "within 10% they agree" in text


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*-load*.json")), ids=lambda path: path.name)
def test_a_committed_result_is_whole(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["kind"] in ("load", "load simulation")
    assert found["environment"]["load"]
    for each in found.get("points", ()):
        assert each["groups"] >= each["patches"] >= 0
        assert 0 <= (each["continuity"] or 0) <= 1
    for each in found.get("published", ()):
        assert each["carried_a_gpu"] <= each["memory"]["streams"]
        assert each["sources"]
