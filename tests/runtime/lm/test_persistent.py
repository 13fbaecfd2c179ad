"""A persistent kernel that gives up: what it should have made is made without it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import slow_after
from replays import repeated
from replies import CAPACITY, drawn, poison, replies_of
from torch import Tensor

from mimo_fast import MimoAudio
from mimo_fast.kernels.cuda.engine_launch import ErrorWord
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.kernels.sample_text import TEXT_SLOT, sample_text
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Decoder, Row
from mimo_fast.runtime.lm.graphs import Graphs, Run
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.persistent import Persistent
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.runtime.lm.variants import AdaptedLM

MODES = ("host", "graphs", "joined graphs")
SPEECH = {"max_new_tokens": 12, "min_new_tokens": 12, "seed": 3}


class StandIn(Persistent):
    """Computes what the model computes without it, up to the launch that gives up.

    Args:
        gives_up: number of that launch, from 1 on; 0 for none. It loses the last value of its first
            row, later ones lose all.
    """

    def __init__(self, lm: LM, gives_up: int = 0) -> None:
        self._lm, self._gives_up, self.launches = lm, gives_up, 0
        self.error = ErrorWord(torch.device("cpu"), "the stand-in gave up")
        self._held = {}
        self.launcher = SimpleNamespace(holds=lambda rows, capacity=0: capacity <= CAPACITY)
        self.backbone = self.encoder = self.decoder = self  # type: ignore[assignment]

    def step(self, x: Tensor, *place: Any) -> tuple[Tensor, Tensor]:
        hidden = self._lm._executor.backbone.step(x, *place)
        logits = self._lm.text_logits(hidden)
        self._launched(torch.nan, hidden, logits)
        return hidden, logits

    def step_text(
        self, x: Tensor, state: DecodeState, slots: Tensor, starts: Tensor, *how: Any
    ) -> tuple[Tensor, Tensor]:
        settings, draws, banned = how
        hidden = self._lm._executor.backbone.step(x, state, slots, starts)
        logits = self._lm.text_logits(hidden)
        text = sample_text(logits, settings, state.seeds[slots], draws, banned, TEXT_SLOT)
        self._launched(torch.nan, hidden)
        if int(self.error.word):
            text[0 if self.launches == self._gives_up else slice(None)] = NOT_FINITE
        return hidden, text

    def encode(self, frames: Tensor) -> Tensor:
        executor = self._lm._executor
        made = executor.patch_to_backbone(executor.patch_encoder.encode(frames).flatten(1))
        self._launched(torch.nan, made)
        return made

    def decode(self, hidden: Tensor, *how: Any) -> Tensor:
        codes = self._lm.decode_patch(self._lm.local_hidden(hidden), *how)
        self._launched(NOT_FINITE, codes)
        return codes

    def _launched(self, lost: float, *made: Tensor) -> None:
        self.launches += 1
        for each in made:
            if int(self.error.word):
                each.fill_(lost)
            elif self.launches == self._gives_up:
                each[0, ..., -1] = lost
        if self.launches == self._gives_up:
            self.error.word.fill_(1)


def as_captured(stand_in: StandIn) -> Callable[[Run], Any]:
    """A stand-in for CUDA graphs that go on to launch what they have launched when captured."""

    def capture(run: Run) -> Any:
        then = stand_in.error.on
        again, result = repeated(run)

        def replay() -> None:
            now, stand_in.error.on = stand_in.error.on, then
            again()
            stand_in.error.on = now

        return replay, result

    return capture


class Both:
    """Stands in for a conditional graph."""

    def __init__(self, step: Any, patch: Any, tokens: Tensor, slots: Tensor, *ids: int) -> None:
        self._step, self._patch, self._tokens, self._empty = step, patch, tokens, ids[0]

    def launch(self) -> None:
        self._step()
        self._drawn = self._tokens.tolist()
        if self._empty in self._drawn:
            self._patch()

    def wait(self) -> list[int]:
        return self._drawn


def engine_of(model: MimoAudio, gives_up: int, how: str, slots: int) -> tuple[Engine, StandIn]:
    """An engine with a stand-in, on a CPU or as a GPU's."""
    lm, stand_in = copy.copy(model.lm), StandIn(model.lm, gives_up)
    lm._executor = replace(lm._executor, persistent=stand_in)
    engine = Engine(lm, slots, CAPACITY)
    poison(engine)
    if how != "host":
        join = Both if how == "joined graphs" else None
        graphs = Graphs(lm, engine.state, as_captured(stand_in), join)  # type: ignore[arg-type]
        engine.decoder.graphs = graphs
        engine.decoder.predict, engine.decoder.check_codes, engine.overlaps = True, False, True
    return engine, stand_in


