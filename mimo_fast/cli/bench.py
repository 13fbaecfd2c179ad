"""`mimo-fast bench`: this machine's speed."""

import argparse

from mimo_fast.bench.command import bench
from mimo_fast.cli.common import find_pair, load_options
from mimo_fast.errors import MimoFastError
from mimo_fast.runtime.loading import find_device


def run(args: argparse.Namespace) -> int:
    if args.quality:
        raise MimoFastError(
            "what formats cost is a command of its own: mimo-fast quality --audio WAV... -o DIR"
        )
    args.device = str(find_device(args.device))
    named = args.model is not None or args.codec is not None
    if args.adapter is not None and not named:
        raise MimoFastError("--adapter goes with --model: random weights have no fine-tunes")
    return bench(args, find_pair(args) if named else None, load_options(args))
