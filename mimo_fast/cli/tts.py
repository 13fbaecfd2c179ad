"""`mimo-fast tts TEXT -o WAV`: says a text."""

import argparse

from mimo_fast.cli.common import (
    load_model,
    load_recording,
    lookahead_of,
    read_text,
    speech_output,
    warn_of_words,
    write_speech,
)
from mimo_fast.errors import MimoFastError


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    if not text:
        raise MimoFastError("there is no text to say")
    if args.voice and not (args.instruct or args.natural):
        raise MimoFastError(
            "--voice needs --instruct or --natural: the model clones voices in those forms alone"
        )
    lookahead = lookahead_of(args)
    voice = load_recording(args.voice) if args.voice else None
    model = load_model(args)
    if not args.natural:
        warn_of_words(model, text)
    request = text, args.instruct, not args.natural, voice
    limits = {"seed": args.seed, "max_new_tokens": args.max_tokens}
    limits["lookahead"] = lookahead
    # A style holds for a whole text.
    chunks = model.stream("tts", *request, split=not (args.whole or args.natural), **limits)
    write_speech(model, args, chunks, speech_output(args.output))
    return 0
