"""A watermark in speech, and where a recording has one.

    samples -> 32 kHz -> spectrum -> what the mark changes of it -> samples, added

Only the difference is resampled, so that what lies above the mark's band stays as it is. Silence
stays silence: a bin is multiplied, nothing is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.resample import check_rate, resample
from mimo_fast.errors import AudioError
from mimo_fast.marking.network import (
    BINS,
    HOP,
    RATE,
    levels,
    marked,
    raised,
    spectrum,
    waveform,
    weights,
)
from mimo_fast.modes import in_own_modes

LEAST_RATE = 8_000
"""Sample rate that the mark's band fits into."""

STRENGTH = 1.75
"""Of the mark, in decibels of each bin, over that of the library.

What Opus at 12 kb/s or a telephone leave of the library's own, of a sentence of two seconds, is too
little (docs/responsible-use.md has the figures).
"""

QUIETER = -30.0
"""Decibels by which the network gets speech quieter: codecs leave more of what it then makes."""

CONTEXT = 20 * HOP
"""Samples at 32 kHz to each side that a sample's mark is computed from, 200 ms. Half windows and
the network's radius reach 14 ms further, to where a Hann window is all but zero: what differs is
below 1e-6 of full scale."""

BLOCK = 500
"""Frames marked at a time, 5 s."""

LISTENED, LATER = 4.0, 1.0
"""Seconds of a window of a recording that is searched, and from there to the next."""

LEVEL = -20.0
"""Decibels of full scale that a window is brought to: there the detector tells best what is marked
from what is not."""

SILENT = 1e-4
"""Peak below which a window holds nothing but rounding."""

SLOPE, BIAS = 13.157, -6.919
"""Of the logistic curve over scores that a confidence is (Platt's scaling), fitted and checked on
voices kept back by benchmarks/studies/watermark.py."""

THRESHOLD = 0.99
"""Confidence from which a recording counts as marked, a score of 0.875: unmarked speech of nano at
other speeds comes to a confidence of 0.987 (docs/responsible-use.md)."""


@dataclass(frozen=True)
class Found:
    """What a recording tells of a mark.

    Attributes:
        score: 0 to 1, the detector's own figure of the window that is surest. The network was
            trained towards 1 for marked speech and 0 for other sound: no probability.
        start, end: seconds, of that window.
    """

    score: float
    start: float
    end: float

    @property
    def confidence(self) -> float:
        """The probability of a mark, in a recording that is as likely marked as not and that has
        kept its speed; from 0.001 for a score of 0 to 0.998 for 1."""
        return 1 / (1 + math.exp(-SLOPE * self.score - BIAS))

    @property
    def marked(self) -> bool:
        return self.confidence >= THRESHOLD


def check_watermark() -> None:
    """Raises MarkingError where marks cannot be made, before there is speech."""
    weights()


def check_samples(wav: Tensor) -> None:
    """Raises AudioError unless `wav` is [n] finite floats."""
    if wav.ndim != 1 or not wav.is_floating_point():
        raise AudioError(f"a mark takes float samples [n], not {wav.dtype} {list(wav.shape)}")
    if not wav.isfinite().all():
        raise AudioError("the waveform holds NaN or infinite samples, which carry no mark")


@in_own_modes
def watermark(wav: Tensor, sample_rate: int) -> Tensor:
    """Marks float samples [n] at 8 kHz or more -> float32 [n] in [-1, 1], on the CPU.

    Raises:
        AudioError: the samples are not [n] floats, or the rate is too low or none.
        MarkingError: the package with the networks' weights is absent.
    """
    stream = MarkStream(sample_rate)
    return torch.cat([stream.push(wav), stream.finish()])


