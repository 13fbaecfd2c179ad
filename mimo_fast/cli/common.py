"""Shared by the commands: finding and loading a model, and writing replies."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mimo_fast.audio.files import save_wav
from mimo_fast.bench.machine import useful_threads
from mimo_fast.checkpoint.embedded import CARD, NANO, PUBLISHED_CODEC, resolve_pair
from mimo_fast.cli.trained import untrained
from mimo_fast.config import PathLike
from mimo_fast.errors import MimoFastError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.loading import LoadOptions
from mimo_fast.text.spelling import spell

WORDS_NAMED = 8
"""Number of words that a warning names."""


def load_options(args: argparse.Namespace) -> LoadOptions:
    """Options on where a model is found and how much memory it may take."""
    return {
        "revision": args.revision,
        "codec_revision": args.codec_revision,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
        "max_batch": 1,
        "max_seq_len": args.max_seq_len,
        "kv_cache": args.kv_cache,
        "offload": args.offload or (),
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


def load_model(args: argparse.Namespace, quantization: Any = None) -> MimoAudio:
    """The model of the options; `quantization` replaces theirs."""
    lm, codec = find_pair(args)
    if Path(lm).parent != NANO:
        say(f"loading {lm} and {codec}")
    options, chosen = load_options(args), quantization or args.quantization
    model = MimoAudio(lm, codec, args.device, dtype=args.dtype, quantization=chosen, **options)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(useful_threads(model.lm.config))
    if beyond := untrained(model.lm.config, args):
        say(f"warning: this model was not trained for {beyond}: do not rely on its reply")
    return model


def say(text: str) -> None:
    """Progress and remarks go to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def warn_of_words(model: MimoAudio, text: str) -> None:
    """Warns of words that the model was not trained to say, where they are known."""
    known = model.tokenizer.trained_words
    unknown = [word for word in dict.fromkeys(spell(text)) if known and word not in known]
    if unknown:
        more = ", ..." if len(unknown) > WORDS_NAMED else ""
        named = ", ".join(unknown[:WORDS_NAMED])
        say(f"warning: this model was not trained on, and may garble: {named}{more}")


def print_text(chunks: Iterator[Chunk]) -> str:
    """Prints text as it comes; returns all of it."""
    text = ""
    for chunk in chunks:
        # Leading whitespace is not part of the answer.
        new = chunk.text if text else chunk.text.lstrip()
        text += new
        print(new, end="", flush=True)
    print(flush=True)
    return text.strip()


def write_speech(chunks: Iterator[Chunk], output: Path, before: torch.Tensor | None = None) -> None:
    """Writes a whole reply and prints its speed; a progress bar shows seconds spoken."""
    audio, text, last = [] if before is None else [before], [], None
    with tqdm(desc="speaking", unit="s", unit_scale=True, disable=None, leave=False) as bar:
        for chunk in chunks:
            audio.append(chunk.audio)
            text.append(chunk.text)
            bar.update(len(chunk.audio) / chunk.sample_rate)
            last = chunk
    assert last is not None
    words, timing = "".join(text).strip(), last.timing
    if words:
        print(words, flush=True)
    wav = torch.cat(audio)
    if not len(wav):
        problem = f"the model said nothing in {timing.groups} groups"
        raise MimoFastError(f"{problem}; nothing was written")
    save_wav(output, wav, last.sample_rate)
    factor = timing.elapsed / timing.audio_seconds if timing.audio_seconds else math.inf
    first = "" if timing.first_audio is None else f", first audio after {timing.first_audio:.2f} s"
    say(
        f"wrote {output}: {timing.audio_seconds:.2f} s of audio in {timing.elapsed:.2f} s "
        f"(real-time factor {factor:.2f}{first})"
    )
