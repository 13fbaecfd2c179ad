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
