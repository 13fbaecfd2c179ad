"""docs/performance.md, its pictures and mimo_fast/assets/cards.json, from benchmarks/results alone.

No figure is typed in. The newest record of each thing on each device counts. What a reader wants to
know and nothing has measured is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import community, engine_report, lookahead, projection, recordings
from benchmarks.cards import Expectation, cards_text
from benchmarks.columns import COLUMNS, cells, factor, gigabytes, share, shown, table, whole_ms
from benchmarks.load import report as load_report
from benchmarks.projection import FORMATS
from benchmarks.records import NOT_MEASURED, RESULTS, Entry, Measured, picture_name, sources
from mimo_fast.bench.cards import CARDS
from mimo_fast.bench.environment import ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
PLACES = ("a GPU", True), ("a CPU", False)
TOP, NAME_WIDTH = 12, 60
"""Number of a profile's kernels that are shown, and length of their names."""

INTRODUCTION = """\
# Performance

Written by `python -m benchmarks --report` from [benchmarks/results](../benchmarks/results): not \
by hand. The newest record of each thing on each device is shown, with its date, commit and file.

A *floor* is what must be read over the bandwidth that the same machine was just measured to read \
with, or its arithmetic over the rate of its matrix products where that takes longer; *of floor* \
is floor over time: 100% is as fast as the machine allows. What a last cache can keep of the patch \
decoder over its steps counts as read once in records with `cached_bytes`, those from 2026-11-28 \
on, and at each step in older ones. A *group* is one step of the backbone: \
a word, or 160 ms of speech. A *real-time factor* below 1 is faster than it plays. Times are \
medians. Presets have random weights in the published dimensions, and replies of a set length: \
their speed is real, their speech is not. Names of request metrics are explained in \
[pipeline.py](../mimo_fast/bench/pipeline.py).
"""

PROMPTS = """\
Products of many rows with the matrices of a layer, whole. *peak*: what the instructions that \
multiply integers do on registers alone, on as many cores, in the same run \
([prompts.py](../benchmarks/prompts.py)). A product is that of a 16-bit activation with a weight.
"""

EXPECTED = (
    "weights",
    "an audio group (160 ms of speech)",
    "of the floor",
    "real-time factor",
    "first audio",
    "streams in real time",
    "peak memory",
)

ORDERS: dict[str, Callable[[Entry], Any]] = {
    "groups": lambda e: (e.title, e["batch"], e["prompt_groups"]),
    "request": lambda e: (e.title, e["task"], e["batch"], e["prompt_groups"]),
    "baseline": lambda e: (e.title, e["provider"] != "ours", e["provider"]),
}
"""Kind -> the order of its rows; those of others are in the records' order."""

TEXTS = {
    "request": 2,
    "prompt": 4,
    "baseline": 2,
    "op": 4,
    "profile": 3,
    "quality": 3,
    "compare": 3,
}
"""Kind -> columns of text, if there is more than one."""


def kind_table(kind: str, entries: Iterable[Entry]) -> str:
    """The records of one kind as a Markdown table."""
    ordered = sorted(entries, key=ORDERS.get(kind, lambda e: 0))
    rows = (row for entry in ordered for row in ROWS.get(kind, lambda e: [e])(entry))
    heads = [head for head, _, _ in COLUMNS[kind]]
    return table(heads, (cells(COLUMNS[kind], row) for row in rows), TEXTS.get(kind, 1))


def _quick_rows(e: Entry) -> Iterator[Entry]:
    name = f"{e.get('preset')} {e.get('quantization') or e['dtype']}"
    for row in e["rows"]:
        yield Entry(e, named=name if e.get("preset") else e.title, **row)


def _profile_rows(e: Entry) -> Iterator[Entry]:
    """The sum of all kernels, and the most expensive ones."""
    total = e["kernel_seconds"]
    yield Entry(e, kernel="**all**", count=e["kernels_a_group"], seconds=total, share=1.0)
    for kernel in sorted(e["kernels"], key=lambda kernel: -kernel["seconds"])[:TOP]:
        name = f"`{kernel['name'].replace('|', ' ')[:NAME_WIDTH]}`"
        yield Entry(e, **kernel, kernel=name, share=kernel["seconds"] / total)


def _quality_rows(e: Entry) -> Iterator[Entry]:
    for name, found in e["formats"].items():
        for i, head in enumerate(found.get("heads", ())):
            yield Entry(e, format=name, head=f"codebook {i - 1}" if i else "text", **head)


