"""What the predicted time of the persistent engine is made of, and what changes would gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.columns import duration, table
from benchmarks.engine_calibration import Calibration
from benchmarks.engine_costs import PIECE, SAMPLED, Cost, Launch
from benchmarks.engine_measured import THREADS
from benchmarks.engine_pieces import Pieces, grid, pair
from mimo_fast.kernels.cuda.engine import MOST_ROWS
from mimo_fast.kernels.cuda.engine_launch import Grid


def columns(on: Grid) -> dict[str, Launch]:
    """What terms and changes are shown of, by the head of its column."""
    found = dict[str, Launch]()
    for streams in (1, MOST_ROWS):
        for _, launch in reversed(Pieces.of(on, 4, streams).launches):
            if launch.name != "patch encoder":
                found[f"{launch.name}, int4, {streams} row{'s' * (streams > 1)}"] = launch
    return found


def terms(calibration: Calibration) -> str:
    shown_of = columns(grid(calibration))
    found = {head: launch.terms(calibration) for head, launch in shown_of.items()}
    names = [*next(iter(found.values()))]
    rows = [(name, *(duration(x[name]) for x in found.values())) for name in names]
    rows.append(("in turn", *(duration(sum(x.values())) for x in found.values())))
    return table(("term", *shown_of), rows)


Change = Callable[[Calibration, Launch], tuple[float, float]]
"""Seconds in turn and ahead of a changed launch."""


def _with(change: Callable[[Cost], Cost | None]) -> Change:
    def seconds(card: Calibration, launch: Launch) -> tuple[float, float]:
        changed = replace(launch, change=change)
        return changed.in_turn(card), changed.ahead(card)

    return seconds


def _on(**fields: int) -> Change:
    def seconds(card: Calibration, launch: Launch) -> tuple[float, float]:
        changed = replace(launch, grid=replace(launch.grid, **fields))
        return changed.in_turn(card), changed.ahead(card)

    return seconds


def _by(**factors: float) -> Change:
    def seconds(card: Calibration, launch: Launch) -> tuple[float, float]:
        other = replace(card, **{x: getattr(card, x) * y for x, y in factors.items()})
        return launch.in_turn(other), launch.ahead(other)

    return seconds


def as_alone(card: Calibration, launch: Launch) -> tuple[float, float]:
    other = replace(card, waiting=1.0)
    return launch.in_turn(other), launch.ahead(other)


def down_in_halves(cost: Cost) -> Cost:
    """K of down in two, of whole tiles: half of the units, and two float32 sums for each result."""
    if cost.name == "down":
        return replace(cost, units=-(-cost.units // 2), issued=-(-cost.issued // 2))
    if cost.name in ("qkv", "qkv and attention", "norm"):
        return replace(cost, reads=tuple((4 * a, 4 * b) for a, b in cost.reads))
    return cost


def embedded_at_once(cost: Cost) -> Cost | None:
    """Embeddings in the draw."""
    return None if cost.name == "embed" else cost


def sampled(cost: Cost) -> Cost:
    """No gain: what the model takes to be greedy is drawn with top-k and top-p."""
    return replace(cost, alone=SAMPLED * cost.alone) if cost.name == "draw" else cost


def staged_by_quarters(cost: Cost) -> Cost:
    """32 columns a thread at once: beyond a round of 512 pieces a quarter of the time each."""
    least = PIECE * THREADS

    def shorter(of: int) -> int:
        return min(of, least) + max(of - least, 0) // 4

    return replace(cost, reads=tuple((shorter(a), shorter(b)) for a, b in cost.reads))


def attention_everywhere(cost: Cost) -> Cost:
    """qkv in all blocks, at best: half of a block's units, no exchange more."""
    if cost.name != "qkv and attention":
        return cost
    return replace(cost, units=cost.units // 2, issued=cost.issued // 2)


def together(card: Calibration, launch: Launch) -> tuple[float, float]:
    """Those of CHANGES above it, with room for x where that is faster."""

    other = replace(card, waiting=1.0, handling=card.handling / 2, attending=card.attending / 2)
    found = [_with(staged_by_quarters)(other, launch)]
    found.append(
        _with(staged_by_quarters)(other, replace(launch, grid=replace(launch.grid, depth=4)))
    )
    return min(found)


CHANGES: dict[str, Change] = {
    "as it is": _by(),
    "exchanges take as long as alone": as_alone,
    "half of the handling": _by(handling=0.5, attending=0.5),
    "staging by quarters, as it is built since": _with(staged_by_quarters),
    "queues of 4 parts, more room for x": _on(depth=4),
    "these four": together,
    "K of down in two": _with(down_in_halves),
    "qkv in all blocks, at best": _with(attention_everywhere),
    "embeddings with the draw": _with(embedded_at_once),
    "draws with top-k and top-p": _with(sampled),
}


def changes(calibration: Calibration) -> str:
    """What changes of the design would give, each alone: in turn / ahead."""
    shown_of = columns(grid(calibration))
    rows = [
        (name, *(pair(change(calibration, x)) for x in shown_of.values()))
        for name, change in CHANGES.items()
    ]
    return table(("change", *shown_of), rows)
