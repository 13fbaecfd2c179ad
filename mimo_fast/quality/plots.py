"""The pictures of a quality report: PNG on white."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_fast.bench.style import COLOURS, STYLE
from mimo_fast.errors import EvaluationError
from mimo_fast.quality.advice import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

DPI = 130

WIDEST = 4
"""Times what is allowed at which intervals are cut off."""


def draw(report: Report, folder: Path) -> list[str]:
    """Draws what there are figures for; returns the names of the files.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        fix = "pip install 'mimo-fast[quality]'"
        raise EvaluationError(f"pictures need the package {error.name}: {fix}") from error
    drawn = []
    with matplotlib.rc_context(STYLE):
        for picture in (losses, speed, heads):
            figure = picture(report)
            if figure is not None:
                drawn.append(f"{picture.__name__}.png")
                figure.savefig(folder / drawn[-1], dpi=DPI, metadata={"Software": None})
    return drawn


def losses(report: Report) -> Figure | None:
    """Each loss with its interval beside its bound, in shares of what is allowed."""
    rows = [
        (name, measure, loss)
        for measure in MEASURES
        for name, each in report["formats"].items()
        if (loss := each.get("losses", {}).get(measure)) is not None
    ]
    if not rows:
        return None
    figure, axes = _figure(7.6, 1.1 + 0.34 * len(rows))
    for place, (name, _, loss) in enumerate(rows):
        value, low, high = (loss[key] / loss["bound"] for key in ("value", "low", "high"))
        colour = _colour(report, name)
        axes.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([value], [place], "o", color=colour, markersize=6)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axvline(1, color="#222222", linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{MEASURES[m].title}, {name}" for name, m, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, -WIDEST), min(max(right, 1.2), WIDEST))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("loss and its 95% interval, in parts of what is allowed (dashed)")
    axes.set_title(f"Lost beside {report['full']}")
    return figure


def speed(report: Report) -> Figure | None:
    """Real-time factor, first audio and weights of each format."""
    panels: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
        ("real-time factor", lambda each: each["speed"].get("real_time_factor")),
        ("first audio (ms)", lambda each: each["speed"].get("first_audio_ms", {}).get("exact")),
        ("weights (MB)", lambda each: each["memory"]["weights"] / 1e6),
    )
    formats = report["formats"]
    shown = [(title, [value(each) for each in formats.values()]) for title, value in panels]
    shown = [(title, values) for title, values in shown if None not in values]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(shown), 1.1 + 0.36 * len(formats)), layout="constrained")
    colours = [_colour(report, name) for name in formats]
    for place, (title, values) in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        bars = axes.barh(range(len(values)), [value or 0.0 for value in values], color=colours)
        axes.bar_label(bars, fmt="{:.3g}", padding=3)
        axes.set_yticks(range(len(values)), [*formats] if place == 1 else [""] * len(values))
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
    return figure


def heads(report: Report) -> Figure | None:
    """KL of each head, on a logarithmic axis."""
    known = {
        name: [head["kl"] for head in each["heads"]]
        for name, each in report["formats"].items()
        if each.get("heads")
    }
    if not known:
        return None
    figure, axes = _figure(7.6, 2.9)
    for name, values in known.items():
        axes.plot(values, "o-", color=_colour(report, name), label=name, markersize=4.5)
    count = len(next(iter(known.values())))
    axes.set_xticks(range(count), ["text", *map(str, range(count - 1))])
    axes.set_xlabel("text head and codebooks")
    axes.set_yscale("log")
    axes.set_title(f"KL from {report['full']} (nats)")
    axes.legend()
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _colour(report: Report, name: str) -> str:
    return COLOURS[[*report["formats"]].index(name) % len(COLOURS)]
