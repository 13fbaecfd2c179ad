"""What measurements are written into and printed as: JSON lines, tables, durations; the options
that say where."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm


class JsonLines:
    """Appends records to a file, each on a line and out of our hands before the next is made;
    nowhere for None."""

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_off = (
                path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
            )
            self._file = path.open("a", encoding="utf-8")
            # Of a run that was killed while it wrote.
            self._file.write("\n" if cut_off else "")

    def append(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def study_records(name: str, path: Path) -> list[dict[str, Any]]:
    """What a study of benchmarks/studies wrote (JSON, or JSON lines), as records of kind "study"."""
    text = path.read_text(encoding="utf-8")
    try:
        found = [json.loads(text)]
    except json.JSONDecodeError:
        found = read_records(path)
    return [
        {"kind": "study", "study": name, "result": result}
        | {
            key: result[key]
            for key in ("environment",)
            if isinstance(result, dict) and key in result
        }
        for result in found
    ]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that was cut off is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def add_run_options(parser: argparse.ArgumentParser, each: str) -> None:
    """Where a model is measured, and where the records go. each: what has one."""
    parser.add_argument("--device", default=None)
    parser.add_argument("--threads", type=int, help="of the CPU [chosen by the model's size]")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.jsonl", help=f"append a record for each {each}"
    )


class Table:
    """Rows printed as they come, in columns of fixed widths; a negative width aligns to the
    left."""

    def __init__(
        self, columns: Mapping[str, int], write: Callable[[str], object] | None = None
    ) -> None:
        self._widths = list(columns.values())
        # Above a progress bar, where there is one.
        self._write = write or partial(tqdm.write, file=sys.stdout)
        self.row(*columns)

    def row(self, *cells: str) -> None:
        pairs = zip(cells, self._widths, strict=True)
        self._write(
            "  ".join(cell.ljust(-w) if w < 0 else cell.rjust(w) for cell, w in pairs).rstrip()
        )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, factor = next(
        ((u, f) for u, f in (("s", 1.0), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6)
    )
    value = seconds * factor
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def main() -> int:
    """`python -m benchmarks.records STUDY FILE.json RECORDS.jsonl` appends what a study wrote."""
    name, path, output = sys.argv[1], Path(sys.argv[2]), JsonLines(Path(sys.argv[3]))
    if not path.exists():
        print(f"the study {name} has written nothing", file=sys.stderr)
        return 1
    for record in study_records(name, path):
        output.append(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
