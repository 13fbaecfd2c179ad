"""The pictures of docs/performance.md: SVG, the same bytes for the same records.

They are drawn on white, for light and dark pages. A floor is dashed in the colour of its series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.records import Entry, Measured
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
"""Colours that the colour-blind can tell apart (Okabe and Ito)."""

MARKERS = "osD^vPX*"
INK = "#222222"
PATCH_MS = 160
"""Seconds of audio of a group of speech."""

OUTLIERS = 7
"""Number of our ops furthest below the ceiling that the roofline names."""

SHORT, LONG = 256, 2048
"""Groups of context; the nearest measured one is taken, for the second from it on."""

Box = tuple[float, float, float, float]
"""Margins: left, bottom, right, top, in points."""


def draw(measured: Measured, folder: Path) -> list[str]:
    """Draws the pictures for which there are records; returns the names of the files."""
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
                made = figure(measured.find(records, device), device, _titles(measured, device))
                made.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
                drawn.append(name)
    return drawn


def _titles(measured: Measured, device: str) -> list[str]:
    """Titles of all measured models; each has one colour in every picture."""
    kinds = ("groups", "request")
    return sorted({e.title for kind in kinds for e in measured.find(kind, device)})


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
        ours = provider.startswith("ours")
        x, y = zip(*(_point(e) for e in entries if e["provider"] == provider), strict=True)
        axes.scatter(
            x,
            y,
            s=30 if ours else 20,
            **_style(i),
            alpha=0.8 if ours else 0.55,
            linewidths=0,
            label=provider,
            zorder=3 if ours else 2,
        )
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


def _style(i: int) -> dict[str, str]:
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
        _note(
            axes,
            str(number),
            _point(entry),
            (dx, dy),
            ha="center",
            va="center",
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkB": 2},
        )
        lines.append(
            f"{number}  {entry['op']}\n     {entry['format']}, {entry['shape']}: "
            f"{100 * entry['of_ceiling']:.1f}%"
        )
    axes.text(
        1.045,
        0.0,
        "\n".join(lines),
        transform=axes.transAxes,
        va="bottom",
        fontsize=8,
        linespacing=1.35,
        color=INK,
    )


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
    known = [title for title in titles if any(e.title == title for e in entries)]
    short = _contexts(entries, known, lambda own: min(own, key=lambda c: (abs(c - SHORT), c)))
    longest = _contexts(entries, known, lambda own: max(c for c in own if c >= LONG - 8))
    for panel, chosen, what in (
        (panels[0], short, "short context"),
        (panels[1], longest, "long context"),
    ):
        for title, context in chosen.items():
            own = [e for e in entries if e.title == title and e.context == context]
            _line(panel, titles.index(title), own, "batch")
        contexts = sorted(set(chosen.values()))
        span = " to ".join(f"{context:,}" for context in contexts[:1] + contexts[1:][-1:])
        panel.set(xlabel="batch (streams)", title=f"{what}: {span or 'no'} groups")
        if missing := [title for title in known if title not in chosen]:
            panel.text(
                0.02,
                0.97,
                f"not measured: {', '.join(missing)}",
                transform=panel.transAxes,
                va="top",
                fontsize=8,
                color=INK,
            )
    for title in known:
        own = [e for e in entries if e.title == title]
        smallest = min(e["batch"] for e in own)
        one = [e for e in own if e["batch"] == smallest]
        _line(panels[2], titles.index(title), one, "context")
    panels[2].set(xlabel="context (groups)", title="smallest batch")
    _legend(figure, {title: _style(titles.index(title)) for title in known})
    panels[0].set_ylabel("a group of speech (ms), p10 to p90")
    times = [1e3 * seconds for e in entries for seconds in _span(e)]
    for panel in panels:
        panel.set(xscale="log", yscale="log")
        panel.set_ylim(min(times) / 1.3, max([*times, PATCH_MS]) * 2)
        _mark_measured(panel)
        panel.axhline(PATCH_MS, color=INK, linewidth=1, linestyle=":")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,g}")
    figure.suptitle(
        f"Latency of a group of speech: {device}",
        x=0.01,
        ha="left",
        fontsize=10.5,
        fontweight="bold",
    )
    return figure


def _legend(figure: Figure, styles: dict[str, dict[str, str]]) -> None:
    """One legend for all panels, below them."""
    lines = [Line2D([], [], **style, label=name) for name, style in styles.items()]
    lines += [
        Line2D([], [], color="#666666", linewidth=1.2, linestyle="--", label="its floor"),
        Line2D([], [], color=INK, linewidth=1, linestyle=":", label="real time: 160 ms"),
    ]
    figure.legend(handles=lines, loc="outside lower left", ncols=len(lines))


def _contexts(
    entries: Sequence[Entry], titles: Sequence[str], choose: Callable[[set[int]], int]
) -> dict[str, int]:
    """Title -> the chosen context; models without one are left out."""
    found = {}
    for title in titles:
        try:
            found[title] = choose({e.context for e in entries if e.title == title})
        except ValueError:
            continue
    return found


def _span(entry: Entry) -> tuple[float, float]:
    return entry["floor"]["audio_group"], entry["audio_group"]["p90"]


def _line(axes: Axes, i: int, entries: Iterable[Entry], field: str) -> None:
    """Times with their spread, and their floor."""
    ordered = sorted(entries, key=lambda e: e.at(field))
    places = [e.at(field) for e in ordered]
    low, mid, high = ([1e3 * e["audio_group"][q] for e in ordered] for q in ("p10", "p50", "p90"))
    axes.errorbar(
        places,
        mid,
        yerr=[
            [m - l for l, m in zip(low, mid, strict=True)],  # noqa: E741
            [h - m for m, h in zip(mid, high, strict=True)],
        ],
        markersize=5,
        capsize=2.5,
        elinewidth=1,
        **_style(i),
    )
    floors = [1e3 * e["floor"]["audio_group"] for e in ordered]
    axes.plot(places, floors, "--", **_style(i) | {"marker": "_"}, markersize=9, linewidth=1.2)


def memory(entries: Sequence[Entry], device: str, titles: Sequence[str]) -> Figure:
    """Peak memory of requests by batch, the most of all tasks."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axes, highest = figure.subplots(), 0.0
    for title in sorted({e.title for e in entries}):
        peaks: dict[int, float] = {}
        for e in entries:
            if e.title == title:
                peaks[e["batch"]] = max(peaks.get(e["batch"], 0), e["peak_bytes"] / GB)
        batches, highest = sorted(peaks), max(highest, *peaks.values())
        axes.plot(
            batches,
            [peaks[b] for b in batches],
            markersize=5,
            label=title,
            **_style(titles.index(title)),
        )
        last = (batches[-1], peaks[batches[-1]])
        _note(axes, f"{last[1]:.2f} GB", last, (6, 5))
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
