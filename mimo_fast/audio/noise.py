"""Steady noise under speech: how loud it is, and less of it.

Each frequency's mean power where nobody speaks is the noise. Where a frequency is hardly louder
than that it is made quieter, by 6 dB and no more: what is taken away altogether takes sounds of
speech with it, and a model that knows some noise is disturbed less by noise than by holes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, HOP = 1024, 256
"""Samples of a frame, 43 ms at 24 kHz, and between frames."""

NOISY = 18.0
"""Decibels of speech over noise above which nothing is done: speech that is clean."""

LOUDER = 3.0
"""Power over the noise's mean above which a frequency is speech: 95% of noise is below it."""

FLOOR = 0.5
"""Gain of what is noise."""

SMOOTHED = (21, 5)
"""Bins and frames, 490 Hz and 64 ms, over which gains are averaged."""

LEAST = HOP
"""Samples of noise in a row that tell something."""


def quieter_noise(wav: Tensor, speech: Sequence[tuple[int, int]]) -> Tensor:
    """A waveform [n] with less of its steady noise; the same if it is clean.

    Args:
        speech: samples between which somebody speaks, in order; the rest is noise alone.
    """
    return (with_noise_at((FLOOR,), wav, speech) or [wav])[0]


def with_noise_at(
    floors: Sequence[float], wav: Tensor, speech: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """A waveform [n] with its steady noise at each of these gains; none of it if it is clean.

    Args:
        speech: as of `quieter_noise`.
    """
    ends = [0, *(place for stretch in speech for place in stretch), len(wav)]
    quiet = [wav[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True) if b - a >= LEAST]
    if not quiet or decibels_over(torch.cat([wav[a:b] for a, b in speech]), quiet) > NOISY:
        return []
    window = torch.hann_window(WINDOW, dtype=wav.dtype, device=wav.device)
    noise = torch.cat([_powers(part, window) for part in quiet]).mean(0)
    padded = F.pad(wav, (0, max(0, WINDOW - len(wav))))
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)
    louder = (spectrum.abs().square() > LOUDER * _smooth(noise)[:, None]).to(wav.dtype)
    bins, frames = SMOOTHED
    around = (frames // 2, frames // 2, bins // 2, bins // 2)
    share = F.avg_pool2d(F.pad(louder[None, None], around, mode="replicate"), SMOOTHED, 1)[0, 0]
    gained = (spectrum * (floor + (1 - floor) * share) for floor in floors)
    heard = (torch.istft(each, WINDOW, HOP, window=window, length=len(padded)) for each in gained)
    return [each[: len(wav)] for each in heard]


def decibels_over(speech: Tensor, quiet: Sequence[Tensor]) -> float:
    """How far speech [n] is louder than what is heard without it."""
    noise = float(torch.cat(list(quiet)).square().mean())
    both = float(speech.square().mean())
    return 10 * math.log10(max(both - noise, 1e-20) / max(noise, 1e-20))


def _powers(wav: Tensor, window: Tensor) -> Tensor:
    """Power of each frame and frequency [frames, bins]; a short part is one frame."""
    if len(wav) < WINDOW:
        # As loud as if it filled the frame.
        wav = F.pad(wav * math.sqrt(WINDOW / len(wav)), (0, WINDOW - len(wav)))
    return torch.fft.rfft(wav.unfold(0, WINDOW, HOP) * window).abs().square()


def _smooth(noise: Tensor) -> Tensor:
    """Noise [bins] is much the same at near frequencies; a few frames do not show that."""
    return F.avg_pool1d(F.pad(noise[None, None], (4, 4), mode="reflect"), 9, 1)[0, 0]
