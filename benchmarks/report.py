"""docs/performance.md and its pictures, made from benchmarks/results alone.

No figure is typed in. The newest record of each thing on each device counts. What a reader wants to
know and nothing has measured is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import projection
from benchmarks.columns import (
    BASELINES,
    COMPARE,
    GROUPS,
    OPS,
    PROFILE,
    QUALITY,
    QUICK,
    REQUESTS,
    columns_table,
    factor,
    gigabytes,
    share,
    shown,
    table,
    whole_ms,
)
from benchmarks.projection import FORMATS
from benchmarks.records import NOT_MEASURED, RESULTS, Entry, Measured, sources
from mimo_fast.bench.environment import ROOT

DOCUMENT = ROOT / "docs" / "performance.md"
PLACES = (" on a GPU", True), (" on a CPU", False)
SENTENCE = 107
"""Groups of the prompt of a text to be said, as `mimo-fast bench` has it."""

CONTEXT = 256
"""Groups of context of the first table's steady state; the nearest measured one is taken."""

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

EXPECTED = (
    "weights",
    "an audio group (160 ms of speech)",
    "of the floor",
    "real-time factor",
    "first audio",
    "streams in real time",
    "peak memory",
)


def groups_table(entries: Sequence[Entry]) -> str:
    return columns_table(
        GROUPS, sorted(entries, key=lambda e: (e.title, e["batch"], e["prompt_groups"]))
    )


def requests_table(entries: Sequence[Entry]) -> str:
    ordered = sorted(entries, key=lambda e: (e.title, e["task"], e["batch"], e["prompt_groups"]))
    return columns_table(REQUESTS, ordered, texts=2)


def quick_table(entries: Sequence[Entry]) -> str:
    rows = [_with(e, named=_quick_name(e), **row) for e in entries for row in e["rows"]]
    return columns_table(QUICK, rows)


def _quick_name(entry: Entry) -> str:
    if not entry.get("preset"):
        return entry.title
    return f"{entry.get('preset')} {entry.get('quantization') or entry['dtype']}"


def baselines_table(entries: Sequence[Entry]) -> str:
    ordered = sorted(entries, key=lambda e: (e.title, e["provider"] != "ours", e["provider"]))
    return columns_table(BASELINES, ordered, texts=2)


def ops_table(entries: Sequence[Entry]) -> str:
    return columns_table(OPS, entries, texts=4)


def profile_table(entries: Sequence[Entry]) -> str:
    """The most expensive kernels of each mode, and the sum of all."""
    rows = []
    for e in entries:
        total, every = e["kernel_seconds"], e["kernels_a_group"]
        rows.append(_with(e, kernel="**all**", count=every, seconds=total, share=1.0))
        for kernel in sorted(e["kernels"], key=lambda kernel: -kernel["seconds"])[:TOP]:
            name = f"`{kernel['name'].replace('|', ' ')[:NAME_WIDTH]}`"
            rows.append(_with(e, **kernel, kernel=name, share=kernel["seconds"] / total))
    return columns_table(PROFILE, rows, texts=3)


def quality_table(entries: Sequence[Entry]) -> str:
    rows = [
        _with(e, format=name, head="text" if i == 0 else f"codebook {i - 1}", **head)
        for e in entries
        for name, heads in e["formats"].items()
        for i, head in enumerate(heads)
    ]
    return columns_table(QUALITY, rows, texts=3)


def compare_table(entries: Sequence[Entry]) -> str:
    return columns_table(COMPARE, entries, texts=3)


def _with(entry: Entry, **fields: Any) -> Entry:
    return Entry(entry.file, entry.data | fields)


def expected(measured: Measured, device: str | None) -> tuple[list[list[str]], list[Entry]]:
    """The rows that a reader wants to know of the published dimensions on a device.

    With the entries that they are from. None: a device that was not measured.
    """
    rows: list[list[str]] = []
    used: list[Entry] = []
    for form in FORMATS:
        name = f"7b {form}"
        found = [e for e in measured.entries if e.device == device and e["kind"] != "op"]
        groups = [e for e in found if e["kind"] == "groups" and e.title == name and e["batch"] == 1]
        requests = [e for e in found if e["kind"] == "request" and e.title == name]
        spoken = [e for e in requests if e["batch"] == 1 and e["audio_ttfp"] is not None]
        many = [e for e in requests if e["task"] == "tts"]
        quick = [
            e
            for e in found
            if e["kind"] == "quick" and f"{e.get('preset')} {e['quantization']}" == name
        ]
        nearest = sorted(groups, key=lambda e: abs(e.context - CONTEXT))[:1]
        # Of the newest requests the one with the prompt of a short sentence.
        newest = sorted(
            spoken,
            key=lambda e: (e["task"] == "tts", e.date[:10], -abs(e["prompt_groups"] - SENTENCE)),
        )[-1:]
        rows.append([name, *_group_cells(nearest), *_request_cells(newest, many, quick)])
        used += nearest + newest + quick + many
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


def _request_cells(
    spoken: Sequence[Entry], many: Sequence[Entry], quick: Sequence[Entry]
) -> Iterator[str]:
    """First audio, streams and memory of a request."""
    rows = [(row["streams"], row["metrics"]["audio_rtf"]) for e in quick for row in e["rows"]]
    rows += [(e["batch"], e["audio_rtf"]) for e in many]
    known = [(streams, rtf) for streams, rtf in rows if rtf is not None]
    carried = max((streams for streams, rtf in known if rtf < 1), default=0)
    more = known and carried == max(streams for streams, _ in known)
    yield whole_ms(spoken[0].at("audio_ttfp.p50")) if spoken else NOT_MEASURED
    yield f"{carried}{' or more' if more else ''}" if known else NOT_MEASURED
    yield gigabytes(spoken[0]["peak_bytes"]) if spoken else NOT_MEASURED


