"""`mimo-fast continue WAV -o WAV`: carries a recording on."""

import argparse

from mimo_fast.cli.common import (
    drawn,
    load_model,
    load_recording,
    lookahead_of,
    speech_output,
    write_speech,
)


def run(args: argparse.Namespace) -> int:
    lookahead = lookahead_of(args)
    wav = load_recording(args.audio, args.prepare)
    model = load_model(args)
    options = drawn(model, args) | {"lookahead": lookahead}
    chunks = model.stream("speech_continuation", wav, **options)
    before = wav if args.join else None
    write_speech(model, args, chunks, speech_output(args.output), before)
    return 0
