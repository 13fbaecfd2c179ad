"""The exchange that a model keeps, while several threads begin requests."""

import copy
from typing import Any

import torch

from mimo_fast import MimoAudio
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.testing.parity import Golden


def test_requests_that_begin_at_the_same_time_do_not_mix(
    model: MimoAudio, golden: Golden, monkeypatch: Any
) -> None:
    """A second request comes whole while the first adds its prompt."""
    first, second = (golden.get(f"prompts:{name}").long() for name in ("tts_en", "text"))
    own, add, other = copy.copy(model), TokenSequence.add, list[Reply]()

    def begin(ids: torch.Tensor, seed: int) -> Reply:
        return own._start(ids, "", frozenset(), 4, 0, False, seed)

    def interrupted(sequence: TokenSequence, ids: torch.Tensor) -> None:
        if ids is first:
            other.append(begin(second, 1))
        add(sequence, ids)

    monkeypatch.setattr(TokenSequence, "add", interrupted)
    sequence = begin(first, 0)._request.sequence
    assert torch.equal(sequence.ids, first)
    assert sequence.seed == 0
    assert torch.equal(other[0]._request.sequence.ids, second)
