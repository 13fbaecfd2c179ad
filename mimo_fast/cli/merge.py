"""`mimo-fast merge --adapter DIR -o OUT`: a language model with a fine-tune's adapter merged."""

import argparse

from mimo_fast.checkpoint.embedded import NAME, resolve_pair
from mimo_fast.checkpoint.files import find_checkpoint, open_weights
from mimo_fast.cli.reports import say
from mimo_fast.runtime.merging import merge_adapter


def run(args: argparse.Namespace) -> int:
    source = find_checkpoint(
        resolve_pair(args.model or NAME, NAME)[0],
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.offline,
    )
    changed = merge_adapter(source, args.adapter, args.target)
    size = open_weights(args.target).nbytes
    say(
        f"wrote {args.target}: {size / 1e9:.3f} GB, {changed} tensors changed by {args.adapter}; "
        "it loads without --adapter"
    )
    return 0
