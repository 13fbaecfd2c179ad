"""mimo-fast: a low-latency runtime for MiMo-Audio speech language models.

    model = mimo_fast.load()    # nano, inside the package; or a hub id, or a directory
    for chunk in model.stream("tts", "seven forty two"):
        play(chunk.audio, chunk.sample_rate)

Dimensions in every docstring:
    B   slots, rows of a batch              D       width
    R   rows that are running               H, Hkv  heads, key-value heads
    T   positions (groups) or frames        Dh      size of a head
    G   frames of a group                   V       vocabulary
    C   audio channels of the LM            L       layers
    Q   codebooks of the codec              M, N, K of a matrix product
    S   cached positions

A position of the language model is a group: one text token and a patch of C x G codes (160 ms of
audio).
"""

from __future__ import annotations

from importlib import import_module

# As `typing` has it, without its import: the command hears Ctrl-C that much earlier.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from mimo_fast.acceleration import accelerate
    from mimo_fast.audio.files import DecodeLimits, load_audio
    from mimo_fast.audio.segments import prepare_speech
    from mimo_fast.audio.writing import save_wav
    from mimo_fast.batches import BatchResult, batch
    from mimo_fast.config import CodecConfig, LMConfig
    from mimo_fast.conversion import Conversion, convert
    from mimo_fast.errors import (
        AudioError,
        BusyError,
        CheckpointError,
        ClosedError,
        ConfigError,
        DeviceMemoryError,
        MimoFastError,
        NumericError,
        PromptError,
        TaskError,
    )
    from mimo_fast.generation import generate
    from mimo_fast.mimo_audio import MimoAudio, load
    from mimo_fast.runtime.codec.model import Codec
    from mimo_fast.runtime.conversion import Converter
    from mimo_fast.runtime.engine.stream import Chunk, ReplyText, Timing
    from mimo_fast.runtime.lm.model import LM
    from mimo_fast.runtime.session import Session
    from mimo_fast.sampling import MiMoSampler, MiMoStopper
else:

    def __getattr__(name: str) -> Any:
        """Imports a public name on first use, so that `mimo-fast --help` does not import torch."""
        for module, names in _HOMES.items():
            if name in names:
                found = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LM",
    "AudioError",
    "BatchResult",
    "BusyError",
    "CheckpointError",
    "Chunk",
    "ClosedError",
    "Codec",
    "CodecConfig",
    "ConfigError",
    "Conversion",
    "Converter",
    "DecodeLimits",
    "DeviceMemoryError",
    "LMConfig",
    "MiMoSampler",
    "MiMoStopper",
    "MimoAudio",
    "MimoFastError",
    "NumericError",
    "PromptError",
    "ReplyText",
    "Session",
    "TaskError",
    "Timing",
    "accelerate",
    "batch",
    "convert",
    "generate",
    "load",
    "load_audio",
    "prepare_speech",
    "save_wav",
]

__version__ = "0.2.0.dev0"

_HOMES = {
    "acceleration": ("accelerate",),
    "audio.files": ("DecodeLimits", "load_audio"),
    "audio.segments": ("prepare_speech",),
    "audio.writing": ("save_wav",),
    "batches": ("BatchResult", "batch"),
    "config": ("CodecConfig", "LMConfig"),
    "conversion": ("Conversion", "convert"),
    "errors": (
        "AudioError",
        "BusyError",
        "CheckpointError",
        "ClosedError",
        "ConfigError",
        "DeviceMemoryError",
        "MimoFastError",
        "NumericError",
        "PromptError",
        "TaskError",
    ),
    "generation": ("generate",),
    "mimo_audio": ("MimoAudio", "load"),
    "runtime.codec.model": ("Codec",),
    "runtime.conversion": ("Converter",),
    "runtime.engine.stream": ("Chunk", "ReplyText", "Timing"),
    "runtime.lm.model": ("LM",),
    "runtime.session": ("Session",),
    "sampling": ("MiMoSampler", "MiMoStopper"),
}
"""Public names by the module that defines them."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
