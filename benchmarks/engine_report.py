"""What the persistent engine costs by the model of engine_costs.py, beside what a GPU measured.

    python -m benchmarks engine                            from benchmarks/results
    python -m benchmarks engine --calibration FILE         from a study or gpu.sh's records as well

Prints the terms of a patch, every measured run of the persistent patch decoder beside what the
model says, predictions for four cards, and what changes of the design would gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.columns import duration, shown, table
from benchmarks.engine_calibration import BOOST, Calibration, Study, read_studies
from benchmarks.engine_costs import (
    BLOCKS,
    THREADS,
    Table,
    backbone,
    codec_decoder,
    patch_decoder,
    patch_encoder,
)
from benchmarks.projection import CARDS
from benchmarks.records import NOT_MEASURED, RESULTS
from mimo_fast.bench.synthetic import preset_configs

CONTEXT = 254
"""Groups, as the group that was measured kernel by kernel (docs/LOG.md)."""

PREDICTED = "H100 SXM", "H200 SXM", "RTX 4090", "RTX 5090"
FORMATS = 8, 4
TITLE = "## The persistent engine: predictions\n"

ABOUT = """\
Predictions, not measurements: what the cost model of \
[engine_costs.py](../benchmarks/engine_costs.py) says of a persistent kernel, of which only the \
patch decoder is built (a study). *in turn*: exchanges wait for copies of weights, as in the \
kernel that was measured. *hidden*: they do not, all else as measured. A word is a pass of the \
backbone with the text head; an audio group adds patch encoder and patch decoder with their \
weights in the same format; the codec's chunk is beside it, in 16 bits. Where a phase is planned \
and not built its handling is taken to be the patch decoder's mean. \
`python -m benchmarks engine` prints all terms.
"""

ASSUMED = """\
{device}: calibrated by {sources}: {read:,.0f} GB/s, {cache:,.0f} GB/s from L2, of which \
{kept:.0f} MB stay for the next step, {clock:.2f} GHz; {handling:,.0f} clocks of handling a phase \
and exchanges {waiting:.2f} times as long as alone, fitted to two runs of the patch decoder on \
{fitted}. Other cards, assumed: its share of their published bandwidth and L2, the same clocks of \
handling, seconds of exchanges and bandwidth of L2, 128 blocks; the clock is the published boost \
({boost}), or this one's. 8 rows: instructions of further rows are read off the source, not \
compiled, with attention in every block as it is built.
"""

CHECKED = """\
Runs of the patch decoder on {device} beside the model, which has two of the int8 runs of each \
version of the kernel (without waiting and copies, without copies; left out) and the \
microbenchmarks. int8 / int4, predicted over measured: {spread}. No blind test: the form of the \
model was chosen with these runs in view. Worst are other launches than the \
usual one, which run another kernel since the second version, and 256 threads: the model has \
exchanges that are slower with fewer threads, as they are alone, and the kernel did not become \
slower. Missing as well: why waiting within the kernel is {least:.1f} to {most:.1f} times what an \
exchange takes alone, and reads from memory that depend on each other at a step's end.
"""


@dataclass(frozen=True)
class Check:
    """A measured run of the patch decoder, in seconds beside what the model says."""

    file: str
    bits: int
    about: str
    predicted: float
    measured: float
    usual: bool
    """The launch with a kernel of its own, that handling and waiting are taken from."""
    calibrates: bool

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


@cache
def configs() -> Any:
    return preset_configs("7b")


def studies(paths: Sequence[Path]) -> list[Study]:
    return [study for path in paths for study in read_studies(path)]


def committed(results: Path) -> list[Path]:
    """Studies of the engine, oldest first; a name without a number is the day's first."""
    return sorted(results.glob("*-engine*.json"), key=lambda path: path.stem)


def checks(results: Sequence[Study], calibration: Calibration) -> Iterator[Check]:
    """Every run without pauses between looks; each version with its own handling and waiting."""
    config, _ = configs()
    for name, result in results:
        if not result.get("int8"):
            continue
        version = calibration.fitted(result["int8"], config)
        for bits in FORMATS:
            for run in result.get(f"int{bits}", ()):
                if "us_a_patch" in run and not run.get("pause"):
                    yield _check(name, version, bits, run)


