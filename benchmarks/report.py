"""docs/performance.md and its pictures, from benchmarks/results alone: no figure in them is typed
by hand.

The newest record of each thing on each device has the say. What a reader wants to know and nothing
has measured is listed as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks import report_tables as tables
from benchmarks.measured import Entry, Measured, sources
from benchmarks.report_tables import NOT_MEASURED, table
from mimo_fast.bench.environment import ROOT

RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

PLACES = (" on a GPU", True), (" on a CPU", False)

INTRODUCTION = """\
# Performance

Written by `python -m benchmarks --report` from [benchmarks/results](../benchmarks/results): not by hand. The newest \
record of each thing on each device is shown, with its date, commit and file.

A *floor* is what must be read over the bandwidth that the same machine was just measured to read with, or its \
arithmetic over the rate of its matrix products where that takes longer; *of floor* is floor over time: 100% is as \
fast as the machine allows. A *group* is one step of the backbone: a word, or 160 ms of speech. A *real-time factor* \
below 1 is faster than it plays. Times are medians. Presets have random weights in the published dimensions, and \
replies of a set length: their speed is real, their speech is not. Names of request metrics are explained in \
[pipeline.py](../mimo_fast/bench/pipeline.py).
"""

PROJECTION = """\
No measurement: what the formula gives for other cards from what one was measured to do.

    t = bytes / (published bandwidth x share) + kernels x latency
    latency = (group - bytes / read bandwidth) / kernels        share = read bandwidth / published bandwidth

with the seconds and bytes of an audio group and the number of its kernels from its profile, and the bandwidth that \
the same card was measured to read with ([projection.py](../benchmarks/projection.py)). Only the first term scales \
with a card's bandwidth; what kernels take beyond their bytes is taken to be the same on every card, and none of it \
to be hidden behind the longer reads of a slower one. *Floor* is what no program beats: bytes / published bandwidth, \
without those of the patch decoder that the card's L2 can keep over its 11 steps, which today's kernels, and so the \
projection, read again each time.
"""


def document(measured: Measured, results: Path, pictures: Sequence[str]) -> str:
    """The whole report; pictures: names of those that there are."""
    parts = [INTRODUCTION, "## What to expect of the published dimensions\n", *_expected(measured)]
    for device in measured.devices("groups", "request", "quick"):
        parts += _end_to_end(measured, device, pictures)
    parts += [
        "## Beside upstream's way of running it\n",
        *_per_device(
            measured,
            "baseline",
            tables.baselines_table,
            "A spoken reply by transformers' modules as upstream runs them",
            PLACES,
        ),
    ]
    parts += ["## Ops\n", *_ops(measured, pictures)]
    parts += [
        "## Where the time of a patch goes\n",
        *_per_device(
            measured,
            "profile",
            tables.profile_table,
            "An audio group, kernel by kernel",
            PLACES[:1],
        ),
    ]
    parts += ["## Quality of quantized weights\n", *_quality(measured), *_weight_errors(results)]
    parts += [
        "## Projection to other cards\n",
        PROJECTION,
        tables.projection_section(measured) + "\n",
    ]
    if measured.find("compare"):
        parts += [
            "## Comparisons of commits\n",
            *_per_device(measured, "compare", tables.compare_table, ""),
        ]
    parts += _skipped(measured)
    return "\n".join(parts)


def _expected(measured: Measured) -> Iterator[str]:
    on_gpu = {
        e.device: e.on_gpu
        for e in measured.find("groups") + measured.find("request") + measured.find("quick")
    }
    for kind, wanted in (("a GPU", True), ("a CPU", False)):
        for device in sorted(name for name, gpu in on_gpu.items() if gpu is wanted) or [None]:
            rows, used = tables.expected(measured, device)
            yield f"**{device or kind}**\n"
            yield table(tables.EXPECTED_COLUMNS, rows) + "\n"
            yield sources(used) + "\n" if used else ""


def _end_to_end(measured: Measured, device: str, pictures: Sequence[str]) -> Iterator[str]:
    """Every group and request of a device."""
    yield f"## {device}\n"
    for kind, title, write in (
        ("groups", "Steady state", tables.groups_table),
        ("request", "Whole requests", tables.requests_table),
        ("quick", "`mimo-fast bench`", tables.quick_table),
    ):
        found = measured.find(kind, device)
        if found:
            yield from (f"### {title}\n", write(found) + "\n", sources(found) + "\n")
            yield from _pictures(
                pictures,
                device,
                ("latency",) if kind == "groups" else ("memory",) if kind == "request" else (),
            )


def _per_device(
    measured: Measured,
    kind: str,
    write: Callable[[Sequence[Entry]], str],
    what: str,
    places: Sequence[tuple[str, bool]] = (),
) -> Iterator[str]:
    """A table for each device; of those of `places` (in words, whether it is a GPU) that there is
    none."""
    for place, on_gpu in places:
        if not measured.find(kind, where=lambda e, on_gpu=on_gpu: e.on_gpu is on_gpu):
            yield f"{what}{place}: {NOT_MEASURED}.\n"
    for device in measured.devices(kind):
        found = measured.find(kind, device)
        yield from (f"**{device}**\n", write(found) + "\n", sources(found) + "\n")


def _ops(measured: Measured, pictures: Sequence[str]) -> Iterator[str]:
    for place, on_gpu in PLACES:
        if not measured.find("op", where=lambda e, on_gpu=on_gpu: e.on_gpu is on_gpu):
            yield f"Every op{place}, beside bitsandbytes, torch's packed formats and dense products: {NOT_MEASURED}.\n"
    for device in measured.devices("op"):
        found = measured.find("op", device)
        yield f"### Ops on {device}\n"
        yield from _pictures(pictures, device, ("roofline",))
        title = f"<details><summary>{len(found)} rows: every op beside what the machine could do at best</summary>"
        yield from (
            title + "\n",
            tables.ops_table(found) + "\n",
            "</details>\n",
            sources(found) + "\n",
        )


def _quality(measured: Measured) -> Iterator[str]:
    if not measured.find("quality"):
        yield f"KL and agreement of each head on trained weights: {NOT_MEASURED}.\n"
    yield from _per_device(measured, "quality", tables.quality_table, "")


def _pictures(pictures: Sequence[str], device: str, kinds: Sequence[str]) -> Iterator[str]:
    for kind in kinds:
        if (name := picture_name(kind, device)) in pictures:
            yield f"![{kind} on {device}](performance/{name})\n"


def picture_name(kind: str, device: str) -> str:
    """Of a device's picture in docs/performance/."""
    return (
        f"{kind}-{'-'.join(''.join(c if c.isalnum() else ' ' for c in device).lower().split())}.svg"
    )


