"""`MelTransform`: the spectrogram that upstream takes from torchaudio, computed as `log_mel`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.arguments import as_type
from mimo_fast.audio.files import check_dense
from mimo_fast.audio.mel import LOG_FLOOR, mel_of_frames, mel_tables
from mimo_fast.config import CodecConfig
from mimo_fast.errors import AudioError
from mimo_fast.json_files import shown
from mimo_fast.modes import in_own_modes

MOST_SAMPLES = 2**31
"""Of all rows together; as float32 they take 8 GiB."""


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
        """Raises AudioError unless there are floating-point samples."""
        check_samples(waveform)
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


def check_samples(wav: Any) -> None:
    """Raises AudioError unless it is a tensor [..., n] of some floating-point samples."""
    if not isinstance(wav, Tensor) or not wav.is_floating_point() or not wav.ndim:
        found = f"{wav.dtype} {list(wav.shape)}" if isinstance(wav, Tensor) else type(wav).__name__
        raise AudioError(
            f"a waveform is a tensor of float samples [n], not {found}; see load_audio"
        )
    check_dense(wav)
    if not 0 < wav.numel() <= MOST_SAMPLES:
        raise AudioError(f"the audio holds {wav.numel()} samples, not 1 to {MOST_SAMPLES}")


def check_lengths(features: Any, lengths: Any, least: int = 0) -> list[int]:
    """The lengths of packed rows, as integers.

    Raises:
        ValueError: they are no integers of at least `least`, or not those of the features.
    """
    if not isinstance(features, Tensor) or not features.ndim or features.is_meta:
        raise ValueError("features must be a tensor of frames, with values")
    try:
        rows = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        rows = [as_type(int, row, "a length") for row in rows]
    except Exception:  # Tensors have no values for many reasons.
        raise ValueError(f"lengths must be integers, one a row, not {shown(lengths)}") from None
    if sum(rows) != len(features) or min(rows, default=0) < least or (least and not rows):
        problem = f"{len(features)} frames of features, but lengths {rows[:8]}"
        raise ValueError(f"{problem}: each row has one, {least} or more")
    return rows


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
    groups, total = list[list[int]](), 0
    for length in check_lengths(features, lengths):
        if not groups or (total and total + length > max_length):
            groups.append([])
            total = 0
        groups[-1].append(length)
        total += length
    by_group = torch.split(lengths, [len(group) for group in groups])
    return torch.split(features, [sum(group) for group in groups]), by_group
