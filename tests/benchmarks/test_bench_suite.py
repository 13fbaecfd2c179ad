"""make bench: its parts end in time, whatever they do, and keep what they have measured."""

import subprocess
import sys
import textwrap

import pytest

from benchmarks import suite
from benchmarks.__main__ import main
from benchmarks.records import JsonLines, read_records
from benchmarks.suite import GRACE, LOAD, PARTS, QUICK, Part, run_part, run_parts

APPEND = 'open(sys.argv[1], "a").write(\'{"kind": "op", "n": 1}\\n\')'


def process(code: str):
    """A start that runs Python code instead, with the output's path as its argument."""
    text = "import sys, time, pathlib\n" + textwrap.dedent(code)
    return lambda part, output: subprocess.Popen([sys.executable, "-c", text, str(output)])


def test_a_part_that_runs_over_is_ended_as_by_ctrl_c_and_keeps_its_records(tmp_path):
    output = tmp_path / "rows.jsonl"
    code = f"""
        {APPEND}
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            {APPEND}
    """
    wrong = run_part(Part("ops", 1, ""), output, 3, process(code))
    assert wrong is not None
    assert "its records are kept" in wrong
    assert len(read_records(output)) == 2


def test_a_part_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "GRACE", 0.5)
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    assert run_part(Part("ops", 1, ""), tmp_path / "rows.jsonl", 2, process(code)) is not None


def test_a_part_that_fails_is_named(tmp_path):
    assert (
        run_part(Part("ops", 1, ""), tmp_path / "rows.jsonl", 60, process("sys.exit(3)"))
        == "exit code 3"
    )


@pytest.mark.parametrize("name", [QUICK, LOAD])
def test_a_file_of_one_record_becomes_a_line_of_the_same_file(tmp_path, name):
    output = tmp_path / "rows.jsonl"
    code = 'pathlib.Path(sys.argv[1]).write_text(\'{\\n "kind": "quick"\\n}\')'
    assert run_part(Part(name, 1, ""), output, 60, process(code)) is None
    assert read_records(output) == [{"kind": "quick"}]


def test_what_does_not_fit_into_the_budget_is_skipped_by_name(tmp_path):
    output = tmp_path / "rows.jsonl"
    parts = (Part("first", 50, ""), Part("long", 500, ""), Part("last", 20, ""))
    times = iter([0.0, 0.0, 60.0, 60.0])
    amiss = run_parts(parts, output, GRACE + 100, lambda: next(times), process(APPEND))
    assert list(amiss) == ["long"]
    assert [record.get("name", record["kind"]) for record in read_records(output)] == [
        "op",
        "long",
        "op",
    ]


def test_ctrl_c_keeps_what_was_measured_and_ends_with_130(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"

    def interrupted(parts, path, budget):
        JsonLines(path).append({"kind": "op"})
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "run_parts", interrupted)
    assert main(["suite", "--no-report", "-o", str(output)]) == 130
    assert f"results: {output}" in capsys.readouterr().out
    assert len(read_records(output)) == 1


def test_all_parts_fit_into_ten_minutes():
    assert sum(part.seconds for part in PARTS) <= suite.BUDGET - GRACE
    assert suite.BUDGET < 600


def test_unknown_parts_are_bad_usage(capsys):
    assert main(["suite", "--only", "nothing*"]) == 2
    assert "there are tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part", [part for part in PARTS if part.name != QUICK], ids=lambda part: part.name
)
def test_every_part_is_a_command_that_exists(part, monkeypatch):
    seen = []
    for name in ("ops.run", "e2e.run", "load.command.run"):
        monkeypatch.setattr(f"benchmarks.{name}", lambda run: seen.append(run) or 0)
    assert main([*part.command.split(), "--device", "cpu"]) == 0
    assert len(seen) == 1
