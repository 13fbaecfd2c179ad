"""What is measured: a language model, a codec or none, a tokenizer, and an engine of so many slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..audio import AudioSource, load_audio
from ..mimo_audio import MimoAudio
from ..prompt import Speech
from ..runtime.codec import Codec
from ..runtime.codec_stream import PATCH_FRAMES
from ..runtime.engine import Engine
from ..tokenizer import Tokenizer
from .schedule import ScheduledLM
from .synthetic import preset_configs, preset_tokenizer, random_codec, random_lm

SAMPLE_RATE = 24000
FRAME_SAMPLES = 960
PATCH_SAMPLES = FRAME_SAMPLES * PATCH_FRAMES
"""Of 160 ms, in the published codec and all that are built like it."""

LONGEST_REPLY = 8192


@dataclass(frozen=True)
class Target:
    """A model to be measured.

    Args:
        codec: None leaves audio out: prompts hold random codes in place of encoded speech.
        steered: whether replies follow a schedule; random weights know no end and mix words and speech by chance.
        slots, capacity: requests at once, and groups of each.
    """

    lm: ScheduledLM
    codec: Codec | None
    tokenizer: Tokenizer
    steered: bool
    slots: int
    capacity: int
    quantized_cache: bool = False

    @classmethod
    def random(
        cls, preset: str, quantization: str | None, dtype: torch.dtype, device: torch.device, with_codec: bool = True
    ) -> Target:
        """A preset's dimensions with random weights, made on the device."""
        lm_config, codec_config = preset_configs(preset)
        tokenizer = preset_tokenizer(preset)
        lm = random_lm(lm_config, quantization, dtype, device, tokenizer.special.empty)
        codec = random_codec(codec_config, None, dtype, device) if with_codec else None
        return cls(ScheduledLM.of(lm, LONGEST_REPLY), codec, tokenizer, True, 1, 2)

    @classmethod
    def of(cls, model: MimoAudio, steered: bool = False, with_codec: bool = True) -> Target:
        """A loaded model."""
        codec = model.codec if with_codec else None
        quantized_cache = model.setup.kv_cache is not None
        return cls(ScheduledLM.of(model.lm, LONGEST_REPLY), codec, model.tokenizer, steered, 1, 2, quantized_cache)

    def sized(self, slots: int, capacity: int) -> Target:
        """The same weights with room for so many requests of so many groups."""
        return replace(self, slots=slots, capacity=capacity)

    @cached_property
    def engine(self) -> Engine:
        """Made, and on a GPU captured, when it is first needed."""
        engine = Engine(self.lm, self.slots, self.capacity, quantized_cache=self.quantized_cache)
        engine.warmup(progress=False)
        return engine

    @property
    def patch_seconds(self) -> float:
        """Of audio a patch."""
        return PATCH_SAMPLES / SAMPLE_RATE

    @cached_property
    def word_id(self) -> int:
        """An ordinary token."""
        return self.tokenizer.encode("a")[0]

    def plan(self, tokens: Sequence[int]) -> None:
        """Sets what replies consist of, where they are steered."""
        self.lm.follow(tokens if self.steered else [])

    def speech(self, audio: Tensor) -> Speech:
        """Codes of speech [n], cut to whole patches; random ones without a codec."""
        config = self.lm.config
        frames = len(audio) // PATCH_SAMPLES * PATCH_FRAMES
        if self.codec is not None:
            return Speech(self.codec.encode(audio, config.channels)[:, :frames].cpu())
        generator = torch.Generator().manual_seed(0)
        # The empty code is the last.
        return Speech(torch.stack([torch.randint(size - 1, (frames,), generator=generator)
                                   for size in config.code_sizes]))  # fmt: skip

    def filler(self, groups: int) -> Tensor:
        """Words [C + 1, groups * G] that came before."""
        config = self.lm.config
        ids = torch.full((config.channels + 1, groups * config.group_size), self.word_id)
        ids[1:] = torch.tensor(config.empty_codes)[:, None]
        return ids


def user_speech(seconds: float, audio: AudioSource | None = None) -> Tensor:
    """Speech [n] of whole patches: a recording's beginning, or noise where there is none."""
    samples = max(1, round(seconds * SAMPLE_RATE / PATCH_SAMPLES)) * PATCH_SAMPLES
    if audio is None:
        return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    wav = load_audio(audio, SAMPLE_RATE)[:samples]
    return torch.nn.functional.pad(wav, (0, -len(wav) % PATCH_SAMPLES))
