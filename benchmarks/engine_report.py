"""What the persistent engine costs by the model of engine_costs.py, and the runs it rests on.

    python -m benchmarks engine                            from benchmarks/results
    python -m benchmarks engine --calibration FILE         from a study or gpu.sh's records as well

Prints predictions for four cards, the phases of each launch with their terms, what changes of the
design would gain, and every run of the kernel that was measured before it (engine_measured.py)
beside what the model's calibration says of that one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

from benchmarks.columns import duration, table
from benchmarks.engine_calibration import BOOST, Calibration
from benchmarks.engine_changes import changes, terms
from benchmarks.engine_checks import checked, checks, committed, compared, studies
from benchmarks.engine_grids import PROCESSORS
from benchmarks.engine_pieces import (
    CONTEXT,
    FORMATS,
    Pieces,
    by_name,
    cards,
    configs,
    grid,
    pair,
)
from benchmarks.engine_runs import beside
from benchmarks.records import NOT_MEASURED, RESULTS
from mimo_fast.kernels.cuda.engine import MOST_ROWS

TITLE = "## The persistent engine: predictions\n"

ABOUT = """\
Predictions, not measurements: nothing of this engine has been measured. What the cost model of \
[engine_costs.py](../benchmarks/engine_costs.py) says of its tables at the published dimensions, \
with seconds of a kernel that was measured before it. *in turn*: exchanges wait for copies of \
weights, as in that kernel. *ahead*: they do not, and memory fills a block's queues of weights \
while it waits. A word is a pass of the backbone with the int8 text head after {context} groups; \
an audio group adds patch encoder and patch decoder, here with their layers in the same format. \
The preset formats leave the patch encoder in 16 bits, and int4 has an int8 patch decoder. \
Launches themselves are left out. `python -m benchmarks engine` prints all terms.
"""

LEGEND = """\
Phases of these launches in int4 with one row: MB of weights of all blocks; then of the busiest \
block its KB, its tiles beside the mean of all blocks, the units of its busiest scheduler, its \
exchanges one after the other, what it reads in them of what all blocks made, the items of 8 \
columns that a thread stages, and how often columns are staged; at last the chain of all times, \
without bytes of weights.
"""

ASSUMED = """\
{device}: calibrated by {sources}: {read:,.0f} GB/s, {cache:,.0f} GB/s from L2, of which \
{kept:.0f} MB stay for the next step, {clock:.2f} GHz; {handling:,.0f} clocks of handling a phase, \
of which {attending:,.0f} fall away with attention in every block, and exchanges {waiting:.2f} \
times as long as alone, fitted to runs of the earlier kernel on {fitted}. Assumed: the rest of the \
handling stays as it was; 8 columns of x take a thread as long as 16 bytes of that kernel's \
exchanges, and with many rows an exchange is as long as the line through 512 and 1,024 such \
pieces says, times the same factor; the instructions of a unit are counted in compiled code, \
those of attention, draws and further rows read off the source; a draw is greedy. Other cards, \
assumed: this one's share of their published bandwidth and L2, the same clocks of handling, \
seconds of exchanges and bandwidth \
of L2; a block on each multiprocessor ({processors}); half of the threads where shared memory does \
not hold the queues of all; the clock is the published boost ({boost}), or this one's.
"""


def predictions(calibration: Calibration) -> str:
    """A table: for each card, format, and 1 and 8 rows, the pieces and an audio group."""
    names = "word", "patch encoder", "patch of 11 steps", "audio group"
    heads = ("card", "weights", "rows", *(f"{x}: in turn / ahead" for x in names))
    rows = []
    for name, card in sorted(cards(calibration), key=lambda x: x[0]):
        for bits in FORMATS:
            for streams in (1, MOST_ROWS):
                found = Pieces.of(grid(card), bits, streams).seconds(card)
                rows.append((name, f"int{bits}", str(streams), *map(pair, found)))
    return table(heads, rows, 2)


def launches(calibration: Calibration) -> str:
    """What each launch has in all: exchanges, bytes, and how shared memory is divided for it."""
    heads = (
        *("launch", "weights", "rows", "phases", "exchanges in the chain", "MB of weights"),
        *("kept in L2", "MB exchanged", "MB read of it by all blocks", "threads"),
        *("parts ahead", "columns of x"),
    )
    rows = []
    on = grid(calibration)
    for bits in FORMATS:
        for streams in (1, MOST_ROWS):
            for _, launch in Pieces.of(on, bits, streams).launches:
                read = sum(n * a for cost, n in launch.costs.items() for a, _ in cost.reads)
                program, depth = launch.divided[0], launch.depth
                megabytes = launch.nbytes, launch.kept, launch.exchanged, read * on.blocks
                rows.append(
                    (
                        *(launch.name, f"int{bits}", str(launch.rows)),
                        *(str(sum(launch.costs.values())), str(launch.exchanges)),
                        *(f"{x / 1e6:,.1f}" for x in megabytes),
                        *(str(launch.threads), str(depth), f"{program.x_columns:,}"),
                    )
                )
    return table(heads, rows, 2)


def phases(calibration: Calibration, bits: int, streams: int) -> str:
    """Every phase: how often, what its busiest block does, and the chain's time for all of them."""
    heads = (
        *("piece", "phase", "times", "MB", "KB a block", "tiles of mean"),
        *("units a scheduler", "exchanges", "KB read of", "items a thread", "staged", "chain"),
    )
    rows = []
    on = grid(calibration)
    for _, launch in Pieces.of(on, bits, streams).launches:
        for name, found in by_name(launch).items():
            count = sum(times for _, times in found)
            seconds = sum(n * x.seconds(calibration, on.blocks, launch.threads) for x, n in found)
            most = max((x for x, _ in found), key=lambda x: (x.issued, x.nbytes, len(x.reads)))
            read = "; ".join(f"{a / 1e3:,.1f} of {b / 1e3:,.1f}" for a, b in most.reads)
            rows.append(
                (
                    *(launch.name, name, f"{count:,}"),
                    *(f"{x / y:,.1f}" for x, y in ((most.nbytes, 1e6), (most.largest, 1e3))),
                    f"{most.tiles} of {most.mean_tiles:.2f}",
                    *(str(most.issued), str(len(most.reads)), read),
                    *(str(most.items), str(most.stagings), duration(seconds)),
                )
            )
    return table(heads, rows, 2)


