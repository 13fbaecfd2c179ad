"""Takes a file that somebody shared into the results: checks it, and gives it its name.

    python -m benchmarks add FILE.json      benchmarks/results/community/DATE-MACHINE-MODEL.json
    python -m benchmarks --report           then shows it under "Machines of others"

The file is what `mimo-fast bench --json` writes. Whatever else is in it, a figure that cannot be,
and a run that is there already are refused. No check tells whether somebody made figures up: the
report says that they are submitted.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.columns import factor, gigabytes, share, table, whole_ms
from benchmarks.records import RESULTS, Entry, slug
from mimo_fast.bench.advice import dense_name
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.command import STREAMS, Row
from mimo_fast.bench.environment import CARD, PACKAGES
from mimo_fast.bench.pipeline import Metrics, Spread
from mimo_fast.bench.shared import PRIVATE_METRICS, SCHEMA
from mimo_fast.checkpoint.embedded import NAME, PUBLISHED_BASE, PUBLISHED_MODEL
from mimo_fast.json_files import read_json, shown

FOLDER = "community"

BEGAN = "2026-11-22"
"""The day of the project's first measurement."""

FASTEST = 2.0
"""Times as fast as its floor that a request may seem: the bandwidth of a busy machine is low."""

PUBLIC = (NAME, PUBLISHED_MODEL, PUBLISHED_BASE)

CONTRIBUTE = (
    "`mimo-fast bench --json FILE` writes such a file, without names and paths of yours, and "
    "[CONTRIBUTING.md](../CONTRIBUTING.md) says where to send it."
)

SUBMITTED = (
    "Submitted by those who have the machines, and checked for their form and for figures that "
    "cannot be: *not measured by the project*. "
)

COLUMNS = (
    "machine",
    "model",
    "streams in real time",
    "real-time factor of one",
    "of floor",
    "first audio of one",
    "memory of one",
    "mimo-fast",
    "day",
    "file",
)

Check = Callable[[Any], bool]
"""Whether a JSON value is what a field may hold."""


def number(least: float, most: float) -> Check:
    """Numbers within bounds; NaN is none."""
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and least <= x <= most


def text(pattern: str) -> Check:
    """Strings that match as a whole."""
    return lambda x: isinstance(x, str) and re.fullmatch(pattern, x, re.ASCII) is not None


def one_of(*values: Any) -> Check:
    return lambda x: any(type(x) is type(value) and x == value for value in values)


def or_none(check: Check) -> Check:
    return lambda x: x is None or check(x)


def known(named: Mapping[str, Check], optional: bool = False) -> Check:
    """Objects of these fields and no others: of all of them, or of any where they are optional."""

    def right(x: Any) -> bool:
        if not isinstance(x, dict) or x.keys() - named.keys():
            return False
        present = optional or x.keys() == named.keys()
        return present and all(named[key](value) for key, value in x.items())

    return right


def many(check: Check, least: int, most: int) -> Check:
    """Lists of so many values."""
    return lambda x: isinstance(x, list) and least <= len(x) <= most and all(map(check, x))


SECONDS, COUNT = number(0, 1e5), number(0, 1e7)
BYTES_A_SECOND, FLOP_A_SECOND = number(1e8, 1e14), number(1e8, 1e17)
VERSION = text(r"[\w.+-]{1,40}")
NAME_OF_DEVICE = text(r"[\w ()@.,+/-]{1,80}")
"""Characters of processors' and cards' names; none of them is Markdown's or begins a tag."""

SENTENCE = text(r"[\w ,.;:%()'/@+-]{1,800}")

FIGURES = {field.name: SECONDS for field in fields(Metrics) if field.name not in PRIVATE_METRICS}
SPREAD = known({field.name: number(0, 1e5) for field in fields(Spread)})
METRICS = FIGURES | {
    "task": one_of("tts"),
    "batch": COUNT,
    "requests": COUNT,
    "prompt_groups": number(1, 1e6),
    "text_groups": COUNT,
    "audio_groups": COUNT,
    **dict.fromkeys(("ttft", "audio_ttfp", "itl", "e2el"), or_none(SPREAD)),
    "audio_rtf": or_none(number(1e-5, 1e5)),
    "audio_rtfx": or_none(number(1e-5, 1e5)),
    "audio_underrun": or_none(SECONDS),
    "audio_continuity": or_none(number(0, 1)),
    "peak_bytes": number(1e6, 1e13),
    "joules": or_none(number(0, 1e8)),
    "joules_source": or_none(SENTENCE),
}

