"""The steady state of decoding: seconds of a group of B rows that all say words, or all speak, without the codec."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

from ..runtime.conversation import Conversation
from ..runtime.decode import Limits, Samplers
from ..sampling import TASK_SAMPLERS
from .ceiling import Ceiling
from .floor import Work, patch_work, prompt_work, word_work
from .target import Target
from .timing import Timing, synchronize

SETTLING = 2
"""Groups that are not counted: the rows fall into step, and what is first used is set up."""


@dataclass(frozen=True)
class GroupTimes:
    """Of a batch at a context.

    prefill: seconds of the first row's prompt of `context` groups. text, audio: of a group of all rows.
    """

    prefill: float
    text: Timing
    audio: Timing


def time_groups(target: Target, batch: int, context: int, groups: int) -> GroupTimes:
    """Times `groups` groups of each kind after prompts of `context` words; the target must have room for both."""
    special = target.tokenizer.special
    prefill, text = _run(target, batch, context, groups, target.word_id)
    return GroupTimes(prefill, text, _run(target, batch, context, groups, special.empty)[1])


def needed(target: Target, batch: int, context: int, groups: int) -> tuple[Work, Work, Work]:
    """What the same three must at least read and compute: the prompt, a group of words, a group of speech."""
    middle = context + groups // 2
    word, patch = (work(target.lm, middle, batch, target.quantized_cache) for work in (word_work, patch_work))
    return prompt_work(target.lm, context), word, patch


def describe(work: tuple[Work, Work, Work], target: Target, ceiling: Ceiling) -> str:
    """Floors, for a line before the measurement."""
    prompt, word, patch = (1e3 * part.floor(ceiling, target.lm) for part in work)
    return (
        f"floor: prompt {prompt:,.1f} ms; a group of words reads {work[1].total / 1e9:.3f} GB, {word:.2f} ms; "
        f"of speech {work[2].total / 1e9:.3f} GB, {patch:.2f} ms"
    )


def _run(target: Target, batch: int, context: int, groups: int, token: int) -> tuple[float, Timing]:
    target.lm.follow([token] * (groups + SETTLING))
    sampler = TASK_SAMPLERS["tts"]
    samplers, limits = Samplers(sampler["global"], sampler["local"]), Limits(groups + SETTLING)
    replies, prefill = [], 0.0
    for row in range(batch):
        conversation = Conversation(target.engine, seed=row)
        conversation.add(target.filler(context))
        replies.append(target.engine.start(conversation, limits, samplers, ahead=1))
        began = perf_counter()
        replies[-1].prefill()
        synchronize(target.lm.device)
        prefill = prefill or perf_counter() - began
    times = []
    for _ in range(groups + SETTLING):
        began = perf_counter()
        # The first to be asked computes the group of all.
        for reply in replies:
            next(reply)
        synchronize(target.lm.device)
        times.append(perf_counter() - began)
    for reply in replies:
        reply.close()
    return prefill, Timing.of(times[SETTLING:])
