"""The policy by itself, over records and a clock that is simulated: order, bounds, determinism."""

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_fast.config import GROUP_SECONDS
from mimo_fast.runtime.engine.policy import (
    DRY,
    FIRST_SLICE,
    JOINING,
    PATIENCE,
    PROMPT,
    SLICE,
    SLOT_PATIENCE,
    STEP,
    Bounds,
    Demand,
    Holder,
    Load,
    Priority,
    StepCost,
    choose_slot,
    next_step,
    refusal,
)

LISTENER, BATCH = Priority.LISTENER, Priority.BATCH


def known(base: float, row: float, group: float = 0.0) -> StepCost:
    return StepCost(base, row, group)


class TestOrder:
    def test_who_runs_dry_who_has_heard_nothing_who_listens_batches(self):
        demands = [
            Demand(BATCH, 0.0, served=9.9),
            Demand(LISTENER, 0.0, served=9.9, dry=13.0),
            Demand(LISTENER, 9.0, served=9.9),
            Demand(LISTENER, 0.0, served=9.9, dry=10.0 + DRY / 2),
            Demand(BATCH, 0.0, served=9.8),
            Demand(LISTENER, 8.0, served=9.9),
            Demand(LISTENER, 0.0, served=9.9, dry=12.0),
        ]
        # Rows are free: all join, in order.
        assert next_step(demands, 10.0, StepCost()).rows == (3, 5, 2, 6, 1, 4, 0)
        # Rows are all that a step costs: to three that are urgent half as many are added.
        assert next_step(demands, 10.0, known(0, 0.005)).rows == (3, 5, 2, 6)

    def test_rows_that_are_nearly_free_join_the_urgent(self):
        demands = [Demand(LISTENER, 0.0)] + [Demand(LISTENER, 0.0, dry=9.0) for _ in range(63)]
        assert len(next_step(demands, 0.1, known(0.007, 0.00007)).rows) > 20
        assert len(next_step(demands, 0.1, known(0.0, 0.002)).rows) == 1

    def test_without_anybody_urgent_a_step_is_filled(self):
        demands = [Demand(LISTENER, 0.0, dry=9.0 + i) for i in range(100)]
        assert next_step(demands, 0.1, known(0.0, 0.002)).rows == tuple(range(20))
        # A model of which a step takes longer is not held up by one row: it doubles at most.
        assert next_step(demands, 0.1, known(0.5, 0.01)).rows == tuple(range(50))
        assert next_step(demands, 0.1, known(0.0, 5.0)).rows == (0,)

    def test_prompts_are_as_long_as_a_step_may_take(self):
        cost = known(0.0, 0.002, group=0.0001)
        demands = [Demand(LISTENER, i, prompt=300, chunk=16) for i in range(3)]
        assert next_step(demands, 3.0, cost).prompts == ((0, 300), (1, 100))
        # Where chunks are fixed at least one is computed.
        fixed = [replace(each, chunk=300) for each in demands]
        assert next_step(fixed, 3.0, known(0, 0, 0.01)).prompts == ((0, 300),)


@dataclass
class Talk:
    """A request in the simulated engine."""

    demand: Demand
    groups: int
    pauses: bool = False
    waited: float = 0.0
    served: int = 0
    gaps: float = 0.0
    times: list[float] = field(default_factory=list)


def simulate(
    talks: list[Talk], cost: StepCost, seconds: float, seed: int = 0
) -> tuple[list[tuple[float, tuple[int, ...]]], float]:
    """Runs the policy until all is done or so long -> what each step computed, the longest step.

    The next group of a listener adds 160 ms; whoever pauses is not asked for now and then.
    """
    now, log, longest, rng = 0.0, list[tuple[float, tuple[int, ...]]](), 0.0, random.Random(seed)
    while now < seconds:
        here = [
            talk
            for talk in talks
            if talk.demand.arrived <= now
            and talk.groups
            and not (talk.pauses and rng.random() < 0.3)
        ]
        if not here:
            later = [talk.demand.arrived for talk in talks if talk.demand.arrived > now]
            if not later and not any(talk.groups for talk in talks):
                break
            now = min(later) if later else now + 0.01
            continue
        step = next_step([talk.demand for talk in here], now, cost)
        assert step == next_step([replace(talk.demand) for talk in here], now, cost)
        assert step.rows or step.prompts
        groups = sum(count for _, count in step.prompts)
        took = (cost.step(len(step.rows)) if step.rows else 0.0) + groups * cost.group
        longest, now = max(longest, took), now + took
        log.append((now, tuple(talks.index(here[i]) for i in step.rows)))
        for i, count in step.prompts:
            demand = here[i].demand
            here[i].waited = max(here[i].waited, now - demand.served)
            demand.served, demand.prompt = now, demand.prompt - count
        for i in step.rows:
            talk, demand = here[i], here[i].demand
            talk.waited = max(talk.waited, now - demand.served)
            if demand.dry is not None and talk.times:
                talk.gaps += max(now - demand.dry, 0.0)
            demand.served = now
            if demand.priority is LISTENER:
                demand.hears(GROUP_SECONDS, now)
            talk.times.append(now)
            talk.groups -= 1
    for talk in talks:
        if talk.groups and talk.demand.arrived < now and not talk.pauses:
            # Whoever was never served has waited, too.
            talk.waited = max(talk.waited, now - talk.demand.served)
    return log, longest