DEVICE = {
    "type": one_of("cpu", "cuda"),
    "name": NAME_OF_DEVICE,
    "cores": number(1, 4096),
    "instructions": VERSION,
    "capability": text(r"sm_\d{2,4}"),
    "memory": number(1e8, 1e13),
    "multiprocessors": number(1, 4096),
    "cuda": or_none(VERSION),
    **dict.fromkeys(CARD[1:], text(r"[\w .\[\]/-]{1,40}")),
}

ENVIRONMENT = {
    "date": text(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"),
    "device": known(DEVICE, optional=True),
    "packages": known(dict.fromkeys(("mimo-fast", *PACKAGES), VERSION), optional=True),
    "python": VERSION,
    "os": text(r"[\w ]{1,40}"),
    "load": or_none(many(number(0, 1e5), 3, 3)),
    "threads": number(1, 4096),
    "commit": or_none(text(r"[0-9a-f]{40}")),
    "dirty": or_none(one_of(True, False)),
}

CEILING = {
    "read_Bps": BYTES_A_SECOND,
    "copy_Bps": BYTES_A_SECOND,
    "flops": known(dict.fromkeys(("float32", "float16", "bfloat16"), FLOP_A_SECOND), optional=True),
    "integers": or_none(FLOP_A_SECOND),
}
assert CEILING.keys() == {field.name for field in fields(Ceiling)}

ROW = {"streams": one_of(*STREAMS), "metrics": known(METRICS), "floor": number(1e-6, 1e5)}
assert ROW.keys() == {field.name for field in fields(Row)}

RECORD: dict[str, Check] = {
    "schema": one_of(SCHEMA),
    "kind": one_of("quick"),
    "command": text(r"mimo-fast bench[\w .:/-]{0,300}"),
    "environment": known(ENVIRONMENT),
    "model": SENTENCE,
    "preset": one_of("7b", "tiny", None),
    "quantization": one_of("int8", "int4", "nf4", None),
    "ceiling": known(CEILING),
    "dtype": one_of("bfloat16", "float16", "float32"),
    "of_integer_peak": lambda x: (
        isinstance(x, dict)
        and all(text(r"\d{1,5}")(key) and number(0, 10)(value) for key, value in x.items())
    ),
    "streams": one_of(0, *STREAMS),
    "line": SENTENCE,
    "rows": many(known(ROW), 1, len(STREAMS)),
}


def check(record: Mapping[str, Any], today: datetime | None = None) -> None:
    """Whether a record may be taken in.

    Raises:
        ValueError: one line that says what is wrong with it.
    """
    if record.get("schema") != SCHEMA:
        wrote = f"`mimo-fast bench --json` of this version writes schema {SCHEMA}"
        raise ValueError(f"it has schema {shown(record.get('schema'))}: {wrote}")
    for field in (*RECORD, *record):
        _demand(field in RECORD, f"it has a field of another kind, {shown(field)}")
        _demand(field in record, f"it lacks {field}")
        _demand(RECORD[field](record[field]), f"its {field} cannot be: {shown(record[field])}")
    _check_machine(record["environment"], today or datetime.now(UTC))
    _demand(
        record["preset"] == "7b" or record["model"] in PUBLIC,
        f"its model can be compared with nothing: measure the published dimensions, or {NAME} "
        f"(mimo-fast bench --model {NAME})",
    )
    rows = record["rows"]
    _demand(
        rows[0]["streams"] == 1
        and all(one["streams"] < other["streams"] for one, other in pairwise(rows)),
        "its rows are not of one stream and then of more",
    )
    for row in rows:
        _check_row(row)
    carried = (r["streams"] for r in rows if (r["metrics"]["audio_rtf"] or 1) < 1)
    most = max(carried, default=0)
    _demand(record["streams"] == most, f"its rows carry {most} streams, not {record['streams']}")


def _demand(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(wrong)


def _check_machine(environment: Mapping[str, Any], now: datetime) -> None:
    device = environment["device"]
    wanted = {"cpu": ("name", "cores", "instructions"), "cuda": ("name", "capability", "memory")}
    for field in wanted.get(device.get("type"), ("type",)):
        _demand(field in device, f"its device lacks {field}")
    _demand("mimo-fast" in environment["packages"], "it lacks the version of mimo-fast")
    try:
        date = datetime.fromisoformat(environment["date"])
    except ValueError as error:
        raise ValueError(f"its date cannot be: {error}") from None
    began = datetime.fromisoformat(f"{BEGAN}T00:00:00+00:00")
    _demand(began <= date <= now + timedelta(days=1), f"its date cannot be: {date.date()}")


def _check_row(row: Mapping[str, Any]) -> None:
    """Figures of a row that contradict each other."""
    streams, found = row["streams"], row["metrics"]
    where = f"of {streams} streams"
    same = found["batch"] == found["requests"] == streams
    _demand(same, f"its metrics {where} are of {found['batch']}")
    for name, spread in found.items():
        if isinstance(spread, dict):
            ordered = spread["p50"] <= spread["p95"] <= spread["p99"]
            _demand(ordered, f"its percentiles of {name} {where} are out of order")
    _demand(found["e2el"] is not None, f"its requests {where} did not end")
    took = found["e2el"]["p50"]
    _demand(took <= found["wall"] * 1.01, f"its requests {where} took longer than all of them")
    _demand(
        row["floor"] <= FASTEST * took,
        f"its requests {where} are faster than the machine reads: {took:.3g} s, and at least "
        f"{row['floor']:.3g} s by its bandwidth",
    )
    if (rtf := found["audio_rtf"]) is not None:
        wanted = took * streams / found["audio_seconds"] if found["audio_seconds"] else 0.0
        near = abs(rtf - wanted) <= 0.01 * wanted
        _demand(near, f"its real-time factor {where} is {rtf:.3g}, and its times make {wanted:.3g}")


def entries(results: Path) -> list[Entry]:
    """The submitted records, each checked.

    Raises:
        ValueError: one is not what `add` would take.
    """
    found = []
    for path in sorted((results / FOLDER).glob("*.json")):
        record = read_json(path)
        try:
            check(record)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        found.append(Entry(record, file=f"{FOLDER}/{path.name}"))
    return found


def titled(entry: Mapping[str, Any]) -> str:
    """The model and the format of its weights, in a few words."""
    model = entry["preset"] or Path(entry["model"]).name
    form = entry["quantization"]
    return f"{model} {form or dense_name(entry['dtype'])}"


def add(path: Path, results: Path = RESULTS) -> Path:
    """Copies a file into the results under its name there.

    Raises:
        ValueError: it is not what `mimo-fast bench --json` writes, or it is there already.
    """
    record = read_json(path)
    check(record)
    others = entries(results)
    for other in others:
        if (other["rows"], other["ceiling"]) == (record["rows"], record["ceiling"]):
            raise ValueError(f"{path.name} is there already: {other['file']}")
    entry = Entry(record)
    name = f"{entry.date[:10]}-{slug(entry.device)}-{slug(titled(entry))}"
    folder = results / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names = (name, *(f"{name}-{i}" for i in range(2, len(others) + 3)))
    target = next(free for each in names if not (free := folder / f"{each}.json").exists())
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target


def section(results: Path) -> Iterator[str]:
    """The report's section of submitted files."""
    yield "## Machines of others\n"
    found = sorted(entries(results), key=lambda e: (not e.on_gpu, e.device, titled(e), e.date))
    if not found:
        yield f"None has been submitted yet: {CONTRIBUTE}\n"
        return
    yield SUBMITTED + CONTRIBUTE + "\n"
    yield table(COLUMNS, map(_cells, found), 2) + "\n"


def _cells(entry: Entry) -> Iterator[str]:
    row = Entry(entry["rows"][0])
    more = " or more" if entry["streams"] == entry["rows"][-1]["streams"] else ""
    yield from (entry.device, titled(entry), f"{entry['streams']}{more}")
    yield factor(row.at("metrics.audio_rtf"))
    yield share(row["floor"] / row.at("metrics.e2el.p50"))
    yield whole_ms(row.at("metrics.audio_ttfp.p50"))
    yield gigabytes(row.at("metrics.peak_bytes"))
    yield from (entry["environment"]["packages"]["mimo-fast"], entry.date[:10], entry.link)


def add_options(add_option: Callable[..., object]) -> None:
    add_option("file", type=Path, metavar="FILE.json", help="of `mimo-fast bench --json`")
    add_option("--results", type=Path, default=RESULTS, metavar="DIR", help="[benchmarks/results]")


def run(args: argparse.Namespace) -> int:
    target = add(args.file, args.results)
    print(f"{target}\nnow run python -m benchmarks --report, and commit both")
    return 0
