"""Waveform -> log-mel spectrogram.

It follows `torchaudio.transforms.MelSpectrogram(power=1)` with its defaults operation by operation,
because audio codes depend on it, and works in blocks, so that memory does not grow with the audio.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.errors import AudioError

LOG_FLOOR = 1e-7
MEL_BLOCK = 2048  # frames per Fourier transform


@torch.no_grad()
def log_mel(wav: Tensor, config: CodecConfig) -> Tensor:
    """Waveform [n] at `config.sample_rate` -> natural log-mel spectrogram [1 + n // hop, n_mels].

    Equals log(clip(MelSpectrogram(wav), min=1e-7)) with power 1, frames centred by reflection, a
    periodic Hann window and HTK filters. Reflection needs more than n_fft / 2 samples; shorter
    audio gets zeros at its end up to the least that works (n_fft // 2 + 1), so that a single sample
    too becomes one code frame.

    Raises:
        AudioError: `wav` is not [n] floating-point samples, or is empty.
    """
    if wav.ndim != 1 or not wav.is_floating_point():
        problem = f"log_mel takes float samples [n], not {wav.dtype} {list(wav.shape)}"
        raise AudioError(f"{problem}; use load_audio first")
    if not len(wav):
        raise AudioError("the audio holds no samples")
    half = config.n_fft // 2
    wav = F.pad(wav.to(torch.float32), (0, max(0, half + 1 - len(wav))))
    wav = F.pad(wav[None], (half, half), mode="reflect")[0]
    return log_mel_of_frames(wav, config, mel_tables(config, wav.device))


def mel_tables(config: CodecConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The window [n] and the filters [n_fft // 2 + 1, n_mels] of `log_mel_of_frames`."""
    window = torch.hann_window(config.window, device=device, dtype=torch.float32)
    bands = config.f_min, config.f_max
    return window, mel_filters(config.sample_rate, config.n_fft, config.n_mels, *bands).to(device)


def log_mel_of_frames(wav: Tensor, config: CodecConfig, tables: tuple[Tensor, Tensor]) -> Tensor:
    """`log_mel` of samples float32 [n] padded at both ends -> [1 + (n - n_fft) // hop, n_mels]."""
    return mel_of_frames(wav, config, tables).clip_(min=LOG_FLOOR).log_()


def mel_of_frames(wav: Tensor, config: CodecConfig, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Mel magnitudes of `log_mel_of_frames`, before the logarithm."""
    window, bank = tables
    frames = 1 + (len(wav) - config.n_fft) // config.hop
    out = wav.new_empty(frames, config.n_mels)
    for first in range(0, frames, MEL_BLOCK):
        last = min(frames, first + MEL_BLOCK)
        block = wav[first * config.hop : (last - 1) * config.hop + config.n_fft]
        sizes = config.n_fft, config.hop, config.window
        spectrum = torch.stft(block, *sizes, window, center=False, return_complex=True)
        out[first:last] = spectrum.abs().T @ bank
    return out


@functools.lru_cache(maxsize=16)
def mel_filters(sample_rate: int, n_fft: int, n_mels: int, f_min: float, f_max: float) -> Tensor:
    """Triangular filters [n_fft // 2 + 1, n_mels] of peak 1, equally spaced in HTK mel."""
    low, high = (2595.0 * math.log10(1.0 + hertz / 700.0) for hertz in (f_min, f_max))
    corners = 700.0 * (
        10.0 ** (torch.linspace(low, high, n_mels + 2, dtype=torch.float32, device="cpu") / 2595.0)
        - 1.0
    )
    bins = torch.linspace(0, sample_rate // 2, n_fft // 2 + 1, dtype=torch.float32, device="cpu")
    steps = corners[1:] - corners[:-1]
    distance = corners[None] - bins[:, None]
    rising, falling = -distance[:, :-2] / steps[:-1], distance[:, 2:] / steps[1:]
    return torch.minimum(rising, falling).clamp(min=0)
