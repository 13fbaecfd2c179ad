"""Runs of the kernel of engine_measured.py beside what the model says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.columns import duration, table
from benchmarks.engine_calibration import Calibration, Study, read_studies
from benchmarks.engine_measured import BLOCKS, THREADS, measured_patch_decoder
from benchmarks.engine_pieces import FORMATS, configs
from benchmarks.records import NOT_MEASURED

CHECKED = """\
What the seconds come from: runs of the earlier kernel on {device}, a patch decoder of one row, \
beside the model's form for it, which has two of the int8 runs of each version (without waiting \
and copies, without copies; left out) and the microbenchmarks. int8 / int4, predicted over \
measured: {spread}. No blind test: the form was chosen with these runs in view. Worst are other \
launches than the usual one, which ran another kernel since the second version, and 256 threads: \
the model has exchanges that are slower with fewer threads, as they are alone, and the kernel did \
not become slower. Missing as well: why waiting within the kernel is {least:.1f} to {most:.1f} \
times what an exchange takes alone, and reads from memory that depend on each other at a step's \
end.
"""


@dataclass(frozen=True)
class Check:
    """A run of the measured kernel, in seconds beside what the model says."""

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
    made = measured_patch_decoder(config, bits, heads=run.get("with_heads", False))
    blocks, threads = run.get("blocks", BLOCKS), run.get("threads", THREADS)
    without, keep = run.get("without", 0), run.get("keep", -1)
    waits, copies = not without & 1, not without & 2
    held = made.again / config.patch_decoder.layers * max(keep, 0)
    chain = version.chain(made, blocks=blocks, threads=threads, waits=waits)
    stream = version.stream(made, kept=min(held, version.kept)) if copies else 0.0
    passed = made.nbytes / version.cache_Bps if copies else 0.0
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
