"""`convert`: a recording converted as examples show it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import AudioSource
from mimo_fast.audio.paths import name_of
from mimo_fast.audio.writing import check_output
from mimo_fast.errors import AudioError
from mimo_fast.mimo_audio import MimoAudio


@dataclass(frozen=True)
class Conversion:
    """A converted recording.

    Attributes:
        text: Its words.
        audio: float32 [n] on the CPU; empty where the model said nothing.
        finish_reason: Why it ended, as of `ReplyText`.
    """

    text: str
    audio: Tensor = field(repr=False)
    sample_rate: int
    finish_reason: str | None


@checked
def convert(
    model: MimoAudio,
    audio: AudioSource,
    examples: Iterable[Any] | str | os.PathLike[str],
    *,
    instruction: str | None = None,
    output: str | os.PathLike[str] | BinaryIO | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    adapter: str | None = None,
) -> Conversion:
    """Converts a recording of at most 30 s as examples show it: its voice, emotion, style, speed,
    language, or the noise in it.

    `MimoAudio.converter` does the same for recordings that are to be heard while they are made.
    Examples that come again are neither encoded nor prefilled again.

    Args:
        audio: anything that `load_audio` reads.
        examples, instruction, adapter: as of `MimoAudio.converter`.
        output: gets the audio; a path's suffix chooses the format, see `save_wav`.
        max_new_tokens: groups of 160 ms; by default what the recordings suggest, see
            `Converter.stream`.

    Raises:
        AudioError: a recording cannot be used, the output cannot be written, or nothing was said
            that could be written to it.
        ConfigError: the folder of examples holds no set.
        PromptError: an example lacks something, or all of them do not fit into the context.
    """
    if output is not None:
        check_output(output)
    words, parts = list[str](), list[Tensor]()
    converter = model.converter(examples, instruction, adapter)
    with closing(converter.stream(audio, seed, max_new_tokens)) as chunks:
        for chunk in chunks:
            words.append(chunk.text)
            parts.append(chunk.audio)
    text, wav = "".join(words).strip(), torch.cat(parts)
    if output is not None:
        if not len(wav):
            problem = f"nothing was said, so {name_of(output)} was not written"
            raise AudioError(f"{problem}: try another seed (the reply's text: {text!r:.120})")
        model.save_wav(output, wav)
    return Conversion(text, wav, chunk.sample_rate, chunk.finish_reason)
