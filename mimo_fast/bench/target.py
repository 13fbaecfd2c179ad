"""The measured target: a language model, codec or none, tokenizer, and an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack

import torch
from torch import Tensor

from mimo_fast.audio.files import AudioSource, load_audio
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import request_floor
from mimo_fast.bench.schedule import ScheduledLM
from mimo_fast.bench.synthetic import preset_setup, preset_tokenizer, random_codec, random_lm
from mimo_fast.config import PathLike
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.loading import LoadOptions, load_parts
from mimo_fast.runtime.memory import GB, Setup, free_bytes
from mimo_fast.text.prompt import Speech
from mimo_fast.text.tokenizer import Tokenizer

SAMPLE_RATE = 24000
FRAME_SAMPLES = 960
PATCH_SAMPLES = FRAME_SAMPLES * PATCH_FRAMES
"""Samples of a patch of 160 ms, in the published codec and all of its form."""

LONGEST_REPLY = 8192


@dataclass(frozen=True)
class Target:
    """A model to be measured.

    Args:
        codec: None leaves audio out: prompts hold random codes in place of encoded speech.
        steered: whether replies follow a schedule; random weights have no end and mix words and
            speech by chance.
        setup: memory of the device; the engine holds `max_batch` requests of `max_seq_len` groups.
    """

    lm: ScheduledLM
    codec: Codec | None
    tokenizer: Tokenizer
    setup: Setup
    steered: bool

    @classmethod
    def random(
        cls,
        preset: str,
        quantization: str | None,
        dtype: torch.dtype,
        device: torch.device,
        with_codec: bool = True,
    ) -> Target:
        """A preset's dimensions with random weights, made on the device.

        Raises:
            DeviceMemoryError: it has not enough free.
        """
        setup, tokenizer = preset_setup(preset, quantization, dtype), preset_tokenizer(preset)
        if (lack := shortfall(setup, device, with_codec)) is not None:
            raise DeviceMemoryError(lack)
        lm = random_lm(setup.lm, quantization, dtype, device, tokenizer.special.empty)
        codec = random_codec(setup.codec, None, dtype, device) if with_codec else None
        return cls(ScheduledLM.of(lm, LONGEST_REPLY), codec, tokenizer, setup, steered=True)

    @classmethod
    def load(
        cls,
        lm: PathLike,
        codec: PathLike,
        quantization: str | None,
        dtype: torch.dtype | str | None,
        device: torch.device,
        steered: bool = False,
        **options: Unpack[LoadOptions],
    ) -> Target:
        """A checkpoint pair from directories or hub ids; options and errors are `MimoAudio`'s.

        With adapters that are not merged it is the model with the last one.
        """
        options["max_batch"], options["max_seq_len"] = 1, 2
        model, audio, tokenizer, setup = load_parts(lm, codec, device, dtype, quantization, options)
        chosen = model.variant(len(model.adapters))
        return cls(ScheduledLM.of(chosen, LONGEST_REPLY), audio, tokenizer, setup, steered)

    def sized(self, slots: int, capacity: int) -> Target:
        """The same weights with room for so many requests of so many groups.

        Raises:
            DeviceMemoryError: the device has not enough memory free for their cache.
        """
        setup = replace(self.setup, max_batch=slots, max_seq_len=capacity)
        if (lack := shortfall(setup, self.lm.device, loaded=True)) is not None:
            raise DeviceMemoryError(lack)
        return replace(self, setup=setup)

    @property
    def quantized_cache(self) -> bool:
        return self.setup.kv_cache is not None

    def request_floor(
        self, ceiling: Ceiling, batch: int, prompt: int, words: float, patches: float
    ) -> float:
        """Least seconds of so many equal requests at once."""
        return request_floor(
            ceiling, self.lm, self.codec, batch, prompt, words, patches, self.quantized_cache
        )

    @cached_property
    def engine(self) -> Engine:
        """The engine, made and (on a GPU) captured at first use."""
        room = (self.setup.max_batch, self.setup.max_seq_len)
        engine = Engine(self.lm, *room, quantized_cache=self.quantized_cache)
        engine.warmup(progress=False)
        return engine

    @property
    def patch_seconds(self) -> float:
        """Seconds of audio of a patch."""
        return PATCH_SAMPLES / SAMPLE_RATE

    @cached_property
    def word_id(self) -> int:
        """The id of an ordinary token."""
        return self.tokenizer.encode("a")[0]

    def plan(self, tokens: Sequence[int]) -> None:
        """Sets the replies' schedule, where they are steered."""
        self.lm.follow(tokens if self.steered else [])

    def speech(self, audio: Tensor) -> Speech:
        """Codes of speech [n], cut to whole patches; random codes without a codec."""
        config = self.lm.config
        frames = len(audio) // PATCH_SAMPLES * PATCH_FRAMES
        if self.codec is not None:
            return Speech(self.codec.encode(audio, config.channels)[:, :frames].cpu())
        draw = torch.Generator().manual_seed(0)
        # The last code is the empty one.
        codes = [
            torch.randint(size - 1, (frames,), generator=draw, dtype=torch.int64, device="cpu")
            for size in config.code_sizes
        ]
        return Speech(torch.stack(codes))

    def filler(self, groups: int) -> Tensor:
        """Preceding context: words [C + 1, groups * G]."""
        config = self.lm.config
        ids = torch.full(
            (config.channels + 1, groups * config.group_size),
            self.word_id,
            dtype=torch.int64,
            device="cpu",
        )
        ids[1:] = torch.tensor(config.empty_codes, dtype=torch.int64, device="cpu")[:, None]
        return ids


def shortfall(
    setup: Setup, device: torch.device, with_codec: bool = True, loaded: bool = False
) -> str | None:
    """Why a setup does not fit into the device's free memory, or None.

    Once loaded, the weights are already there.
    """
    free, parts = free_bytes(device), setup.bytes()
    absent = {"weights", "adapters", "codec"} if loaded else set() if with_codec else {"codec"}
    need = sum(size for name, size in parts.items() if name not in absent)
    if free is None or need <= free:
        return None
    return f"it needs {need / GB:.1f} GB and {device} has {free / GB:.1f} GB free"


def user_speech(seconds: float, audio: AudioSource | None = None) -> Tensor:
    """Speech [n] of whole patches: the beginning of a recording, or noise without one."""
    samples = max(1, round(seconds * SAMPLE_RATE / PATCH_SAMPLES)) * PATCH_SAMPLES
    if audio is None:
        return 0.1 * torch.randn(
            samples, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
        )
    wav = load_audio(audio, SAMPLE_RATE)[:samples]
    return torch.nn.functional.pad(wav, (0, -len(wav) % PATCH_SAMPLES))
