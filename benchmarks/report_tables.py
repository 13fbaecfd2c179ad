"""The tables of docs/performance.md, each of its records alone: Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.measured import Entry, Measured, sources
from benchmarks.projection import (
    CARDS,
    FORMATS,
    POSITIONS,
    SEQUENCE,
    Basis,
    basis,
    card_of,
    project,
)
from benchmarks.records import duration
from mimo_fast.runtime.memory import GB

NOT_MEASURED = "not measured yet"
CONTEXT = 256
"""Groups of context of the steady state in the first table, or what has been measured nearest to
it."""

TOP, NAME_WIDTH = 12, 60
"""Kernels of a profile that are shown, and letters of their names."""

Row = Sequence[str]


def table(columns: Row, rows: Iterable[Row], texts: int = 1) -> str:
    """Markdown; the first `texts` columns are aligned to the left."""
    marks = [":--" if i < texts else "--:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, marks, *rows))


def shown(value: float | None, scale: float = 1.0, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{scale * value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def median(entry: Entry, field: str) -> float | None:
    return entry[field] and entry[field]["p50"]


def expected(measured: Measured, device: str | None) -> tuple[list[Row], list[Entry]]:
    """What a reader wants to know of the published dimensions on a device; None: of one that is not
    there."""
    rows, used = [], []
    for quantization in FORMATS:

        def ours(entry: Entry, quantization: str = quantization) -> bool:
            name = (
                f"{entry.get('preset')} {entry['quantization']}"
                if entry["kind"] == "quick"
                else entry.title
            )
            return name == f"7b {quantization}"

        def single(entry: Entry, ours: Callable[[Entry], bool] = ours) -> bool:
            return ours(entry) and entry["batch"] == 1

        found = (
            {}
            if device is None
            else {
                "groups": measured.find("groups", device, single),
                "spoken": measured.find(
                    "request", device, lambda e: single(e) and e["audio_ttfp"] is not None
                ),
                "many": measured.find("request", device, lambda e: ours(e) and e["task"] == "tts"),
                "quick": measured.find("quick", device, ours),
            }
        )
        rows.append((f"7b {quantization}", *_cells(found, used)))
    return rows, used


def _cells(found: dict[str, list[Entry]], used: list[Entry]) -> Row:
    """Milliseconds of a group, its share of the floor, real-time factor, first audio, streams,
    memory."""
    groups = min(
        found.get("groups", []),
        key=lambda e: abs(e["prompt_groups"] + e["groups"] - CONTEXT),
        default=None,
    )
    spoken = max(found.get("spoken", []), key=lambda e: (e["task"] == "tts", e.date), default=None)
    streams = [
        (row["streams"], row["metrics"]["audio_rtf"])
        for e in found.get("quick", [])
        for row in e["rows"]
    ]
    streams += [(e["batch"], e["audio_rtf"]) for e in found.get("many", [])]
    used += (
        [e for e in (groups, spoken) if e is not None]
        + found.get("quick", [])
        + found.get("many", [])
    )
    cells = [NOT_MEASURED] * 6
    if groups is not None:
        context = groups["prompt_groups"] + groups["groups"]
        cells[:3] = (
            f"{shown(median(groups, 'audio_group'), 1e3, 2)} ms at {context} of context",
            share(groups["of_floor"]["audio_group"]),
            f"{groups['audio_rtf']:.3f}",
        )
    if spoken is not None:
        cells[3] = shown(median(spoken, "audio_ttfp"), 1e3, 0, " ms")
        cells[5] = shown(spoken["peak_bytes"], 1 / GB, 2, " GB")
    known = [(count, factor) for count, factor in streams if factor is not None]
    if known:
        carried = max((count for count, factor in known if factor < 1), default=0)
        cells[4] = f"{carried}{' or more' if carried == max(count for count, _ in known) else ''}"
    return cells


EXPECTED_COLUMNS = (
    "weights",
    "an audio group (160 ms of speech)",
    "of the floor",
    "real-time factor",
    "first audio",
    "streams in real time",
    "peak memory",
)


def groups_table(entries: Sequence[Entry]) -> str:
    columns = (
        "model",
        "batch",
        "context",
        "prompt",
        "of floor",
        "group of words",
        "of floor",
        "group of speech",
        "of floor",
        "p90",
        "real-time factor",
    )
    ordered = sorted(entries, key=lambda e: (e.title, e["batch"], e["prompt_groups"]))
    return table(
        columns,
        (
            (
                e.title,
                str(e["batch"]),
                str(e["prompt_groups"] + e["groups"]),
                duration(e["prefill"]),
                share(e["of_floor"]["prefill"]),
                duration(e["text_group"]["p50"]),
                share(e["of_floor"]["text_group"]),
                duration(e["audio_group"]["p50"]),
                share(e["of_floor"]["audio_group"]),
                duration(e["audio_group"]["p90"]),
                f"{e['audio_rtf']:.3f}",
            )
            for e in ordered
        ),
    )


def requests_table(entries: Sequence[Entry]) -> str:
    columns = (
        "model",
        "task",
        "batch",
        "prompt",
        "ttft",
        "audio_ttfp",
        "itl p50",
        "p95",
        "p99",
        "underrun",
        "continuity",
        "e2el",
        "audio_rtf",
        "audio_rtfx",
        "of floor",
        "peak memory",
        "energy",
    )
    ordered = sorted(entries, key=lambda e: (e.title, e["task"], e["batch"], e["prompt_groups"]))
    return table(
        columns,
        (
            (
                e.title,
                e["task"],
                str(e["batch"]),
                str(e["prompt_groups"]),
                *(shown(median(e, name), 1e3, 1, " ms") for name in ("ttft", "audio_ttfp")),
                *(
                    shown(e["itl"] and e["itl"][name], 1e3, 1, " ms")
                    for name in ("p50", "p95", "p99")
                ),
                shown(e["audio_underrun"], 1e3, 0, " ms"),
                share(e["audio_continuity"]),
                shown(median(e, "e2el"), 1, 2, " s"),
                shown(e["audio_rtf"], 1, 3),
                shown(e["audio_rtfx"], 1, 2),
                share(e["of_floor"]),
                shown(e["peak_bytes"], 1 / GB, 2, " GB"),
                shown(e["joules"], 1, 1, " J"),
            )
            for e in ordered
        ),
        texts=2,
    )


def quick_table(entries: Sequence[Entry]) -> str:
    columns = (
        "model",
        "streams",
        "real-time factor",
        "first audio",
        "next chunk, p95",
        "worst silence",
        "memory",
    )
    return table(
        columns,
        (
            (
                f"{entry.get('preset')} {entry.get('quantization') or entry['dtype']}"
                if entry.get("preset")
                else entry.title,
                str(row["streams"]),
                shown(row["metrics"]["audio_rtf"], 1, 3),
                shown(
                    row["metrics"]["audio_ttfp"] and row["metrics"]["audio_ttfp"]["p50"],
                    1e3,
                    0,
                    " ms",
                ),
                shown(row["metrics"]["itl"] and row["metrics"]["itl"]["p95"], 1e3, 0, " ms"),
                shown(row["metrics"]["audio_underrun"], 1e3, 0, " ms"),
                shown(row["metrics"]["peak_bytes"], 1 / GB, 2, " GB"),
            )
            for entry in entries
            for row in entry["rows"]
        ),
    )


def baselines_table(entries: Sequence[Entry]) -> str:
    columns = (
        "provider",
        "model",
        "prompt",
        "group of words",
        "group of speech",
        "of floor",
        "ttft",
        "audio_ttfp",
        "e2el",
        "audio_rtf",
    )
    ordered = sorted(entries, key=lambda e: (e.title, e["provider"] != "ours", e["provider"]))
    return table(
        columns,
        (
            (
                e["provider"],
                e.title,
                duration(e["prefill"]),
                duration(e["text_group"]["p50"]),
                duration(e["audio_group"]["p50"]),
                share(e["of_floor"]),
                shown(median(e, "ttft"), 1e3, 1, " ms"),
                shown(median(e, "audio_ttfp"), 1, 3, " s"),
                shown(median(e, "e2el"), 1, 3, " s"),
                shown(e["audio_rtf"], 1, 3),
            )
            for e in ordered
        ),
        texts=2,
    )


def ops_table(entries: Sequence[Entry]) -> str:
    columns = (
        "op",
        "provider",
        "format",
        "shape",
        "p50",
        "p10",
        "p90",
        "GB/s",
        "GFLOP/s",
        "bound by",
        "achieved / ceiling",
    )
    return table(
        columns,
        (
            (
                e["op"],
                e["provider"],
                e["format"],
                e["shape"],
                *(duration(e["seconds"][q]) for q in ("p50", "p10", "p90")),
                shown(e["bytes"] / e["seconds"]["p50"], 1e-9),
                shown(e["flop"] / e["seconds"]["p50"], 1e-9),
                e["bound"],
                share(e["of_ceiling"]),
            )
            for e in entries
        ),
        texts=4,
    )


def profile_table(entries: Sequence[Entry]) -> str:
    """The costliest kernels of each mode, and all together."""
    rows = []
    for e in entries:
        total = e["kernel_seconds"]
        rows.append(
            (
                e.title,
                e["mode"],
                "**all**",
                f"{e['kernels_a_group']:g}",
                duration(total),
                share(1.0),
            )
        )
        rows += [
            (
                e.title,
                e["mode"],
                f"`{kernel['name'].replace('|', ' ')[:NAME_WIDTH]}`",
                f"{kernel['count']:g}",
                duration(kernel["seconds"]),
                share(kernel["seconds"] / total),
            )
            for kernel in sorted(e["kernels"], key=lambda kernel: -kernel["seconds"])[:TOP]
        ]
    return table(("model", "mode", "kernel", "an audio group", "busy", "share"), rows, texts=3)


def quality_table(entries: Sequence[Entry]) -> str:
    columns = ("model", "format", "head", "KL (nats)", "top-1 agreement", "predictions")
    return table(
        columns,
        (
            (
                str(e["model"]),
                name,
                "text" if i == 0 else f"codebook {i - 1}",
                f"{head['kl']:.5f}",
                share(head["agreement"]),
                str(head["predictions"]),
            )
            for e in entries
            for name, heads in e["formats"].items()
            for i, head in enumerate(heads)
        ),
        texts=3,
    )


def compare_table(entries: Sequence[Entry]) -> str:
    columns = ("op", "old", "new", "new / old", "99% interval", "verdict")
    return table(
        columns,
        (
            (
                e["case"],
                e["old"],
                e["new"],
                f"{e['ratio']:.3f}",
                f"{e['low']:.3f} to {e['high']:.3f}",
                e["verdict"],
            )
            for e in entries
        ),
        texts=3,
    )


def projection_section(measured: Measured) -> str:
    """A table of all cards and formats, with the measured card beside each projection."""
    known = {name: basis(measured, name) for name in FORMATS}
    rows = []
    for name in FORMATS:
        found = known[name]
        for card in CARDS:
            if found is not None and card_of(found.profile.device) == card:
                continue
            got = project(card, name, found)
            fits = f"{'yes' if got.fits else 'no'}: {got.needed / GB:.1f} of {card.gb} GB"
            projected = (
                f"projection: {NOT_MEASURED}"
                if got.seconds is None
                else f"projection: {duration(got.seconds)}"
            )
            beside = "-" if found is None else f"{found.profile.device}: {duration(found.seconds)}"
            rows.append(
                (
                    card.name,
                    name,
                    f"{card.gb_per_s:,} GB/s",
                    f"{card.cache_mb} MB",
                    fits,
                    f"floor: {duration(got.floor)}",
                    projected,
                    beside,
                )
            )
    columns = (
        "card",
        "weights",
        "published bandwidth",
        "L2",
        f"fits with {SEQUENCE} of context",
        "floor",
        f"an audio group, batch 1, {POSITIONS} of context",
        "measured beside it",
    )
    bases = [_basis(name, found) for name, found in known.items() if found is not None]
    cited = "; ".join(dict.fromkeys(card.source for card in CARDS))
    return "\n\n".join(
        [
            table(columns, rows, 2),
            *bases,
            f"Bandwidth, memory and L2 of the cards: {cited}, and the architectures' white papers.",
        ]
    )


def _basis(name: str, found: Basis) -> str:
    figures = (
        f"{name}: reads reach {share(found.share)} of the published bandwidth; {found.kernels:,.0f} kernels a group "
        f"take {duration(found.latency)} each beyond their bytes. "
    )
    return figures + sources([found.profile])
