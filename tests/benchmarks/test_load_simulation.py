"""The simulation of many people: against closed forms, and its tables of step times."""

from dataclasses import replace

import pytest

from benchmarks.load.steps import (
    CARDS,
    between,
    measured_table,
    prompt_seconds,
    published,
    streams_that_fit,
)

policy = pytest.importorskip("mimo_fast.runtime.engine.policy")

from benchmarks.load import simulate  # noqa: E402
from benchmarks.load.engine import Point  # noqa: E402
from benchmarks.load.people import carried  # noqa: E402
from benchmarks.load.simulation import Piece, Simulation, long_reply  # noqa: E402
from benchmarks.load.steps import StepTable  # noqa: E402
from mimo_fast.bench.synthetic import preset_configs  # noqa: E402

RATE = 24_000
PATCH = 3840


def patches(count, prompt=10):
    """A reply of patches alone, each of which is heard at once."""
    piece = Piece(prompt, (PATCH,) * count, (True,) * count)
    return lambda turn, person, index: [piece]


def run(streams, table, profile="listeners", count=50, **fields):
    point = Point(streams, profile, **({"seconds": 20.0, "ramp": 2.0} | fields))
    return Simulation(point, table, patches(count), RATE).run()


def linear(seconds, most=512, prompt=0.0):
    """A step takes so many seconds a row."""
    return StepTable(((1, seconds), (most, most * seconds)), prompt)


def test_a_closed_loop_takes_what_its_steps_take():
    # 50 groups of 10 ms and a prompt of 10 groups, 5 ms each: 550 ms for each reply.
    found = run(1, linear(0.01, prompt=0.005), "closed")
    assert found["groups_a_second"] == pytest.approx(50 / 0.55, rel=0.01)
    assert found["rows_a_step"] == pytest.approx(50 / 51, rel=0.01)


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_rows_that_cost_nothing_more_are_computed_together(streams):
    # A step takes 20 ms, whatever its rows.
    found = run(streams, StepTable(((1, 0.02), (512, 0.02)), 0.0), "closed", count=500)
    assert found["groups_a_second"] == pytest.approx(streams / 0.02, rel=0.02)


def test_listeners_ask_for_as_much_as_they_hear():
    found = run(10, linear(0.001), seconds=40.0)
    assert found["gaps"] == 0
    # The room of two seconds is filled at first, and each reply is waited for.
    assert found["audio_a_second"] == pytest.approx(10, rel=0.1)
    assert carried(found)


@pytest.mark.parametrize("seconds", [0.002, 0.004, 0.008])
def test_as_many_are_carried_as_the_time_of_a_patch_holds(seconds):
    # N rows of so many seconds each in every 160 ms.
    most = 0.16 / seconds
    assert carried(run(round(0.9 * most), linear(seconds), count=400))
    assert not carried(run(round(1.15 * most), linear(seconds), count=400))


def test_rows_that_are_nearly_free_join_though_one_takes_most_of_a_step():
    # A row takes 24 ms and eight 25 ms; one by one they would take 192 of every 160 ms.
    assert carried(run(8, StepTable(((1, 0.024), (8, 0.025), (512, 0.1)), 0.0), count=400))


def test_whom_nobody_answers_is_not_carried():
    found = run(64, linear(1.0))
    assert not carried(found)
    assert found["continuity"] < 0.5


def test_the_first_audio_of_a_lone_listener_is_its_prompt_and_a_step():
    found = run(1, linear(0.01, prompt=0.005))
    assert found["first_audio"]["p50"] == pytest.approx(0.05 + 0.01, abs=1e-6)


def test_it_repeats():
    assert run(8, linear(0.01)) == run(8, linear(0.01))


def test_pieces_follow_one_another_without_a_new_request():
    piece = Piece(10, (PATCH,) * 5, (True,) * 5)
    point = Point(1, "closed", seconds=5.0, ramp=0.5)
    made = Simulation(point, linear(0.01), lambda turn, person, index: [piece, piece], RATE)
    made.run()
    assert all(len(each.groups) == 10 for each in made.heard[:-1])
    assert all(each.player.duration == pytest.approx(1.6) for each in made.heard[:-1])


def test_a_long_reply_says_all_of_its_patches_and_the_first_with_the_second():
    _, config = preset_configs("7b")
    piece = long_reply(100, 6, 50, config, RATE)
    assert len(piece.samples) == len(piece.spoken) == 56
    assert sum(piece.samples) == 50 * PATCH
    assert piece.samples[:8] == (0,) * 7 + (PATCH,)
    assert sum(piece.spoken) == 50
    # Ten patches are held back in the end.
    assert piece.samples[-1] == 11 * PATCH


