"""`mimo-fast asr WAV ...`: transcribes recordings."""

import argparse

from mimo_fast.audio.paths import name_of
from mimo_fast.cli.common import load_model, load_recording, print_text
from mimo_fast.cli.reports import report
from mimo_fast.errors import MimoFastError


def run(args: argparse.Namespace) -> int:
    several = len(args.audio) > 1
    for error in args.problems.values():
        report(error)
    readable = [path for path in args.audio if path not in args.problems]
    if not readable:
        return 1
    # Of several, each is decoded in its turn: together they may not fit into memory.
    first = None if several else load_recording(readable[0])
    model, failed = load_model(args), bool(args.problems)
    for path in readable:
        # One that cannot be transcribed ends only itself.
        try:
            wav = load_recording(path) if first is None else first
            chunks = model.stream("asr", wav, seed=args.seed, max_new_tokens=args.max_tokens)
            print_text(model, args, chunks, f"{name_of(path)}: " if several else "")
        except MimoFastError as error:
            report(error)
            failed = True
    return int(failed)
