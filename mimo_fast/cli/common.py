"""Shared by the commands: finding and loading a model, and writing replies."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.paths import name_of
from mimo_fast.audio.segments import prepare_speech
from mimo_fast.audio.writing import pcm16, save_wav, wav_header
from mimo_fast.bench.machine import useful_threads
from mimo_fast.checkpoint.embedded import CARD, NANO, PUBLISHED_CODEC, resolve_pair
from mimo_fast.cli.arguments import STANDARD, read_adapters
from mimo_fast.cli.marking import marked, marks_of
from mimo_fast.cli.playing import Aloud
from mimo_fast.cli.process import StandardStream, written
from mimo_fast.cli.reports import say
from mimo_fast.cli.trained import check_asked, untrained
from mimo_fast.config import LMConfig, PathLike
from mimo_fast.errors import MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.sequence import in_seconds
from mimo_fast.runtime.engine.stream import Chunk, Listening
from mimo_fast.runtime.loading import LoadOptions, find, find_device, open_lm
from mimo_fast.text.spelling import spell

SAMPLE_RATE = 24000
"""Of the waveforms that tasks take."""

WORDS_NAMED = 8
"""Number of words that a warning names."""


def adapters_of(args: argparse.Namespace) -> tuple[dict[str, PathLike] | None, bool | None]:
    """`adapters` and `merge_adapters` of `LoadOptions`.

    One that has no name has that of its folder, and is for all requests: merged where it can be.
    Those that have names are for requests that choose them.
    """
    given = args.adapter if isinstance(args.adapter, list) else [args.adapter]
    found, alone = read_adapters([str(each) for each in given if each is not None])
    return {**found} or None, None if alone or not found else False


def adapter_of(model: MimoAudio, args: argparse.Namespace) -> str | None:
    """The adapter that all requests choose: the one of --adapter DIR, where it is not merged."""
    _, merge = adapters_of(args)
    return next(iter(model.adapters), None) if merge is None else None


def drawn(model: MimoAudio, args: argparse.Namespace) -> dict[str, Any]:
    """The options of a task that every command has."""
    limits = {"seed": args.seed, "max_new_tokens": args.max_tokens}
    return limits | {"adapter": adapter_of(model, args)}


def load_options(args: argparse.Namespace, max_batch: int | None = 1) -> LoadOptions:
    """Options on where a model is found and how much memory it may take."""
    adapters, merge = adapters_of(args)
    return {
        "revision": args.revision,
        "codec_revision": args.codec_revision,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
        "adapters": adapters,
        "merge_adapters": merge,
        "codec_rope": args.codec_rope,
        "max_batch": max_batch,
        "max_seq_len": args.max_seq_len,
        "kv_cache": args.kv_cache,
        "offload": args.offload or (),
        # Of the server alone, where 0 is no bound.
        "max_load": getattr(args, "max_load", None) or None,
        "max_parked_bytes": getattr(args, "max_parked_bytes", None) or None,
    }


def find_pair(args: argparse.Namespace) -> tuple[PathLike, PathLike]:
    """Language model and codec of the options; prints which where they name neither."""
    lm, codec = resolve_pair(args.model, args.codec, args.published)
    if args.model is None and args.codec is None:
        say(
            "using nano, which speaks, transcribes and answers in a small closed domain of "
            f"English (see {CARD}); for the published model give --model {args.published} --codec "
            f"{PUBLISHED_CODEC}"
        )
    return lm, codec


def load_model(
    args: argparse.Namespace,
    quantization: Any = None,
    max_batch: int | None = 1,
    check: Callable[[LMConfig], None] | None = None,
) -> MimoAudio:
    """The model of the options; `quantization` replaces theirs, None as `max_batch` what fits.

    check: raises for a model that is not to be loaded.
    """
    device, (lm, codec) = find_device(args.device), find_pair(args)
    if Path(lm).parent != NANO:
        say(f"loading {lm} and {codec}")
    options, chosen = load_options(args, max_batch), quantization or args.quantization
    # Before its weights are read.
    marks = marks_of(args)
    config = open_lm(find(lm, options))[0]
    check_asked(config, args)
    if check is not None:
        check(config)
    model = MimoAudio(lm, codec, device, dtype=args.dtype, quantization=chosen, **options)
    model.marks = marks
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(useful_threads(model.lm.config))
    for name, folder in (options["adapters"] or {}).items():
        say(f"with {folder} {'beside the weights' if name in model.adapters else 'merged'}")
    if beyond := untrained(model.lm.config, args):
        say(f"warning: this model was not trained for {beyond}: do not rely on its reply")
    return model


def warn_of_words(model: MimoAudio, text: str) -> None:
    """Warns of words that the model was not trained to say, where they are known."""
    known = model.tokenizer.trained_words
    unknown = [word for word in dict.fromkeys(spell(text)) if known and word not in known]
    if unknown:
        more = ", ..." if len(unknown) > WORDS_NAMED else ""
        named = ", ".join(unknown[:WORDS_NAMED])
        say(f"warning: this model was not trained on, and may garble: {named}{more}")


def warn_if_cut(model: MimoAudio, args: argparse.Namespace, last: Chunk) -> None:
    """Warns of a reply that did not come to its end, and names the option that lengthens it."""
    groups = last.timing.groups
    if last.finish_reason == "length":
        say(f"warning: the reply was cut after {groups} groups: raise --max-tokens")
    if last.finish_reason == "context":
        room, most = model.engine.capacity, model.lm.config.max_positions
        advice = f"raise --max-seq-len (up to {most})" if room < most else "give less at once"
        context = f"the context of {in_seconds(room)} is full"
        say(f"warning: the reply was cut after {groups} groups, {context}: {advice}")


def warn_if_unsure(last: Chunk) -> None:
    """Warns of a reply that the model itself has little confidence in."""
    if last.warning is not None:
        say(f"warning: {last.warning}")


def load_recording(path: Path, prepare: bool = False) -> Tensor:
    """A recording [n] at 24 kHz; "-" is standard input.

    It is decoded before a model is loaded, so that a bad one does not cost that time.

    prepare: see `prepare_speech`.
    """
    load = prepare_speech if prepare else load_audio
    return load(sys.stdin.buffer if path == STANDARD else path, SAMPLE_RATE)


def read_text(text: str) -> str:
    """The text of an argument; "-" reads standard input."""
    try:
        return sys.stdin.read().strip() if text == "-" else text
    except UnicodeDecodeError as error:
        raise MimoFastError(f"standard input is not text in {sys.stdin.encoding}") from error


def print_text(
    model: MimoAudio, args: argparse.Namespace, chunks: Iterator[Chunk], prefix: str = ""
) -> str:
    """Prints text as it comes, after a prefix; returns all of it."""
    text, last = "", None
    try:
        for chunk in chunks:
            # Leading whitespace is not part of the answer.
            new = chunk.text if text else chunk.text.lstrip()
            text += new
            print(new if last else prefix + new, end="", flush=True)
            last = chunk
    finally:
        # An error, too, begins a line of its own.
        if last is not None:
            print(flush=True)
    if last is not None:
        warn_if_cut(model, args, last)
        warn_if_unsure(last)
    return text.strip()


class LiveAudio:
    """Standard output as a WAV of unknown length, which a player hears while it is spoken."""

    def __init__(self) -> None:
        self._samples = 0

    def write(self, wav: Tensor, sample_rate: int) -> None:
        """Appends samples [n].

        Raises:
            OutputError: nobody reads them.
        """
        if len(wav):
            begun = b"" if self._samples else wav_header(sample_rate)
            # `main` has put it there.
            cast(StandardStream, sys.stdout).write_bytes(begun + pcm16(wav))
            self._samples += len(wav)
            written[:] = [f"{self._samples / sample_rate:.2f} s of audio to standard output"]


def write_speech(
    model: MimoAudio,
    args: argparse.Namespace,
    chunks: Iterator[Chunk],
    output: Path | LiveAudio | None,
    before: Tensor | None = None,
    aloud: Aloud | None = None,
) -> None:
    """Writes a reply after `before` [n], then prints its words, and its speed on stderr.

    The model's marks are in the reply alone: what came before is somebody's.

    A file is written whole, first of all, so that no failure of standard output costs it. A
    progress bar shows seconds spoken.

    aloud: where it is heard, too, while it is made.
    """
    rate = model.codec.sample_rate
    live = output if isinstance(output, LiveAudio) else None
    audio, text, last = [] if before is None else [before], [], None
    if live and before is not None:
        live.write(before, rate)
    with tqdm(desc="speaking", unit="s", unit_scale=True, disable=None, leave=False) as bar:
        for chunk in marked(model, chunks):
            if live:
                live.write(chunk.audio, rate)
            if aloud:
                aloud.write(chunk.audio)
            audio.append(chunk.audio)
            text.append(chunk.text)
            bar.update(len(chunk.audio) / rate)
            last = chunk
    assert last is not None
    words, timing = "".join(text).strip(), last.timing
    where = "standard output" if live else "the speaker" if output is None else name_of(output)
    if not timing.audio_seconds:
        warn_if_cut(model, args, last)
        lost = f"; {where} was not written" if isinstance(output, Path) else ""
        raise MimoFastError(f"the model said nothing in {timing.groups} groups{lost}")
    if isinstance(output, Path):
        save_speech(model, output, torch.cat(audio))
    if words and live:
        say(words)
    elif words:
        print(words, flush=True)
    factor = timing.elapsed / timing.audio_seconds if timing.audio_seconds else math.inf
    first = "" if timing.first_audio is None else f", first audio after {timing.first_audio:.2f} s"
    done = "said" if output is None else f"wrote {where}"
    say(
        f"{done}: {timing.audio_seconds:.2f} s of audio in {timing.elapsed:.2f} s "
        f"(real-time factor {factor:.2f}{first})"
    )
    warn_if_cut(model, args, last)
    warn_if_unsure(last)
    if aloud:
        aloud.finish()


def save_speech(model: MimoAudio, path: Path, wav: Tensor) -> None:
    """Writes samples [n] that carry their marks already; remembers that the file was written."""
    write = save_wav if model.marks is None else model.marks.seal
    write(path, wav, model.codec.sample_rate)
    written.append(name_of(path))


def lookahead_of(args: argparse.Namespace) -> Listening:
    """The look-ahead of --lookahead, which files have no use for.

    Raises:
        MimoFastError: it is elastic, and the reply is not heard as it is spoken.
    """
    heard = args.output == STANDARD or (args.output is None and getattr(args, "play", False))
    if args.lookahead == "elastic" and not heard:
        raise MimoFastError(
            "--lookahead elastic is for somebody who listens: it goes with -o - or with --play "
            "alone, a file gets the exact samples"
        )
    return "elastic" if args.lookahead == "elastic" else "exact"


def speech_output(path: Path) -> Path | LiveAudio:
    return LiveAudio() if path == STANDARD else path
