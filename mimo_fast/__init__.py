"""mimo-fast: a low-latency runtime for MiMo-Audio speech language models.

    model = mimo_fast.load()    # nano, inside the package; or "XiaomiMiMo/MiMo-Audio-7B-Instruct", a directory, ...
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

from mimo_fast.accelerate import accelerate
from mimo_fast.audio.files import load_audio, save_wav
from mimo_fast.config import CodecConfig, LMConfig
from mimo_fast.errors import AudioError, CheckpointError, ConfigError, MimoFastError, PromptError
from mimo_fast.generation import generate
from mimo_fast.mimo_audio import MimoAudio, load
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.engine.stream import Chunk, Timing
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.session import Session
from mimo_fast.sampling import MiMoSampler, MiMoStopper

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
