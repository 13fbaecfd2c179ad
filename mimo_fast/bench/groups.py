"""Steady-state decoding: seconds of a group of B rows, without the codec.

All rows of a group are text, or all are speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from mimo_fast.bench.target import Target
from mimo_fast.bench.timing import CallTime, synchronize
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.runtime.lm.snapshot import Snapshot
from mimo_fast.sampling import TASK_SAMPLERS

SAMPLERS = Samplers(TASK_SAMPLERS["tts"]["global"], TASK_SAMPLERS["tts"]["local"])

SETTLING = 2
"""Groups that are not counted, in which rows synchronize and lazy set-up happens."""


@dataclass(frozen=True)
class Context:
    """Ids [C + 1, T G] of a prompt, with its keys and values."""

    ids: Tensor
    computed: Snapshot


@dataclass(frozen=True)
class GroupTimes:
    """Seconds of the first row's prompt, and of a text and a speech group of all rows."""

    prefill: float
    text: CallTime
    audio: CallTime


def time_groups(
    target: Target, batch: int, prompt: int, groups: int, samplers: Samplers = SAMPLERS
) -> GroupTimes:
    """Times `groups` groups of each kind after a prompt of `prompt` groups of text.

    The prompt is computed once and copied to every row. The target must have room for both kinds
    and SETTLING groups more.
    """
    if target.lm.device.type == "cuda":
        # The first prompt of a length sets up its kernels.
        prompted(target, prompt, samplers)
    context, prefill = prompted(target, prompt, samplers)
    kinds = []
    for token in (target.word_id, target.lm.empty_id):
        replies = start_rows(target, context, batch, token, groups + SETTLING, samplers)
        times = []
        for _ in range(groups + SETTLING):
            began = perf_counter()
            take_group(replies)
            synchronize(target.lm.device)
            times.append(perf_counter() - began)
        for reply in replies:
            reply.close()
        kinds.append(CallTime.of(times[SETTLING:]))
    return GroupTimes(prefill, *kinds)


def take_group(replies: Sequence[Reply]) -> None:
    """Takes a group of replies in step; the first reply that is asked computes that of all rows."""
    for reply in replies:
        next(reply)


def prompted(target: Target, prompt: int, samplers: Samplers = SAMPLERS) -> tuple[Context, float]:
    """A computed prompt of `prompt` groups of text, and the seconds that it took."""
    first = target.engine.sequence(seed=0)
    first.add(target.filler(prompt))
    reply = target.engine.start(first, Limits(1), samplers)
    began = perf_counter()
    reply.prefill()
    synchronize(target.lm.device)
    seconds = perf_counter() - began
    reply.close()
    computed = target.engine.export(first)
    assert computed is not None
    return Context(first.ids, computed), seconds


def start_rows(
    target: Target,
    context: Context,
    batch: int,
    token: int,
    groups: int,
    samplers: Samplers = SAMPLERS,
) -> list[Reply]:
    """Starts replies of `groups` groups of one token each, their prompt copied to every row.

    Their groups are to be taken in step.
    """
    target.lm.follow([token] * groups)
    replies = []
    for row in range(batch):
        sequence = target.engine.sequence(seed=row)
        sequence.add(context.ids)
        sequence.snapshot, sequence.cached = context.computed, context.computed.length
        replies.append(target.engine.start(sequence, Limits(groups), samplers, ahead=1))
        replies[-1].prefill()
    return replies