def _check(name: str, version: Calibration, bits: int, run: dict[str, Any]) -> Check:
    config, _ = configs()
    made = patch_decoder(config, bits, heads=run.get("with_heads", False))
    blocks, threads = run.get("blocks", BLOCKS), run.get("threads", THREADS)
    without, keep = run.get("without", 0), run.get("keep", -1)
    waits, copies = not without & 1, not without & 2
    held = made.again / config.patch_decoder.layers * max(keep, 0)
    chain = version.chain(made, blocks=blocks, threads=threads, waits=waits)
    stream = version.stream(made, kept=min(held, version.kept)) if copies else 0.0
    passed = made.nbytes() / version.cache_Bps if copies else 0.0
    said = [f"{blocks} x {threads}"]
    said += ["with heads"] if run.get("with_heads") else []
    said += [f"{keep} layers kept"] if keep >= 0 else []
    said += [] if waits else ["without waiting"]
    said += [] if copies else ["without copies"]
    said += [f"{run['depth']} units ahead"]
    return Check(
        name,
        bits,
        ", ".join(said),
        chain + stream if waits else max(chain + passed, stream),
        run["us_a_patch"] / 1e6,
        usual=(blocks, threads) == (BLOCKS, THREADS),
        calibrates=bits == 8 and not copies and keep < 0,
    )


def cards(calibration: Calibration) -> Iterator[tuple[str, Calibration]]:
    """The four, the measured one as it was measured; that one alone if nothing is published."""
    known = calibration.published
    if known is None or known.name not in PREDICTED:
        yield calibration.device, calibration
    if known is not None:
        for card in CARDS:
            if card.name in PREDICTED:
                yield card.name, calibration if card == known else calibration.scaled(card)


def pieces(bits: int) -> tuple[Table, ...]:
    """Of an audio group, the backbone first; the codec last."""
    config, codec = configs()
    tables = backbone(config, bits, CONTEXT), patch_encoder(config, bits)
    return *tables, patch_decoder(config, bits), codec_decoder(codec)


def predictions(calibration: Calibration) -> str:
    """A table: for each card, format, and 1 and 8 rows a patch, a word, a group and a chunk."""
    heads = ("card", "weights", "rows", *(f"{x}: in turn / hidden" for x in PIECES))
    rows = []
    for name, card in sorted(cards(calibration), key=lambda x: x[0]):
        for bits in FORMATS:
            for streams in (1, 8):
                found = [card.seconds(x, streams) for x in pieces(bits)]
                word, encoder, patch, chunk = found
                group = [sum(x) for x in zip(word, encoder, patch, strict=True)]
                cells = (" / ".join(map(duration, x)) for x in (patch, word, group, chunk))
                rows.append((name, f"int{bits}", str(streams), *cells))
    return table(heads, rows, 2)


PIECES = "patch of 11 steps", "word", "audio group", "codec's chunk"


def phases(calibration: Calibration, bits: int) -> str:
    """Every phase of one row: how often, bytes, pieces exchanged, issue, and the model's time."""
    heads = ("piece", "phase", "times", "bytes", "pieces read of", "issue", "chain", "stream")
    rows = []
    for made in pieces(bits):
        for times, x in made.phases:
            read = x.nbytes(made.each)
            chain = calibration.phase_chain(x, made.each)
            rows.append(
                (
                    made.name,
                    x.name,
                    str(times * made.steps),
                    f"{read:,.0f}",
                    f"{x.reads:,} of {x.whole:,}",
                    shown(x.issue(made.each, BLOCKS), digits=0),
                    duration(chain),
                    duration(read / calibration.read_Bps),
                )
            )
    return table(heads, rows, 2)


def terms(calibration: Calibration, made: Table) -> dict[str, float]:
    """Seconds of a table's terms for one row; their sum is its time in turn."""
    alone = replace(calibration, handling=0.0, waiting=1.0)
    issue = alone.chain(made, waits=False)
    exchanged = alone.chain(made) - issue
    return {
        "issue of the products": issue,
        "handling: loads, staging, sums, publishing": calibration.chain(made, waits=False) - issue,
        "exchanges, as alone": exchanged,
        "waiting beyond them": exchanged * (calibration.waiting - 1),
        "bytes": calibration.stream(made),
    }


