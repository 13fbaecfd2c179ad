"""`mimo-fast demo [WAV]`: says a text, transcribes a recording and answers it; times all stages."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.paths import name_of, write_whole
from mimo_fast.bench.machine import describe_machine
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.cli.arguments import DEMO_FILES
from mimo_fast.cli.common import (
    adapter_of,
    load_model,
    load_recording,
    warn_if_cut,
    warn_if_unsure,
    warn_of_words,
)
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import say
from mimo_fast.errors import MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.stream import Chunk, ChunkStream

Result = TypeVar("Result")


def run(args: argparse.Namespace) -> int:
    if not args.text.strip():
        raise MimoFastError("there is no text to say")
    recording = args.audio or QUESTION
    wav = load_recording(recording, args.prepare)
    model, loading = _timed(lambda: load_model(args))
    warn_of_words(model, args.text)
    say(f"on {model.device}, {str(model.lm.dtype).removeprefix('torch.')}")
    table = StageTable()
    table.row("load", loading)
    texts, sounds = _talk(model, args, wav, table)
    args.output.mkdir(parents=True, exist_ok=True)
    # An untrained model may say nothing.
    saved = [args.output / name for name, samples in sounds.items() if len(samples)]
    for path in saved:
        model.save_wav(path, sounds[path.name])
        written.append(name_of(path))
    if args.json:
        table.write(args.json, [*describe_machine()], texts)
    print(f"\nthe recording: {recording}")
    for what, text in texts.items():
        print(f"{what + ':':<10}{text!r}")
    for path in saved:
        print(f"wrote {path}")
    return 0


def _talk(
    model: MimoAudio, args: argparse.Namespace, wav: Tensor, table: "StageTable"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Runs every stage and adds its rows -> texts by what they are, waveforms [n] by file name."""
    seed, limit, rate = args.seed or 0, args.max_tokens, model.codec.sample_rate
    seconds = len(wav) / rate
    adapter = adapter_of(model, args)
    how: dict[str, Any] = {"seed": seed, "max_new_tokens": limit, "adapter": adapter}
    saying = model.stream("tts", args.text, **how)
    follow = partial(_follow, table, partial(warn_if_cut, model, args))
    said, spoken = follow("say", saying)
    codes, encoding = _timed(lambda: model.codec.encode(wav, model.audio_channels))
    table.row(f"encode to {len(codes)} x {codes.shape[1]} codes", encoding, seconds)
    decoded, decoding = _timed(lambda: model.codec.decode(codes).cpu())
    table.row("decode them again", decoding, len(decoded) / rate)
    hearing = model.stream("asr", wav, **how)
    heard, _ = follow("transcribe", hearing, seconds, speaks=False)
    answering = model.session(seed=seed, adapter=adapter).stream(wav, limit)
    answered, reply = follow("answer", answering, seconds)
    texts = {"said": said, "heard": heard, "answered": answered}
    return texts, dict(zip(DEMO_FILES, (spoken, decoded, reply), strict=True))


def _follow(
    table: "StageTable",
    warn: Callable[[Chunk], None],
    name: str,
    stream: ChunkStream,
    heard: float = 0.0,
    speaks: bool = True,
) -> tuple[str, Tensor]:
    """Collects a stream: its text, its waveform [n], and the table rows that only a stream has.

    heard: seconds of recording in its prompt; a reply in text is timed against them.
    """
    chunks = []
    with tqdm(desc=name, unit="group", disable=None, leave=False) as bar:
        for chunk in stream:
            chunks.append(chunk)
            bar.update(1)
    timing = chunks[-1].timing
    table.row(f"{name}: {'encode and ' if heard else ''}prefill", timing.prefill, heard)
    audio = timing.audio_seconds if speaks else heard
    table.row(f"{name}: {timing.groups} groups, streaming", timing.elapsed - timing.prefill, audio)
    if timing.first_audio is not None:
        table.row(f"{name}: time to first audio", timing.first_audio)
    warn(chunks[-1])
    warn_if_unsure(chunks[-1])
    text = "".join(chunk.text for chunk in chunks).strip()
    return text, torch.cat([chunk.audio for chunk in chunks])


class StageTable:
    """Table of the stages: printed as they end, and kept for --json."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{'stage':<34}{'audio':>9}{'time':>11}{'real-time factor':>18}", flush=True)

    def row(self, stage: str, time: float, audio: float = 0.0) -> None:
        """time and audio in seconds; audio is 0 where there is none to compare with."""
        self.rows.append({"stage": stage, "seconds": time, "audio_seconds": audio or None})
        length = f"{audio:.2f} s" if audio else ""
        factor = f"{time / audio:.3f}" if audio else ""
        print(f"{stage:<34}{length:>9}{1000 * time:>8.0f} ms{factor:>18}".rstrip(), flush=True)

    def write(self, path: Path, machine: list[str], texts: dict[str, str]) -> None:
        content = {"machine": machine, "stages": self.rows, "texts": texts}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, text.encode())
        written.append(name_of(path))


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    began = perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, perf_counter() - began
