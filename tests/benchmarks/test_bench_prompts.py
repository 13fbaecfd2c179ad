"""Products of prompts beside the CPU's integer peak: measured, recorded, shown in the report."""

import json

import pytest
import torch

from benchmarks import prompts, records, report
from benchmarks.__main__ import main
from mimo_fast.kernels.cpu import library as native

SMALL = {"out": ((256,), 128, False), "gate_up": ((128, 128), 256, True)}


def sets() -> list[str]:
    known = native.compiled().instruction_sets() if native.available() else []
    return [name for name in known if name in prompts.SETS]


needs_tiles = pytest.mark.skipif(not sets(), reason="no instruction set with tiles")


@needs_tiles
def test_each_product_is_a_record_and_a_row_of_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "products", lambda: SMALL)
    chosen = native.compiled().instruction_set()
    if chosen not in sets():
        pytest.skip(f"this process multiplies by {chosen}")
    threads, output = torch.get_num_threads(), tmp_path / "2026-01-01-prompts.jsonl"
    options = ["--sets", chosen, "--rows", "5", "9", "--threads", "1", "--tries", "2"]
    options += ["-o", str(output)]
    assert main(["prompts", *options]) == 0
    assert torch.get_num_threads() == threads
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["quantization"], r["product"], r["rows"]) for r in found] == [
        (form, name, rows) for form in ("int4", "int8") for name in SMALL for rows in (5, 9)
    ]
    for record in found:
        assert record["share"] == pytest.approx(record["reached"] / record["peak"])
        assert 0 < record["share"] < 1.1
        assert (record["instructions"], record["threads"]) == (chosen, 1)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split()[:3] == ["instructions", "product", "weights"]
    measured = records.Measured.read(tmp_path)
    assert len(measured.find("prompt")) == 8
    text = report.document(measured, tmp_path, ())
    section = text.split("## Prompts on a CPU")[1].split("\n## ")[0]
    assert f"| {chosen} | gate_up | int8 | N=256 K=256 | 1 | 9 |" in section
    assert output.name in section


@needs_tiles
def test_sets_are_measured_in_processes_of_their_own(monkeypatch):
    called = []

    def run(command, env, **options):
        called.append((env[native.INSTRUCTION_SET], command[command.index("--sets") + 1]))
        return type("Done", (), {"returncode": len(called) - 1})

    monkeypatch.setattr(prompts.subprocess, "run", run)
    monkeypatch.setattr(native.compiled(), "instruction_set", lambda: "another")
    assert main(["prompts"]) == len(sets()) - 1
    assert called == [(name, name) for name in sets()]


def test_a_set_that_the_cpu_lacks_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(prompts, "SETS", ("mmx",))
    with pytest.raises(SystemExit):
        main(["prompts", "--sets", "sse9"])
    assert "invalid choice: 'sse9'" in capsys.readouterr().err
    assert main(["prompts", "--sets", "mmx"]) == 2
    assert "error: " in capsys.readouterr().err


def test_without_records_the_report_says_so(tmp_path):
    text = report.document(records.Measured.read(tmp_path), tmp_path, ())
    assert "Products of int4 and int8 beside the integer peak: not measured yet." in text


def test_the_published_dimensions():
    shapes = {
        name: (sum(blocks), columns) for name, (blocks, columns, _) in prompts.products().items()
    }
    assert shapes == {
        "qkv": (6144, 4096),
        "out": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    }