def _weight_errors(results: Path) -> Iterator[str]:
    """What rounding does to Gaussian weights, from the newest of the single files that tell."""
    files = sorted(results.glob("*-quantization.json"))
    if files:
        found = json.loads(files[-1].read_text(encoding="utf-8"))["relative_error"]
        yield "Error of quantized random weights, relative to their root mean square:\n"
        rows = ((name, f"{100 * value:.2f}%") for name, value in found.items())
        yield table(("format and width", "error"), rows) + "\n"
        yield f"*[{files[-1].name}](../benchmarks/results/{files[-1].name})*\n"


def _skipped(measured: Measured) -> Iterator[str]:
    if measured.skipped:
        yield "## Not measured, and why\n"
        yield (
            table(
                ("what", "why", "file"),
                (
                    (e["name"], e["reason"], f"[{e.file}](../benchmarks/results/{e.file})")
                    for e in measured.skipped
                ),
                texts=3,
            )
            + "\n"
        )


def write_report(results: Path = RESULTS, target: Path = DOCUMENT) -> int:
    """Writes the report and its pictures, and removes pictures of what is no longer there; returns
    the exit code."""
    if find_spec("matplotlib") is None:
        print(
            "error: the report needs matplotlib: pip install 'mimo-fast[bench]' (or '.[bench]' in a checkout)",
            file=sys.stderr,
        )
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


def add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report", help="docs/performance.md from benchmarks/results; --report is the same"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="of *.jsonl [benchmarks/results]",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DOCUMENT,
        metavar="FILE.md",
        help="[docs/performance.md]",
    )
    parser.set_defaults(run=lambda args: write_report(args.results, args.output))