@contextmanager
def warned_once(stand_in: StandIn) -> Iterator[None]:
    """It warns if a launch has given up: how many there are depends on what steps take of time."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    named = [str(each.message) for each in found if "gave up" in str(each.message)]
    assert len(named) == int(stand_in.error.word)
    assert all("MIMO_FAST_EXPERIMENTAL=0" in line for line in named)


@pytest.mark.parametrize("tries", slow_after(1, [2, 20]))
@pytest.mark.parametrize("how", MODES)
def test_any_launch_may_give_up(model, requests, alone, how, tries):
    requests, want = requests[:4], alone[:4]
    engine, stand_in = engine_of(model, 0, how, 3)
    with warned_once(stand_in):
        assert replies_of(engine, requests) == want
    launches = stand_in.launches
    assert launches > 40
    for gives_up in range(2, launches, launches // tries):
        engine, stand_in = engine_of(model, gives_up, how, 3)
        with warned_once(stand_in):
            assert replies_of(engine, requests) == want
        if not int(stand_in.error.word):
            continue
        launched = stand_in.launches
        assert replies_of(engine, requests[:1]) == want[:1]
        assert stand_in.launches == launched
        assert not engine.decoder.lm.gave_up()
        assert engine.decoder.lm.persistent_of(engine.state) is None


@pytest.mark.parametrize("tries", slow_after(1, [2, 8]))
@pytest.mark.parametrize("how", MODES)
def test_nothing_of_it_is_heard(model, how, tries):
    """Text, codes and samples of two replies at once."""

    def said(gives_up: int) -> tuple[list[Any], int]:
        own = copy.copy(model)
        engine, stand_in = engine_of(model, gives_up, how, 2)
        own.pipeline = replace(model.pipeline, lm=engine.decoder.lm)
        own.pipeline._engine = engine
        streams = [own.stream("tts", text, **SPEECH) for text in ("Hi.", "Hello there.")]
        with warned_once(stand_in):
            chunks = [chunk for pair in zip(*streams, strict=True) for chunk in pair]
        return [(chunk.text, chunk.audio) for chunk in chunks], stand_in.launches

    want, launches = said(0)
    assert sum(len(audio) for _, audio in want)
    for gives_up in range(5, launches, launches // tries):
        got, _ = said(gives_up)
        assert [text for text, _ in got] == [text for text, _ in want]
        assert torch.equal(*(torch.cat([audio for _, audio in each]) for each in (got, want)))


def test_values_of_the_model_itself_are_not_taken_for_it(model):
    """Nobody asks the device while all is finite, and a NaN of the model's own stays one."""
    engine, stand_in = engine_of(model, 0, "host", 1)
    assert not engine.decoder.lm.gave_up()
    state = engine.state
    row_lm = engine.decoder.lm
    state.hidden[0] = torch.nan
    text = row_lm.sample_text(state, torch.tensor([0]), state.text_sampler.select([0]))
    assert int(text) == NOT_FINITE
    assert not row_lm.gave_up()
    assert row_lm.persistent_of(state) is stand_in


@pytest.mark.parametrize(
    ("slots", "capacity", "quantized", "taken"),
    [(8, 4, False, True), (9, 4, False, False), (2, 4, True, False), (1, 99, False, False)],
)
def test_which_states_it_takes(model, slots, capacity, quantized, taken):
    """Rows of one state all go one way, or one's bits would depend on how many there are."""
    lm = copy.copy(model.lm)
    lm._executor = replace(lm._executor, persistent=StandIn(model.lm))
    state = lm.new_state([0] * slots, capacity, quantized)
    assert (lm.persistent_of(state) is not None) == taken


def test_rows_of_several_adapters_go_without(tuned):
    variants = [copy.copy(each) for each in tuned.lm._variants]
    for each in variants:
        each._executor = replace(each._executor, persistent=StandIn(each))
    lm = AdaptedLM(*variants[:1], variants[1:], tuned.lm.adapters, tuned.lm.adapter_digests[1:])
    assert lm._executor.persistent is None
    assert [each._executor.persistent for each in lm._variants] == [None] * len(variants)


def test_a_row_takes_back_one_group(model, requests):
    request, lm = requests[0], model.lm
    state = lm.new_state([request.seed], CAPACITY)
    lm.prefill(request.ids, state, 0)
    size = request.ids.shape[1] // lm.config.group_size
    row = Row(0, request.limits, request.samplers, request.seed, size)
    decoder = Decoder(lm, state)
    for _ in range(3):
        before = replace(row, _before=None, stale=True)
        made = drawn(decoder.next_groups([row]))
        assert row.draws == before.draws + 1
        row.take_back()
        assert replace(row, _before=None, hidden=None) == before
        assert drawn(decoder.next_groups([row])) == made
    row.take_back()
    with pytest.raises(AssertionError):
        row.take_back()
