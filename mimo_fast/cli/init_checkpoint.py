"""`mimo-fast init-checkpoint DIR`: a checkpoint pair of random weights."""

import argparse

from mimo_fast.checkpoint.initialize import init_checkpoint
from mimo_fast.cli.reports import say


def run(args: argparse.Namespace) -> int:
    lm, codec = init_checkpoint(args.directory, args.preset, seed=args.seed)
    say(
        "random weights make noise, not words: this pair is for trying the pipeline and for "
        "timing it"
    )
    print(f"{lm}\n{codec}")
    return 0
