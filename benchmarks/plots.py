"""The pictures of docs/performance.md: SVG, the same bytes for the same records.

They are drawn on white, for light and dark pages. A floor is dashed in the colour of its series.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.records import Entry, Measured, picture_name
from mimo_fast.bench.style import COLOURS
from mimo_fast.bench.style import STYLE as PICTURES
from mimo_fast.runtime.memory import GB

STYLE = PICTURES | {"svg.hashsalt": "mimo-fast", "svg.fonttype": "path"}
MARKERS = "osD^vPX*"
INK = "#222222"
PATCH_MS = 160
"""Seconds of audio of a group of speech."""

OUTLIERS = 7
"""Number of our ops furthest below the ceiling that the roofline names."""

SHORT, LONG = 256, 2048
"""Groups of context; the nearest measured one is taken, for the second from it on."""

Style = dict[str, str]
Box = tuple[float, float, float, float]
"""Margins: left, bottom, right, top, in points."""


def draw(measured: Measured, folder: Path) -> list[str]:
    """Draws the pictures for which there are records; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for figure, kind in ((roofline, "op"), (latency, "groups"), (memory, "request")):
            for device in measured.devices(kind):
                models = [*measured.find("groups", device), *measured.find("request", device)]
                # A model has one colour in every picture.
                titles = sorted({e.title for e in models})
                name = picture_name(figure.__name__, device)
                made = figure(measured.find(kind, device), device, titles)
                made.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
                drawn.append(name)
    return drawn


def roofline(entries: Sequence[Entry], device: str, _titles: Sequence[str] = ()) -> Figure:
    """Achieved arithmetic over arithmetic intensity, by provider, under the newest ceilings.

    Our ops furthest below them have a number and a line in the list.
    """
    figure = Figure(figsize=(9.6, 5.0))
    # A fixed layout, since the numbers' places depend on it.
    axes = figure.add_axes((0.07, 0.1, 0.6, 0.83))
    providers = sorted(
        {e["provider"] for e in entries}, key=lambda name: (not name.startswith("ours"), name)
    )
    for i, provider in enumerate(providers):
        x, y = zip(*(_point(e) for e in entries if e["provider"] == provider), strict=True)
        shape = {"s": 20, "alpha": 0.55, "zorder": 2}
        if provider.startswith("ours"):
            shape = {"s": 30, "alpha": 0.8, "zorder": 3}
        axes.scatter(x, y, **shape, **_style(i), linewidths=0, label=provider)
    points = [_point(e) for e in entries]
    newest = max(entries, key=lambda e: e.date)["ceiling"]
    knee = max(newest["flops"].values()) / newest["read_Bps"]
    left, right = min(x for x, _ in points) / 2, max(max(x for x, _ in points), knee) * 4
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(min(y for _, y in points) / 2.5, max(newest["flops"].values()) / 1e9 * 2.2),
        xlabel="arithmetic intensity (FLOP/byte)",
        ylabel="achieved (GFLOP/s)",
        title=f"Ops under the ceiling: {device}",
    )
    taken = _ceilings(axes, newest, left, right, knee)
    axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1), title="who computes", alignment="left")
    _outliers(axes, entries, taken)
    return figure


