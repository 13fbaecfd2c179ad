"""`--mark` and `--sign`: what is said of them, and the marks that a model's files get."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mimo_fast import __version__
from mimo_fast.audio.paths import name_of
from mimo_fast.checkpoint.embedded import NAME, NANO, resolve_pair
from mimo_fast.cli.reports import say
from mimo_fast.errors import MimoFastError
from mimo_fast.marking.marks import Marks
from mimo_fast.marking.provenance import Credentials, Origin, Signer
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.examples import NOTE, set_of

NOTICE = (
    "marking: a watermark some 10 dB below the speech, which some people hear; streams begin 0.2 s "
    "later; MP3, Opus, telephones and cuts leave it, changes of speed and noise do not"
)
"""What is said where a watermark is switched on."""


def marks_of(args: argparse.Namespace) -> Marks | None:
    """The marks of the options, None for none; says what a watermark costs.

    Raises:
        MarkingError: what makes them is not installed, or the certificate cannot be used.
    """
    marked, signed = getattr(args, "mark", False), getattr(args, "sign", None)
    if not marked and not signed:
        return None
    signer = None
    if signed:
        origin = Origin(short_name(args), __version__, tuple(_consents(args)))
        signer = Signer(Credentials(*signed), origin)
    marks = Marks(marked, signer)
    if marked:
        say(NOTICE)
    return marks


def marked(model: MimoAudio, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Chunks of a reply as the model's marks have them; the last one has what was held back."""
    if model.marks is None or not model.marks.watermark:
        yield from chunks
        return
    stream = model.marks.stream(model.codec.sample_rate)
    for chunk in chunks:
        audio = stream.push(chunk.audio)
        if chunk.finish_reason is not None:
            audio = torch.cat([audio, stream.finish()])
        yield replace(chunk, audio=audio)


def short_name(args: argparse.Namespace) -> str:
    """The last part of the model's folder or hub id."""
    lm = Path(resolve_pair(args.model, args.codec, args.published)[0])
    return NAME if lm.parent == NANO else lm.name


def _consents(args: argparse.Namespace) -> Iterator[str]:
    """Consent notes of the recordings that speech is made from: of a voice the text beside it."""
    voice: Path | None = getattr(args, "voice", None)
    if voice is not None and (note := voice.with_suffix(".txt")).is_file():
        try:
            text = note.read_text("utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise MimoFastError(f"cannot read {name_of(note)}, a voice's consent note") from error
        if 0 < len(text) <= NOTE:
            yield text
    if getattr(args, "examples", None):
        yield set_of(args.examples)[2]
    if getattr(args, "consent", None):
        yield args.consent
