"""The report's section on the look-ahead of the codec's stream, from the newest study of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.columns import table
from benchmarks.records import NOT_MEASURED, Entry, sources

TITLE = "## Look-ahead of the codec's stream\n"
PLACES = {"first_1": "first 160 ms", "first_3": "480 ms", "first_10": "1.6 s", "whole": "all"}
"""Field of a row -> its head: patches from the first on."""

ABOUT = """\
Replies of three held-out sentences, in nano's voice and in one that training never used, decoded \
by nano's codec with a vocoder of the published depth and windows (16 layers, 40 frames back and \
10 ahead each, width 80), which `python -m training vocoder` trains, and compared with one-shot \
decoding of the same codes: SNR (mean over the voices, and the worst reply's) and mean absolute \
difference of mel spectra, in dB, and the words that a recogniser hears wrong in the first \
sentence. *elastic*: one patch is held back at first, then one more for each two that come, up to \
ten. Norm statistics: *own* are one-shot decoding's, so that only the look-ahead differs; *voice* \
another reply's in the same voice; *average* those that nano's checkpoint states; *estimated*: \
none are given. Ten patches with estimates are an exact stream of a codec that states none, as the \
published one ([study](../benchmarks/studies/lookahead.py)).
"""

Rows = list[dict]


def section(results: Path) -> Iterator[str]:
    yield TITLE
    files = sorted(results.glob("*-lookahead*.json"))
    if not files:
        yield f"On a trained vocoder that looks ten patches ahead: {NOT_MEASURED}.\n"
        return
    # Several parts of one study have the same date.
    newest = [path for path in files if path.name[:10] == files[-1].name[:10]]
    parts = [Entry(json.loads(x.read_text(encoding="utf-8")), file=x.name) for x in newest]
    rows: Rows = [row for part in parts for row in part["rows"]]
    yield ABOUT
    kinds = "SNR, dB", "mel, dB"
    heads = (f"{kind}: {place}" for kind in kinds for place in PLACES.values())
    shown = (_row(group) for group in _settings(rows))
    yield table(("norm statistics", "look-ahead", *heads), shown) + "\n"
    heads = ("norm statistics", "look-ahead", "words wrong", "sentences heard unlike one-shot's")
    heard = [row for row in rows if "words" in row and row["lookahead"] is not None]
    yield table(heads, map(_heard, _settings(heard))) + "\n"
    whole = ([r for r in rows if r["statistics"] == name] for name in ("recording", "one-shot"))
    yield "Of the recordings {} words are wrong, of one-shot decoding {}.\n".format(
        *map(_words, whole)
    )
    yield sources(parts) + "\n"


def _settings(rows: Rows) -> Iterator[Rows]:
    """The rows of all voices for each kind of statistics and look-ahead."""
    keys = {(r["statistics"], r["lookahead"]): None for r in rows if r["lookahead"] is not None}
    for key in keys:
        yield [r for r in rows if (r["statistics"], r["lookahead"]) == key]


def _row(group: Rows) -> list[str]:
    """Means, and the worst reply's in brackets."""
    cells = [group[0]["statistics"], str(group[0]["lookahead"])]
    for field, worst, digits in (("snr_db", min, 1), ("mel_db", max, 2)):
        for place in PLACES:
            mean = statistics.fmean(row[place][field]["mean"] for row in group)
            least = worst(row[place][field]["worst"] for row in group)
            cells.append(f"{mean:.{digits}f} ({least:.{digits}f})")
    return cells


def _heard(group: Rows) -> list[str]:
    unlike = f"{sum(row['unlike'] for row in group)} of {sum(row['sentences'] for row in group)}"
    return [group[0]["statistics"], str(group[0]["lookahead"]), _words(group), unlike]


def _words(rows: Rows) -> str:
    wrong, every = (sum(row[field] for row in rows) for field in ("words_wrong", "words"))
    return f"{wrong} of {every}"
