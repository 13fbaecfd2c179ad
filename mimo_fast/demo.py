"""The whole pipeline on one recording: encode, answer in streaming, decode; with the time each stage took."""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from tqdm import tqdm

from .audio import load_audio, save_wav
from .commands import load_model, say
from .errors import MimoFastError
from .initialize import init_checkpoint
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
    print(f"{'stage':<34}{'audio':>9}{'time':>10}{'real-time factor':>18}")
    _row("load", None, loading)
    codes, encoding = _timed(lambda: model.codec.encode(wav, model.audio_channels))
    _row(f"encode to {len(codes)} x {codes.shape[1]} codes", seconds, encoding)
    decoded, decoding = _timed(lambda: model.codec.decode(codes).cpu())
    _row("decode them again", len(decoded) / rate, decoding)
    save_wav(args.output / "recording_decoded.wav", decoded, rate)
    audio, text = _answer(model, wav, args, min_groups)
    if len(audio):
        save_wav(args.output / "reply.wav", audio, rate)
    print(f"\ntext of the reply: {text!r}")
    for name in ("recording_decoded.wav", "reply.wav") if len(audio) else ("recording_decoded.wav",):
        print(f"wrote {args.output / name}")
    return 0


def _answer(model: MimoAudio, wav: torch.Tensor, args: argparse.Namespace, min_groups: int) -> tuple[torch.Tensor, str]:
    """Answers in streaming and prints the rows that only a stream has."""
    session = model.session(seed=0 if args.seed is None else args.seed)
    chunks = []
    with tqdm(desc="answering", total=args.max_tokens, unit="group", disable=None, leave=False) as bar:
        for chunk in session.stream(wav, args.max_tokens, min_groups):
            chunks.append(chunk)
            bar.update(1)
    timing = chunks[-1].timing
    _row(f"prefill {session.prefilled} groups", len(wav) / model.codec.sample_rate, timing.prefill)
    spoken = timing.audio_seconds
    _row(f"answer: {timing.groups} groups, streaming", spoken, timing.elapsed - timing.prefill)
    _row("whole answer, encode to last sample", spoken, timing.elapsed)
    if timing.first_audio is not None:
        _row("time to first audio", None, timing.first_audio)
    return torch.cat([chunk.audio for chunk in chunks]), "".join(chunk.text for chunk in chunks).strip()


def _row(stage: str, audio: float | None, time: float) -> None:
    length = "" if audio is None else f"{audio:.2f} s"
    factor = f"{time / audio:.3f}" if audio else ""
    print(f"{stage:<34}{length:>9}{1000 * time:>7.0f} ms{factor:>18}", flush=True)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    began = perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, perf_counter() - began
