"""The endurance of a server: a hundredth of `make soak`, and what its record must show."""

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.serving import FAILURE, GONE, late, problems
from benchmarks.serving_clients import KINDS, LEFT, Tally
from benchmarks.serving_leaver import STATES

GOOD = {"rss_mb": 400.0, "threads": 8, "fds": 8}


def record(**fields):
    found = {"problems": {}, "held": [], "log": [], "calm": [GOOD] * 4, "killed_s": {}}
    return found | fields


@pytest.mark.slow
def test_a_hundredth_of_it_leaves_threads_and_files_as_they_were(tmp_path, capsys):
    pytest.importorskip("starlette")
    file = tmp_path / "serving.json"
    options = ["--requests", "100", "--talk", "36", "--parts", "2", "--kills", "1", "--crowd", "0"]
    options += ["--users", "4", "--sessions", "1"]
    benchmarks.main(["serving", *options, "-o", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    # Not how long it took: the machine may have other things to do.
    assert problems(found) == [], capsys.readouterr().err
    assert set(found["outcomes"]) == set(KINDS)
    assert found["requests"] == 100
    assert found["talk_s"] >= 36
    assert set(found["killed_s"]) == set(STATES)
    assert not found["errors"].keys() & {"internal_error", "unknown", "rate_limit_exceeded"}


def test_a_record_without_growth_is_no_problem():
    assert problems(record()) == []


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"calm": [GOOD, GOOD, GOOD, GOOD | {"threads": 9}]}, "threads grew from 8 to 9"),
        ({"calm": [GOOD, GOOD, GOOD, GOOD | {"fds": 9}]}, "fds grew from 8 to 9"),
        ({"calm": [GOOD, GOOD, GOOD, GOOD | {"rss_mb": 433.0}]}, "rss_mb grew from 400 to 433"),
        ({"held": [{"sessions": 1.0}]}, "never given back: {'sessions': 1.0}"),
        ({"problems": {"speech: 500 internal_error": 2}}, "2 times speech: 500 internal_error"),
        ({"log": ["Traceback (most recent call last):"]}, "in the log: Traceback"),
    ],
)
def test_what_grew_or_failed_is_named(fields, problem):
    (found,) = problems(record(**fields))
    assert found.startswith(problem)


def test_a_client_that_was_held_is_named():
    times = {"waits": [0.01, GONE], "speaks": [0.01, GONE + 0.1]}
    assert late(record(killed_s=times)) == ["a client that speaks was held for 0.600 s"]


def test_unexpected_answers_are_problems():
    tally = Tally()
    tally.answered("speech", (200, None), frozenset({(200, None)}))
    tally.answered("speech", LEFT, frozenset({(200, None), LEFT}))
    assert not tally.problems
    tally.answered("speech", (500, "internal_error"), frozenset({(200, None)}))
    assert tally.problems == {"speech: 500 internal_error": 1}
    assert tally.outcomes["speech"] == {"200": 1, "left": 1, "500 internal_error": 1}


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ('{"level": "error", "event": "error"}', True),
        ('{"level": "warning", "event": "request"}', False),
        ("Traceback (most recent call last):", True),
        ("RuntimeWarning: coroutine 'x' was never awaited", True),
        ("listening on http://127.0.0.1:8000", False),
    ],
)
def test_failures_in_the_log(line, is_one):
    assert (FAILURE.search(line) is not None) == is_one
