"""The report's section on many people at once, from the newest results of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.columns import shown, table, whole_ms
from benchmarks.load.people import carried
from benchmarks.records import NOT_MEASURED, Entry, read_records, sources

TITLE = "## Many people at once\n"

ABOUT = """\
`python -m benchmarks load`: seeded people, nano, as many slots as streams. *listeners* hear reply \
after reply in real time, with two seconds of buffer; *closed* loops read as fast as they can. A \
stream is carried if it is heard 99.9% of the time; a gap is any silence within a reply, or more \
than two seconds before it. *Of ceiling*: the arithmetic of groups, prompts and audio over that of \
a matrix product on all cores in the same run. Load is the machine's load average, of which the \
measurement itself is a part: other work on it lowers every figure, but for groups a second of a \
busy core.
"""

SIMULATED = """\
Simulated ([simulation.py](../benchmarks/load/simulation.py)): the engine's policy with a table of \
step times. *long*: every listener hears replies of 1,000 groups; *talk*: replies of one to six \
sentences. Keys and values are int8. No row of this table was measured as a whole; what of it is \
measured and what is predicted stands below it.
"""

HEADS = (
    *("kind", "streams", "carried", "continuity", "gaps", "first audio p50", "p95", "p99"),
    *("groups/s", "of ceiling", "cores busy", "groups/s a core", "memory", "load"),
)


def section(results: Path) -> Iterator[str]:
    yield TITLE
    found = [
        Entry(json.loads(path.read_text(encoding="utf-8")), file=path.name)
        for path in sorted(results.glob("*-load*.json"))
    ]
    # Those of `make bench` are lines of its file.
    found += [
        Entry(each, file=path.name)
        for path in sorted(results.glob("*.jsonl"))
        for each in read_records(path)
        if each["kind"] == "load"
    ]
    measured = sorted((each for each in found if each["kind"] == "load"), key=lambda e: e.date)
    if not measured:
        yield f"Streams carried, first audio and groups a second: {NOT_MEASURED}.\n"
    else:
        yield ABOUT
        for each in _newest(measured):
            yield from _measured(each)
    simulated = [each for each in found if each["kind"] == "load simulation"]
    published = [each for each in simulated if each.get("published")]
    if published:
        yield from _published(published[-1])
    else:
        yield f"Simulated for the published dimensions: {NOT_MEASURED}.\n"
    checked = [each for each in simulated if each.get("check")]
    if checked:
        yield from _checked(checked[-1])
    else:
        yield f"The simulation beside the real engine: {NOT_MEASURED}.\n"


def _newest(entries: list[Entry]) -> list[Entry]:
    """The last of each target and profile, of comparisons and of single sides."""
    kinds: dict[Any, Entry] = {}
    for each in entries:
        of = frozenset((p["target"], p["profile"]) for p in each["points"])
        kinds[of, each["compared_with"] is not None] = each
    return list(kinds.values())


def _measured(entry: Entry) -> Iterator[str]:
    points = entry["points"]
    names = {each["side"] for each in points}
    heads = ("side", *HEADS) if len(names) > 1 else HEADS
    rows = (
        [*([p["side"]] if len(names) > 1 else []), *_cells(p)]
        for p in sorted(points, key=lambda p: (p["profile"], p["streams"], p["side"]))
    )
    targets = {p["target"] for p in points}
    how = "`mimo-fast serve`" if "server" in targets else "the engine, by its Python API"
    compared = entry["compared_with"]
    yield f"**{how}**{f', beside {compared}' if compared else ''}\n"
    yield table(heads, rows, 2 if len(names) > 1 else 1) + "\n"
    for name, each in entry["most"].items():
        side = f"{name}: " if len(names) > 1 else ""
        yield (
            f"{side}{each['carried']} streams carried, {each['without_gap']} without a gap, of the "
            "numbers that were tried.\n"
        )
    for row in entry.get("pairs") or ():
        if row.get("groups_a_second_ratio"):
            first = row.get("first_audio_p95_ratio")
            yield (
                f"{row['profile']} {row['streams']}: groups a second now / before "
                f"{row['groups_a_second_ratio']:.2f}"
                + (f", first audio p95 {first:.2f}.\n" if first else ".\n")
            )
    yield sources([entry]) + "\n"


def _cells(point: dict[str, Any]) -> list[str]:
    first = point["first_audio"] or {}
    return [
        point["profile"],
        str(point["streams"]),
        "-" if point["profile"] == "closed" else ("yes" if carried(point) else "no"),
        *(
            ["-", "-"]
            if point["profile"] == "closed"
            else [shown(point["continuity"], 100, 2, "%"), str(point["gaps"])]
        ),
        *(whole_ms(first.get(name)) for name in ("p50", "p95", "p99")),
        shown(point["groups_a_second"], digits=0),
        shown(point.get("of_ceiling"), 100, 1, "%"),
        shown(point["cpus"], digits=2),
        shown(point["groups_a_second"] / max(point["cpus"], 1e-9), digits=0),
        shown(point["peak_bytes"], 1e-6, 0, " MB"),
        shown(point["load"], digits=1),
    ]


def _published(entry: Entry) -> Iterator[str]:
    yield SIMULATED
    heads = ("machine", "weights", "codec", "replies", "streams carried", "rows that fit")
    rows = []
    notes = dict[str, None]()
    for each in entry["published"]:
        fits = f"{each['memory']['streams']} of {each['memory']['groups']} groups"
        name = (each["card"], each["quantization"], each["codec"], each["replies"])
        rows.append([*name, str(each["carried"]), fits, each["limit"]])
        notes |= dict.fromkeys(each["sources"])
    yield table((*heads, "what limits it"), rows, 4) + "\n"
    yield "\n".join(f"- {note}" for note in sorted(notes)) + "\n"
    yield f"*{entry.link}*\n"


def _checked(entry: Entry) -> Iterator[str]:
    found = entry["check"]
    verdict = "agree" if found["agrees"] else "do not agree"
    yield (
        f"Beside the real engine with nano the simulation carries {found['carried']['simulated']} "
        f"streams where the engine carries {found['carried']['engine']}; within "
        f"{100 * found['within']:.0f}% they {verdict}.\n"
    )
    heads = ("kind", "streams", "groups/s, engine", "simulated", "simulated / engine")
    rows = (
        [
            row["profile"],
            str(row["streams"]),
            shown(row["engine"]["groups_a_second"], digits=0),
            shown(row["simulated"]["groups_a_second"], digits=0),
            f"{row['groups_ratio']:.3f}",
        ]
        for row in found["rows"]
    )
    yield table(heads, rows) + "\n"
    yield sources([entry]) + "\n"
