"""Columns that show records on a terminal and in the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from benchmarks.records import Entry
from mimo_fast.runtime.memory import GB


def duration(seconds: float) -> str:
    """A duration with three digits and a unit."""
    units = (u for u in (("s", 1.0), ("ms", 1e3)) if seconds * u[1] >= 1)
    unit, factor = next(units, ("us", 1e6))
    value = seconds * factor
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def shown(value: float | None, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """A number with thousands separators; a dash for None."""
    return "-" if value is None else f"{scale * value:,.{digits}f}{unit}"


share = partial(shown, scale=100, unit="%")
ms = partial(shown, scale=1e3, unit=" ms")
whole_ms = partial(shown, scale=1e3, digits=0, unit=" ms")
gigabytes = partial(shown, scale=1 / GB, digits=2, unit=" GB")
factor = partial(shown, digits=3)
per_nano = partial(shown, scale=1e-9)

Column = tuple[str, str, Callable[[Any], str]]
"""A column: its head, its field of a record (`Entry.at`), and its format."""

WIDTHS = {
    "case": -56,
    "name": -48,
    "op": -30,
    "provider": -22,
    "format": -8,
    "shape": -24,
    "title": -16,
    "task": -19,
    "old": -24,
    "new": -16,
    "interval": 16,
    "verdict": -20,
    "instructions": -12,
    "product": -8,
    "quantization": -8,
}
"""Widths of columns on a terminal, by their place; negative: aligned to the left.

Others are as wide as their heads, and at least NUMBER.
"""

NUMBER = 9

COLUMNS: dict[str, tuple[Column, ...]] = {
    "groups": (
        ("model", "title", str),
        ("batch", "batch", str),
        ("context", "context", str),
        ("prompt", "prefill", duration),
        ("of floor", "of_floor.prefill", share),
        ("group of words", "text_group.p50", duration),
        ("of floor", "of_floor.text_group", share),
        ("group of speech", "audio_group.p50", duration),
        ("of floor", "of_floor.audio_group", share),
        ("p90", "audio_group.p90", duration),
        ("real-time factor", "audio_rtf", factor),
    ),
    "request": (
        ("model", "title", str),
        ("task", "task", str),
        ("batch", "batch", str),
        ("prompt", "prompt_groups", str),
        ("ttft", "ttft.p50", ms),
        ("audio_ttfp", "audio_ttfp.p50", ms),
        ("itl p50", "itl.p50", ms),
        ("p95", "itl.p95", ms),
        ("p99", "itl.p99", ms),
        ("underrun", "audio_underrun", whole_ms),
        ("continuity", "audio_continuity", share),
        ("e2el", "e2el.p50", partial(shown, digits=2, unit=" s")),
        ("audio_rtf", "audio_rtf", factor),
        ("audio_rtfx", "audio_rtfx", partial(shown, digits=2)),
        ("of floor", "of_floor", share),
        ("peak memory", "peak_bytes", gigabytes),
        ("energy", "joules", partial(shown, unit=" J")),
    ),
    "quick": (
        ("model", "named", str),
        ("streams", "streams", str),
        ("real-time factor", "metrics.audio_rtf", factor),
        ("first audio", "metrics.audio_ttfp.p50", whole_ms),
        ("next chunk, p95", "metrics.itl.p95", whole_ms),
        ("worst silence", "metrics.audio_underrun", whole_ms),
        ("memory", "metrics.peak_bytes", gigabytes),
    ),
    "baseline": (
        ("provider", "provider", str),
        ("model", "title", str),
        ("prompt", "prefill", duration),
        ("group of words", "text_group.p50", duration),
        ("group of speech", "audio_group.p50", duration),
        ("of floor", "of_floor", share),
        ("ttft", "ttft.p50", ms),
        ("audio_ttfp", "audio_ttfp.p50", partial(factor, unit=" s")),
        ("e2el", "e2el.p50", partial(factor, unit=" s")),
        ("audio_rtf", "audio_rtf", factor),
    ),
    "op": (
        ("op", "op", str),
        ("provider", "provider", str),
        ("format", "format", str),
        ("shape", "shape", str),
        ("p50", "seconds.p50", duration),
        ("p10", "seconds.p10", duration),
        ("p90", "seconds.p90", duration),
        ("GB/s", "bytes_per_s", per_nano),
        ("GFLOP/s", "flop_per_s", per_nano),
        ("bound by", "bound", str),
        ("achieved / ceiling", "of_ceiling", share),
    ),
    "prompt": (
        ("instructions", "instructions", str),
        ("product", "product", str),
        ("weights", "quantization", str),
        ("shape", "shape", str),
        ("cores", "threads", str),
        ("rows", "rows", str),
        ("G products/s", "reached", per_nano),
        ("peak", "peak", per_nano),
        ("of the peak", "share", share),
    ),
    "profile": (
        ("model", "title", str),
        ("mode", "mode", str),
        ("kernel", "kernel", str),
        ("an audio group", "count", "{:g}".format),
        ("busy", "seconds", duration),
        ("share", "share", share),
    ),
    "quality": (
        ("model", "model", str),
        ("format", "format", str),
        ("head", "head", str),
        ("KL (nats)", "kl", "{:.5f}".format),
        ("top-1 agreement", "agreement", share),
        ("predictions", "predictions", str),
    ),
    "compare": (
        ("op", "case", str),
        ("old", "old", str),
        ("new", "new", str),
        ("new / old", "ratio", "{:.3f}".format),
        ("99% interval", "interval", str),
        ("verdict", "verdict", str),
    ),
}
"""Kind of record -> its columns."""


class Table:
    """Records printed as they come, one row each, above a progress bar if there is one."""

    def __init__(
        self, columns: Sequence[Column], write: Callable[[str], object] | None = None
    ) -> None:
        self._columns, self._write = columns, write or partial(tqdm.write, file=sys.stdout)
        self._row([head for head, _, _ in columns])

    def row(self, record: dict[str, Any]) -> None:
        self._row(cells(self._columns, Entry(record)))

    def _row(self, texts: Iterable[str]) -> None:
        padded = []
        for text, (head, path, _) in zip(texts, self._columns, strict=True):
            width = WIDTHS.get(path, max(len(head), NUMBER))
            padded.append(text.ljust(-width) if width < 0 else text.rjust(width))
        self._write("  ".join(padded).rstrip())


def cells(columns: Sequence[Column], entry: Entry) -> list[str]:
    return [write(entry.at(path)) for _, path, write in columns]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; its first `texts` columns are aligned to the left."""
    marks = [":--" if i < texts else "--:" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, marks, *rows))
