"""What one format hears and says, how fast, and in how much memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.writing import save_wav
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.quality.material import Recording
from mimo_fast.runtime.engine.stream import Timing
from mimo_fast.runtime.engine.voicing import Listening

STYLE = "in a natural voice"
"""The instruction that a voice prompt goes with, as upstream takes one with an instruction only."""

LONGEST = 375
"""Groups of a text's speech at most, a minute: what never ends is wrong by then."""

TIMED, ROUNDS = 5, 3
"""Texts that are timed, and how often each is said. The least time of a text counts, as whatever
else the machine does only adds to it; of the texts the median."""


@dataclass(frozen=True)
class Spoken:
    """Speech [n] of a text, and when it came."""

    wav: Tensor
    timing: Timing


def can(model: MimoAudio, task: str) -> bool:
    """Whether a model does a task, by its architecture and by what it states it was trained for."""
    config = model.lm.config
    tasks = config.architecture.tasks
    return (not tasks or task in tasks) and config.is_trained(task)


def takes_voice(model: MimoAudio) -> bool:
    """Whether it says a text in the voice of a recording."""
    return can(model, "tts_sft") and model.lm.config.is_trained("tts_sft", "prompt_speech")


def transcripts(
    model: MimoAudio, sounds: Sequence[Tensor | Path], title: str, language: str | None, seed: int
) -> tuple[list[str], list[float]]:
    """Words that a model hears in each, and the seconds that each took."""
    tag = language if model.lm.config.architecture.tags else None
    heard, seconds = list[str](), list[float]()
    for sound in tqdm(sounds, desc=f"{title} listens", leave=False, disable=None):
        began = perf_counter()
        source = iter([sound]) if isinstance(sound, Tensor) else sound
        heard.append(model.transcribe(source, template=0, seed=seed, language=tag).text)
        seconds.append(perf_counter() - began)
    return heard, seconds


def say(
    model: MimoAudio,
    text: str,
    seed: int,
    voice: Tensor | None = None,
    most: int | None = None,
    lookahead: Listening = "exact",
) -> Spoken:
    """Says a text, in a recording's voice where one is given."""
    how: dict[str, Any] = {"split": True} if voice is None else {}
    if voice is not None:
        how |= {"instruct": STYLE, "prompt_speech": voice}
    how |= {"seed": seed, "max_new_tokens": most or LONGEST, "lookahead": lookahead}
    chunks = [*model.stream("tts", text, **how)]
    return Spoken(torch.cat([chunk.audio for chunk in chunks]), chunks[-1].timing)


def voices_of(
    model: MimoAudio, recordings: Sequence[Recording], texts: Sequence[str]
) -> list[Recording | None]:
    """The recording in whose voice each text is said, one after the other; None for the model's."""
    if not recordings or not takes_voice(model):
        return [None] * len(texts)
    return [recordings[i % len(recordings)] for i in range(len(texts))]


def speak_all(
    model: MimoAudio,
    texts: Sequence[str],
    voices: Sequence[Recording | None],
    folder: Path,
    title: str,
    seed: int,
    most: int | None,
) -> list[Path | None]:
    """Says the texts into files; None where nothing was said."""
    folder.mkdir(parents=True, exist_ok=True)
    files = list[Path | None]()
    pairs = zip(texts, voices, strict=True)
    bar = tqdm(pairs, desc=f"{title} speaks", total=len(texts), leave=False, disable=None)
    for i, (text, voice) in enumerate(bar):
        wav = say(model, text, seed + i, voice and voice.wav, most).wav
        files.append(folder / f"text-{i + 1:03}.wav" if len(wav) else None)
        if files[-1] is not None:
            save_wav(files[-1], wav, model.codec.sample_rate)
    return files


def pace(
    model: MimoAudio,
    texts: Sequence[str],
    voices: Sequence[Recording | None],
    title: str,
    seed: int,
    most: int | None,
) -> dict[str, Any]:
    """Real-time factor and first audio of some texts, which must have been said before.

    Both are None where nothing was said. See TIMED.
    """
    factors, firsts = list[float](), {"exact": list[float](), "elastic": list[float]()}
    timed = [*zip(texts, voices, strict=True)][:TIMED]
    for i, (text, voice) in enumerate(
        tqdm(timed, desc=f"{title} is timed", leave=False, disable=None)
    ):
        wav = voice and voice.wav
        runs = {
            way: [say(model, text, seed + i, wav, most, way).timing for _ in range(ROUNDS)]
            for way in ("exact", "elastic")
        }
        if not runs["exact"][0].audio_seconds:
            continue
        factors.append(min(run.elapsed / run.audio_seconds for run in runs["exact"]))
        for way, found in runs.items():
            firsts[way].append(1e3 * min(run.first_audio or run.elapsed for run in found))
    return {
        "real_time_factor": statistics.median(factors) if factors else None,
        "first_audio_ms": {
            way: statistics.median(found) if found else None for way, found in firsts.items()
        },
        "texts": len(factors),
        "rounds": ROUNDS,
    }


def weight_bytes(model: MimoAudio) -> int:
    """Bytes of the language model's weights by the memory plan, as if none lay in a mapped file."""
    setup = model.setup
    assert setup is not None
    return replace(setup, mapped=False).bytes()["weights"]