def document(measured: Measured, results: Path, pictures: Sequence[str]) -> str:
    """The whole report; pictures: names of the existing ones."""
    spoken = "A spoken reply by transformers' modules as upstream runs them"
    parts = [INTRODUCTION, "## What to expect of the published dimensions\n", *_expected(measured)]
    for device in measured.devices("groups", "request", "quick"):
        parts += _end_to_end(measured, device, pictures)
    parts += ["## Beside upstream's way of running it\n"]
    parts += _per_device(measured, "baseline", baselines_table, spoken, PLACES)
    parts += ["## Ops\n", *_ops(measured, pictures), "## Where the time of a patch goes\n"]
    what = "An audio group, kernel by kernel"
    parts += _per_device(measured, "profile", profile_table, what, PLACES[:1])
    parts += ["## Quality of quantized weights\n"]
    if not measured.find("quality"):
        parts += [f"KL and agreement of each head on trained weights: {NOT_MEASURED}.\n"]
    parts += _per_device(measured, "quality", quality_table)
    parts += _weight_errors(results)
    parts += ["## Projection to other cards\n", projection.section(measured) + "\n"]
    if measured.find("compare"):
        parts += ["## Comparisons of commits\n"]
        parts += _per_device(measured, "compare", compare_table)
    if measured.skipped:
        rows = ((e["name"], e["reason"], e.link) for e in measured.skipped)
        parts += ["## Not measured, and why\n", table(("what", "why", "file"), rows, 3) + "\n"]
    return "\n".join(parts)


def _expected(measured: Measured) -> Iterator[str]:
    kinds = "groups", "request", "quick"
    on_gpu = {e.device: e.on_gpu for kind in kinds for e in measured.find(kind)}
    for kind, wanted in (("a GPU", True), ("a CPU", False)):
        for device in sorted(name for name, gpu in on_gpu.items() if gpu is wanted) or [None]:
            rows, used = expected(measured, device)
            yield f"**{device or kind}**\n"
            yield table(EXPECTED, rows) + "\n"
            yield sources(used) + "\n" if used else ""


def _end_to_end(measured: Measured, device: str, pictures: Sequence[str]) -> Iterator[str]:
    """Every group and request of a device."""
    yield f"## {device}\n"
    for kind, title, write, picture in (
        ("groups", "Steady state", groups_table, "latency"),
        ("request", "Whole requests", requests_table, "memory"),
        ("quick", "`mimo-fast bench`", quick_table, None),
    ):
        if found := measured.find(kind, device):
            yield from (f"### {title}\n", write(found) + "\n", sources(found) + "\n")
            yield from _picture(pictures, device, picture)


def _per_device(
    measured: Measured,
    kind: str,
    write: Callable[[Sequence[Entry]], str],
    what: str = "",
    places: Sequence[tuple[str, bool]] = (),
) -> Iterator[str]:
    """A table for each device.

    places: (in words, whether it is a GPU) of the devices that are expected; missing ones are
    named.
    """
    for place, on_gpu in places:
        if not any(e.on_gpu is on_gpu for e in measured.find(kind)):
            yield f"{what}{place}: {NOT_MEASURED}.\n"
    for device in measured.devices(kind):
        found = measured.find(kind, device)
        yield from (f"**{device}**\n", write(found) + "\n", sources(found) + "\n")


def _ops(measured: Measured, pictures: Sequence[str]) -> Iterator[str]:
    for place, on_gpu in PLACES:
        if not any(e.on_gpu is on_gpu for e in measured.find("op")):
            others = "beside bitsandbytes, torch's packed formats and dense products"
            yield f"Every op{place}, {others}: {NOT_MEASURED}.\n"
    for device in measured.devices("op"):
        found = measured.find("op", device)
        yield f"### Ops on {device}\n"
        yield from _picture(pictures, device, "roofline")
        what = "every op beside what the machine could do at best"
        yield f"<details><summary>{len(found)} rows: {what}</summary>\n"
        yield from (ops_table(found) + "\n", "</details>\n", sources(found) + "\n")


def _picture(pictures: Sequence[str], device: str, kind: str | None) -> Iterator[str]:
    if kind is not None and (name := picture_name(kind, device)) in pictures:
        yield f"![{kind} on {device}](performance/{name})\n"


def picture_name(kind: str, device: str) -> str:
    """File name of a device's picture in docs/performance/."""
    words = "".join(c if c.isalnum() else " " for c in device).lower().split()
    return f"{kind}-{'-'.join(words)}.svg"


def _weight_errors(results: Path) -> Iterator[str]:
    """Error of rounded Gaussian weights, from the newest of the files that have it."""
    files = sorted(results.glob("*-quantization.json"))
    if files:
        found = json.loads(files[-1].read_text(encoding="utf-8"))["relative_error"]
        yield "Error of quantized random weights, relative to their root mean square:\n"
        rows = ((name, f"{100 * value:.2f}%") for name, value in found.items())
        yield table(("format and width", "error"), rows) + "\n"
        yield f"*{Entry(files[-1].name, {}).link}*\n"


def write_report(results: Path = RESULTS, target: Path = DOCUMENT) -> int:
    """Writes the report and its pictures, and removes outdated pictures; returns the exit code."""
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
    print(f"{target}: {len(measured.entries)} records, {len(drawn)} pictures")
    return 0


def add_options(add: Callable[..., object]) -> None:
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="[benchmarks/results]")
    about = "[docs/performance.md]"
    add("-o", "--output", type=Path, default=DOCUMENT, metavar="FILE.md", help=about)


def run(args: argparse.Namespace) -> int:
    return write_report(args.results, args.output)
