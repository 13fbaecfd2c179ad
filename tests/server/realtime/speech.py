"""Speech for tests: "what is three plus four", as a client sends it."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from mimo_fast import load_audio
from mimo_fast.checkpoint.embedded import QUESTION

RATE = 24_000


@cache
def question() -> Tensor:
    """float32 [n] at 24 kHz."""
    return load_audio(str(QUESTION), RATE)


def silence(ms: int) -> Tensor:
    return torch.zeros(RATE * ms // 1000)


def pcm(wav: Tensor) -> bytes:
    return (wav * 32767).round().to(torch.int16).numpy().astype(np.dtype("<i2")).tobytes()


def turn(before: int = 300, after: int = 900) -> bytes:
    """The question between silences of so many milliseconds."""
    return pcm(torch.cat((silence(before), question(), silence(after))))
