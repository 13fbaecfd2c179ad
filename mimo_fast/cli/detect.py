"""`mimo-fast detect FILE ...`: which recordings are marked as a model's.

The exit code is grep's: 0 where one is marked, 1 where none is, 2 where one could not be read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mimo_fast.audio.paths import name_of
from mimo_fast.cli.reports import report
from mimo_fast.errors import MimoFastError
from mimo_fast.marking.detection import Evidence, evidence_of


def run(args: argparse.Namespace) -> int:
    found = failed = 0
    for path in args.audio:
        try:
            if path in args.problems:
                raise args.problems[path]
            evidence = evidence_of(path)
        except MimoFastError as error:
            report(error)
            failed += 1
            continue
        found += evidence.marked
        print(json.dumps(_object(path, evidence)) if args.as_json else _line(path, evidence))
    return 2 if failed else 0 if found else 1


def _line(path: Path, evidence: Evidence) -> str:
    mark, told = evidence.watermark, evidence.provenance
    said = "marked" if mark.marked else "not marked"
    where = f" from {mark.start:.1f} to {mark.end:.1f} s" if mark.marked else ""
    line = f"{name_of(path)}: {said} (confidence {mark.confidence:.2f}{where})"
    if told is None:
        return line
    if not told.intact:
        return f"{line}; its provenance does not match: the file was changed after it was signed"
    by = told.program or "an unnamed program"
    model = f" with {told.model}" if told.model else ""
    made = "made" if told.generated else "not said to be made"
    consent = f", {len(told.consents)} consent notes" if told.consents else ""
    return f"{line}; {made} by {by}{model}{consent}, signed by {told.signer or 'nobody named'}"


def _object(path: Path, evidence: Evidence) -> dict[str, Any]:
    mark, told = evidence.watermark, evidence.provenance
    return {
        "file": name_of(path),
        "marked": evidence.marked,
        "watermark": {
            "marked": mark.marked,
            "confidence": round(mark.confidence, 4),
            "score": round(mark.score, 4),
            "start": round(mark.start, 3),
            "end": round(mark.end, 3),
        },
        "provenance": None if told is None else told.described(),
    }
