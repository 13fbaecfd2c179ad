"""`mimo-fast quantize IN OUT`: a language model in a smaller format."""

import argparse

from mimo_fast.checkpoint.embedded import NAME, resolve_pair
from mimo_fast.checkpoint.files import find_checkpoint, open_weights
from mimo_fast.cli.reports import say
from mimo_fast.config import read_json
from mimo_fast.quantization import FOREIGN_KEY, import_checkpoint, quantize_checkpoint


def run(args: argparse.Namespace) -> int:
    source = find_checkpoint(
        resolve_pair(args.source, NAME)[0],
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.offline,
    )
    foreign = read_json(source / "config.json").get(FOREIGN_KEY)
    convert = import_checkpoint if foreign else quantize_checkpoint
    errors = convert(source, args.target, args.format)
    print(f"{'relative error':>14}  matrix")
    for name, error in errors.items():
        print(f"{error:>14.4f}  {name}")
    before, after = (open_weights(directory).nbytes for directory in (source, args.target))
    say(
        f"wrote {args.target}: {after / 1e9:.3f} GB, was {before / 1e9:.3f} GB; it loads without "
        "--quantization"
    )
    return 0
