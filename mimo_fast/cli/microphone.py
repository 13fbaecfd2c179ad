"""The microphone as blocks of samples, until Ctrl-C."""

import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mimo_fast.errors import MimoFastError

BLOCK = 0.1
"""Seconds of a block."""


@contextmanager
def microphone(rate: int) -> Iterator[Iterator[Tensor]]:
    """Blocks [n] of the default microphone; the first Ctrl-C ends them, the next the command.

    Raises:
        MimoFastError: there is no microphone, or no package that reads it.
    """
    try:
        import sounddevice
    # OSError: the package is there, its library is not.
    except (ImportError, OSError) as error:
        fix = "pip install sounddevice, and apt-get install libportaudio2 on Debian"
        raise MimoFastError(f"a microphone needs the package sounddevice: {fix}") from error
    blocks = queue.SimpleQueue[Tensor | None]()

    def heard(data: Any, frames: int, time: object, status: object) -> None:
        blocks.put(torch.from_numpy(data[:, 0].copy()))

    def stop(number: int, frame: FrameType | None) -> None:
        blocks.put(None)
        signal.signal(signal.SIGINT, before)

    try:
        stream = sounddevice.InputStream(
            samplerate=rate,
            channels=1,
            dtype="float32",
            blocksize=int(BLOCK * rate),
            callback=heard,
        )
    except sounddevice.PortAudioError as error:
        raise MimoFastError(f"the microphone cannot be opened: {error}") from error
    before = signal.signal(signal.SIGINT, stop)
    try:
        with stream:
            yield iter(blocks.get, None)
    finally:
        signal.signal(signal.SIGINT, before)
