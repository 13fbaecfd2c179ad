"""`mimo-fast quantize IN OUT`: a language model in a smaller format."""

import argparse

from mimo_fast.checkpoint.files import open_weights
from mimo_fast.cli.common import say
from mimo_fast.config import read_json
from mimo_fast.quantization import FOREIGN_KEY, import_checkpoint, quantize_checkpoint


def run(args: argparse.Namespace) -> int:
    foreign = read_json(args.source / "config.json").get(FOREIGN_KEY)
    errors = (import_checkpoint if foreign else quantize_checkpoint)(
        args.source, args.target, args.format
    )
    print(f"{'relative error':>14}  matrix")
    for name, error in errors.items():
        print(f"{error:>14.4f}  {name}")
    before, after = (open_weights(directory).nbytes for directory in (args.source, args.target))
    say(
        f"wrote {args.target}: {after / 1e9:.3f} GB, was {before / 1e9:.3f} GB; it loads without "
        "--quantization"
    )
    return 0
