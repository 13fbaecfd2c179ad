"""The microphone as blocks of samples, until Ctrl-C."""

import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from mimo_fast.errors import MimoFastError
from mimo_fast.talk import card

BLOCK = 0.1
"""Seconds of a block."""


@contextmanager
def microphone(rate: int) -> Iterator[Iterator[Tensor]]:
    """Blocks [n] of the default microphone; the first Ctrl-C ends them, the next the command.

    Raises:
        MimoFastError: there is no microphone, or no package that reads it.
    """
    blocks = queue.SimpleQueue[Tensor | None]()

    def heard(block: np.ndarray) -> None:
        blocks.put(torch.from_numpy(block))

    def stop(number: int, frame: FrameType | None) -> None:
        blocks.put(None)
        signal.signal(signal.SIGINT, before)

    def gone() -> None:
        lost.append(card.gone("input"))
        blocks.put(None)

    lost = list[MimoFastError]()
    stream = card.Input(rate, heard, gone, card.find_device(None, "input"), BLOCK)
    before = signal.signal(signal.SIGINT, stop)
    try:
        with stream:
            yield iter(blocks.get, None)
        if lost:
            raise lost[0]
    finally:
        signal.signal(signal.SIGINT, before)