class MarkStream:
    """`watermark` of speech that comes in parts; those given back join to its result.

    Attributes:
        delay: seconds that a sample is held at most before it is given back.

    Raises:
        AudioError, MarkingError: as `watermark`.
    """

    def __init__(self, sample_rate: int) -> None:
        rate = check_rate(sample_rate)
        if rate < LEAST_RATE:
            raise AudioError(f"speech at {rate} Hz is too dull for a mark: {LEAST_RATE} is least")
        weights()
        # The shortest time that is whole in samples, in samples at 32 kHz and in frames.
        period = math.lcm(HOP, RATE // math.gcd(rate, RATE))
        self._rate, self._step = rate, rate * period // RATE
        self._context = -(-CONTEXT // period) * self._step
        self._block = max(BLOCK * HOP // period, 1) * self._step
        self._held = self._silence(self._context)
        self.delay = (self._context + self._step) / rate

    @in_own_modes
    def push(self, wav: Tensor) -> Tensor:
        """More samples [n] -> those that are marked, [m]."""
        check_samples(wav)
        self._held = torch.cat([self._held, wav.to("cpu", torch.float32)])
        ready = (len(self._held) - 2 * self._context) // self._step * self._step
        return self._taken(max(ready, 0))

    @in_own_modes
    def finish(self) -> Tensor:
        """The samples that are still held, marked; the stream may begin again."""
        rest = len(self._held) - self._context
        whole = -(-rest // self._step) * self._step
        self._held = torch.cat([self._held, self._silence(whole - rest + self._context)])
        marked = self._taken(whole)[:rest]
        self._held = self._silence(self._context)
        return marked

    def _silence(self, samples: int) -> Tensor:
        return torch.zeros(samples, dtype=torch.float32, device="cpu")

    def _taken(self, samples: int) -> Tensor:
        """The first samples after the context, marked: whole steps of them."""
        parts = [self._silence(0)]
        for start in range(0, samples, self._block):
            end = min(start + self._block, samples)
            around = self._held[start : end + 2 * self._context]
            inner = slice(self._context, self._context + end - start)
            parts.append((around[inner] + _difference(around, self._rate)[inner]).clamp(-1, 1))
        self._held = self._held[samples:].clone()
        return torch.cat(parts)


@in_own_modes
def find_watermark(wav: Tensor, sample_rate: int) -> Found:
    """Searches float samples [n], as `find_watermark_in` does.

    Raises:
        AudioError, MarkingError: as `watermark`.
    """
    check_samples(wav)
    return find_watermark_in([resample(wav, sample_rate, RATE)])


@in_own_modes
def find_watermark_in(blocks: Iterable[Tensor]) -> Found:
    """Searches samples at 32 kHz that come in blocks [n], in windows of 4 s, one a second.

    Memory does not grow with the recording, and a mark in a part of it is found.

    Raises:
        MarkingError: the package with the networks' weights is absent.
    """
    weights()
    length, hop = round(LISTENED * RATE), round(LATER * RATE)
    best, start = Found(0.0, 0.0, 0.0), 0
    held = torch.zeros(0, dtype=torch.float32, device="cpu")

    def better(window: Tensor) -> Found:
        found = Found(_score(window), start / RATE, (start + len(window)) / RATE)
        return found if found.score > best.score or not best.end else best

    for block in blocks:
        held = torch.cat([held, block.to("cpu", torch.float32)])
        # The last window is as long as any, so at least so much is kept.
        while len(held) >= length + hop:
            best = better(held[:length])
            held, start = held[hop:].clone(), start + hop
    if len(held) > length:
        best = better(held[:length])
        start, held = start + len(held) - length, held[-length:]
    return better(held)


def _difference(wav: Tensor, rate: int) -> Tensor:
    """What the mark adds to samples [n], without those that it lacks context for."""
    original = resample(wav, rate, RATE)
    bins = spectrum(original)
    band = bins[:BINS]
    quieter = band * 10 ** (QUIETER / 20)
    gain = 10 ** (STRENGTH * raised(levels(quieter)) / 20) - 1
    change = F.pad(band * gain, (0, 0, 0, len(bins) - BINS))
    return resample(waveform(change, len(original)), RATE, rate)[: len(wav)]


def _score(wav: Tensor) -> float:
    """How surely a window [n] at 32 kHz is marked."""
    if not len(wav) or float(wav.abs().max()) < SILENT:
        return 0.0
    return marked(levels(spectrum(wav * (10 ** (LEVEL / 20) / wav.square().mean().sqrt()))))
