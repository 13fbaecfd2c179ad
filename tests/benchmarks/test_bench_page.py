"""What a record of the page's memory must show; the run itself is one of the browser's tests."""

import base64
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.chromium import RATE
from benchmarks.page import ALLOWED, ENOUGH, family, problems, question, resident_mb

GOOD = {
    "at_s": 2000,
    "heap_mb": 9.0,
    "nodes": 900,
    "listeners": 90,
    "browser_mb": 400.0,
    "rss_mb": 300.0,
    "threads": 9,
    "fds": 9,
}


def record(**fields):
    found = {"failures": [], "log": [], "replies": 90, "interrupted": 80, "talk_s": ENOUGH}
    return found | {"calm": [GOOD] * 4, "again": [GOOD] * 4} | fields


def test_what_stays_as_it_was_is_no_problem():
    assert set(GOOD) == {"at_s", *ALLOWED}
    assert problems(record()) == []


@pytest.mark.parametrize("kind", ["calm", "again"])
@pytest.mark.parametrize("name", ALLOWED)
def test_what_grew_is_named(kind, name):
    more = GOOD | {name: GOOD[name] + ALLOWED[name] + 1}
    (found,) = problems(record(**{kind: [GOOD, GOOD, GOOD, more]}))
    assert found.startswith(f"{name} grew from {GOOD[name]:g} to {more[name]:g}")


def test_the_recording_of_both_sides_grows_the_browser_until_it_is_full():
    early, late = (GOOD | {"at_s": at} for at in (800, 1600))
    late["browser_mb"] += ALLOWED["browser_mb"] + 70
    assert problems(record(calm=[early, late])) == []
    (found,) = problems(record(calm=[early | {"at_s": 1500}, late]))
    assert found.startswith("browser_mb grew")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"failures": ["wrong"]}, "the page failed: wrong"),
        ({"log": ["Traceback"]}, "in the log: Traceback"),
        ({"replies": 0}, "nobody was answered"),
        ({"interrupted": 0}, "nobody was answered, or nobody interrupted"),
    ],
)
def test_what_failed_is_named(fields, problem):
    (found,) = problems(record(**fields))
    assert found.startswith(problem)


def test_a_short_talk_tells_nothing_of_growth():
    more = GOOD | {"nodes": 9000}
    assert problems(record(talk_s=ENOUGH - 1, calm=[GOOD, more])) == []


def test_a_question_has_silence_at_its_end():
    samples = np.frombuffer(base64.b64decode(question("what_is_three_plus_four")), "<i2")
    assert samples.any()
    assert not samples[-RATE // 2 :].any()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_memory_is_counted_for_children_too():
    code = "print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child = subprocess.Popen([sys.executable, "-c", code], **pipes)
    try:
        # Before it is Python it has next to none.
        child.stdout.readline()
        assert child.pid in family(os.getpid())
        assert 1 < resident_mb([child.pid]) < 1000
    finally:
        child.communicate(b"\n")
