"""The report's section on recordings as they are, from the newest result of each condition."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.columns import share, table
from benchmarks.records import NOT_MEASURED, Entry, sources

TITLE = "## Recordings as they are\n"

ABOUT = """\
Words that nano gets wrong, in sentences and a voice that its training never had. *cut at pauses* \
is `transcribe` (`mimo-fast asr`): speech found, pieces of it at one level, words joined; *one \
pass*, where it was measured, is upstream's `asr_sft`. Noise and talkers are measured against the \
mean power of the sentence; in a room the echoes are as loud as the direct sound \
([benchmark](../benchmarks/robustness.py)).
"""

LONG = """\
The same sentences with pauses of half a second to two, as files of these lengths, by `mimo-fast \
asr` in a process of its own: its time over the recording's, and the most memory that it had.
"""


def section(results: Path) -> Iterator[str]:
    yield TITLE
    newest, used = dict[str, dict[str, Any]](), dict[str, Entry]()
    files = sorted(results.glob("*-robustness*.json"))
    read = (Entry(json.loads(path.read_text(encoding="utf-8")), file=path.name) for path in files)
    for found in sorted(read, key=lambda found: found.date):
        for name, each in found["conditions"].items():
            # The order is that of the newest.
            newest.pop(name, None)
            newest[name], used[name] = each, found
    if not newest:
        yield f"{NOT_MEASURED.capitalize()}.\n"
        return
    yield ABOUT
    short = {name: each for name, each in newest.items() if "peak_mb" not in each}
    columns = {"cut at pauses": "wrong", "one pass": "one_pass"}
    if not any("one_pass" in each for each in short.values()):
        del columns["one pass"]
    rows = (
        (name, str(each["words"]), *(share(each.get(key)) for key in columns.values()))
        for name, each in short.items()
    )
    yield table(("", "words", *columns), rows) + "\n"
    yield LONG
    rows = (_long_row(name, each) for name, each in newest.items() if name not in short)
    yield table(("", "words", "wrong", "real-time factor", "memory"), rows) + "\n"
    yield sources(list({each["file"]: each for each in used.values()}.values())) + "\n"


def _long_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    words, wrong, factor = found["words"], share(found["wrong"]), found["real_time_factor"]
    return name, f"{words:,}", wrong, f"{factor:.3f}", f"{found['peak_mb']} MB"