mixes = st.lists(
    st.tuples(
        st.sampled_from([LISTENER, LISTENER, BATCH]),
        st.floats(0, 3),
        st.integers(0, 400),
        st.integers(1, 60),
        st.sampled_from([1, 16, 512]),
    ),
    min_size=1,
    max_size=24,
)
costs = st.builds(
    known,
    st.sampled_from([0.0, 0.001, 0.007, 0.3]),
    st.sampled_from([1e-4, 0.003, 0.02, 0.4]),
    st.sampled_from([1e-5, 1e-4, 2e-3]),
)


@settings(max_examples=60, deadline=None)
@given(mixes, costs)
def test_nobody_waits_longer_than_the_stated_bound(mix, cost):
    """Adversarial loads, far more than there is time for: PATIENCE + (n + 1) steps at most."""
    talks = [
        Talk(Demand(priority, arrived, prompt=prompt, chunk=chunk), groups)
        for priority, arrived, prompt, groups, chunk in mix
    ]
    _, longest = simulate(talks, cost, 60.0)
    bound = PATIENCE + (len(talks) + 1) * longest + 1e-6
    assert max(talk.waited for talk in talks) <= bound


def test_a_batch_beside_more_listeners_than_there_is_time_for_goes_on():
    talks = [Talk(Demand(LISTENER, 0.0), 4000) for _ in range(20)] + [Talk(Demand(BATCH, 0.0), 5)]
    _, longest = simulate(talks, known(0.0, 0.02), 20.0)
    assert talks[-1].groups == 0
    assert talks[-1].waited <= PATIENCE + 22 * longest


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 10), st.integers(1, 40), st.integers(0, 2**16))
def test_batches_cost_no_listener_a_gap(listeners, batches, seed):
    """As long as listeners alone need half of the time."""
    rng = random.Random(seed)
    talks = [Talk(Demand(LISTENER, rng.random() * 2), 60) for _ in range(listeners)]
    talks += [Talk(Demand(BATCH, rng.random()), 100) for _ in range(batches)]
    simulate(talks, known(0.001, 0.006), 30.0)
    assert max(talk.gaps for talk in talks[:listeners]) == 0
    assert all(talk.times for talk in talks[listeners:])


def test_first_audio_does_not_wait_for_those_who_have_enough():
    """A newcomer's ten groups take ten steps of its own beside listeners with audio in hand."""
    cost = known(0.0005, 0.003)
    talks = [Talk(Demand(LISTENER, 0.0), 400) for _ in range(15)]
    talks.append(Talk(Demand(LISTENER, 5.0), 10))
    # It hears nothing before its tenth group.
    newcomer, log = talks[-1], list[float]()
    now = 0.0
    while newcomer.groups:
        here = [talk for talk in talks if talk.demand.arrived <= now and talk.groups]
        step = next_step([talk.demand for talk in here], now, cost)
        now += cost.step(len(step.rows))
        for i in step.rows:
            here[i].groups -= 1
            here[i].demand.served = now
            if here[i] is newcomer:
                log.append(now)
            else:
                here[i].demand.hears(GROUP_SECONDS, now)
    together = 10 * cost.step(16)
    assert log[-1] - 5.0 < together / 3


def test_the_simulation_is_a_function_of_its_input():
    def run() -> object:
        rng = random.Random(3)
        talks = [
            Talk(
                Demand(rng.choice([LISTENER, BATCH]), rng.random(), prompt=rng.randrange(99)),
                20,
                pauses=rng.random() < 0.5,
            )
            for _ in range(20)
        ]
        return simulate(talks, known(0.002, 0.004, 1e-4), 20.0, seed=5)

    assert run() == run()


def test_whoever_pauses_is_not_owed_what_was_not_asked_for():
    demand = Demand(LISTENER, 0.0)
    demand.hears(0.16, 1.0)
    assert demand.dry == 1.16
    demand.hears(0.16, 9.0)
    assert demand.dry == 9.16


