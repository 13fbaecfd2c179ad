"""Fixtures that every test may use. Nothing here may be changed by a test: copy before altering."""

from pathlib import Path

import pytest
import torch

import mimo_fast
from mimo_fast.verify import Golden

KIT = Path(__file__).parent / "golden"

# Small matrices: more threads only cost synchronisation.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def kit() -> Path:
    """The parity kit: checkpoint/lm, checkpoint/codec, audio/*.wav, golden/*."""
    return KIT


@pytest.fixture(scope="session")
def audio(kit: Path) -> list[Path]:
    """24 kHz mono, 16 kHz mono, 24 kHz stereo."""
    return [kit / "audio" / name for name in ("en_m_24k.wav", "en_f_16k.wav", "zh_24k_stereo.wav")]


@pytest.fixture(scope="session")
def golden(kit: Path) -> Golden:
    return Golden(kit)


@pytest.fixture(scope="session")
def model(kit: Path) -> mimo_fast.MimoAudio:
    """The kit's tiny checkpoint pair on the CPU, float32."""
    return mimo_fast.load(kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", device="cpu")
