"""What a GPU measured of the persistent engine (studies/engine.py) beside what the model says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.columns import duration, table
from benchmarks.engine_calibration import Calibration, Study
from benchmarks.engine_costs import Launch
from benchmarks.engine_pieces import FORMATS, Pieces, by_name, pair
from benchmarks.studies.engine_micro import COLUMNS
from mimo_fast.kernels.cuda.engine_launch import KEPT_SHARE, Grid


@dataclass(frozen=True)
class Part:
    """A part of a study: a format's records, and the grid that its card has.

    Args:
        calibration: of that card.
    """

    file: str
    bits: int
    grid: Grid
    records: Sequence[dict[str, Any]]
    calibration: Calibration

    def launch(self, record: dict[str, Any]) -> tuple[int, Launch]:
        """How often it is launched, and what."""
        fields = {x: record[x] for x in ("blocks", "threads", "depth", "x_columns") if x in record}
        launches = Pieces.of(replace(self.grid, **fields), self.bits, record["rows"]).launches
        return next(x for x in launches if x[1].name == record["piece"])


def parts(results: Sequence[Study], calibration: Calibration) -> Iterator[Part]:
    """Of the calibration's card."""
    for name, result in results:
        for bits in FORMATS:
            records = result.get(f"engine-int{bits}") or [{}]
            about = records[0]
            if about.get("device") == calibration.device:
                kept = int(KEPT_SHARE * about["l2_bytes"])
                grid = Grid(about["processors"], about["shared_bytes"], kept_bytes=kept)
                yield Part(name, bits, grid, records[1:], calibration)


def timed(found: Sequence[Part]) -> str:
    """A table of all times."""
    heads = ("file", "weights", "piece", "rows", "launch", "in turn / ahead", "measured")
    rows = []
    for part in found:
        for record in part.records:
            if "us" in record and "threads" in record:
                count, launch = part.launch(record)
                times = launch.in_turn(part.calibration), launch.ahead(part.calibration)
                how = f"{record['blocks']} x {record['threads']}, {record['depth']} parts ahead"
                how += f", pause {record['pause']}" * bool(record["pause"])
                rows.append(
                    (
                        *(part.file, f"int{part.bits}", record["piece"], str(record["rows"]), how),
                        pair((count * times[0], count * times[1])),
                        duration(record["us"] / 1e6),
                    )
                )
    return table(heads, rows, 3)


def clocked(found: Sequence[Part]) -> str:
    """A table of the clocks of a phase, by kind; predicted: without waiting for copies."""
    heads = ("file", "weights", "piece", "rows", "phase", "times", "predicted", "mean", "range")
    rows = []
    for part in found:
        for record in part.records:
            if "clocks" in record:
                _, launch = part.launch(record)
                costs = by_name(launch)[record["phase"]]
                at = part.calibration, launch.grid.blocks, launch.threads
                seconds = sum(n * cost.seconds(*at) for cost, n in costs)
                predicted = seconds * part.calibration.clock / sum(n for _, n in costs)
                mean, least, most = record["clocks"]
                rows.append(
                    (
                        *(part.file, f"int{part.bits}", record["piece"], str(record["rows"])),
                        *(record["phase"], str(record["times"]), f"{predicted:,.0f}"),
                        *(f"{mean:,.0f}", f"{least:,.0f} to {most:,.0f}"),
                    )
                )
    return table(heads, rows, 3)


def streaming(results: Sequence[Study], device: str) -> str:
    """A table of exchanges while weights stream; "" where the card has not run them.

    Not hidden: how much of the shorter of both, as they take alone, adds to the longer: 0 is
    *ahead* of the cost model, 1 is *in turn*.
    """
    heads = ("file", "columns", "parts", "exchange alone", "stream alone", "both", "not hidden")
    rows = []
    for name, result in results:
        runs = result.get("phases") or [{}]
        usual = [x for x in runs[1:] if (x.get("depth"), x.get("threads")) == (8, 512)]
        times = {(x["columns"], x["parts"], x["waits"]): x["us"] / 1e6 for x in usual}
        for (columns, count, waits), both in times.items():
            alone = times.get((columns, 0, True)), times.get((min(COLUMNS), count, False))
            if runs[0].get("device") != device or not (waits and count and all(alone)):
                continue
            shorter, longer = sorted(alone)
            hidden = f"{(both - longer) / shorter:.2f}"
            each = (f"{columns:,}", str(count), *map(duration, (*alone, both)), hidden)
            rows.append((name, *each))
    return table(heads, rows) if rows else ""


def failures(found: Sequence[Part]) -> list[str]:
    """Lines of what went wrong."""
    return [
        f"{part.file}, int{part.bits}: {record}"
        for part in found
        for record in part.records
        if "failed" in record
    ]


def beside(results: Sequence[Study], calibration: Calibration) -> Iterator[str]:
    """Nothing where no study has run the engine on this card."""
    if both := streaming(results, calibration.device):
        yield f"Exchanges while weights stream, {calibration.device}\n"
        yield both + "\n"
    found = [*parts(results, calibration)]
    if not found:
        return
    yield f"Runs of the engine on {calibration.device}\n"
    yield timed(found) + "\n"
    yield clocked(found) + "\n"
    yield from failures(found)
