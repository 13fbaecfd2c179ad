"""Echo cancellation by WebRTC's audio processing, which LiveKit packages."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from mimo_fast.errors import MimoFastError
from mimo_fast.talk.player import Player

FRAME = 0.01
"""Seconds that it takes at a time."""


class EchoCanceller:
    """Takes out of the microphone's sound what the speaker plays.

    Args:
        rate: of both.
        delay: seconds from a sample's way to the speaker until the microphone gives it back.

    Raises:
        MimoFastError: the package is not there.
    """

    def __init__(self, rate: int, delay: float = 0.0) -> None:
        try:
            from livekit.rtc import AudioFrame
            from livekit.rtc.apm import AudioProcessingModule
        except ImportError as error:
            fix = "pip install 'mimo-fast[echo]', or wear headphones and leave it out"
            raise MimoFastError(f"--echo-cancel needs the package livekit: {fix}") from error
        self._module: Any = AudioProcessingModule(
            echo_cancellation=True, noise_suppression=True, high_pass_filter=True
        )
        self._frame: Any = AudioFrame
        self._rate, self._size = rate, int(FRAME * rate)
        self._near = np.zeros(0, np.float32)
        self._far = np.zeros(0, np.float32)
        self.set_delay(delay)

    def set_delay(self, seconds: float) -> None:
        self._delay = round(1000 * seconds)

    def clean(self, block: np.ndarray, player: Player) -> np.ndarray:
        """A block of the microphone without the echo, in whole frames: float32 [m]."""
        far = player.far if player.far is not None else deque[np.ndarray]()
        self._far = np.concatenate((self._far, *[far.popleft() for _ in range(len(far))]))
        while len(self._far) >= self._size:
            frame, self._far = self._far[: self._size], self._far[self._size :]
            self._module.process_reverse_stream(self._framed(frame))
        self._near = np.concatenate((self._near, block))
        found = list[np.ndarray]()
        while len(self._near) >= self._size:
            frame, self._near = self._near[: self._size], self._near[self._size :]
            self._module.set_stream_delay_ms(self._delay)
            framed = self._framed(frame)
            self._module.process_stream(framed)
            found.append(np.frombuffer(framed.data, np.int16).astype(np.float32) / 32768)
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def _framed(self, frame: np.ndarray) -> Any:
        samples = np.clip(frame * 32768, -32768, 32767).astype(np.int16)
        return self._frame(bytearray(samples.tobytes()), self._rate, 1, len(samples))
