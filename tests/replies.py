"""Requests to an engine, and what they are compared by."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import watch
from torch import Tensor

from mimo_fast import LM
from mimo_fast.runtime.engine.engine import Engine, Reply
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.lm.decode import Group, Limits, Samplers
from mimo_fast.sampling import GREEDY, MiMoSampler

CAPACITY = 80
SAMPLED = Samplers(MiMoSampler(True, 0.8, top_p=0.95), MiMoSampler(True, 0.9, top_k=40))
GREEDILY = Samplers(GREEDY, GREEDY)

Drawn = list[tuple[int, list[int], bool]]


@dataclass(eq=False)
class RequestSpec:
    """A prompt with all that decides its reply."""

    ids: Tensor
    seed: int
    samplers: Samplers
    limits: Limits
    adapter: str | None = None

    def start(self, engine: Engine, **options: Any) -> Reply:
        sequence = engine.sequence(self.seed, self.adapter)
        sequence.add(self.ids)
        return engine.start(sequence, self.limits, self.samplers, **options)


@dataclass(eq=False)
class Interruption:
    """A reply broken off after `taken` groups, of which `heard` stay, and what is said then."""

    taken: int
    heard: int
    then: Tensor


@dataclass(eq=False)
class Consumer:
    """Takes `patience` groups of a reply, one at a time, then leaves; it may interrupt it once."""

    request: RequestSpec
    patience: int
    interruption: Interruption | None = None
    got: list[Group] = field(default_factory=list)

    def start(self, engine: Engine, **options: Any) -> "Consumer":
        self.engine, self.options = engine, options
        self.reply = self.request.start(engine, **options)
        return self

    @property
    def sequence(self) -> TokenSequence:
        return self.reply._request.sequence

    def take(self) -> bool:
        """False when it has ended."""
        group = next(self.reply, None)
        if group is not None:
            self.got.append(group)
        if self.interruption and (group is None or len(self.got) == self.interruption.taken):
            self._interrupt(self.interruption)
            return True
        if group is not None and len(self.got) < self.patience:
            return True
        self.reply.close()
        return False

    def _interrupt(self, interruption: Interruption) -> None:
        sequence = self.sequence
        self.reply.close()
        sequence.truncate(sequence.groups - len(self.got) + min(interruption.heard, len(self.got)))
        sequence.add(interruption.then)
        self.interruption = None
        self.reply = self.engine.start(
            sequence, self.request.limits, self.request.samplers, **self.options
        )


def break_steps(monkeypatch: pytest.MonkeyPatch, error: BaseException, slot: int) -> None:
    """Makes every later step that a slot takes part in fail once it is computed."""

    def fail(_lm: LM, _state: Any, slots: Tensor) -> None:
        if slot in slots.tolist():
            raise error

    watch(monkeypatch, LM, "step", after=fail)


def replies_of(engine: Engine, requests: list[RequestSpec]) -> list[Drawn]:
    """What the requests draw when all are started before the first is read."""
    replies = [request.start(engine, ahead=None) for request in requests]
    return [drawn(list(reply)) for reply in replies]


def poison(engine: Engine) -> None:
    """Fills the KV cache with NaN, so that reading a position not yet written shows."""
    for part in engine.state.cache.parts:
        part.fill_(torch.nan)


def drawn(groups: list[Group]) -> Drawn:
    return [(group.text, group.codes.flatten().tolist(), group.finished) for group in groups]
