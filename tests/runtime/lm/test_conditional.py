"""A step and its patch as one graph: whether a row speaks is tested where its token is drawn."""

import ctypes
import gc
import random
from typing import Any

import pytest
import torch
from helpers import KIT_PAIR, raising
from replays import Counted, repeated
from replies import CAPACITY, RequestSpec, drawn, poison, replies_of
from torch import Tensor

import mimo_fast
from mimo_fast.bench.schedule import ScheduledLM
from mimo_fast.kernels.cuda import graph_conditional
from mimo_fast.kernels.cuda.graph_conditional import ConditionalGraph
from mimo_fast.kernels.defaults import ENVIRONMENT as EXPERIMENTAL
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Limits
from mimo_fast.runtime.lm.graphs import Graphs, Joined, Replay


class Pieces:
    """A stand-in for conditional graphs that counts launches, waits and computed patches."""

    def __init__(self) -> None:
        self.launches = self.waits = self.patches = 0

    def __call__(
        self, step: Replay, patch: Replay, tokens: Tensor, slots: Tensor, empty: int, scratch: int
    ) -> Joined:
        pieces = self

        class Both:
            def launch(self) -> None:
                pieces.launches += 1
                step()
                self._drawn = tokens.tolist()
                if bool(((tokens == empty) & (slots != scratch)).any()):
                    pieces.patches += 1
                    patch()

            def wait(self) -> list[int]:
                pieces.waits += 1
                return self._drawn

        return Both()


def joined_engine(lm: Any, slots: int, pieces: Pieces, counted: Counted | None = None) -> Engine:
    engine = Engine(lm, slots, CAPACITY)
    engine.decoder.graphs = Graphs(lm, engine.state, counted or repeated, pieces)
    engine.decoder.predict = True
    return engine


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_the_tokens_are_those_without_it(model, requests, alone, slots):
    pieces = Pieces()
    engine = joined_engine(model.lm, slots, pieces)
    poison(engine)
    assert replies_of(engine, requests) == alone
    assert pieces.launches == pieces.waits > 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_change_between_words_and_speech_wastes_nothing(model, requests, overlaps):
    """A group is one launch and one host read, with a patch exactly where it speaks."""
    word, empty = 65, model.lm.empty_id
    plan = [*3 * [word], *4 * [empty], word, empty, *2 * [word], empty, *5 * [word]]
    lm = ScheduledLM.of(model.lm, 40)
    lm.follow(plan)
    limits = Limits(len(plan))
    want = []
    for graphed in (False, True):
        pieces, counted = Pieces(), Counted()
        engine = joined_engine(lm, 1, pieces, counted)
        if not graphed:
            engine.decoder.graphs = Graphs(lm, engine.state, repeated)
        engine.overlaps = overlaps
        request = RequestSpec(requests[1].ids, 7, requests[1].samplers, limits)
        reply, groups = request.start(engine), []
        groups += reply
        want.append(drawn(groups))
    assert want[0] == want[1]
    assert [text for text, _, _ in want[1]] == plan
    assert pieces.launches == pieces.waits == len(plan) - 1
    assert pieces.patches == plan.count(empty)
    # Neither piece has run but as a part of the whole.
    assert counted.replays == pieces.launches + pieces.patches


def test_a_batch_computes_patches_where_any_row_speaks(model, requests, alone):
    """What the padding draws computes no patch."""
    pieces = Pieces()
    engine = joined_engine(model.lm, 5, pieces)
    engine.decoder.graphs.warmup(progress=False)
    rows, group = [], engine.decoder.graphs.group

    def noted(slots: Any) -> Any:
        before = pieces.patches
        result = group(slots)
        tokens = engine.state.text[list(slots)].tolist()
        rows.append((len(slots), model.lm.empty_id in tokens, pieces.patches - before))
        return result

    engine.decoder.graphs.group = noted
    # The scratch row always draws the token of speech.
    engine.state.banned[5] = True
    engine.state.banned[5, model.lm.empty_id] = False
    assert replies_of(engine, requests) == alone
    assert all(ran == speaks for _, speaks, ran in rows)
    assert {False, True} == {speaks for _, speaks, _ in rows}
    assert any(count not in (1, 2, 4, 5) for count, _, _ in rows)


@pytest.mark.parametrize("seed", range(6))
def test_rows_join_leave_and_move(model, requests, alone, seed):
    rng, pieces = random.Random(seed), Pieces()
    engine = joined_engine(model.lm, 2, pieces)
    engine.overlaps = bool(seed % 2)
    waiting, running = rng.sample(range(6), 6), []
    got: dict[int, list[Any]] = {}
    while waiting or running:
        if waiting and (not running or rng.random() < 0.4):
            number = waiting.pop()
            running.append((number, requests[number].start(engine, ahead=rng.choice([1, 3]))))
            continue
        number, reply = rng.choice(running)
        group = next(reply, None)
        if group is None:
            running.remove((number, reply))
            assert drawn(got[number]) == alone[number]
        else:
            got.setdefault(number, []).append(group)
            if rng.random() < 0.03:
                reply.close()
                running.remove((number, reply))
                assert drawn(got[number]) == alone[number][: len(got[number])]


