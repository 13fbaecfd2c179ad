"""Augmentation: recordings at other levels, in noise, of other speakers and microphones.

They are drawn anew at every use, since a few voices are not enough to learn what a voice is.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

SPEEDS = (0.75, 1.2)
"""Range of playback speeds of what is heard."""

RIPPLES, RIPPLE = 4, 4.0
"""Cosines over the spectrum that colour what is heard, and the decibels of each."""

SIZES_OF_SPEAKERS, CONTRASTS = (0.85, 1.15), (0.75, 1.25)
"""For another speaker: scales of the mel axis, and of the deviation from a band's mean."""

BENDS, BEND = 3, 0.03
"""Sines that bend the mel axis, and how much of its width the first one moves a band."""

MASKS, MASKED_BANDS, MASKED_FRAMES = 2, 0.15, 8
"""Masks of what is heard: how many of each, the most bands (a share), and frames (of 10 ms)."""


def augment(wav: Tensor, rng: random.Random, noise_share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Waveform [n] -> the recording at some level, maybe in noise, and the same without the noise.

    Noise is white or pink, 8 to 35 dB below the speech, in `noise_share` of the cases; there is
    always a little.
    """
    peak = float(wav.abs().max()) or 1.0
    clean = wav * (10 ** (rng.uniform(-14, -0.5) / 20) / peak)
    level = rng.uniform(-35, -8) if rng.random() < noise_share else rng.uniform(-65, -45)
    power = float(clean.square().mean().sqrt())
    return clean + noise(len(wav), rng) * power * 10 ** (level / 20), clean


def vary(wav: Tensor, rng: random.Random) -> Tensor:
    """Waveform [n] as of another speaker and microphone: slower or faster, and coloured."""
    length = round(len(wav) / rng.uniform(*SPEEDS))
    # Pitch and formants move together.
    played = F.interpolate(wav[None, None], length, mode="linear")[0, 0]
    size = _fft_size(len(played))
    spectrum = torch.fft.rfft(played, size)
    place = torch.linspace(0, math.pi, len(spectrum))
    gains = sum(
        rng.gauss(0, RIPPLE) * torch.cos(i * place + rng.uniform(0, math.pi))
        for i in range(1, RIPPLES + 1)
    )
    return torch.fft.irfft(spectrum * 10 ** (gains / 20), size)[: len(played)]


def other_speaker(mel: Tensor, rng: random.Random) -> Tensor:
    """Log-mel frames [T, M] of another speaker: formants move, the range of loudness changes."""
    place, last = torch.linspace(0, 1, mel.shape[1]), mel.shape[1] - 1
    sines = range(1, BENDS + 1)
    shifts = sum(rng.gauss(0, BEND / i) * torch.sin(i * math.pi * place) for i in sines)
    source = ((place * rng.uniform(*SIZES_OF_SPEAKERS) + shifts) * last).clamp(0, last)
    below = source.floor().long().clamp(max=last - 1)
    moved = torch.lerp(mel[:, below], mel[:, below + 1], (source - below).to(mel))
    mean = moved.mean(0)
    return mean + rng.uniform(*CONTRASTS) * (moved - mean)


def masked(mel: Tensor, rng: random.Random) -> Tensor:
    """Log-mel frames [T, M] with ranges of bands and of frames set to their means.

    So no cue of a sound is the only one that is learned (SpecAugment, arXiv:1904.08779).
    """
    mel, means = mel.clone(), mel.mean(0)
    for _ in range(MASKS):
        bands = rng.randint(0, round(MASKED_BANDS * mel.shape[1]))
        frames = rng.randint(0, MASKED_FRAMES)
        band = rng.randrange(max(1, mel.shape[1] - bands))
        frame = rng.randrange(max(1, len(mel) - frames))
        mel[:, band : band + bands] = means[band : band + bands]
        mel[frame : frame + frames] = means
    return mel


def noise(samples: int, rng: random.Random) -> Tensor:
    """Noise [samples] of unit power, its spectrum between white and pink."""
    size = _fft_size(samples)
    white = torch.randn(size, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    spectrum = torch.fft.rfft(white)
    slope = torch.arange(1, len(spectrum) + 1) ** (-0.5 * rng.random())
    shaped = torch.fft.irfft(spectrum * slope, size)[:samples]
    return shaped / shaped.square().mean().sqrt()


def _fft_size(samples: int) -> int:
    """A size of at least so many that is fast to transform."""
    return -(-samples // 4096) * 4096