def changes(calibration: Calibration, made: Table) -> dict[str, float]:
    """Seconds of one row after changes of the design, each alone and then together."""
    layers = configs()[0].patch_decoder.layers
    out = next(phase for _, phase in made.phases if phase.name == "out")
    # One phase and its exchange less in each layer, its units with those of another.
    one_less = calibration.phase_chain(replace(out, units=0), made.each)
    saved = made.steps * layers * one_less
    half = replace(calibration, handling=calibration.handling / 2)
    waits = replace(calibration, waiting=1.0)
    both = replace(half, waiting=1.0)
    again = replace(out, units=0)
    least = made.steps * layers * both.phase_chain(again, made.each)
    return {
        "as built, L2 told what to keep": calibration.seconds(made)[0],
        "copies do not hold up exchanges": calibration.seconds(made)[1],
        "exchanges take as long as alone": waits.seconds(made)[0],
        "half of the handling": half.seconds(made)[0],
        "a phase less in each layer": calibration.seconds(made)[0] - saved,
        "the first three": both.seconds(made)[1],
        "all four": max(both.seconds(made)[1] - least, both.stream(made)),
    }


def compared(found: Sequence[Check]) -> str:
    heads = ("file", "weights", "launch", "predicted", "measured", "predicted / measured")
    rows = (
        (
            x.file,
            f"int{x.bits}",
            x.about,
            duration(x.predicted),
            duration(x.measured),
            "calibrates" if x.calibrates else f"{x.ratio:.2f}",
        )
        for x in found
    )
    return table(heads, rows, 3)


def spread(found: Sequence[Check], usual: bool) -> str:
    """Least and greatest ratio of int8 and int4."""
    parts = []
    for bits in FORMATS:
        of = [x.ratio for x in found if (x.bits, x.usual) == (bits, usual) and not x.calibrates]
        parts.append(f"{min(of):.2f} to {max(of):.2f}" if of else NOT_MEASURED)
    return " / ".join(parts)


def section(results: Path) -> Iterator[str]:
    """The report's."""
    yield TITLE
    paths = committed(results)
    measured = studies(paths)
    if not measured:
        yield f"Exchanges and a persistent kernel: {NOT_MEASURED}.\n"
        return
    calibration = Calibration.of(measured, configs()[0])
    yield ABOUT
    yield predictions(calibration) + "\n"
    yield assumed(calibration) + "\n"
    found = [*checks(measured, calibration)]
    yield checked(measured, calibration, found) + "\n"
    yield from beside(calibration)


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
        waiting=calibration.waiting,
        boost=boost,
    )


def checked(
    measured: Sequence[Study],
    calibration: Calibration,
    found: Sequence[Check],
) -> str:
    config, _ = configs()
    waiting = [calibration.fitted(x["int8"], config).waiting for _, x in measured if x.get("int8")]
    usual, others = spread(found, usual=True), spread(found, usual=False)
    return CHECKED.format(
        device=calibration.device,
        spread=f"{usual} in the usual launch of 128 x 512, {others} in others",
        least=min(waiting),
        most=max(waiting),
    )


def beside(calibration: Calibration) -> Iterator[str]:
    """The patch's terms and what changes would gain."""
    made = [patch_decoder(configs()[0], bits) for bits in FORMATS]
    for head, of in (("term of a patch, in turn", terms), ("change of the design", changes)):
        found = [of(calibration, x) for x in made]
        rows = ((name, *(duration(x[name]) for x in found)) for name in found[0])
        yield table((head, *(f"int{bits}" for bits in FORMATS)), rows) + "\n"


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
    print(ABOUT)
    print(assumed(calibration))
    for bits in FORMATS:
        print(f"Phases of one row, int{bits}, {calibration.device}; issue: slots of a scheduler\n")
        print(phases(calibration, bits) + "\n")
    found = [*checks(ran, own)]
    print(checked(ran, own, found))
    print(compared(found) + "\n")
    print("Predictions\n")
    print(predictions(calibration) + "\n")
    print("\n".join(beside(calibration)))
    return 0
