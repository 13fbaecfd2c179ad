"""Perth's implicit watermark (Resemble AI, MIT): its networks, with the weights from its wheel.

    32 kHz -> STFT, a frame each 10 ms -> level of the bins below 2 kHz
    embedding: five convolutions over time -> what each bin is raised by
    detection: the same at three speeds, their means weighed by attention -> 1 marked, 0 not

The networks are computed here by torch, since the package's own class needs librosa, torchaudio and
pkg_resources, and is None without a word where one of them is missing.
"""

import importlib.util
import pickle
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.errors import MarkingError

RATE = 32_000
"""Sample rate of the networks."""

HOP = 320
WINDOW = 2048
"""Samples of a frame's Hann window."""

BINS = 128
"""Of the spectrum that carry the mark, those below 2 kHz."""

LAYERS = 7

SLOPE = 0.01
"""Of the activation below zero."""

FLOOR, RANGE = -180.0, 195.0
"""Decibels of a level of 0, and from there to 1."""

SPEEDS = {"slow": 1.25, "normal": 1.0, "fast": 0.75}
"""Branches of the detector, with what they stretch the recording by."""

SILENT = 0.05
"""Of the mean level of the loudest frame: what is below tells the detector nothing."""

PACKAGE = "perth"
WEIGHTS = Path("perth_net", "pretrained", "implicit", "perth_net_250000.pth.tar")
INSTALL = "pip install 'mimo-fast[mark]'"


@cache
def weights() -> dict[str, Tensor]:
    """Weights of both networks by their names in the package.

    Raises:
        MarkingError: the package that carries them is absent, or not one that is known.
    """
    # Found, not imported.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MarkingError(f"marks need the package resemble-perth: {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / WEIGHTS
    if not path.is_file():
        raise MarkingError(f"this {PACKAGE} has no {WEIGHTS.name}: {INSTALL}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return {name: stored[name].float() for name in map(str, stored)}
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise MarkingError(f"{path} cannot be read: install resemble-perth again") from error


def spectrum(wav: Tensor) -> Tensor:
    """Samples [n] at 32 kHz -> complex [1025, 1 + n // HOP]; frames are centred on HOP."""
    window = torch.hann_window(WINDOW, dtype=wav.dtype, device=wav.device)
    # Of a sound shorter than a frame there is nothing to mirror.
    return torch.stft(wav, WINDOW, HOP, WINDOW, window, pad_mode="constant", return_complex=True)


def waveform(spectrum: Tensor, samples: int) -> Tensor:
    """The inverse of `spectrum` -> [samples]."""
    window = torch.hann_window(WINDOW, dtype=torch.float32, device=spectrum.device)
    return torch.istft(spectrum, WINDOW, HOP, WINDOW, window, length=samples)


def levels(spectrum: Tensor) -> Tensor:
    """Complex bins -> their levels in decibels, as the networks take them: 0 is -180 dB."""
    return (20 * spectrum.abs().clamp(min=10 ** (FLOOR / 20)).log10() - FLOOR) / RANGE


def raised(levels: Tensor) -> Tensor:
    """Levels [BINS, T] -> decibels [BINS, T] by which the mark raises them, or lowers them."""
    return RANGE * _layers("encoder.layers", levels[None])[0]


def marked(levels: Tensor) -> float:
    """Levels [1025, T] -> how surely they carry a mark: 1 yes, 0 no."""
    loudness = levels.sum(0)
    mask = (loudness > SILENT * loudness.max()).float()[None, None]
    if not mask.any():
        return 0.0
    weights, votes = list[Tensor](), list[Tensor]()
    for name, speed in SPEEDS.items():
        length = max(int(levels.shape[1] * speed), 1)
        stretched = F.interpolate(
            levels[None, :BINS], size=length, mode="linear", align_corners=True
        )
        out = _layers(f"decoder.{name}_layers", stretched)
        heard = F.interpolate(mask, size=length, mode="nearest")
        weight, vote = (out * heard).sum(2)[0] / heard.sum().clamp(min=1)
        weights.append(weight)
        votes.append(vote)
    shares = torch.stack(weights).softmax(0)
    return float((torch.stack(votes) * shares).sum().clamp(0, 1))


def _layers(name: str, x: Tensor) -> Tensor:
    """[1, channels, T] through one of the four stacks of convolutions."""
    found = weights()
    for i in range(LAYERS):
        weight, bias = (found[f"{name}.{i}.conv.{part}"] for part in ("weight", "bias"))
        x = F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)
        if i < LAYERS - 1:
            x = F.leaky_relu(x, SLOPE)
    return x
