"""Fifty random mixes of nano's streams: ids bit for bit, audio to 120 dB those of lone runs.

Priorities, pauses, cancels, interruptions, parking, shared beginnings and several tasks, by one
thread that takes chunks at random or by a thread a stream.
"""

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers import KIT, in_threads, slow_after, snr_db
from torch import Tensor

import mimo_fast
from mimo_fast import Chunk, MimoAudio
from mimo_fast.runtime.engine.engine import Engine

CAPACITY = 400
RECORDING = KIT / "audio" / "en_f_16k.wav"

Talk = Callable[[MimoAudio], Generator[None, None, "Heard"]]


@dataclass
class Heard:
    """What came of a stream: chunks, and all ids at the end."""

    chunks: list[Chunk] = field(default_factory=list)
    ids: Tensor | None = None

    @property
    def audio(self) -> Tensor:
        return torch.cat([torch.zeros(1), *(chunk.audio for chunk in self.chunks)])

    @property
    def said(self) -> list[tuple[str, int, str | None]]:
        return [(each.text, len(each.audio), each.finish_reason) for each in self.chunks]


@pytest.fixture(scope="module")
def nano() -> MimoAudio:
    return mimo_fast.load("nano", device="cpu")


@cache
def recording() -> Tensor:
    """Half a second of speech at 24 kHz."""
    return mimo_fast.load_audio(RECORDING, 24000)[6000:18000]


def task(name: str, *arguments: Any, most: int, patience: int = 1000, **options: Any) -> Talk:
    """A stream of a task, which is left after `patience` chunks."""

    def talk(model: MimoAudio) -> Generator[None, None, Heard]:
        heard, own = Heard(), copy.copy(model)
        own.clear_history()
        limits = {"max_new_tokens": most, "min_new_tokens": most // 2}
        given = [recording() if argument == "recording" else argument for argument in arguments]
        stream = own.stream(name, *given, **limits, **options)
        for chunk in stream:
            heard.chunks.append(chunk)
            yield
            if len(heard.chunks) == patience:
                stream.close()
        heard.ids = own.history
        return heard

    return talk


def dialogue(seed: int, most: int, breaks: int, played_ms: float) -> Talk:
    """Two turns, of which the first is interrupted after `breaks` chunks."""

    def talk(model: MimoAudio) -> Generator[None, None, Heard]:
        heard, session = Heard(), model.session("Be brief.", seed=seed)
        limits = {"max_new_tokens": most, "min_new_tokens": most}
        for count, chunk in enumerate(session.stream(recording(), lookahead="elastic", **limits)):
            heard.chunks.append(chunk)
            yield
            if count + 1 == breaks:
                session.interrupt(played_ms)
                break
        for chunk in session.stream(recording(), **limits):
            heard.chunks.append(chunk)
            yield
        heard.ids = session.ids
        return heard

    return talk


TALKS: list[Talk] = [
    task("tts", "Hello there.", most=18, seed=1),
    task("tts", "Good morning.", most=24, seed=2, lookahead="elastic"),
    task("tts", "Good evening.", most=16, seed=3, priority="batch"),
    task("tts", "One, two, three.", most=20, seed=4, lookahead="elastic", patience=7),
    task("tts", "Hello there.", most=14, seed=5, patience=3, priority="batch"),
    task("asr", "recording", most=8, seed=6),
    task("asr", "recording", most=8, seed=7, priority="batch"),
    dialogue(seed=8, most=14, breaks=6, played_ms=300.0),
    dialogue(seed=9, most=12, breaks=4, played_ms=0.0),
    task("spoken_dialogue", "recording", "Be brief.", most=16, seed=10, lookahead="elastic"),
    task("spoken_dialogue", "recording", "Be brief.", most=12, seed=11),
]


def engine_of(model: MimoAudio, slots: int) -> MimoAudio:
    """The model with an engine of its own."""
    own = copy.copy(model)
    engine = Engine(model.lm, slots, CAPACITY)
    own.pipeline = dataclasses.replace(model.pipeline, _engine=engine)
    return own


def to_its_end(talk: Generator[None, None, Heard]) -> Heard:
    while True:
        try:
            next(talk)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def alone(nano: MimoAudio) -> Callable[[int], Heard]:
    """What comes of each stream by itself, in an engine of its own."""
    return cache(lambda number: to_its_end(TALKS[number](engine_of(nano, 1))))


def same(heard: Heard, want: Heard, what: str) -> None:
    assert heard.said == want.said, what
    assert heard.ids is not None
    assert want.ids is not None
    assert torch.equal(heard.ids, want.ids), what
    if not torch.equal(heard.audio, want.audio):
        assert snr_db(heard.audio, want.audio) >= 120, what


@pytest.mark.parametrize("seed", slow_after(4, range(50)))
def test_any_mix_of_streams_is_what_each_is_alone(nano, alone, seed):
    rng = random.Random(seed)
    numbers = [rng.randrange(len(TALKS)) for _ in range(rng.randint(3, 8))]
    model = engine_of(nano, rng.randint(1, 5))
    model.engine.overlaps = seed % 5 == 4
    if seed % 3 == 2:
        results = in_threads(partial(threaded, model, numbers, seed), len(numbers))
    else:
        results = interleaved(model, numbers, rng)
    for number, heard in zip(numbers, results, strict=True):
        same(heard, alone(number), f"stream {number} of {numbers}")
    assert not model.engine._requests


def threaded(model: MimoAudio, numbers: list[int], seed: int, row: int) -> Heard:
    """Reads a stream in the thread that calls it, with pauses."""
    rng, talk = random.Random(seed * 100 + row), TALKS[numbers[row]](model)
    while True:
        try:
            next(talk)
        except StopIteration as end:
            return end.value
        if rng.random() < 0.1:
            time.sleep(0.02)


def interleaved(model: MimoAudio, numbers: list[int], rng: random.Random) -> list[Heard]:
    """Takes a chunk of one stream at a time; some pause for long."""
    found = dict[int, Heard]()
    running = {row: TALKS[number](model) for row, number in enumerate(numbers)}
    favour = {row: rng.choice([1, 1, 4, 16]) for row in running}
    while running:
        row = rng.choices([*running], [favour[each] for each in running])[0]
        try:
            next(running[row])
        except StopIteration as end:
            found[row] = end.value
            del running[row]
    return [found[row] for row in range(len(numbers))]


def test_the_streams_of_a_mix_are_not_all_the_same(alone):
    """Or a mix that confuses them would pass."""
    found = [alone(number) for number in range(len(TALKS))]
    assert len({tuple(heard.ids.flatten().tolist()) for heard in found}) == len(TALKS)
    assert sum(bool(len(heard.audio) > 1) for heard in found) >= 5
    assert [len(found[number].chunks) for number in (3, 4)] == [7, 3]
