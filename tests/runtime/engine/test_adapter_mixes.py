"""Rows that choose their adapter: each draws what it draws alone, and shares no beginning."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import THREE, slow_after
from replays import repeated
from replies import CAPACITY, Consumer, Drawn, RequestSpec, drawn, replies_of

from mimo_fast import MimoAudio
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.lm.graphs import Graphs

CHOICES = (None, *THREE)


@pytest.fixture(scope="module")
def choices(requests: list[RequestSpec]) -> list[RequestSpec]:
    """Four prompts, each with every adapter and with none."""
    return [replace(each, adapter=adapter) for each in requests[1:5] for adapter in CHOICES]


@pytest.fixture(scope="module")
def lone(tuned: MimoAudio, choices: list[RequestSpec]) -> list[Drawn]:
    """What each gives in an engine of its own."""
    return [drawn(list(each.start(Engine(tuned.lm, 1, CAPACITY)))) for each in choices]


@pytest.fixture
def engine(tuned: MimoAudio) -> Engine:
    return Engine(tuned.lm, 3, CAPACITY)


def test_adapters_change_what_is_drawn(lone, choices, alone):
    """The mixes would not notice one that does nothing; without one it is the model itself."""
    for first in range(0, len(choices), len(CHOICES)):
        group = lone[first : first + len(CHOICES)]
        assert all(one != other for i, one in enumerate(group) for other in group[:i])
    assert lone[:: len(CHOICES)] == alone[1:5]


@pytest.mark.parametrize("seed", slow_after(6, range(40)))
def test_any_mix_gives_the_tokens_of_lone_runs(tuned, engine, choices, lone, seed):
    """More rows than slots, so that some are evicted, with priorities, pauses and cancels."""
    rng = random.Random(seed)
    engine.overlaps = seed % 5 < 2
    if seed % 3 == 2:
        prompts, packed = seed % 5 > 0, bool(seed % 2)
        engine.decoder.graphs = Graphs(tuned.lm, engine.state, repeated, None, prompts, packed)
    to_start = [rng.randrange(len(choices)) for _ in range(8)]
    running, ended = list[tuple[Consumer, int]](), list[tuple[Consumer, int]]()
    while running or to_start:
        if to_start and (not running or rng.random() < 0.4):
            chosen = to_start.pop()
            consumer = Consumer(choices[chosen], rng.choice([3, 1000, 1000, 1000]))
            priority = rng.choice([Priority.LISTENER, Priority.BATCH])
            consumer.start(engine, ahead=rng.choice([1, 2, None]), priority=priority)
            running.append((consumer, chosen))
            continue
        each = rng.choice(running)
        if rng.random() < 0.03:
            each[0].reply.cancel()
            each[0].patience = len(each[0].got)
            each[0].reply.close()
        elif each[0].take():
            continue
        running.remove(each)
        ended.append(each)
    for consumer, chosen in ended:
        assert drawn(consumer.got) == lone[chosen][: consumer.patience]
    assert not engine._requests


def test_an_evicted_row_keeps_its_adapter(tuned, choices, lone):
    engine = Engine(tuned.lm, 1, CAPACITY)
    consumers = [Consumer(each, 1000).start(engine) for each in choices[: len(CHOICES)]]
    left = [*consumers]
    while left:
        left = [each for each in left if each.take()]
        # The one slot goes from one to the other, with its adapter.
        if (owner := engine.slots.owner(0)) is not None:
            assert engine.state.adapters[0] == owner.adapter
    assert engine.slots.evictions >= len(CHOICES)
    assert [drawn(each.got) for each in consumers] == lone[: len(CHOICES)]


def beginnings(engine: Engine, requests: list[RequestSpec]) -> tuple[list[Drawn], int, int]:
    """Replies one after the other; prompts that began in the tree, and groups that they reused."""
    got = [drawn(list(each.start(engine))) for each in requests]
    return got, engine.steps.prefixes.hits, engine.steps.prefixes.reused


def test_a_beginning_is_shared_within_an_adapter_and_never_between(engine, choices, lone):
    group = choices[-len(CHOICES) :]
    got, hits, _ = beginnings(engine, group)
    assert (got, hits) == (lone[-len(CHOICES) :], 0)
    # Noted twice, it is kept, by each adapter for itself.
    got, hits, _ = beginnings(engine, group)
    assert (got, hits) == (lone[-len(CHOICES) :], 0)
    got, hits, reused = beginnings(engine, group)
    assert (got, hits) == (lone[-len(CHOICES) :], len(CHOICES))
    assert reused == len(CHOICES) * (group[0].ids.shape[1] // 4 - 1)


def test_a_declared_beginning_is_one_of_its_adapter(engine, choices, lone):
    def ask(request: RequestSpec) -> Drawn:
        sequence = engine.sequence(request.seed, request.adapter)
        sequence.add(request.ids)
        sequence.prefix_groups = 12
        return drawn(list(engine.start(sequence, request.limits, request.samplers)))

    tree, group = engine.steps.prefixes, choices[-len(CHOICES) :]
    for request, expected in zip(group, lone[-len(CHOICES) :], strict=True):
        before = tree.hits
        assert ask(request) == expected
        assert tree.hits == before
        assert ask(request) == expected
        assert tree.hits == before + 1


def test_prompts_are_packed_with_those_of_their_adapter(tuned, engine, choices):
    graphs = Graphs(tuned.lm, engine.state, repeated, None, prompts=True, packed=True)
    engine.decoder.graphs = graphs
    packed = list[list[str | None]]()
    plain = graphs.prefill_parts

    def prefill_parts(parts):
        packed.append([CHOICES[engine.state.adapters[part.slot]] for part in parts])
        plain(parts)

    graphs.prefill_parts = prefill_parts
    first, second = choices[0], choices[1]
    # Begins otherwise, so that it does not wait for the first.
    other = replace(first, ids=first.ids[:, 4:])
    replies_of(engine, [first, second, other])
    assert sorted(packed, key=len) == [[second.adapter], [first.adapter] * 2]


def test_what_a_session_has_cached_is_its_adapters(engine, choices):
    """A fork with another adapter has nothing cached, one with the same adapter neither."""
    sequence = engine.sequence(1, "qkvo")
    sequence.add(choices[0].ids)
    list(engine.start(sequence, choices[0].limits, choices[0].samplers))
    assert sequence.cached
    assert sequence.fork().adapter == sequence.adapter == tuple(THREE).index("qkvo") + 1
    assert sequence.fork(0).adapter == 0
    assert sequence.fork(0).cached == 0
    assert torch.equal(sequence.fork(0).ids, sequence.ids)
