"""The pictures of docs/performance.md: SVG, the same bytes for the same records, on white for light
and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.measured import Entry, Measured
from benchmarks.report import picture_name
from mimo_fast.runtime.memory import GB

STYLE = {
    "svg.hashsalt": "mimo-fast",
    "svg.fonttype": "path",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "lines.linewidth": 1.8,
}

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#666666")
"""Told apart by the colour-blind too (Okabe and Ito)."""

MARKERS = "osD^vPX*"
PATCH_MS = 160
"""A group of speech plays for so long."""


def draw(measured: Measured, folder: Path) -> list[str]:
    """Writes what there are records for; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for kind, records, figure in (
            ("roofline", "op", roofline),
            ("latency", "groups", latency),
            ("memory", "request", memory),
        ):
            for device in measured.devices(records):
                name = picture_name(kind, device)
                entries = measured.find(
                    records, device, lambda e: e["kind"] != "op" or e["flop"] > 0
                )
                if not entries:
                    continue
                made = figure(entries, device)
                made.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
                drawn.append(name)
    return drawn


def roofline(entries: Sequence[Entry], device: str) -> Figure:
    """Achieved arithmetic against arithmetic intensity, by provider, under the newest entry's
    ceilings."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    points = [
        (e["flop"] / e["bytes"], e["flop"] / e["seconds"]["p50"] / 1e9, e["provider"])
        for e in entries
    ]
    providers = sorted(
        {provider for *_, provider in points}, key=lambda name: (not name.startswith("ours"), name)
    )
    for i, provider in enumerate(providers):
        x, y = zip(*((x, y) for x, y, name in points if name == provider), strict=True)
        ours = provider.startswith("ours")
        axes.scatter(
            x,
            y,
            s=26 if ours else 20,
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            alpha=0.85 if ours else 0.6,
            linewidths=0,
            label=provider,
            zorder=3 if ours else 2,
        )
    newest = max(entries, key=lambda e: e.date)["ceiling"]
    left, right = min(x for x, *_ in points) / 2, max(x for x, *_ in points) * 4
    for i, (dtype, rate) in enumerate(newest["flops"].items()):
        knee = rate / newest["read_Bps"]
        style = ("-", "--", ":")[i % 3]
        axes.plot(
            [max(knee, left), max(right, 4 * knee)],
            [rate / 1e9] * 2,
            style,
            color="#222222",
            linewidth=1.3,
        )
        axes.annotate(
            f"{dtype} products, {rate / 1e9:,.0f} GFLOP/s",
            (max(right, 4 * knee), rate / 1e9),
            ha="right",
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=8,
            color="#222222",
        )
    knee = max(newest["flops"].values()) / newest["read_Bps"]
    axes.plot(
        [left, knee],
        [x * newest["read_Bps"] / 1e9 for x in (left, knee)],
        color="#222222",
        linewidth=1.3,
    )
    axes.annotate(
        f"reads {newest['read_Bps'] / 1e9:,.1f} GB/s",
        (left, left * newest["read_Bps"] / 1e9),
        xytext=(16, 1),
        textcoords="offset points",
        fontsize=8,
        color="#222222",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity (FLOP/byte)",
        ylabel="achieved (GFLOP/s)",
        title=f"Ops under the ceiling: {device}",
    )
    axes.legend(loc="lower right", ncols=2)
    return figure


def latency(entries: Sequence[Entry], device: str) -> Figure:
    """A group of speech by batch, at the context most measured, and by context, at the smallest
    batch."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    by_batch, by_context = figure.subplots(1, 2, sharey=True)

    def context(entry: Entry) -> int:
        return entry["prompt_groups"] + entry["groups"]

    for i, title in enumerate(sorted({e.title for e in entries})):
        own = [e for e in entries if e.title == title]
        near = min(
            {context(e) for e in own},
            key=lambda c: (-len({e["batch"] for e in own if context(e) == c}), c),
        )
        small = min(e["batch"] for e in own)
        _line(
            by_batch,
            i,
            f"{title}, context {near}",
            [e for e in own if context(e) == near],
            lambda e: e["batch"],
        )
        _line(
            by_context,
            i,
            f"{title}, batch {small}",
            [e for e in own if e["batch"] == small],
            context,
        )
    by_batch.set(xlabel="batch (streams)", ylabel="a group of speech (ms), p10 to p90")
    by_context.set(xlabel="context (groups)")
    for axes in (by_batch, by_context):
        axes.set(xscale="log", yscale="log")
        _mark_measured(axes)
        axes.axhline(PATCH_MS, color="#222222", linewidth=1, linestyle="--")
        axes.legend(loc="best")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
    by_batch.annotate(
        "real time: 160 ms",
        (0.02, PATCH_MS),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color="#222222",
    )
    figure.suptitle(
        f"Latency of a group of speech: {device}",
        x=0.01,
        ha="left",
        fontsize=10.5,
        fontweight="bold",
    )
    return figure


def _line(
    axes: Axes, i: int, label: str, entries: Iterable[Entry], x: Callable[[Entry], float]
) -> None:
    ordered = sorted(entries, key=x)
    times = [[1e3 * e["audio_group"][q] for e in ordered] for q in ("p10", "p50", "p90")]
    colour = COLOURS[i % len(COLOURS)]
    errors = [
        [mid - low for low, mid in zip(times[0], times[1], strict=True)],
        [high - mid for mid, high in zip(times[1], times[2], strict=True)],
    ]
    axes.errorbar(
        [x(e) for e in ordered],
        times[1],
        yerr=errors,
        marker=MARKERS[i % len(MARKERS)],
        markersize=5,
        color=colour,
        capsize=2.5,
        elinewidth=1,
        label=label,
    )


def memory(entries: Sequence[Entry], device: str) -> Figure:
    """Peak memory of requests by batch, the most of all tasks."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes, highest = figure.subplots(), 0.0
    for i, title in enumerate(sorted({e.title for e in entries})):
        peaks: dict[int, float] = {}
        for e in entries:
            if e.title == title:
                peaks[e["batch"]] = max(peaks.get(e["batch"], 0), e["peak_bytes"] / GB)
        batches, highest = sorted(peaks), max(highest, *peaks.values())
        axes.plot(
            batches,
            [peaks[b] for b in batches],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            color=COLOURS[i % len(COLOURS)],
            label=title,
        )
        axes.annotate(
            f"{peaks[batches[-1]]:.2f} GB",
            (batches[-1], peaks[batches[-1]]),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
            color="#333333",
        )
    axes.set(
        xscale="log",
        xlabel="batch (streams)",
        ylabel="peak memory (GB)",
        ylim=(0, 1.2 * highest),
        title=f"Peak memory of whole requests: {device}",
    )
    axes.margins(x=0.12)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _mark_measured(axes)
    return figure


def _mark_measured(axes: Axes) -> None:
    """Marks what was measured on the x axis, and nothing else."""
    found = sorted({float(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(found, [f"{x:,.0f}" for x in found])
    axes.minorticks_off()
