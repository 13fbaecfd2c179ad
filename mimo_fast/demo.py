"""The whole pipeline on one recording: encode, answer in streaming, decode; with the time each stage took."""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from .audio import load_audio, save_wav
from .commands import load_model, say
from .errors import MimoFastError
from .initialize import init_checkpoint
from .machine import describe_machine
from .mimo_audio import MimoAudio

RANDOM_REPLY = 60
"""Groups that a random model, which does not know when to stop, is made to speak: 9.6 s if all are audio."""

Result = TypeVar("Result")


def demo(args: argparse.Namespace) -> int:
    """`mimo-fast demo AUDIO`: with a given model, or with a tiny random one that is made for it and thrown away."""
    if bool(args.model) != bool(args.codec):
        raise MimoFastError("--model and --codec go together; leave out both for a random tiny pair")
    wav = load_audio(args.audio, 24000)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.model:
        return _run(args, wav, min_groups=0)
    folder = Path(tempfile.mkdtemp(prefix="mimo-fast-demo-"))
    try:
        say("no model given: using a tiny one with random weights. It shows the pipeline; it makes noise, not words.")
        args.model, args.codec = init_checkpoint(folder / "tiny", "tiny", progress=False)
        args.max_tokens = args.max_tokens or RANDOM_REPLY
        return _run(args, wav, min_groups=min(RANDOM_REPLY, args.max_tokens))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(args: argparse.Namespace, wav: torch.Tensor, min_groups: int) -> int:
    model, loading = _timed(lambda: load_model(args))
    rate = model.codec.sample_rate
    seconds = len(wav) / rate
    say(f"on {model.device}, {str(model.lm.dtype).removeprefix('torch.')}; the recording is {seconds:.2f} s long")
    table = Table()
    table.row("load", loading)
    codes, encoding = _timed(lambda: model.codec.encode(wav, model.audio_channels))
    table.row(f"encode to {len(codes)} x {codes.shape[1]} codes", encoding, seconds)
    decoded, decoding = _timed(lambda: model.codec.decode(codes).cpu())
    table.row("decode them again", decoding, len(decoded) / rate)
    written = {"recording_decoded.wav": decoded}
    audio, text = _answer(model, wav, args, min_groups, table)
    if len(audio):
        written["reply.wav"] = audio
    print(f"\ntext of the reply: {text!r}")
    for name, samples in written.items():
        save_wav(args.output / name, samples, rate)
        print(f"wrote {args.output / name}")
    if args.json:
        table.write(args.json, [*describe_machine()])
    return 0


def _answer(
    model: MimoAudio, wav: torch.Tensor, args: argparse.Namespace, min_groups: int, table: "Table"
) -> tuple[torch.Tensor, str]:
    """Answers in streaming and adds the rows that only a stream has."""
    session = model.session(seed=0 if args.seed is None else args.seed)
    chunks = []
    with tqdm(desc="answering", total=args.max_tokens, unit="group", disable=None, leave=False) as bar:
        for chunk in session.stream(wav, args.max_tokens, min_groups):
            chunks.append(chunk)
            bar.update(1)
    timing = chunks[-1].timing
    spoken = timing.audio_seconds
    table.row(f"encode and prefill {session.prefilled} groups", timing.prefill, len(wav) / model.codec.sample_rate)
    table.row(f"answer {timing.groups} groups, streaming", timing.elapsed - timing.prefill, spoken)
    if timing.first_audio is not None:
        table.row("time to first audio", timing.first_audio)
    return torch.cat([chunk.audio for chunk in chunks]), "".join(chunk.text for chunk in chunks).strip()


class Table:
    """Stages as they end: printed, and kept for --json."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{'stage':<34}{'audio':>9}{'time':>11}{'real-time factor':>18}")

    def row(self, stage: str, time: float, audio: float | None = None) -> None:
        """time and audio in seconds; audio None where there is none to compare with."""
        self.rows.append({"stage": stage, "seconds": time, "audio_seconds": audio})
        length = f"{audio:.2f} s" if audio else ""
        factor = f"{time / audio:.3f}" if audio else ""
        print(f"{stage:<34}{length:>9}{1000 * time:>8.0f} ms{factor:>18}".rstrip(), flush=True)

    def write(self, path: Path, machine: list[str]) -> None:
        path.write_text(json.dumps({"machine": machine, "stages": self.rows}, indent=1) + "\n", encoding="utf-8")


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    began = perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, perf_counter() - began