class TestCost:
    @pytest.mark.parametrize(("base", "row"), [(0.007, 0.0001), (0.001, 0.003), (0.0, 0.01)])
    def test_is_learned_from_steps(self, base, row):
        cost, rng = StepCost(), random.Random(1)
        for _ in range(200):
            rows = rng.randint(1, 16)
            cost.saw(rows, (base + rows * row) * rng.uniform(0.9, 1.1))
        assert cost.step(8) == pytest.approx(base + 8 * row, rel=0.1)
        assert cost.row == pytest.approx(row, rel=0.5, abs=5e-5)

    def test_steps_of_one_size_are_taken_for_rows_alone(self):
        cost = StepCost()
        for _ in range(9):
            cost.saw(4, 0.02)
        assert (cost.base, cost.row) == pytest.approx((0.0, 0.005))

    def test_a_hiccup_counts_for_little(self):
        cost = StepCost()
        for _ in range(50):
            cost.saw(4, 0.02)
            cost.saw_prompts(100, 0.01)
        cost.saw(4, 30.0)
        cost.saw_prompts(100, 30.0)
        assert cost.step(4) < 0.025
        assert cost.group < 0.0002


class TestSlots:
    def asks(self, priority: Priority = LISTENER, served: float = 10.0) -> Demand:
        return Demand(priority, 0.0, served=served)

    def test_free_ones_then_those_that_rest_then_whoever_had_one_for_longest(self):
        rests, runs = Holder(False, BATCH, 7, 0), Holder(True, LISTENER, 9, SLICE)
        older = replace(rests, used=3)
        chosen = [
            choose_slot(holders, self.asks(), False, True, 10.0)
            for holders in (
                [runs, None, rests],
                [runs, rests, older],
                [runs, replace(runs, slice=40)],
            )
        ]
        assert chosen == [1, 2, 1]

    @pytest.mark.parametrize(("begun", "slice"), [(False, FIRST_SLICE), (True, SLICE)])
    def test_a_row_keeps_its_slot_for_a_slice(self, begun, slice):
        for more, slot in ((-1, None), (0, 0)):
            holder = Holder(True, LISTENER, 1, slice + more)
            assert choose_slot([holder], self.asks(), begun, True, 10.0) == slot

    def test_a_batch_gives_its_slot_to_a_listener_and_not_the_other_way(self):
        batch, listener = Holder(True, BATCH, 1, FIRST_SLICE), Holder(True, LISTENER, 1, 500)
        assert choose_slot([listener, batch], self.asks(), True, True, 10.0) == 1
        assert choose_slot([listener], self.asks(BATCH), False, True, 10.0) is None
        late = 10.0 + SLOT_PATIENCE + 0.1
        assert choose_slot([listener], self.asks(BATCH), False, True, late) == 0
        # Also one that nobody waits for yet.
        assert choose_slot([listener], self.asks(BATCH), False, False, 10.0) is None
        assert choose_slot([listener], self.asks(BATCH), False, False, late) == 0


class TestAdmission:
    LOAD = Load(running=4, waiting=2, listeners=5, group=0.02, parked=3 * 2**20)

    def test_a_full_queue(self):
        said = refusal(self.LOAD, Bounds(queue=2), BATCH)
        assert said is not None
        assert said.startswith("4 replies are running and 2 wait: try again later")
        assert refusal(self.LOAD, Bounds(queue=3), BATCH) is None

    def test_host_memory_for_those_who_wait(self):
        said = refusal(self.LOAD, Bounds(parked=2 * 2**20), BATCH)
        assert said is not None
        assert "would need 3 MiB of host memory" in said
        assert refusal(self.LOAD, Bounds(parked=3 * 2**20), BATCH) is None

    def test_time_that_listeners_need(self):
        # Six listeners of 20 ms each need 120 of every 160 ms.
        assert refusal(self.LOAD, Bounds(load=0.75), LISTENER) is None
        said = refusal(self.LOAD, Bounds(load=0.7), LISTENER)
        assert said is not None
        assert "5 listeners are served, and one more would need 75% of real time" in said
        assert refusal(self.LOAD, Bounds(load=0.7), BATCH) is None
        # However slow the machine, one is let in.
        alone = replace(self.LOAD, listeners=0, group=9.0)
        assert refusal(alone, Bounds(load=0.7), LISTENER) is None


def test_the_stated_wait_is_half_a_group_of_audio():
    assert STEP + PROMPT == GROUP_SECONDS / 2
    assert 0 < JOINING < 1


def test_a_priority_has_a_name():
    assert [Priority.of(name) for name in ("listener", "batch")] == [LISTENER, BATCH]
    with pytest.raises(ValueError, match="priority must be 'listener' or 'batch', not 'urgent'"):
        Priority.of("urgent")