def test_between_points():
    points = ((1, 1.0), (4, 4.0), (8, 6.0))
    assert [between(points, x) for x in (0, 1, 2, 4, 6, 8, 12)] == [0, 1, 2, 4, 5, 6, 8]
    assert between(((4, 2.0),), 2) == 2


def test_a_table_of_closed_loops_is_what_their_steps_took():
    points = [
        # Keys of JSON are texts.
        {"seconds": 2.0, "steps": {"1": (100, 0.5), "4": (50, 0.5)}, "prefills": (200, 0.4)},
        {"seconds": 1.5, "steps": {"4": (50, 0.7), "8": (4, 0.2)}, "prefills": (200, 0.6)},
    ]
    table = measured_table(points)
    # 3.5 s, of which 1.9 were steps and 1.0 prompts, in 204 steps; four of 8 rows are too few.
    between_steps = 0.6 / 204
    assert table.rows == (
        (1, pytest.approx(0.005 + between_steps)),
        (4, pytest.approx(0.012 + between_steps)),
    )
    assert table.prompt == pytest.approx(1.0 / 400)


def test_an_h100_is_what_was_measured_and_more_rows_are_predicted():
    table, card = published("H100", "int4")
    one, four, sixteen = (table.step(n, 0, 0, 242 * n, 0) for n in (1, 4, 16))
    assert one == pytest.approx(5.42e-3, rel=0.01)
    assert four == pytest.approx(7.22e-3, rel=0.01)
    assert sixteen == pytest.approx(9.73e-3, rel=0.01)
    assert [seconds for _, seconds in table.rows] == sorted(seconds for _, seconds in table.rows)
    assert any(each.startswith("predicted: groups of more than 16") for each in table.sources)
    assert card.read_Bps < CARDS["H100"].read_Bps
    lone, many = (between(table.codec, n) for n in (1, 64))
    assert lone == pytest.approx(3.62e-3, rel=0.01)
    one_by_one, _ = published("H100", "int4", batched_codec=False)
    assert between(one_by_one.codec, 64) == pytest.approx(64 * lone)
    assert many < 64 * lone
    slower, _ = published("4090", "int4")
    assert slower.step(1, 0, 0, 242, 0) > one
    assert all(each.startswith("predicted") for each in slower.sources)


def test_prompts_are_a_line():
    groups = [
        {"batch": 1, "prompt_groups": 242, "prefill": 0.015},
        {"batch": 1, "prompt_groups": 2034, "prefill": 0.075},
        {"batch": 4, "prompt_groups": 242, "prefill": 9.0},
    ]
    base, each = prompt_seconds(groups)
    assert base + 242 * each == pytest.approx(0.015)
    assert base + 2034 * each == pytest.approx(0.075)


def test_memory_holds_fewer_rows_of_a_wider_cache_and_of_more_groups():
    card = CARDS["H100"]
    fits = streams_that_fit(card, "int8", 1100)
    assert fits["streams"] > 256
    assert fits["fixed_bytes"] + fits["streams"] * fits["row_bytes"] <= card.memory
    assert streams_that_fit(card, "int8", 1100, None)["streams"] < fits["streams"]
    assert streams_that_fit(card, "int8", 2200)["streams"] < fits["streams"]
    small = replace(card, memory=12e9)
    assert streams_that_fit(small, "bf16", 1100)["streams"] == 0
    assert streams_that_fit(small, "int4", 1100)["streams"] > 0


def test_what_limits_is_named():
    fits = {"streams": 40, "groups": 1100}
    points = [
        {"streams": n, "continuity": c, "errors": {}, "busy": c} for n, c in ((16, 1.0), (32, 0.9))
    ]
    assert simulate.most(points) == 16
    assert simulate._limit(points, 16, [16, 32, 40], fits).startswith("time: 32 streams")
    assert simulate._limit(points, 40, [16, 40], fits).startswith("memory: 40 rows of 1100")
    assert simulate._limit([], 0, [1], {"streams": 0}) == "the weights do not fit"


def test_the_most_that_are_carried_is_found_by_halves():
    table = linear(0.004)
    found = simulate.sweep(
        Point(1, seconds=20.0, ramp=2.0), table, patches(400), (1, 8, 16, 24, 32, 36, 64, 128)
    )
    counts = [each["streams"] for each in found]
    assert counts == sorted(counts)
    assert len(counts) < 8
    assert simulate.most(found) == 36
