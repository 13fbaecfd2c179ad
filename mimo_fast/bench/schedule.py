"""A model that follows a schedule of text and speech, so runs with random weights can be compared.

The text token of each group is computed and drawn as always and then replaced by the schedule's, on
the device, also inside a captured graph. That takes three small kernels more for each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.text.prompt import REPLY_PATCHES, REPLY_TEXT_TOKENS

FREE = -1
"""In a schedule: the token that the model draws."""


class ScheduledLM(LM):
    """A model whose i-th group since its seed has the i-th token of a schedule.

    After the schedule's end, and before one is set, it is the token that the model draws.
    """

    schedule: Tensor

    @classmethod
    def of(cls, lm: LM, longest: int) -> ScheduledLM:
        """The same weights, for schedules of at most so many groups."""
        scheduled = cls.__new__(cls)
        scheduled.__dict__.update(lm.__dict__)
        # One entry more, for all later groups.
        scheduled.schedule = torch.full((longest + 1,), FREE, device=lm.device, dtype=torch.int64)
        return scheduled

    def follow(self, tokens: Sequence[int]) -> None:
        """Sets the schedule.

        Raises:
            ValueError: it is longer than `of` allowed for.
        """
        if len(tokens) >= len(self.schedule):
            raise ValueError(
                f"a schedule of {len(tokens)} groups exceeds the longest, {len(self.schedule) - 1}"
            )
        # In place, since graphs have captured its address.
        self.schedule.fill_(FREE)
        self.schedule[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64, device=self.device)

    def _take_text(self, state: DecodeState, slots: Tensor, draws: Tensor, text: Tensor) -> Tensor:
        planned = self.schedule[draws.clamp(max=len(self.schedule) - 1)]
        planned = torch.where(planned == FREE, text, planned)
        return super()._take_text(state, slots, draws, planned)


def spoken_reply(patches: int, words: int, word_id: int, empty_id: int, end_id: int) -> list[int]:
    """The schedule of a spoken reply as trained: 5 words, 5 patches, and so on; then its end."""
    plan: list[int] = []
    while words or patches:
        plan += [word_id] * min(words, REPLY_TEXT_TOKENS) + [empty_id] * min(patches, REPLY_PATCHES)
        words, patches = max(words - REPLY_TEXT_TOKENS, 0), max(patches - REPLY_PATCHES, 0)
    return [*plan, end_id]


def written_reply(words: int, word_id: int, end_id: int) -> list[int]:
    """The schedule of a reply in text, then its end."""
    return [word_id] * words + [end_id]
