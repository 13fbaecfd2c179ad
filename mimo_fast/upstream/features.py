"""`MelTransform`: the spectrogram that upstream takes from torchaudio, computed as `log_mel`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.audio.mel import LOG_FLOOR, mel_of_frames, mel_tables
from mimo_fast.config import CodecConfig
from mimo_fast.modes import in_own_modes


class MelTransform:
    """Waveforms [..., n] at the codec's rate -> mel magnitudes [..., n_mels, 1 + n // hop].

    Short audio is padded with zeros, as in `log_mel`.
    """

    def __init__(self, config: CodecConfig, device: torch.device) -> None:
        self._config, self.device = config, device
        self.sample_rate, self.n_mels, self.power = config.sample_rate, config.n_mels, 1.0
        self.n_fft, self.hop_length, self.win_length = config.n_fft, config.hop, config.window
        self.f_min, self.f_max = config.f_min, config.f_max

    @in_own_modes
    def __call__(self, waveform: Tensor) -> Tensor:
        half = self.n_fft // 2
        wav = waveform.to(self.device, torch.float32)
        rows = wav.reshape(-1, wav.shape[-1])
        rows = F.pad(rows, (0, max(0, half + 1 - rows.shape[1])))
        rows = F.pad(rows, (half, half), mode="reflect")
        tables = mel_tables(self._config, self.device)
        mels = [mel_of_frames(row, self._config, tables).T for row in rows]
        return torch.stack(mels).reshape(*wav.shape[:-1], self.n_mels, -1)

    def to(self, *_places: object) -> "MelTransform":
        """Itself: it computes where the codec is."""
        return self


def log_of(mel: Tensor) -> Tensor:
    """Upstream's logarithm of mel magnitudes."""
    return torch.log(torch.clip(mel, min=LOG_FLOOR))


def group_by_length(
    features: Tensor, lengths: Tensor, max_length: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Splits rows of features [sum of lengths, D] so that a group has at most max_length frames.

    A row that is longer is a group of its own.

    Returns:
        Features and lengths by group.

    Raises:
        ValueError: the lengths are not those of the features.
    """
    if len(features) != int(lengths.sum()):
        raise ValueError(f"{len(features)} frames of features, but lengths of {int(lengths.sum())}")
    groups, total = list[list[int]](), 0
    for length in lengths.tolist():
        if not groups or (total and total + length > max_length):
            groups.append([])
            total = 0
        groups[-1].append(length)
        total += length
    by_group = torch.split(lengths, [len(group) for group in groups])
    return torch.split(features, [sum(group) for group in groups]), by_group
