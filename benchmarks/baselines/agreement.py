"""Whether a baseline computes what we compute: its choice at every text token and code, fed our
tokens all along.

In float32 every choice must be ours. In 16 bits two orders of summation may decide a near tie
differently: there a choice that is not ours passes where the baseline's score of our token is
within TIES of its best, relative to its largest score; how many were equal, and how far the worst
was, is part of the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.upstream import Upstream
from mimo_fast.bench.target import Target
from mimo_fast.runtime.lm.decode import Group, Limits, Samplers
from mimo_fast.sampling import GREEDY

TIES = {torch.float32: 0.0, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Of the largest score. The best and the second best of 1,000 random scores are 7% apart in the
median; a random choice is 100% off."""


class Refused(Exception):
    """A baseline's tokens are not ours, so its speed says nothing."""


@dataclass(frozen=True)
class Agreement:
    """Choices compared, how many were ours, and the largest gap of the others, relative to the
    largest score."""

    choices: int
    equal: int
    worst_gap: float
    bound: float

    def __str__(self) -> str:
        if self.equal == self.choices:
            return f"all {self.choices} greedy choices equal ours"
        return (
            f"{self.equal} of {self.choices} greedy choices equal ours, the others are ties: "
            f"within {100 * self.worst_gap:.2f}% of the largest score (bound {100 * self.bound:g}%)"
        )


class Judge:
    """Takes our tokens one after the other and compares them with what the scores prefer."""

    def __init__(self, tokens: Iterator[int | None]) -> None:
        self._tokens = tokens
        self.choices = self.equal = 0
        self.worst_gap = 0.0

    def __call__(self, scores: Tensor) -> int:
        best, ours = int(scores.argmax()), next(self._tokens)
        if ours is None:
            return best
        self.choices += 1
        self.equal += best == ours
        allowed = scores[scores != -torch.inf].float()
        gap = float((scores[best].float() - scores[ours].float()) / allowed.abs().max())
        # A NaN stays.
        if gap > self.worst_gap or gap != gap:
            self.worst_gap = gap
        return ours


def agreement(target: Target, baseline: Upstream, ids: Tensor, groups: int) -> Agreement:
    """Compares the text tokens of a reply that runs freely, and the codes of one that only speaks.

    Args:
        ids: a prompt [C + 1, T G]; the target must have room for it and the groups.

    Raises:
        Refused: a token is neither equal nor a tie.
    """
    judged = []
    for plan in ([], [target.lm.empty_id] * groups):
        ours = our_groups(target, ids, groups, plan)
        judge = Judge(_choices(ours, bool(plan), baseline))
        for _ in baseline.generate(ids, groups, judge, plan):
            pass
        judged.append(judge)
    bound = TIES[target.lm.dtype]
    found = Agreement(
        sum(judge.choices for judge in judged),
        sum(judge.equal for judge in judged),
        max((judge.worst_gap for judge in judged), key=lambda gap: (gap != gap, gap)),
        bound,
    )
    if not found.worst_gap <= bound:
        raise Refused(
            f"{found.choices - found.equal} of {found.choices} greedy choices differ from ours, by up to "
            f"{100 * found.worst_gap:.1f}% of the largest score"
        )
    return found


def our_groups(target: Target, ids: Tensor, groups: int, plan: Sequence[int] = ()) -> list[Group]:
    """Our greedy groups after a prompt."""
    target.lm.follow(plan)
    conversation = target.engine.conversation(seed=0)
    conversation.add(ids)
    return list(target.engine.start(conversation, Limits(groups), Samplers(GREEDY, GREEDY)))


def _choices(groups: Sequence[Group], planned: bool, baseline: Upstream) -> Iterator[int | None]:
    """Our tokens in the order in which the baseline asks for them; None for text that a plan
    decided."""
    config = baseline.config
    for group in groups:
        yield None if planned else group.text
        if group.text == baseline.empty_id:
            codes = group.codes.tolist()
            for step in range(config.patch_steps):
                for channel, delay in enumerate(config.delays):
                    if delay <= step < delay + config.group_size:
                        yield codes[channel][step - delay]
