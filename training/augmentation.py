"""Augmentation: recordings at other levels, in noise and rooms, of other speakers and microphones,
by telephone.

They are drawn anew at every use, since a few voices are not enough to learn what a voice is.
"""

import io
import math
import random
from collections.abc import Callable

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample

from .synthesis import RATE

SPEEDS = (0.75, 1.2)
"""Range of playback speeds of what is heard."""

RIPPLES, RIPPLE = 4, 4.0
"""Cosines over the spectrum that colour what is heard, and the decibels of each."""

SIZES_OF_SPEAKERS, CONTRASTS = (0.85, 1.15), (0.75, 1.25)
"""For another speaker: scales of the mel axis, and of the deviation from a band's mean."""

BENDS, BEND = 3, 0.03
"""Sines that bend the mel axis, and how much of its width the first one moves a band."""

NOISE = -30, -3
"""Decibels of noise, relative to the speech."""

MASKS, MASKED_BANDS, MASKED_FRAMES = 2, 0.15, 8
"""Masks of what is heard: how many of each, the most bands (a share), and frames (of 10 ms)."""


SILENT_SHARE, SILENCE = 0.25, (0.05, 1.5)
"""Share of recordings with silence at each end that has their noise, and seconds of it; and share
of those whose samples there are zero."""

BABBLE_SHARE, BABBLE = 0.1, (8, 25)
"""Share with other talkers, and decibels that they are below."""

ROOM_SHARE, ROOM, DIRECT = 0.15, (0.1, 0.7), (-2, 12)
"""Share in rooms, seconds in which their sound falls by 60 dB, decibels of the direct sound over
the rest."""

CLIPPED_SHARE, CLIPPED = 0.06, (2, 12)
"""Share that is too loud, and by how many decibels."""

QUIET_SHARE, QUIET = 0.12, (-60, -35)
"""Share of 16-bit recordings at so few decibels, whose level was raised later."""

CODED_SHARE = 0.25
FORMATS = (
    *(("WAV", "ULAW", 8000), ("WAV", "ALAW", 8000), ("WAV", "GSM610", 8000)),
    *(("OGG", "OPUS", 16000), ("MP3", "MPEG_LAYER_III", 16000), ("WAV", "PCM_16", 8000)),
)
"""Form, kind and sample rate of telephones and players."""


def recorded(
    wav: Tensor, rng: random.Random, noise_share: float, others: Callable[[], Tensor]
) -> Tensor:
    """Waveform [n] at 24 kHz -> a recording of it, near or far, loud or quiet, by any device.

    others: draws what another talker says.
    """
    wav = wav / (float(wav.abs().max()) or 1.0)
    silent = rng.random()
    ends = [round(rng.uniform(*SILENCE) * RATE) for _ in range(2)]
    if silent < SILENT_SHARE:
        wav = F.pad(wav, ends)
    if rng.random() < BABBLE_SHARE:
        babble = sum(_fitted(others(), len(wav), rng) for _ in range(rng.randint(1, 4)))
        wav = wav + at_level(babble, wav, rng.uniform(*BABBLE))
    if rng.random() < ROOM_SHARE:
        wav = in_room(wav, rng)
    wav, _ = augment(wav, rng, noise_share)
    if SILENT_SHARE <= silent < 2 * SILENT_SHARE:
        wav = F.pad(wav, ends)
    if rng.random() < CLIPPED_SHARE:
        wav = (wav / wav.abs().max() * 10 ** (rng.uniform(*CLIPPED) / 20)).clamp(-1, 1)
    if rng.random() < QUIET_SHARE:
        step = 10 ** (-rng.uniform(*QUIET) / 20) / 2**15 * float(wav.abs().max())
        wav = (wav / step).round() * step
    if rng.random() < CODED_SHARE:
        wav = coded(wav, *rng.choice(FORMATS))
    return wav


def augment(wav: Tensor, rng: random.Random, noise_share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Waveform [n] -> the recording at some level, maybe in noise, and the same without the noise.

    Noise is white or pink, 3 to 35 dB below the speech, in `noise_share` of the cases; there is
    always a little.
    """
    peak = float(wav.abs().max()) or 1.0
    clean = wav * (10 ** (rng.uniform(-14, -0.5) / 20) / peak)
    level = rng.uniform(*NOISE) if rng.random() < noise_share else rng.uniform(-65, -45)
    return clean + at_level(noise(len(wav), rng), clean, -level), clean


def at_level(other: Tensor, wav: Tensor, decibels: float) -> Tensor:
    """Another sound, so many decibels below a waveform where that is heard."""
    loud = wav[wav.abs() > 0.05 * wav.abs().max()]
    powers = [float(each.square().mean().sqrt()) or 1.0 for each in (loud, other)]
    return other * powers[0] / powers[1] * 10 ** (-decibels / 20)


def in_room(wav: Tensor, rng: random.Random) -> Tensor:
    """With the echoes of some room; the same length."""
    response = room_response(rng.uniform(*ROOM), rng.uniform(*DIRECT), rng)
    return convolved(wav, response)[: len(wav)]


def room_response(seconds: float, direct: float, rng: random.Random) -> Tensor:
    """A room's impulse response: the direct sound, then noise that decays.

    Args:
        seconds: in which the echoes fall by 60 dB.
        direct: decibels of the direct sound over all echoes.
    """
    size = round(seconds * RATE)
    response = noise(size, rng) * 10 ** (-3 * torch.arange(size) / size)
    response *= 10 ** (-direct / 20) / response.square().sum().sqrt()
    response[0] += 1
    return response


def convolved(wav: Tensor, response: Tensor) -> Tensor:
    """Waveforms [n], [m] -> [n + m]."""
    length = _fft_size(len(wav) + len(response))
    spectrum = torch.fft.rfft(wav, length) * torch.fft.rfft(response, length)
    return torch.fft.irfft(spectrum, length)[: len(wav) + len(response)]


def coded(wav: Tensor, form: str, kind: str, rate: int) -> Tensor:
    """Through a codec of libsndfile at a sample rate; the same length."""
    file = io.BytesIO()
    samples = resample(wav / max(1.0, float(wav.abs().max())), RATE, rate).numpy()
    soundfile.write(file, samples, rate, format=form, subtype=kind)
    found = load_audio(file.getvalue(), RATE)[: len(wav)]
    return F.pad(found, (0, len(wav) - len(found)))


def _fitted(wav: Tensor, samples: int, rng: random.Random) -> Tensor:
    """A part of a waveform, or several times all of it."""
    start = rng.randrange(max(1, len(wav)))
    return wav.roll(-start).repeat(-(-samples // len(wav)))[:samples]


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
