"""The conversation that a model keeps, while several threads begin requests."""

import copy

import torch

from mimo_fast.runtime.engine.sequence import TokenSequence


def test_requests_that_begin_at_the_same_time_do_not_mix(model, golden, monkeypatch):
    first, second = (golden.get(f"prompts:{name}").long() for name in ("tts_en", "text"))
    own, add, other = copy.copy(model), TokenSequence.add, list[TokenSequence]()

    def interrupted(sequence: TokenSequence, ids: torch.Tensor) -> None:
        """Another thread's request comes whole in between."""
        if ids is first:
            other.append(own._history.begin(own.pipeline, second, False, 1))
        add(sequence, ids)

    monkeypatch.setattr(TokenSequence, "add", interrupted)
    sequence = own._history.begin(own.pipeline, first, False, 0)
    assert torch.equal(sequence.ids, first)
    assert sequence.seed == 0
    assert torch.equal(other[0].ids, second)
