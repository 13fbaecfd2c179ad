"""People of the load generator: seeded turns, and what a window shows of what they heard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.load import command
from benchmarks.load.people import (
    MOST_SENTENCES,
    Heard,
    carried,
    people,
    recording_files,
    summary,
    within,
)
from mimo_fast.bench.player import Player

RATE = 1000
ROOT = Path(__file__).parents[2]


def heard(asked, *arrivals, ended=None, error=None):
    player = Player(RATE)
    for time, samples in arrivals:
        player.hear(time, samples)
    times = [time for time, _ in arrivals]
    return Heard(asked, player, times, times, prompt=7, ended=ended, error=error)


def test_a_seed_repeats_and_another_does_not():
    first, again, other = (people("listeners", 9, 5.0, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [each.turn(3) for each in first] == [each.turn(3) for each in again]
    assert [each.turn(3) for each in first] != [each.turn(3) for each in other]


def test_all_arrive_in_order_within_the_ramp():
    times = [each.arrives for each in people("people", 200, 5.0, 1)]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 5


def test_listeners_ask_for_one_to_six_sentences_two_on_average():
    counts = [len(each.turn(i).sentences) for each in people("listeners", 50, 1, 1) for i in "abcd"]
    assert {*counts} == {*range(1, MOST_SENTENCES + 1)}
    assert sum(counts) / len(counts) == pytest.approx(2, abs=0.25)


def test_people_say_recordings_and_interrupt_some_replies():
    turns = [each.turn(i) for each in people("people", 100, 1, 1) for i in range(10)]
    assert {turn.said for turn in turns} == {*range(len(recording_files()))}
    assert all(not turn.sentences for turn in turns)
    barged = [turn.barge_in for turn in turns if turn.barge_in is not None]
    assert 0.1 < len(barged) / len(turns) < 0.2
    assert all(0.3 <= each <= 2 for each in barged)


def test_a_gap_counts_where_it_is_within_the_window():
    # Played from 1 to 1.5, silent to 2, played to 3.
    found = summary([heard(0.5, (1.0, 500), (2.0, 1000), ended=3.0)], 0, 4)
    assert found["gaps"] == 1
    assert found["gap_seconds"] == found["worst_gap"] == pytest.approx(0.5)
    assert found["played_seconds"] == pytest.approx(1.5)
    assert found["continuity"] == pytest.approx(0.75)
    assert found["first_audio"]["p50"] == pytest.approx(0.5)
    assert found["reply_seconds"]["p50"] == pytest.approx(1.5)
    assert (found["groups"], found["prompt_groups"]) == (2, 7)
    part = summary([heard(0.5, (1.0, 500), (2.0, 1000), ended=3.0)], 1.75, 2.25)
    assert part["gap_seconds"] == part["played_seconds"] == pytest.approx(0.25)
    assert part["first_audio"] is None
    assert part["requests"] == 0


def test_a_reply_that_waits_at_the_end_is_silent_until_then():
    waiting = summary([heard(0.5, (1.0, 500))], 0, 4)
    assert waiting["gap_seconds"] == pytest.approx(2.5)
    assert waiting["played_seconds"] == pytest.approx(0.5)
    assert summary([heard(0.5, (1.0, 500), ended=1.5)], 0, 4)["gaps"] == 0


def test_what_was_interrupted_is_not_heard_any_more():
    found = summary([heard(0.0, (1.0, 2000), ended=1.5)], 0, 4)
    assert found["played_seconds"] == pytest.approx(0.5)
    assert found["gaps"] == 0


def test_who_hears_nothing_waits_until_the_end_and_errors_are_counted():
    found = summary([heard(1.0), heard(1.0, error="BusyError", ended=1.0)], 0, 4)
    assert found["first_audio"]["p95"] == pytest.approx(3.0)
    assert found["errors"] == {"BusyError": 1}
    # Two seconds may pass before the first word; another has.
    assert found["gap_seconds"] == pytest.approx(1.0)
    assert found["continuity"] == 0
    assert not carried(found)
    assert summary([], 0, 4)["continuity"] is None


def test_overlap_of_intervals():
    assert within(1, 3, 2, 5) == 1
    assert within(1, 3, 4, 5) == 0


def point(side, streams, profile="listeners", **fields):
    found = {"side": side, "streams": streams, "profile": profile, "gaps": 0, "continuity": 1.0}
    found |= {"groups_a_second": 10.0, "first_audio": {"p95": 0.3}, "errors": {}}
    return found | fields


def test_most_streams_are_those_before_the_first_that_fails():
    points = [point("now", n) for n in (1, 2, 4, 16)] + [point("now", 8, continuity=0.9)]
    points[1] |= {"gaps": 1, "continuity": 0.9995}
    assert command.most_carried(points) == {"now": {"carried": 4, "without_gap": 1}}


def test_sides_are_compared_by_their_medians():
    points = [
        point(side, 16, groups_a_second=rate, first_audio={"p95": rate / 100})
        for side, rates in (("before", (90, 100, 300)), ("now", (240, 250, 260)))
        for rate in rates
    ]
    (found,) = command.pairs(points)
    assert found["groups_a_second_ratio"] == pytest.approx(2.5)
    assert found["first_audio_p95"] == {"before": 1.0, "now": 2.5}
    assert command.pairs(points[:3]) == []
    closed = [point("now", n, "closed", groups_a_second=100.0 * n) for n in (1, 4)]
    assert command.ratios(closed) == {"now": {"1": 1.0, "4": 4.0}}


def test_a_checkout_with_the_same_source_gets_our_kernels(tmp_path):
    root, tree = tmp_path / "root", tmp_path / "tree"
    for each in (root, tree):
        (each / "csrc").mkdir(parents=True)
        (each / "mimo_fast").mkdir()
        (each / "csrc" / "a.cpp").write_text("int a;")
        (each / "setup.py").write_text("")
    (root / "mimo_fast" / "_native.so").write_bytes(b"made")
    command.native(tree, root)
    assert (tree / "mimo_fast" / "_native.so").read_bytes() == b"made"
    (tree / "mimo_fast" / "_native.so").unlink()
    (tree / "csrc" / "a.cpp").write_text("int b;")
    with pytest.raises(command.CompareError, match="cannot build"):
        command.native(tree, root)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["closed", "listeners", "people"])
def test_an_engine_answers_a_crowd(profile):
    request = {"streams": 2, "profile": profile, "seconds": 3.0, "ramp": 0.5}
    run = [sys.executable, "-m", "benchmarks.load.engine", json.dumps(request)]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = json.loads(found.stdout)
    assert seen["groups"] > 0
    assert seen["prompt_groups"] > 0
    assert not seen["errors"]
    assert seen["cpus"] > 0
    assert seen["peak_bytes"] > 1e8


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["listeners", "people"])
def test_a_server_answers_a_crowd(profile):
    pytest.importorskip("starlette")
    request = {"streams": 2, "profile": profile, "seconds": 4.0, "ramp": 0.5}
    run = [sys.executable, "-m", "benchmarks.load.server", json.dumps(request)]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    seen = json.loads(found.stdout)
    assert seen["patches"] > 0
    assert not seen["errors"]
    assert seen["cpus"] > 0
    assert seen["peak_bytes"] > 1e8


def test_wrong_usage_is_said_before_anything_runs():
    for wrong in (["--streams", "0"], ["--seconds", "0"], ["--model", "nano"]):
        args = _parsed(wrong)
        with pytest.raises(ValueError, match=r"must be at least 1|go together"):
            command.run(args)


def _parsed(arguments):
    from argparse import ArgumentParser

    parser = ArgumentParser()
    command.add_options(parser.add_argument)
    return parser.parse_args(arguments)