ROWS: dict[str, Callable[[Entry], Iterable[Entry]]] = {
    "quick": _quick_rows,
    "profile": _profile_rows,
    "quality": _quality_rows,
}
"""Kind -> the rows of a record; a record of another is one row."""


def expected(measured: Measured, device: str | None) -> tuple[list[list[str]], list[Entry]]:
    """The rows that a reader wants to know of the published dimensions on a device.

    With the entries that they are from. None: a device that was not measured.
    """
    rows: list[list[str]] = []
    used: list[Entry] = []
    for form in FORMATS:
        known = Expectation.of(measured, device, form)
        rows.append([f"7b {form}", *_group_cells(known.groups), *_request_cells(known)])
        used += known.used
    return rows, used


def _group_cells(entries: Sequence[Entry]) -> Sequence[str]:
    """Milliseconds, share of the floor, real-time factor of a group."""
    for e in entries:
        time = shown(e.at("audio_group.p50"), 1e3, 2)
        return (
            f"{time} ms at {e.context} of context",
            share(e.at("of_floor.audio_group")),
            factor(e["audio_rtf"]),
        )
    return (NOT_MEASURED,) * 3


def _request_cells(known: Expectation) -> Iterator[str]:
    """First audio, streams and memory of a request."""
    spoken, streams, more = known.spoken, known.streams, " or more" if known.or_more else ""
    yield whole_ms(spoken[0].at("audio_ttfp.p50")) if spoken else NOT_MEASURED
    yield NOT_MEASURED if streams is None else f"{streams}{more}"
    yield gigabytes(spoken[0]["peak_bytes"]) if spoken else NOT_MEASURED


def document(measured: Measured, results: Path, pictures: Sequence[str]) -> str:
    """The whole report; pictures: names of the existing ones."""
    parts = [INTRODUCTION, "## What to expect of the published dimensions\n"]
    whole = "groups", "request", "quick"
    devices = measured.devices(*whole)
    on_gpu = {e.device: e.on_gpu for e in measured.entries}
    for place, wanted in PLACES:
        for device in [name for name in devices if on_gpu[name] is wanted] or [None]:
            rows, used = expected(measured, device)
            parts += [f"**{device or place}**\n", table(EXPECTED, rows) + "\n"]
            parts += [sources(used) + "\n" if used else ""]
    heads = "Steady state", "Whole requests", "`mimo-fast bench`"
    for device in devices:
        parts += [f"## {device}\n"]
        for kind, head, picture in zip(whole, heads, ("latency", "memory", None), strict=True):
            if measured.find(kind, device):
                parts += [*_section(measured, kind, device, f"### {head}")]
                parts += _picture(pictures, device, picture)
    spoken = "A spoken reply by transformers' modules as upstream runs them"
    parts += ["## Beside upstream's way of running it\n"]
    parts += [*_missing(measured, "baseline", spoken), *_per_device(measured, "baseline")]
    others = "beside bitsandbytes, torch's packed formats and dense products"
    parts += ["## Ops\n", *_missing(measured, "op", "Every op", f", {others}")]
    for device in measured.devices("op"):
        title, *tables = _section(measured, "op", device, f"### Ops on {device}")
        count = len(measured.find("op", device))
        what = f"{count} rows: every op beside what the machine could do at best"
        parts += [title, *_picture(pictures, device, "roofline")]
        parts += [f"<details><summary>{what}</summary>\n", tables[0], "</details>\n", tables[1]]
    parts += ["## Prompts on a CPU\n", *_prompts(measured)]
    parts += ["## Where the time of a patch goes\n"]
    parts += _missing(measured, "profile", "An audio group, kernel by kernel", places=PLACES[:1])
    parts += [*_per_device(measured, "profile"), "## Quality of quantized weights\n"]
    if not measured.find("quality"):
        parts += [f"KL and agreement of each head on trained weights: {NOT_MEASURED}.\n"]
    parts += [*_per_device(measured, "quality"), *_weight_errors(results)]
    parts += lookahead.section(results)
    parts += recordings.section(results)
    parts += load_report.section(results)
    parts += community.section(results)
    parts += ["## Projection to other cards\n", projection.section(measured) + "\n"]
    parts += engine_report.section(results)
    if measured.find("compare"):
        parts += ["## Comparisons of commits\n", *_per_device(measured, "compare")]
    if measured.skipped:
        rows = ([e["name"], e["reason"], e.link] for e in measured.skipped)
        parts += ["## Not measured, and why\n", table(("what", "why", "file"), rows, 3) + "\n"]
    return "\n".join(parts)