def _style(i: int) -> Style:
    """Style of the i-th of several series."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}


def _note(axes: Axes, text: str, at: tuple[float, float], away: tuple[float, float], **how) -> None:
    """Text at an offset in points from a place."""
    where = {"xytext": away, "textcoords": "offset points"}
    axes.annotate(text, at, fontsize=8, color=INK, **where, **how)


def _point(entry: Entry) -> tuple[float, float]:
    return entry["flop"] / entry["bytes"], entry["flop"] / entry["seconds"]["p50"] / 1e9


def _in_points(axes: Axes, x: float, y: float) -> tuple[float, float]:
    """Position on the page in points; for axes whose place and limits are set."""
    scale = 72 / axes.figure.dpi
    place = axes.transData.transform((x, y))
    return scale * place[0], scale * place[1]


def _ceilings(axes: Axes, newest: dict, left: float, right: float, knee: float) -> list[Box]:
    """Draws the read bandwidth and the rate of products of each type.

    Types within a tenth of each other share a label. Returns the boxes of lines and labels.
    """
    read = newest["read_Bps"] / 1e9
    axes.plot([left, knee], [left * read, knee * read], color=INK, linewidth=1.3)
    place = math.sqrt(left * knee)
    (x0, y0), (x1, y1) = (_in_points(axes, x, x * read) for x in (left, knee))
    steps = [(x0 + (x1 - x0) * i / 40, y0 + (y1 - y0) * i / 40) for i in range(41)]
    taken = [(x - 6, y - 3, x + 6, y + 14) for x, y in steps]
    slope = {"rotation": math.degrees(math.atan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor"}
    _note(axes, f"reads {read:,.0f} GB/s", (place, place * read), (0, 3), ha="center", **slope)
    shared: list[list[tuple[float, str]]] = []
    for name, rate in sorted(newest["flops"].items(), key=lambda item: -item[1]):
        if shared and rate > 0.9 * shared[-1][0][0]:
            shared[-1].append((rate, name))
        else:
            shared.append([(rate, name)])
    for lines in shared:
        for rate, _ in lines:
            axes.plot(
                [rate / newest["read_Bps"], right], [rate / 1e9] * 2, color=INK, linewidth=1.3
            )
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for rate, name in lines)
        _note(axes, f"products: {rates}", (right, lines[0][0] / 1e9), (0, 4), ha="right")
        end, height = _in_points(axes, right, lines[0][0] / 1e9)
        start, lowest = _in_points(axes, lines[-1][0] / newest["read_Bps"], lines[-1][0] / 1e9)
        taken += [(start, lowest - 3, end, height + 3), (end - 230, height, end, height + 15)]
    return taken


def _outliers(axes: Axes, entries: Sequence[Entry], taken: Sequence[Box]) -> None:
    """Numbers the points furthest below, and lists them beside the picture."""
    worst: dict[tuple[str, str], Entry] = {}
    for entry in sorted(entries, key=lambda e: e["of_ceiling"]):
        if entry["provider"].startswith("ours"):
            worst.setdefault((entry["op"], entry["format"]), entry)
    chosen = sorted([*worst.values()][:OUTLIERS], key=lambda e: (_point(e), e["op"], e["format"]))
    centres = [_in_points(axes, *_point(e)) for e in entries]
    placed: list[Box] = [*taken, *((x - 3, y - 3, x + 3, y + 3) for x, y in centres)]
    lines = [f"furthest below the ceiling,\nof {len(worst)} ops and formats of ours:"]
    for number, entry in enumerate(chosen, 1):
        at = _in_points(axes, *_point(entry))
        dx, dy = _free_place(at, placed)
        placed.append((at[0] + dx - 5, at[1] + dy - 5, at[0] + dx + 5, at[1] + dy + 5))
        arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 2}
        how = {"ha": "center", "va": "center", "fontweight": "bold", "arrowprops": arrow}
        _note(axes, str(number), _point(entry), (dx, dy), **how)
        about = f"{entry['format']}, {entry['shape']}: {100 * entry['of_ceiling']:.1f}%"
        lines.append(f"{number}  {entry['op']}\n     {about}")
    style = {"va": "bottom", "fontsize": 8, "linespacing": 1.35, "color": INK}
    axes.text(1.045, 0.0, "\n".join(lines), transform=axes.transAxes, **style)


def _free_place(at: tuple[float, float], taken: Sequence[Box]) -> tuple[float, float]:
    """A place for a label of 10 by 10 points that overlaps nothing, as near as possible.

    Tries circles around its point, starting below and to the right.
    """
    for radius in range(11, 80, 6):
        for step in range(16):
            angle = math.radians(-90 + 22.5 * step)
            dx, dy = (round(radius * f(angle), 1) for f in (math.cos, math.sin))
            left, bottom = at[0] + dx - 5, at[1] + dy - 5
            free = (
                left >= right or left + 10 <= low or bottom >= top or bottom + 10 <= down
                for low, down, right, top in taken
            )
            if all(free):
                return dx, dy
    return 11.0, 11.0


def latency(entries: Sequence[Entry], device: str, titles: Sequence[str]) -> Figure:
    """A group of speech and its floor.

    By batch at a short and at a long context, all formats in the same colours, and by context at
    the smallest batch.
    """
    figure = Figure(figsize=(11, 4.1), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    styles = {title: _style(i) for i, title in enumerate(titles)}
    every = {title: [e for e in entries if e.title == title] for title in titles}
    known = {title: own for title, own in every.items() if own}
    for panel, what, choose in (
        (panels[0], "short context", lambda own: min(own, key=lambda c: (abs(c - SHORT), c))),
        (panels[1], "long context", lambda own: max((c for c in own if c >= LONG - 8), default=0)),
    ):
        chosen = {title: choose({e.context for e in own}) for title, own in known.items()}
        for title, context in chosen.items():
            if context:
                _line(panel, styles[title], [e for e in known[title] if e.context == context])
        contexts = sorted({*chosen.values()} - {0})
        span = " to ".join(f"{context:,}" for context in contexts[:1] + contexts[1:][-1:])
        panel.set(xlabel="batch (streams)", title=f"{what}: {span or 'no'} groups")
        if missing := [title for title, context in chosen.items() if not context]:
            about = f"not measured: {', '.join(missing)}"
            panel.text(
                0.02, 0.97, about, transform=panel.transAxes, va="top", fontsize=8, color=INK
            )
    for title, own in known.items():
        smallest = min(e["batch"] for e in own)
        _line(panels[2], styles[title], [e for e in own if e["batch"] == smallest], "context")
    panels[2].set(xlabel="context (groups)", title="smallest batch")
    # One legend for all panels, below them.
    lines = [Line2D([], [], **styles[title], label=title) for title in known]
    lines += [
        Line2D([], [], color="#666666", linewidth=1.2, linestyle="--", label="its floor"),
        Line2D([], [], color=INK, linewidth=1, linestyle=":", label="real time: 160 ms"),
    ]
    figure.legend(handles=lines, loc="outside lower left", ncols=len(lines))
    panels[0].set_ylabel("a group of speech (ms), p10 to p90")
    lowest = min(1e3 * e["floor"]["audio_group"] for e in entries)
    highest = max(1e3 * e["audio_group"]["p90"] for e in entries)
    for panel in panels:
        panel.set(xscale="log", yscale="log")
        panel.set_ylim(lowest / 1.3, max(highest, PATCH_MS) * 2)
        _mark_measured(panel)
        panel.axhline(PATCH_MS, color=INK, linewidth=1, linestyle=":")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
    title = f"Latency of a group of speech: {device}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    return figure


def _line(axes: Axes, style: Style, entries: Iterable[Entry], field: str = "batch") -> None:
    """Times with their spread, and their floor."""
    ordered = sorted(entries, key=lambda e: e.at(field))
    places = [e.at(field) for e in ordered]
    times = [[1e3 * e["audio_group"][q] for q in ("p10", "p50", "p90")] for e in ordered]
    spread = [[mid - low for low, mid, _ in times], [high - mid for _, mid, high in times]]
    shape = {"markersize": 5, "capsize": 2.5, "elinewidth": 1}
    axes.errorbar(places, [mid for _, mid, _ in times], yerr=spread, **shape, **style)
    floors = [1e3 * e["floor"]["audio_group"] for e in ordered]
    axes.plot(places, floors, "--", **style | {"marker": "_"}, markersize=9, linewidth=1.2)


def memory(entries: Sequence[Entry], device: str, titles: Sequence[str]) -> Figure:
    """Peak memory of requests by batch, the most of all tasks."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes, highest = figure.subplots(), 0.0
    for i, title in enumerate(titles):
        peaks: dict[int, float] = {}
        for e in (e for e in entries if e.title == title):
            peaks[e["batch"]] = max(peaks.get(e["batch"], 0), e["peak_bytes"] / GB)
        if peaks:
            batches, held = zip(*sorted(peaks.items()), strict=True)
            highest = max(highest, *held)
            axes.plot(batches, held, markersize=5, label=title, **_style(i))
            _note(axes, f"{held[-1]:.2f} GB", (batches[-1], held[-1]), (6, 5))
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
    """Puts ticks only at the measured values of the x axis."""
    found = sorted({float(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(found, [f"{x:,.0f}" for x in found])
    axes.minorticks_off()
