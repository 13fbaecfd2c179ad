"""The steady state of decoding: seconds of a group of B rows that all say words, or all speak, without the codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from ..runtime.conversation import Conversation
from ..runtime.decode import Limits, Samplers
from ..runtime.job import Reply
from ..sampling import TASK_SAMPLERS
from .ceiling import Ceiling
from .floor import Work, patch_work, prompt_work, word_work
from .target import Target
from .timing import Timing, synchronize

SAMPLERS = Samplers(TASK_SAMPLERS["tts"]["global"], TASK_SAMPLERS["tts"]["local"])

SETTLING = 2
"""Groups that are not counted: the rows fall into step, and what is first used is set up."""


@dataclass(frozen=True)
class GroupTimes:
    """Seconds of the first row's prompt, and of a group of all rows, of words and of speech."""

    prefill: float
    text: Timing
    audio: Timing


@dataclass(frozen=True)
class GroupWork:
    """What the same three must at least read and compute."""

    prefill: Work
    text: Work
    audio: Work

    @classmethod
    def of(cls, target: Target, batch: int, prompt: int, groups: int = 0) -> GroupWork:
        """After prompts of `prompt` words, in the middle of `groups` groups."""
        middle, quantized = prompt + groups // 2, target.setup.kv_cache is not None
        text, audio = (work(target.lm, middle, batch, quantized) for work in (word_work, patch_work))
        return cls(prompt_work(target.lm, prompt), text, audio)

    def floors(self, ceiling: Ceiling, target: Target) -> tuple[float, float, float]:
        """Seconds of each."""
        prefill, text, audio = (work.floor(ceiling, target.lm) for work in (self.prefill, self.text, self.audio))
        return prefill, text, audio

    def describe(self, ceiling: Ceiling, target: Target) -> str:
        """A line to be printed before the measurement."""
        prefill, text, audio = (1e3 * seconds for seconds in self.floors(ceiling, target))
        return (
            f"floor: the prompt {prefill:,.1f} ms; a group of words reads {self.text.total / 1e6:,.1f} MB, {text:.2f} "
            f"ms; of speech {self.audio.total / 1e6:,.1f} MB, {audio:.2f} ms"
        )


def time_groups(
    target: Target, batch: int, prompt: int, groups: int, samplers: Samplers = SAMPLERS
) -> GroupTimes:
    """Times `groups` groups of each kind after a prompt of `prompt` words, computed once and copied to every row.

    The target must have room for SETTLING groups more than both.
    """
    first = Conversation(target.engine, seed=0)
    first.add(target.filler(prompt))
    reply = target.engine.start(first, Limits(1), samplers)
    began = perf_counter()
    reply.prefill()
    synchronize(target.lm.device)
    prefill = perf_counter() - began
    reply.close()
    computed = target.engine.export(first)
    assert computed is not None
    times = []
    for token in (target.word_id, target.lm.empty_id):
        target.lm.follow([token] * (groups + SETTLING))
        replies = []
        for row in range(batch):
            conversation = Conversation(target.engine, seed=row)
            conversation.add(first.ids)
            conversation.snapshot, conversation.cached = computed, computed.length
            replies.append(target.engine.start(conversation, Limits(groups + SETTLING), samplers, ahead=1))
            replies[-1].prefill()
        times.append(_step_all(replies, groups, target.lm.device))
    return GroupTimes(prefill, *times)


def _step_all(replies: Sequence[Reply], groups: int, device: torch.device) -> Timing:
    """Takes all groups of the replies, in step, and closes them."""
    times = []
    for _ in range(groups + SETTLING):
        began = perf_counter()
        # The first to be asked computes the group of all.
        for reply in replies:
            next(reply)
        synchronize(device)
        times.append(perf_counter() - began)
    for reply in replies:
        reply.close()
    return Timing.of(times[SETTLING:])