def _prompts(measured: Measured) -> Iterator[str]:
    """Products of prompts beside the CPU's integer peak."""
    if not measured.find("prompt"):
        yield f"Products of int4 and int8 beside the integer peak: {NOT_MEASURED}.\n"
    else:
        yield PROMPTS
    yield from _per_device(measured, "prompt")


def _section(measured: Measured, kind: str, device: str, title: str) -> Iterator[str]:
    """A device's records of one kind under a title, and where they are from."""
    found = measured.find(kind, device)
    yield from (f"{title}\n", kind_table(kind, found) + "\n", sources(found) + "\n")


def _per_device(measured: Measured, kind: str) -> Iterator[str]:
    for device in measured.devices(kind):
        yield from _section(measured, kind, device, f"**{device}**")


def _missing(
    measured: Measured,
    kind: str,
    what: str,
    more: str = "",
    places: Sequence[tuple[str, bool]] = PLACES,
) -> Iterator[str]:
    """Names the places (in words, whether it is a GPU) of which there are no records."""
    for place, on_gpu in places:
        if not any(e.on_gpu is on_gpu for e in measured.find(kind)):
            yield f"{what} on {place}{more}: {NOT_MEASURED}.\n"


def _picture(pictures: Sequence[str], device: str, kind: str | None) -> Iterator[str]:
    if kind is not None and (name := picture_name(kind, device)) in pictures:
        yield f"![{kind} on {device}](performance/{name})\n"


def _weight_errors(results: Path) -> Iterator[str]:
    """Error of rounded Gaussian weights, from the newest of the files that have it."""
    files = sorted(results.glob("*-quantization.json"))
    if files:
        found = json.loads(files[-1].read_text(encoding="utf-8"))["relative_error"]
        yield "Error of quantized random weights, relative to their root mean square:\n"
        rows = ((name, f"{100 * value:.2f}%") for name, value in found.items())
        yield table(("format and width", "error"), rows) + "\n"
        yield f"*{Entry(file=files[-1].name).link}*\n"


def write_report(results: Path = RESULTS, target: Path = DOCUMENT) -> int:
    """Writes the report and its pictures, and removes outdated pictures; returns the exit code.

    With the committed report the package's table of known machines is written as well.
    """
    if find_spec("matplotlib") is None:
        install = "pip install 'mimo-fast[bench]' (or '.[bench]' in a checkout)"
        print(f"error: the report needs matplotlib: {install}", file=sys.stderr)
        return 1
    from benchmarks.plots import draw

    measured = Measured.read(results)
    folder = target.parent / target.stem
    drawn = draw(measured, folder)
    for path in folder.glob("*.svg"):
        if path.name not in drawn:
            path.unlink()
    target.write_text(document(measured, results, drawn).rstrip() + "\n", encoding="utf-8")
    if (results, target) == (RESULTS, DOCUMENT):
        CARDS.write_text(cards_text(measured), encoding="utf-8")
    print(f"{target}: {len(measured.entries)} records, {len(drawn)} pictures")
    return 0


def figures(measured: Measured) -> str:
    """What README quotes: the published dimensions on each GPU, and upstream's way beside it."""
    parts = list[str]()
    for device in measured.devices("groups", "request", "quick", "baseline"):
        rows, used = expected(measured, device)
        if not any(entry.on_gpu for entry in [*used, *measured.find("baseline", device)]):
            continue
        parts += [f"**{device}**\n", table(EXPECTED, rows) + "\n"]
        if beside := measured.find("baseline", device):
            parts.append(kind_table("baseline", beside) + "\n")
    return "\n".join(parts) or f"Figures of a GPU: {NOT_MEASURED}.\n"


def add_options(add: Callable[..., object]) -> None:
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="[benchmarks/results]")
    about = "[docs/performance.md]"
    add("-o", "--output", type=Path, default=DOCUMENT, metavar="FILE.md", help=about)
    add("--figures", action="store_true", help="print what README quotes, and write nothing")


def run(args: argparse.Namespace) -> int:
    if args.figures:
        print(figures(Measured.read(args.results)))
        return 0
    return write_report(args.results, args.output)