def test_where_it_is_refused_decoding_goes_on_as_before(model, requests, alone):
    engine, refusing = Engine(model.lm, 3, CAPACITY), raising(RuntimeError, "CUDA error 801")
    engine.decoder.graphs = Graphs(model.lm, engine.state, repeated, refusing)
    with pytest.warns(UserWarning, match="without conditional graphs: CUDA error 801"):
        assert not engine.decoder.graphs.conditional
    assert replies_of(engine, requests) == alone


@pytest.mark.gpu
@pytest.mark.parametrize("overlaps", [False, True])
def test_on_a_gpu_the_tokens_are_those_without_it(requests, monkeypatch, overlaps):
    if not graph_conditional.available():
        pytest.skip("needs CUDA 12.4, torch 2.8 and the built library")
    # In 16 bits a dense product of another number of rows rounds otherwise, and draws with it.
    lm = mimo_fast.load(*KIT_PAIR, device="cuda", dtype="float32").lm
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv(EXPERIMENTAL, value)
        engine = Engine(lm, 3, CAPACITY)
        engine.overlaps = overlaps
        assert engine.decoder.graphs.conditional == (value == "1")
        replies = [request.start(engine, ahead=None) for request in requests]
        for reply in replies[:2]:
            next(reply)
            reply.close()
        found.append([drawn(list(reply)) for reply in replies[2:]])
    assert found[0] == found[1]


EMPTY, SCRATCH = 7, 99
Work = ctypes.CFUNCTYPE(None)


@pytest.fixture(scope="module")
def library(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    """csrc/cuda/graph_conditional.cu on graphs that run on the CPU."""
    emulated_cuda.fake_graph.restype = ctypes.c_void_p
    return emulated_cuda


class Emulated:
    """A conditional graph over Python calls: its tokens are set, its work is recorded."""

    def __init__(self, library: ctypes.CDLL, slots: list[int]) -> None:
        self.drawn, self.done = [0] * len(slots), list[str]()
        self.tokens, self.slots = torch.zeros(len(slots), dtype=torch.int64), torch.tensor(slots)
        self._work = [Work(self._step), Work(lambda: self.done.append("patch"))]
        first, then = (library.fake_graph(work) for work in self._work)
        self.graph = ConditionalGraph(
            first, then, self.tokens, self.slots, EMPTY, SCRATCH, loaded=library
        )

    def _step(self) -> None:
        self.done.append("step")
        self.tokens.copy_(torch.tensor(self.drawn))

    def run(self, drawn: list[int]) -> list[str]:
        self.drawn = drawn
        self.done.clear()
        self.graph.launch()
        return list(self.done)


class TestSource:
    @pytest.mark.parametrize(
        ("drawn", "slots", "speaks"),
        [
            ([EMPTY], [0], True),
            ([3], [0], False),
            ([3, EMPTY], [1, 0], True),
            ([3, EMPTY], [0, SCRATCH], False),
            ([EMPTY, EMPTY, 3, 3], [2, SCRATCH, 0, SCRATCH], True),
            ([3] * 69 + [EMPTY], list(range(70)), True),
            ([3] * 33 + [EMPTY], [*range(33), SCRATCH], False),
            ([3] * 32 + [EMPTY] + [3] * 7, list(range(40)), True),
        ],
    )
    def test_the_patch_runs_where_a_row_speaks(self, library, drawn, slots, speaks):
        graph = Emulated(library, slots)
        for _ in range(3):
            assert graph.run(drawn) == (["step", "patch"] if speaks else ["step"])
            assert graph.graph.wait() == drawn

    def test_a_launch_that_nobody_read_is_not_taken_for_the_next(self, library):
        graph = Emulated(library, [0, 1])
        assert graph.run([EMPTY, 2]) == ["step", "patch"]
        assert graph.run([3, 4]) == ["step"]
        assert graph.graph.wait() == [3, 4]
        # As if the device had not begun the last.
        graph.graph._launches += 1
        with pytest.raises(RuntimeError, match="has run 2 of 3 launches"):
            graph.graph.wait()

    def test_slots_are_read_at_each_launch(self, library):
        graph = Emulated(library, [0, 1])
        assert graph.run([3, EMPTY]) == ["step", "patch"]
        graph.slots[1] = SCRATCH
        assert graph.run([3, EMPTY]) == ["step"]

    def test_a_failed_or_deleted_graph_leaves_nothing(self, library):
        gc.collect()
        assert library.fake_live() == 0
        # A graph, its event, three nodes, the condition's handle, node and body, the instance.
        for call in range(1, 10):
            library.fake_failure(call)
            with pytest.raises(RuntimeError, match="to make a conditional graph: CUDA error 999"):
                Emulated(library, [0])
            assert library.fake_live() == 0
        library.fake_failure(10)
        graph = Emulated(library, [0])
        assert graph.run([EMPTY]) == ["step", "patch"]
        assert library.fake_live() == 3
        del graph
        gc.collect()
        assert library.fake_live() == 0

    def test_an_older_driver_cannot(self, library):
        for version, error in ((12030, 801), (12040, 0), (13000, 0)):
            library.fake_driver(version)
            assert library.mimo_fast_conditional_supported() == error

    @pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
    def test_without_a_gpu_there_is_none(self):
        assert not graph_conditional.available()
