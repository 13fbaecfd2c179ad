"""A measurement as a file that may be shared: figures, machine and versions, nothing of its owner.

No path, host or user name is in it: checkpoints other than public ones are called OWN, the command
has DIR in place of folders, and of what a driver or the system says only the fields below are kept.
`python -m benchmarks add FILE` checks such a file and takes it into docs/performance.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from mimo_fast.checkpoint.embedded import NAME, NANO, PUBLISHED_BASE, PUBLISHED_MODEL
from mimo_fast.config import PathLike

SCHEMA = 1
"""Raised when a field changes its meaning, or goes."""

OWN = "a checkpoint of its owner's"

OPTIONS = ("quantization", "dtype", "device", "max_seq_len", "kv_cache", "codec_rope")
"""Options of the command whose values are words and numbers of this program."""

FOLDERS = ("codec", "adapter", "revision", "codec_revision", "cache_dir")
"""Options whose values are the owner's."""

PRIVATE_METRICS = ("unmeasured",)
"""Fields of `Metrics` that quote what the system says."""


def public_name(lm: PathLike) -> str:
    """Name of a language model: nano's, a published one's, or OWN."""
    if lm == NANO / "lm":
        return NAME
    return str(lm) if str(lm) in (PUBLISHED_MODEL, PUBLISHED_BASE) else OWN


def public_command(args: argparse.Namespace) -> str:
    """The command that measured, without what is its owner's."""
    words = ["mimo-fast", "bench"]
    if (lm := args.model) is not None:
        public = lm == NAME or public_name(lm) != OWN
        words += ["--model", str(lm) if public else "DIR"]
    for option in FOLDERS:
        if getattr(args, option) is not None:
            words += [f"--{option.replace('_', '-')}", "DIR" if "rev" not in option else "NAME"]
    for option in OPTIONS:
        if (value := getattr(args, option)) is not None:
            words += [f"--{option.replace('_', '-')}", str(value)]
    for part in args.offload or ():
        words += ["--offload", part]
    return " ".join(words)


def shared(
    args: argparse.Namespace,
    about: Mapping[str, str | None],
    environment: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    **figures: Any,
) -> dict[str, Any]:
    """The record: schema, command, `about` the model, environment, figures, and rows of streams.

    Args:
        rows: of the table, each with its `metrics`.
    """
    kept = [
        {**row, "metrics": {k: v for k, v in row["metrics"].items() if k not in PRIVATE_METRICS}}
        for row in rows
    ]
    head = {"schema": SCHEMA, "kind": "quick", "command": public_command(args)}
    return head | {"environment": dict(environment), **about, **figures, "rows": kept}
