"""The arithmetic that groups, prompts and chunks of audio need, beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mimo_fast
from mimo_fast.bench.floor import codec_work, patch_work, prompt_work, word_work

POSITIONS = 64
"""Cached groups of a row in the middle of its reply, for the share of attention."""


def share_of_ceiling(
    model: str, codec: str, flop_a_second: float, device: str = "cpu"
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """A function of a point -> its FLOP a second, and their share of the machine's."""
    with mimo_fast.load(model, codec, device=device, max_batch=1, max_seq_len=256) as loaded:
        word = word_work(loaded.lm, POSITIONS).flop
        patch = patch_work(loaded.lm, POSITIONS).flop + codec_work(loaded.codec, POSITIONS).flop
        prompt = prompt_work(loaded.lm, 1).flop

    def shares(point: Mapping[str, Any]) -> dict[str, float]:
        patches, words = point["patches"], point["groups"] - point["patches"]
        flop = words * word + patches * patch + point["prompt_groups"] * prompt
        rate = flop / point["seconds"]
        return {"flop_a_second": rate, "of_ceiling": rate / flop_a_second}

    return shares
