"""`mimo-fast asr WAV ...`: transcribes recordings."""

import argparse

from mimo_fast.cli.common import load_model, print_text


def run(args: argparse.Namespace) -> int:
    model = load_model(args)
    for path in args.audio:
        if len(args.audio) > 1:
            print(f"{path}: ", end="", flush=True)
        print_text(model.stream("asr", path, seed=args.seed, max_new_tokens=args.max_tokens))
    return 0
