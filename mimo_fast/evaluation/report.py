"""What an evaluation found: a table, OUT/report.md and OUT/report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mimo_fast.audio.paths import write_whole
from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.evaluation.items import Answer, Published
from mimo_fast.evaluation.plugins import SELF
from mimo_fast.evaluation.run import Asked, Evaluation, Measured, part_of
from mimo_fast.json_files import cut

REPORT = "report"

RELEASED = (
    "runtime: the released one's, which MiMo-Audio-Eval's differs from (--as-evaluated reproduces "
    "it)"
)
EVALUATED = "runtime: as MiMo-Audio-Eval's (--as-evaluated)"

Row = tuple[str, str, str, str]
HEAD: Row = ("figure", "here", "of", "published")


def report_of(
    evaluation: Evaluation, tools: Mapping[str, str], device: Any, limit: int | None = None
) -> dict[str, Any]:
    """Everything that is known of an evaluation, as JSON values.

    Args:
        tools: what plug-ins were given as, by kind.
        limit: items of the set that were asked for; None for all.
    """
    asked, answers = evaluation.asked, evaluation.answers
    used = {name for each in evaluation.measured for name in each.measure.needs}
    errors = [answer for answer in answers if answer.error is not None]
    return {
        "title": asked.set.title,
        **evaluation.about,
        "normaliser": asked.options.normaliser,
        "runtime": EVALUATED if asked.as_evaluated else RELEASED,
        "tools": {kind: name for kind, name in tools.items() if kind in used},
        "limit": limit,
        "answers": len(answers),
        "errors": [{"id": each.item.id, "error": each.error} for each in errors],
        "seconds": round(sum(answer.seconds for answer in answers), 2),
        "figures": _figures(asked, evaluation.measured),
        "groups": {
            group: {
                value: _figures(asked, [part_of(each, part) for each in evaluation.measured], group)
                for value, part in parts.items()
            }
            for group, parts in _groups(answers).items()
        },
        "not_measured": [
            {"measure": each.measure.name, "needs": sorted(each.missing)}
            for each in evaluation.measured
            if each.missing
        ],
        "failed": {
            each.measure.name: [*each.failed] for each in evaluation.measured if each.failed
        },
        "environment": environment(device),
    }


def _figures(
    asked: Asked, measured: Sequence[Measured], group: str | None = None
) -> dict[str, dict[str, Any]]:
    """Figures by name, each with what is published for the whole of the split."""
    found = dict[str, dict[str, Any]]()
    for each in measured:
        if not each.found:
            continue
        for name, figure in each.measure.figures(each.found).items():
            found[name] = asdict(figure)
            if group is None:
                found[name]["published"] = [asdict(one) for one in _published(asked, name)]
    return found


def _published(asked: Asked, figure: str) -> list[Published]:
    """Scores of the same figure, split and way of asking."""
    return [
        each
        for each in asked.set.published
        if each.figure == figure
        and each.split in (None, asked.split)
        and (each.options is None or _same(each, asked))
    ]


def _same(published: Published, asked: Asked) -> bool:
    assert published.options is not None
    names = "shots", "thinking", "mode"
    ours, theirs = asked.options, published.options
    mode = ours.mode or (asked.set.modes[0] if asked.set.modes else None)
    values = {"shots": ours.shots, "thinking": ours.thinking, "mode": mode}
    return all(getattr(theirs, name) in (values[name], None) for name in names)


def _groups(answers: Sequence[Answer]) -> dict[str, dict[str, list[Answer]]]:
    """Answers by group and value, in the order in which they first come."""
    found = dict[str, dict[str, list[Answer]]]()
    for answer in answers:
        for group, value in answer.item.groups.items():
            found.setdefault(group, {}).setdefault(value, []).append(answer)
    return found


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Rows of the table, without its head."""
    rows = [_row(name, figure) for name, figure in report["figures"].items()]
    for each in report["not_measured"]:
        options = " and ".join(f"--{name}" for name in each["needs"])
        rows.append((each["measure"], f"not measured: give {options}", "", ""))
    for parts in report["groups"].values():
        for value, figures in parts.items():
            rows += [_row(f"  {value}: {name}", figure) for name, figure in figures.items()]
    return rows


def _row(name: str, figure: Mapping[str, Any]) -> Row:
    published = "; ".join(
        f"{_shown(each['value'], figure['unit'])} {each['model']} ({each['source']})"
        for each in figure.get("published", ())
    )
    return name, _shown(figure["value"], figure["unit"]), str(figure["count"]), published


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2f}%" if unit == "%" else f"{value:.3f}{' ' if unit else ''}{unit}"


def remarks_of(report: Mapping[str, Any]) -> list[str]:
    """What is to be known beside the table, a line each."""
    first = "the first " if report["limit"] else ""
    remarks = [f"{report['title']}, {report['split']}: {first}{report['answers']} items"]
    format_ = report["format"] or f"the checkpoint's own, {report['dtype']}"
    limit = report["max_new_tokens"]
    remarks.append(
        f"weights: {format_}; seed {report['seed']}"
        + (", upstream's samplers" if report["sampled"] else "")
        + (f", at most {limit} groups a reply" if limit else "")
    )
    remarks.append(report["runtime"])
    if not any(figure["published"] for figure in report["figures"].values()):
        remarks.append("no published score is known of this split, asked so")
    if report["tools"].get("recogniser") == SELF:
        remarks.append("words heard: by the model itself, which is no independent recogniser")
    if failed := report["errors"]:
        first = f"{failed[0]['id']}: {cut(failed[0]['error'], 120)}"
        remarks.append(f"{len(failed)} items failed and count as wrong, the first: {first}")
    for measure, errors in report["failed"].items():
        remarks.append(
            f"{measure}: {len(errors)} answers were not measured, the first: "
            f"{cut(errors[0], 120)}; the same command tries them again"
        )
    for name, figure in report["figures"].items():
        if figure["note"]:
            remarks.append(f"{name}: {figure['note']}")
    return remarks


def table_of(report: Mapping[str, Any]) -> str:
    """The table and its remarks, for a terminal."""
    rows = [HEAD, *rows_of(report)]
    widths = [max(len(row[place]) for row in rows if row[2] or not place) for place in range(3)]
    lines = [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    ]
    return "\n".join([*lines, "", *remarks_of(report)])


def markdown_of(report: Mapping[str, Any]) -> str:
    """report.md."""
    rows = [HEAD, ("---", "--:", "--:", "---"), *rows_of(report)]
    table = ["| " + " | ".join(each.strip() for each in row) + " |" for row in rows]
    where = report["environment"]
    about = [
        f"model {report['model']}, codec {report['codec']}, task {report['task']}",
        *(f"{kind}: {name}" for kind, name in report["tools"].items()),
        f"{where['date']}, {where['device']['name']}, mimo-fast {where['packages']['mimo-fast']}",
    ]
    remarks = [f"- {each}" for each in (*remarks_of(report), *about)]
    title = f"# {report['title']}, {report['split']}"
    return "\n".join([title, "", *table, "", *remarks]) + "\n"


def write_report(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """Writes report.json and report.md; returns their paths."""
    paths = [folder / f"{REPORT}.json", folder / f"{REPORT}.md"]
    write_json(paths[0], report)
    write_whole(paths[1], markdown_of(report).encode())
    return paths
