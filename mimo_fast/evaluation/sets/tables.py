"""Rows of a set's files as they are published: JSON, JSON lines, TSV and parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import Options
from mimo_fast.evaluation.rates import evaluation_package
from mimo_fast.json_files import cut

Row = Mapping[str, Any]

Audio = Path | bytes
"""A recording: its file, or the encoded bytes that a parquet file holds."""


@dataclass(frozen=True)
class Files:
    """The files of a set.

    Attributes:
        title: Of the set.
        source: Where its files come from.
    """

    title: str
    source: str

    def error(self, problem: str) -> EvaluationError:
        return EvaluationError(f"{problem}: get {self.title} from {self.source}")

    def find(self, folder: Path, *names: str) -> Path:
        """The first of these files that the folder has, by its absolute path.

        Raises:
            EvaluationError: it has none.
        """
        for name in names:
            if (folder / name).is_file():
                return (folder / name).absolute()
        also = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise self.error(f"{folder} has no {names[0]}{also}")

    def file(self, folder: Path, written: Any) -> Path:
        """A recording by the path that a row gives, below a folder; "./" in front goes.

        Raises:
            EvaluationError: there is no such file.
        """
        path = folder / str(written).lstrip("./")
        if not path.is_file():
            raise self.error(f"the recording {path} is missing")
        return path

    def text(self, path: Path) -> str:
        """Raises EvaluationError where a file is no text in UTF-8."""
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or cut(error)
            raise self.error(f"cannot read {path}: {reason}") from error

    def json(self, path: Path) -> Any:
        """Raises EvaluationError where a file is no JSON."""
        return self._parsed(self.text(path), path)

    def rows(self, path: Path, columns: Iterable[str]) -> list[Row]:
        """Rows of a list in JSON, of JSON lines, or of TSV, by the name of the file.

        Raises:
            EvaluationError: it cannot be read, has no rows, or one of them lacks a column.
        """
        text = self.text(path)
        if path.suffix == ".tsv":
            rows: Any = list(csv.DictReader(StringIO(text, newline=""), delimiter="\t"))
        elif text.lstrip().startswith("["):
            rows = self._parsed(text, path)
        else:
            lines = enumerate(text.split("\n"), 1)
            written = ((f"{path}, line {number}", line) for number, line in lines if line.strip())
            rows = [self._parsed(line, where) for where, line in written]
        return self._checked(rows, path, columns)

    def parquet(self, path: Path, columns: Iterable[str]) -> list[Row]:
        """Rows of a parquet file.

        Raises:
            EvaluationError: pyarrow is missing, or the file cannot be read, or lacks a column.
        """
        package = evaluation_package("pyarrow.parquet")
        try:
            with package.ParquetFile(path) as file:
                rows = file.read().to_pylist()
        except Exception as error:
            # Arrow has many kinds of errors; what is no parquet has another each time.
            raise self.error(f"cannot read {path}: {cut(error)}") from error
        return self._checked(rows, path, columns)

    def _parsed(self, text: str, where: object) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{where} is not valid JSON: {cut(error)}") from error

    def _checked(self, rows: Any, path: Path, columns: Iterable[str]) -> list[Row]:
        if not isinstance(rows, list) or not rows:
            raise self.error(f"{path} has no rows")
        needed = list(columns)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise self.error(f"{path}: row {number} is a {type(row).__name__}, not an object")
            if missing := [name for name in needed if row.get(name) is None]:
                raise self.error(f"{path}: row {number} has no {', '.join(missing)}")
        return rows


def ids_of(rows: Sequence[Row], column: str = "id") -> list[str]:
    """The published ids where each row has one of its own, otherwise numbers."""
    ids = [str(row.get(column, "")) for row in rows]
    if all(ids) and len(set(ids)) == len(ids):
        return ids
    return [f"{i:05}" for i in range(len(rows))]


def groups_of(row: Row, columns: Iterable[str]) -> dict[str, str]:
    """Breakdowns by columns; a row that lacks one is in none of them."""
    return {name: str(row[name]) for name in columns if row.get(name) not in (None, "")}


def table_files(folder: Path) -> list[Path]:
    """Parquet files and JSON of any form below a folder, in the order of their paths.

    Not those in hidden folders, where the hub's client keeps its own.
    """
    found = list[Path]()
    for suffix in ("parquet", "json", "jsonl"):
        found += folder.rglob(f"*.{suffix}")
    names = (each.relative_to(folder).as_posix() for each in found)
    return sorted(path for path, name in zip(found, names, strict=True) if "/." not in f"/{name}")


def refuse(options: Options, title: str, *, shots: bool = True, thinking: bool = True) -> None:
    """Raises EvaluationError for an option that a set is not asked with.

    Args:
        shots, thinking: whether it takes them.
    """
    if options.shots < 0:
        raise EvaluationError(f"shots must be 0 or more, not {options.shots}")
    if options.shots and not shots:
        raise EvaluationError(f"{title} takes no examples: leave shots out")
    if options.thinking and not thinking:
        raise EvaluationError(f"{title} is asked without thoughts: leave thinking out")
