"""Recordings in place of a microphone and a speaker, and a talk written to a file."""

from __future__ import annotations

import asyncio
import os
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mimo_fast.audio.paths import name_of, reason_of
from mimo_fast.audio.writing import pcm16
from mimo_fast.errors import AudioError
from mimo_fast.talk.card import BLOCK
from mimo_fast.talk.player import Player

LAG = 5.0
"""Seconds by which one side of a recorded talk may lag behind the other; then it is silence."""


class WavMicrophone:
    """A recording that is heard at its own pace, and silence after it.

    Args:
        wav: float32 [n] at `rate`.
        heard: called with each block.

    Attributes:
        silent: Seconds of silence that have followed it.
    """

    def __init__(self, wav: np.ndarray, rate: int, heard: Callable[[np.ndarray], None]) -> None:
        self._wav, self._rate, self._heard = wav, rate, heard
        self.silent = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        size = int(BLOCK * self._rate)
        loop, at = asyncio.get_running_loop(), 0
        begun = loop.time()
        while True:
            block = self._wav[at : at + size]
            if len(block) < size:
                self.silent += (size - len(block)) / self._rate
                block = np.concatenate((block, np.zeros(size - len(block), np.float32)))
            self._heard(block)
            at += size
            await asyncio.sleep(max(0.0, begun + at / self._rate - loop.time()))


class WavSpeaker:
    """A file that plays at the pace of a speaker; when the machine is late, it waits."""

    def __init__(self, path: Path, player: Player) -> None:
        self._player = player
        self._file = WavFile(path, player.rate, 1)

    async def run(self) -> None:
        """Until it is cancelled."""
        block = np.empty(int(BLOCK * self._player.rate), np.float32)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._player.fill(block)
            self._file.write(block[:, None])
            due = max(due + BLOCK, loop.time() - BLOCK)
            await asyncio.sleep(max(0.0, due - loop.time()))

    def close(self) -> None:
        self._file.close()


class WavFile:
    """A 16-bit WAV that is whole after every second, however the program ends.

    Raises:
        AudioError: it cannot be written.
    """

    def __init__(self, path: Path, rate: int, channels: int) -> None:
        self._path, self._channels, self._size = path, channels, rate
        self._parts, self._waiting = list[np.ndarray](), 0
        self.frames = 0
        try:
            self._file = wave.open(os.fspath(path), "wb")  # noqa: SIM115
        except OSError as error:
            raise AudioError(f"cannot write {name_of(path)}: {reason_of(error)}") from error
        self._file.setnchannels(channels)
        self._file.setsampwidth(2)
        self._file.setframerate(rate)

    def write(self, frames: np.ndarray) -> None:
        """More frames, float32 [n, channels]."""
        self._parts.append(frames.copy())
        self._waiting += len(frames)
        if self._waiting >= self._size:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if not self._parts:
            return
        frames = np.concatenate(self._parts).reshape(-1)
        self._parts, self._waiting = [], 0
        try:
            # It corrects the header, too.
            self._file.writeframes(pcm16(torch.from_numpy(frames)))
        except (OSError, wave.Error) as error:
            problem = f"cannot write {name_of(self._path)}: {reason_of(error)}"
            raise AudioError(problem) from error
        self.frames += len(frames) // self._channels


class Recorder:
    """A talk as a stereo WAV: who speaks on the left, the model on the right."""

    def __init__(self, path: Path, rate: int) -> None:
        self._file, self._most = WavFile(path, rate, 2), int(LAG * rate)
        self._sides = [np.zeros(0, np.float32), np.zeros(0, np.float32)]

    def add(self, side: int, blocks: list[np.ndarray]) -> None:
        """More of a side: 0 for the left, 1 for the right."""
        self._sides[side] = np.concatenate((self._sides[side], *blocks))
        longer = max(map(len, self._sides))
        if longer - min(map(len, self._sides)) > self._most:
            self._level(longer - self._most)
        self._write(min(map(len, self._sides)))

    def close(self) -> None:
        self._level(max(map(len, self._sides)))
        self._write(min(map(len, self._sides)))
        self._file.close()

    def _level(self, samples: int) -> None:
        for i, side in enumerate(self._sides):
            missing = np.zeros(max(0, samples - len(side)), np.float32)
            self._sides[i] = np.concatenate((side, missing))

    def _write(self, samples: int) -> None:
        if samples:
            self._file.write(np.stack([side[:samples] for side in self._sides], axis=1))
            self._sides = [side[samples:] for side in self._sides]
