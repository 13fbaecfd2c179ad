"""Where somebody speaks: Silero's voice activity detector (v6, 16 kHz), its weights from its wheel.

    32 ms -> STFT magnitudes -> four convolutions -> LSTM over time -> probability of speech

The network is computed here by torch, many frames at once, since the package's own form takes one
at a time and its import changes the number of threads of the process.
"""

import importlib.util
import warnings
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.errors import MimoFastError
from mimo_fast.modes import in_own_modes

RATE = 16_000
"""Sample rate of the detector."""

FRAME = 512
"""Samples of a frame, 32 ms."""

CONTEXT = 64
"""Samples before a frame that it sees."""

BLOCK = 512
"""Frames computed at once, 16 s."""

BINS = 129
WIDTH = 128
HOP = 128

PACKAGE = "silero_vad"
WEIGHTS = Path("data", "silero_vad.jit")
"""The newest weights; its file in safetensors holds other ones."""

PREFIX = "_model."
"""Of the network for 16 kHz, beside which the file has one for 8 kHz."""


class VoiceActivity:
    """Probabilities of speech in a waveform that comes in parts.

    Raises:
        MimoFastError: the package that carries the weights is absent or too old.
    """

    @in_own_modes
    def __init__(self) -> None:
        self._weights, self._lstm = _network()
        self.reset()

    def reset(self) -> None:
        """Begins another waveform."""
        self._rest = torch.zeros(CONTEXT, dtype=torch.float32, device="cpu")
        self._state = tuple(
            torch.zeros(1, 1, WIDTH, dtype=torch.float32, device="cpu") for _ in range(2)
        )

    @in_own_modes
    def push(self, wav: Tensor) -> Tensor:
        """More samples [n] at 16 kHz -> probabilities float32 [frames that are complete]."""
        wav = torch.cat((self._rest, wav))
        frames = (len(wav) - CONTEXT) // FRAME
        self._rest = wav[frames * FRAME :].clone()
        if not frames:
            return wav.new_zeros(0)
        windows = wav.unfold(0, CONTEXT + FRAME, FRAME)
        return torch.cat([self._probabilities(block) for block in windows.split(BLOCK)])

    def _probabilities(self, x: Tensor) -> Tensor:
        """Frames with their contexts [T, 576] -> [T]."""
        w = self._weights
        x = F.pad(x[:, None], (0, CONTEXT), mode="reflect")
        x = F.conv1d(x, w["stft.forward_basis_buffer"], stride=HOP)
        x = torch.hypot(x[:, :BINS], x[:, BINS:])
        for i, stride in enumerate((1, 2, 2, 1)):
            name = f"encoder.{i}.reparam_conv"
            x = F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1).relu()
        out, self._state = self._lstm(x.transpose(1, 2).reshape(len(x), 1, WIDTH), self._state)
        last = "decoder.decoder.2"
        logits = F.linear(out[:, 0].relu(), w[f"{last}.weight"][:, :, 0], w[f"{last}.bias"])
        return logits[:, 0].sigmoid()


@cache
def _network() -> tuple[dict[str, Tensor], torch.nn.LSTM]:
    """Weights by their names in the package, and the LSTM that holds its own."""
    fix = "pip install 'silero-vad>=6.2'"
    # Found, not imported.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MimoFastError(f"finding speech needs the package silero-vad: {fix}")
    path = Path(found.submodule_search_locations[0]) / WEIGHTS
    if not path.is_file():
        raise MimoFastError(f"this silero-vad has no {WEIGHTS.name}: {fix}")
    with warnings.catch_warnings():
        # That the form is old, which its users cannot change.
        warnings.simplefilter("ignore")
        stored = torch.jit.load(path, map_location="cpu").state_dict()
    weights = {
        name.removeprefix(PREFIX): stored[name].float()
        for name in stored
        if name.startswith(PREFIX)
    }
    lstm = torch.nn.LSTM(WIDTH, WIDTH)
    with torch.no_grad():
        for name, place in lstm.named_parameters():
            place.copy_(weights.pop(f"decoder.rnn.{name.removesuffix('_l0')}"))
    return weights, lstm.requires_grad_(False).eval()