def section(results: Path) -> Iterator[str]:
    """The report's."""
    yield TITLE
    paths = committed(results)
    measured = studies(paths)
    if not measured:
        yield f"Exchanges and a persistent kernel: {NOT_MEASURED}.\n"
        return
    calibration = Calibration.of(measured, configs()[0])
    yield about()
    yield predictions(calibration) + "\n"
    yield assumed(calibration)
    yield f"Launches on {calibration.device}:\n"
    yield launches(calibration) + "\n"
    yield LEGEND.format(device=calibration.device)
    yield phases(calibration, 4, 1) + "\n"
    yield terms(calibration) + "\n"
    yield changes(calibration) + "\n"
    yield checked(measured, calibration, [*checks(measured, calibration)])


def about() -> str:
    return ABOUT.format(context=CONTEXT)


def assumed(calibration: Calibration) -> str:
    boost = ", ".join(f"{name} {hz / 1e9:.2f} GHz" for name, hz in BOOST.items())
    return ASSUMED.format(
        device=calibration.device,
        fitted=calibration.fitted_on,
        sources=", ".join(f"[{x}](../benchmarks/results/{x})" for x in calibration.sources),
        read=calibration.read_Bps / 1e9,
        cache=calibration.cache_Bps / 1e9,
        kept=calibration.kept / 1e6,
        clock=calibration.clock / 1e9,
        handling=calibration.handling,
        attending=calibration.attending,
        processors=", ".join(f"{name} {count}" for name, count in PROCESSORS.items()),
        waiting=calibration.waiting,
        boost=boost,
    )


def add_options(add: Callable[..., object]) -> None:
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="[benchmarks/results]")
    about = "a study's JSON or gpu.sh's records; newer than the results, part by part"
    add("--calibration", type=Path, nargs="+", default=[], metavar="FILE", help=about)


def run(args: argparse.Namespace) -> int:
    kept, given = studies(committed(args.results)), studies(args.calibration)
    if args.calibration and not given:
        print(f"no study of the engine in {', '.join(map(str, args.calibration))}\n")
    config, _ = configs()
    calibration = Calibration.of([*kept, *given], config)
    # Runs of a card beside its own microbenchmarks.
    ran = given if any(x.get("int8") for _, x in given) else kept
    own = calibration if ran is given else Calibration.of(kept, config)
    print(about())
    print(predictions(calibration) + "\n")
    print(assumed(calibration))
    print(f"Launches on {calibration.device}\n")
    print(launches(calibration) + "\n")
    for bits, streams in product(FORMATS, (1, MOST_ROWS)):
        print(f"Phases of {streams} rows, int{bits}, {calibration.device}: the busiest block\n")
        print(phases(calibration, bits, streams) + "\n")
    print(terms(calibration) + "\n")
    print(changes(calibration) + "\n")
    for text in beside([*kept, *given], calibration):
        print(text)
    found = [*checks(ran, own)]
    print(checked(ran, own, found))
    print(compared(found))
    return 0
