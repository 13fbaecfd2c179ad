"""Training losses: spectra of audio at several resolutions, and ordered labels (CTC)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.mel import mel_filters

SCALES = ((256, 20), (512, 40), (1024, 80), (2048, 120))
"""Window and mel bands of each resolution; hops are a quarter of a window. A shorter one would see
single pulses of the voice, whose positions codes do not tell, and only teach to smear them.
"""

ENVELOPE_WINDOW, ENVELOPE_BANDS, CEPSTRA = 640, 40, 13
"""Window of the envelope: frames of 27 ms without the harmonics, as recognisers use."""

F_MAX = 8000.0
"""Hz, above which the synthesizer's speech has nothing."""

FLOOR = 1e-3
"""Magnitude below which differences do not count: about 60 dB below the loudest."""


def mel_distance(got: Tensor, want: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of the natural log-mels of waveforms [n], over all `SCALES`."""
    total = got.new_zeros(())
    for window, bands in SCALES:
        a, b = (_log_mel(wav, window, bands, sample_rate) for wav in (got, want))
        total = total + (a - b).abs().mean()
    return total / len(SCALES)


def envelope_distance(got: Tensor, want: Tensor, sample_rate: int) -> Tensor:
    """Waveforms [n] -> mean absolute difference of mel cepstra, in nats like `mel_distance`."""
    a, b = (_log_mel(wav, ENVELOPE_WINDOW, ENVELOPE_BANDS, sample_rate) for wav in (got, want))
    return ((a - b) @ _cosines(ENVELOPE_BANDS, CEPSTRA).to(a.device)).abs().mean()


def _cosines(bands: int, count: int) -> Tensor:
    """The first `count` columns of the orthonormal DCT, [bands, count]."""
    place = (torch.arange(bands) + 0.5) * math.pi / bands
    columns = torch.cos(place[:, None] * torch.arange(count)) * (2 / bands) ** 0.5
    columns[:, 0] /= 2**0.5
    return columns


def ctc(scores: Sequence[Tensor], labels: Sequence[Sequence[int]], blank: int) -> Tensor:
    """Cross entropy of the labels per label, from log-probabilities [T_i, V] of each sequence."""
    lengths = [torch.tensor([*map(len, each)]) for each in (scores, labels)]
    targets = torch.tensor([label for each in labels for label in each], device=scores[0].device)
    return F.ctc_loss(
        torch.nn.utils.rnn.pad_sequence([*scores]), targets, *lengths, blank, zero_infinity=True
    )


def _log_mel(wav: Tensor, window: int, bands: int, sample_rate: int) -> Tensor:
    shape = torch.hann_window(window, device=wav.device)
    spectrum = torch.stft(wav, window, window // 4, window=shape, return_complex=True)
    # The gradient of a modulus is not defined at 0.
    power = torch.view_as_real(spectrum).square().sum(-1)
    filters = mel_filters(sample_rate, window, bands, 0.0, F_MAX).to(wav.device)
    magnitude = (power + 1e-9).sqrt().T @ filters
    return magnitude.clamp(min=FLOOR * window**0.5).log()
