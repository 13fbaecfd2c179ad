"""mimo-fast: a low-latency runtime for MiMo-Audio speech language models.

    model = mimo_fast.load()    # nano, inside the package; or a hub id, or a directory
    for chunk in model.stream("tts", "seven forty two"):
        play(chunk.audio, chunk.sample_rate)

Dimension letters, used in every docstring:
    B streams (rows of a batch), R rows still running, T positions (groups) or frames, G frames per
    group, C audio channels the language model speaks, Q codebooks of the codec, S cached positions,
    D width, H / Hkv / Dh heads, key-value heads and their size, V vocabulary, L layers; M, N, K
    only in a matrix product.

A position of the language model is a group: one text token, and a patch of C x G codes (160 ms of
audio).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_fast.acceleration import accelerate
    from mimo_fast.audio.files import load_audio, save_wav
    from mimo_fast.config import CodecConfig, LMConfig
    from mimo_fast.errors import (
        AudioError,
        CheckpointError,
        ConfigError,
        MimoFastError,
        PromptError,
    )
    from mimo_fast.generation import generate
    from mimo_fast.mimo_audio import MimoAudio, load
    from mimo_fast.runtime.codec.model import Codec
    from mimo_fast.runtime.engine.stream import Chunk, Timing
    from mimo_fast.runtime.lm.model import LM
    from mimo_fast.runtime.session import Session
    from mimo_fast.sampling import MiMoSampler, MiMoStopper
else:

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used: `mimo-fast --help` needs no torch."""
        for module, names in _HOMES.items():
            if name in names:
                found = getattr(import_module(f"{__name__}.{module}"), name)
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "LM",
    "AudioError",
    "CheckpointError",
    "Chunk",
    "Codec",
    "CodecConfig",
    "ConfigError",
    "LMConfig",
    "MiMoSampler",
    "MiMoStopper",
    "MimoAudio",
    "MimoFastError",
    "PromptError",
    "Session",
    "Timing",
    "accelerate",
    "generate",
    "load",
    "load_audio",
    "save_wav",
]

__version__ = "0.1.0"

_HOMES = {
    "acceleration": ("accelerate",),
    "audio.files": ("load_audio", "save_wav"),
    "config": ("CodecConfig", "LMConfig"),
    "errors": ("AudioError", "CheckpointError", "ConfigError", "MimoFastError", "PromptError"),
    "generation": ("generate",),
    "mimo_audio": ("MimoAudio", "load"),
    "runtime.codec.model": ("Codec",),
    "runtime.engine.stream": ("Chunk", "Timing"),
    "runtime.lm.model": ("LM",),
    "runtime.session": ("Session",),
    "sampling": ("MiMoSampler", "MiMoStopper"),
}
"""Module -> the public names that it defines."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
