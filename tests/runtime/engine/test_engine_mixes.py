"""Rows that join, leave and are interrupted between groups draw what they draw alone."""

import random

import pytest
import torch
from replays import repeated
from replies import CAPACITY, Consumer, Drawn, Interruption, RequestSpec, drawn, poison, replies_of
from torch import Tensor

from mimo_fast import MimoAudio
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.graphs import Graphs


@pytest.fixture(scope="module")
def interruptions(requests: list[RequestSpec]) -> list[Interruption | None]:
    then = requests[0].ids[:, :24]
    return [None, Interruption(5, heard=2, then=then), Interruption(3, heard=3, then=then)]


@pytest.fixture(scope="module")
def by_itself(
    model: MimoAudio, requests: list[RequestSpec], interruptions: list[Interruption | None]
):
    """(request, interruption) -> its groups and final ids in an engine of its own."""
    known: dict[tuple[int, int], tuple[Drawn, Tensor]] = {}

    def run(request: int, interruption: int) -> tuple[Drawn, Tensor]:
        if (request, interruption) not in known:
            consumer = Consumer(requests[request], 1000, interruptions[interruption])
            consumer.start(Engine(model.lm, 1, CAPACITY))
            while consumer.take():
                pass
            known[request, interruption] = drawn(consumer.got), consumer.sequence.ids
        return known[request, interruption]

    return run


@pytest.mark.parametrize("seed", range(50))
def test_any_mix_gives_the_tokens_of_lone_runs(
    model, engine, requests, interruptions, by_itself, seed
):
    """More rows than slots; two of five engines launch the next group ahead, of every
    third the groups are graphs, of most of those the prompts, alone or several at once."""
    rng = random.Random(seed)
    engine.overlaps = seed % 5 < 2
    engine.decoder.predict = bool(seed % 2)
    if seed % 3 == 2:
        prompts, packed = seed % 5 > 0, bool(seed % 2)
        engine.decoder.graphs = Graphs(model.lm, engine.state, repeated, None, prompts, packed)
    to_start = [(rng.randrange(len(requests)), rng.choice([0, 0, 1, 2])) for _ in range(7)]
    running, ended = list[tuple[Consumer, int, int]](), list[tuple[Consumer, int, int]]()
    while running or to_start:
        if to_start and (not running or rng.random() < 0.3):
            request, interruption = to_start.pop()
            patience = 1000 if interruption else rng.choice([3, 1000, 1000])
            consumer = Consumer(requests[request], patience, interruptions[interruption])
            consumer.start(engine, ahead=rng.choice([1, 2, None]))
            running.append((consumer, request, interruption))
            continue
        each = rng.choice(running)
        if not each[0].take():
            running.remove(each)
            ended.append(each)
    assert len(ended) == 7
    for consumer, request, interruption in ended:
        groups, ids = by_itself(request, interruption)
        assert drawn(consumer.got) == groups[: consumer.patience]
        # What it never took is forgotten.
        kept = ids.shape[1] - 4 * (len(groups) - len(consumer.got))
        assert torch.equal(consumer.sequence.ids, ids[:, :kept])
    assert not engine._requests


def test_interruptions_change_what_follows(by_itself, alone):
    """The mixes would not notice an interruption that does nothing."""
    assert by_itself(5, 0)[0] == alone[5]
    for interruption, taken in ((1, 5), (2, 3)):
        groups, _ = by_itself(5, interruption)
        assert groups[:taken] == alone[5][:taken]
        assert groups[taken:] != alone[5][taken:]


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_graphs_pad_their_batches_without_a_trace(model, requests, alone, slots):
    engine = Engine(model.lm, slots, CAPACITY)
    poison(engine)
    engine.decoder.graphs = graphs = Graphs(model.lm, engine.state, repeated)
    assert graphs.buckets == {1: [1], 3: [1, 2, 3], 5: [1, 2, 4, 5]}[slots]
    graphs.warmup(progress=False)
    assert replies_of(engine, requests) == alone
