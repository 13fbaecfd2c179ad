"""`mimo-fast bench`: this machine's speed or, with --quality, what quantized weights cost."""

import argparse
from functools import partial

from mimo_fast.bench.command import bench
from mimo_fast.bench.quality import quality
from mimo_fast.cli.common import find_pair, load_model, load_options
from mimo_fast.errors import MimoFastError
from mimo_fast.runtime.loading import find_device


def run(args: argparse.Namespace) -> int:
    if not args.quality:
        if args.format or args.audio or args.text:
            raise MimoFastError("--format, --audio and --text go with --quality")
        args.device = str(find_device(args.device))
        named = args.model is not None or args.codec is not None
        if args.adapter is not None and not named:
            raise MimoFastError("--adapter goes with --model: random weights have no fine-tunes")
        return bench(args, find_pair(args) if named else None, load_options(args))
    if not args.audio and not args.text:
        raise MimoFastError("--quality needs --audio or --text to compare on")
    if args.quantization:
        raise MimoFastError(
            "--quality chooses the formats itself: use --format in place of --quantization"
        )
    args.model, args.codec = find_pair(args)
    return quality(args, partial(load_model, args))
