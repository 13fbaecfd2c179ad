"""`mimo-fast info`: this machine, the kernels and a checkpoint pair."""

import argparse

from mimo_fast.bench.machine import describe_checkpoint, describe_machine, describe_products
from mimo_fast.cli.common import adapters_of, find_pair
from mimo_fast.runtime.loading import HubOptions


def run(args: argparse.Namespace) -> int:
    for line in describe_machine():
        print(line)
    hub: HubOptions = {"cache_dir": args.cache_dir, "local_files_only": args.offline}
    for line in describe_products(args.model, {**hub, "revision": args.revision}):
        print(line)
    lm, codec = find_pair(args)
    alone = (args.model is None) != (args.codec is None)
    for source, kind, named in ((lm, "lm", args.model), (codec, "codec", args.codec)):
        # Only one was named: its published counterpart is not described.
        if named or not alone:
            hub["revision"] = args.revision if kind == "lm" else args.codec_revision
            for line in describe_checkpoint(source, kind, hub, args.codec_rope, *adapters_of(args)):
                print(line)
    return 0
