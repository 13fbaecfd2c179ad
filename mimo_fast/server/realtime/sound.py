"""Bytes on the wire <-> samples at the model's rate, in parts of any size.

PCM is 16 bits little-endian; G.711 (ITU-T, 1988) is 8 bits at 8 kHz.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mimo_fast.audio.resample import resample
from mimo_fast.marking.watermark import MarkStream

MARGIN = 0.001
"""Seconds on either side of a part that resampling may see, more than its filter reaches."""

CLIP, BIAS = 32635, 132


@dataclass(frozen=True)
class Format:
    """A format of samples, mono.

    Attributes:
        name: As the API has it.
        rate: Samples a second.
        width: Bytes of a sample, of all channels.
        channels: Of which samples are the mean; of what is heard alone.
    """

    name: str
    rate: int
    width: int
    channels: int = 1


PCM = Format("audio/pcm", 24_000, 2)
FORMATS = {each.name: each for each in (PCM, Format("audio/pcmu", 8000, 1))}
FORMATS |= {each.name: each for each in (Format("audio/pcma", 8000, 1),)}


class Resampler:
    """Waveforms at one rate -> at another; parts join to what `resample` gives for all of it."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self._period = source // math.gcd(source, target)
        # The filter is six periods of the lower rate wide.
        reach = max(math.ceil(MARGIN * source), math.ceil(8 * source / min(source, target)))
        self._margin = -(-reach // self._period) * self._period
        self._before = _silence(self._margin)
        self._waiting = _silence(0)

    def push(self, wav: Tensor, ended: bool = False) -> Tensor:
        """More samples [n] -> what is final; with `ended` all of it."""
        if self._source == self._target:
            return wav
        rest = len(self._waiting) + len(wav)
        tail = _silence(self._margin + self._period) if ended else _silence(0)
        self._waiting = torch.cat((self._waiting, wav, tail))
        size = (len(self._waiting) - self._margin) // self._period * self._period
        if size <= 0:
            return _silence(0)
        seen = torch.cat((self._before, self._waiting[: size + self._margin]))
        found = resample(seen, self._source, self._target)
        first = self._margin * self._target // self._source
        # Clones, so that no part keeps all of its audio.
        self._before = seen[size : size + self._margin].clone()
        self._waiting = self._waiting[size:].clone()
        found = found[first : first + size * self._target // self._source]
        return found[: -(-rest * self._target // self._source)] if ended else found


class Decoder:
    """Bytes of a format -> samples float32 [n] in [-1, 1) at `rate`."""

    def __init__(self, format: Format, rate: int) -> None:
        self._format, self._rest = format, b""
        self._resampler = Resampler(format.rate, rate)

    def push(self, data: bytes, ended: bool = False) -> Tensor:
        """More bytes; half a sample waits for its other half."""
        data = self._rest + data
        whole = len(data) - len(data) % self._format.width
        self._rest = data[whole:]
        if self._format.width == 2 * self._format.channels:
            samples = np.frombuffer(data[:whole], "<i2")
        else:
            samples = _levels(self._format.name)[np.frombuffer(data, np.uint8)]
        wav = torch.from_numpy(samples.astype(np.float32)) / 32768
        if self._format.channels > 1:
            wav = wav.view(-1, self._format.channels).mean(1)
        return self._resampler.push(wav, ended)


class Encoder:
    """Samples float32 [n] at `rate` -> bytes of a format, whole samples in each part.

    mark: whether they carry a watermark, which delays them by 0.2 s.
    """

    def __init__(self, format: Format, rate: int, mark: bool = False) -> None:
        self._format, self._resampler = format, Resampler(rate, format.rate)
        self._mark = MarkStream(rate) if mark else None

    def push(self, wav: Tensor, ended: bool = False) -> bytes:
        if self._mark is not None:
            wav = self._mark.push(wav)
            if ended:
                wav = torch.cat([wav, self._mark.finish()])
        wav = self._resampler.push(wav, ended)
        samples = (wav * 32768).round().clamp(-32768, 32767).to(torch.int16).numpy()
        if self._format.width == 2:
            return bytes(samples.astype("<i2").tobytes())
        table = _codes(self._format.name)
        return bytes(table[samples.astype(np.int32) + 32768].tobytes())


def _silence(samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.float32, device="cpu")


@cache
def _levels(name: str) -> np.ndarray:
    """int16 [256] of the codes of G.711."""
    codes = np.arange(256, dtype=np.int32)
    if name == "audio/pcmu":
        codes = ~codes & 0xFF
        size = (((codes & 15) << 3) + BIAS << (codes >> 4 & 7)) - BIAS
        return np.where(codes & 0x80, -size, size).astype(np.int16)
    codes ^= 0x55
    step, size = codes >> 4 & 7, ((codes & 15) << 4) + 8
    size = np.where(step > 0, (size + 256) << np.maximum(step - 1, 0), size)
    return np.where(codes & 0x80, size, -size).astype(np.int16)


@cache
def _codes(name: str) -> np.ndarray:
    """uint8 [65536]: the code of G.711 of each sample, the least first."""
    samples = np.arange(-32768, 32768, dtype=np.int32)
    if name == "audio/pcmu":
        size = np.minimum(np.abs(samples), CLIP) + BIAS
        step = np.floor(np.log2(size)).astype(np.int32) - 7
        codes = ~((samples < 0) * 0x80 | step << 4 | size >> step + 3 & 15)
        return (codes & 0xFF).astype(np.uint8)
    size = np.where(samples < 0, ~samples, samples) >> 4
    step = np.where(size > 15, np.floor(np.log2(np.maximum(size, 1))).astype(np.int32) - 3, 0)
    codes = np.where(step > 0, (size >> np.maximum(step - 1, 0)) - 16 + (step << 4), size)
    return ((codes | (samples >= 0) * 0x80) ^ 0x55).astype(np.uint8)
