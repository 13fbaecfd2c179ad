"""`mimo-fast quantize IN OUT`: a language model in a smaller format, or another tool's in ours."""

import argparse
import warnings
from pathlib import Path

from mimo_fast.checkpoint.embedded import NAME, resolve_pair
from mimo_fast.checkpoint.files import find_checkpoint, open_weights
from mimo_fast.cli.reports import say
from mimo_fast.config import read_json
from mimo_fast.quantization import FOREIGN_KEY, import_checkpoint, quantize_checkpoint


def run(args: argparse.Namespace) -> int:
    source = _find(args)
    gguf = source.suffix == ".gguf"
    if gguf or args.speech_from or read_json(source / "config.json").get(FOREIGN_KEY):
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            errors = import_checkpoint(
                source, args.target, args.format, speech_from=args.speech_from
            )
        for remark in remarks:
            say(str(remark.message))
    else:
        errors = quantize_checkpoint(source, args.target, args.format or "int4")
    if errors:
        print(f"{'relative error':>14}  matrix")
    for name, error in errors.items():
        print(f"{error:>14.4f}  {name}")
    before = source.stat().st_size if gguf else open_weights(source).nbytes
    say(
        f"wrote {args.target}: {open_weights(args.target).nbytes / 1e9:.3f} GB, was "
        f"{before / 1e9:.3f} GB; it loads without --quantization"
    )
    return 0


def _find(args: argparse.Namespace) -> Path:
    if args.source.endswith(".gguf"):
        return Path(args.source).expanduser()
    return find_checkpoint(
        resolve_pair(args.source, NAME)[0],
        revision=args.revision,
        cache_dir=args.cache_dir,
        local_files_only=args.offline,
    )
