"""Hundreds of people simulated: the engine's policy with measured or predicted step times.

    python -m benchmarks simulate --published -o FILE.json   an H100, a 4090, eight H100s
    python -m benchmarks simulate --check -o FILE.json       beside the real engine with nano

`--check` measures what a step of so many rows takes by closed loops, simulates listeners with it,
and measures the same listeners with the real engine; closed loops of other numbers too, in turn
with the first in three rounds, so that what the machine does meanwhile is in both. It fails where
groups a second or the streams carried differ by more than a tenth (or by one stream).

`--published` takes groups of 1, 4 and 16 rows as they were measured on an H100 and predicts the
rest (`steps.py` says how); every result names what is measured and what is predicted. "long": each
listener hears replies of 1,000 groups; "talk": replies of one to six sentences, as long as nano's.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.compare import Side
from benchmarks.load.command import measured
from benchmarks.load.engine import Point
from benchmarks.load.people import Person, Turn, carried
from benchmarks.load.simulation import Patterns, Piece, Simulation, long_reply
from benchmarks.load.steps import StepTable, measured_table, published, streams_that_fit
from mimo_fast.bench.environment import ROOT, environment
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.checkpoint.folder import write_json

WITHIN = 0.1
ROUNDS = 3
CALIBRATED = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
"""Kernels take some numbers of rows better than their neighbours, so few points do not do."""

CLOSED = (5, 7, 11)
LISTENERS = (1, 2, 4, 6, 8, 12, 16)

LONG, PROMPT, WORDS = 1000, 100, 6
"""Groups of a long reply, of its prompt, and of the text before its speech."""

SENTENCE = (6, 12)
"""Groups of text and patches of a sentence, about nano's."""

STREAMS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256, 320, 384)

FIELDS = ("streams", "continuity", "gaps", "groups_a_second", "first_audio", "rows_a_step")


def spoken_patterns(found: dict[str, Any]) -> Patterns:
    """nano's own replies, from `engine.replies`."""
    pieces = {
        name: Piece(
            each["prompt"], tuple(each["samples"]), tuple(count > 0 for count in each["samples"])
        )
        for name, each in found["sentences"].items()
    }

    def patterns(turn: Turn, person: Person, index: int) -> Sequence[Piece]:
        chosen = [pieces[each] for each in turn.sentences]
        pause = found["pause"]
        return [
            *(
                replace(each, samples=(*each.samples[:-1], each.samples[-1] + pause))
                for each in chosen[:-1]
            ),
            chosen[-1],
        ]

    return patterns


def published_patterns(kind: str) -> Patterns:
    """Replies of the published dimensions; long ones are heard from anywhere on at first."""
    _, config = preset_configs("7b")

    @cache
    def reply(words: int, patches: int) -> Piece:
        return long_reply(PROMPT, words, patches, config, config.sample_rate)

    def patterns(turn: Turn, person: Person, index: int) -> Sequence[Piece]:
        if kind == "talk":
            return [reply(*(each * len(turn.sentences) for each in SENTENCE))]
        left = LONG - WORDS
        if index == 0:
            left = random.Random(f"{person.seed} {person.number} left").randint(1, left)
        return [replace(reply(WORDS, left), before=LONG - WORDS - left)]

    return patterns


def sweep(
    point: Point, table: StepTable, patterns: Patterns, streams: Sequence[int]
) -> list[dict[str, Any]]:
    """Points around the most streams that are carried, found by halves; ascending."""
    found = dict[int, dict[str, Any]]()

    def holds(count: int) -> bool:
        one = Simulation(replace(point, streams=count), table, patterns).run()
        found[count] = {name: one[name] for name in (*FIELDS, "errors")}
        return carried(one)

    low, high = 0, len(streams)
    if holds(streams[-1]):
        low = high
    while low < high:
        middle = (low + high) // 2
        if streams[middle] not in found and holds(streams[middle]):
            low = middle + 1
        else:
            high = middle
    return [found[count] for count in sorted(found)]


def most(
    points: Sequence[dict[str, Any]], holds: Callable[[dict[str, Any]], bool] = carried
) -> int:
    """The most streams before the first number that does not hold."""
    best = 0
    for each in points:
        if not holds(each):
            break
        best = each["streams"]
    return best


def published_results(seed: int) -> list[dict[str, Any]]:
    """Every card, format and codec, with both kinds of replies."""
    results = []
    for name, quantization, batched, kind in (
        ("H100", "int4", True, "long"),
        ("H100", "int4", False, "long"),
        ("H100", "int8", True, "long"),
        ("H100", "bf16", True, "long"),
        ("H100", "int4", True, "talk"),
        ("H100", "int4", False, "talk"),
        ("4090", "int4", True, "long"),
        ("4090", "int4", True, "talk"),
        ("8xH100", "int8", True, "long"),
    ):
        table, card = published(name, quantization, batched)
        context = LONG + PROMPT if kind == "long" else 256
        fits = streams_that_fit(card, quantization, context)
        allowed = [n for n in STREAMS if n <= fits["streams"]] or [max(fits["streams"], 1)]
        if fits["streams"] < STREAMS[-1]:
            allowed = sorted({*allowed, fits["streams"]})
        point = Point(1, seconds=20.0, ramp=5.0, seed=seed, model="7b", codec="7b")
        points = sweep(point, table, published_patterns(kind), allowed) if fits["streams"] else []
        best = most(points)
        result = {
            "card": card.name,
            "gpus": card.gpus,
            "quantization": quantization,
            "codec": "in batches" if batched else "one by one",
            "replies": kind,
            "memory": fits,
            "memory_bf16_cache": streams_that_fit(card, quantization, context, None),
            "points": points,
            "carried_a_gpu": best,
            "carried": best * card.gpus,
            "limit": _limit(points, best, allowed, fits),
            "sources": table.sources,
        }
        results.append(result)
        print(
            f"{card.name} {quantization}, codec {result['codec']}, {kind}: "
            f"{result['carried']} streams; {result['limit']}",
            flush=True,
        )
    return results


def _limit(
    points: Sequence[dict[str, Any]], best: int, allowed: Sequence[int], fits: dict[str, Any]
) -> str:
    """What keeps more streams from being carried."""
    if not fits["streams"]:
        return "the weights do not fit"
    if best == allowed[-1] and best < STREAMS[-1]:
        return f"memory: {fits['streams']} rows of {fits['groups']} groups fit"
    if best == STREAMS[-1]:
        return "the largest number that was simulated"
    more = next(each for each in points if each["streams"] > best)
    return f"time: {more['streams']} streams are heard {100 * (more['continuity'] or 0):.2f}% of it"


def check(args: argparse.Namespace) -> dict[str, Any]:
    """The real engine beside the simulation of it."""
    side, model = Side("now", ROOT), {"model": args.model or "nano", "codec": args.codec or "nano"}
    said = measured(side, {"replies": True, **model}, "engine")
    patterns = spoken_patterns(said)
    shared = {"seconds": args.seconds, "ramp": 3.0, "seed": args.seed, **model}

    def engine(streams: int, profile: str) -> dict[str, Any]:
        asked = {"streams": streams, "profile": profile, "watch": profile == "closed", **shared}
        found = measured(side, asked, "engine")
        print(
            f"{profile} {streams}: {found['groups_a_second']:.0f} groups/s, continuity "
            f"{found['continuity']}, load {found['load']:.1f}",
            flush=True,
        )
        return found

    rounds = [
        {n: engine(n, "closed") for n in sorted((*CALIBRATED, *CLOSED))} for _ in range(ROUNDS)
    ]
    calibration = [
        {name: each[n][name] for name in ("streams", "seconds", "steps", "prefills")}
        for each in rounds
        for n in CALIBRATED
    ]
    table = measured_table(calibration)
    real = {("closed", n): [each[n] for each in rounds] for n in CLOSED}
    real |= {("listeners", n): [engine(n, "listeners")] for n in args.streams}
    rows = []
    for (profile, streams), found in real.items():
        point = Point(streams, profile, args.seconds, 3.0, seed=args.seed)
        simulated = Simulation(point, table, patterns, said["rate"]).run()
        groups = [each["groups_a_second"] for each in found]
        ratio = simulated["groups_a_second"] / (sum(groups) / len(groups))
        rows.append(
            {
                "profile": profile,
                "streams": streams,
                "engine": {name: found[0][name] for name in (*FIELDS[1:-1], "load")}
                | {"groups_a_second": sum(groups) / len(groups), "rounds": groups},
                "simulated": {name: simulated[name] for name in FIELDS[1:]},
                "groups_ratio": ratio,
                "within": abs(ratio - 1) <= WITHIN,
            }
        )
        print(f"{profile} {streams}: simulated / engine groups/s {ratio:.3f}", flush=True)
    both = {
        name: most(
            [
                {"streams": r["streams"], "errors": {}, **r[name]}
                for r in rows
                if r["profile"] == "listeners"
            ]
        )
        for name in ("engine", "simulated")
    }
    apart = abs(both["engine"] - both["simulated"])
    agrees = apart <= max(1, WITHIN * both["engine"]) and all(r["within"] for r in rows)
    return {
        "calibration": calibration,
        "table": {"rows": table.rows, "prompt": table.prompt},
        "rows": rows,
        "carried": both,
        "within": WITHIN,
        "agrees": agrees,
    }


def add_options(add: Callable[..., object]) -> None:
    add("--check", action="store_true", help="beside the real engine with nano")
    add("--published", action="store_true", help="the published dimensions on three machines")
    add("--streams", type=int, nargs="+", default=[*LISTENERS], help="listeners of --check")
    add("--seconds", type=float, default=5.0, help="of each point of --check [%(default)g]")
    add("--model", help="directory or hub id; by default nano")
    add("--codec", help="directory or hub id")
    add("--seed", type=int, default=1)
    add("-o", "--output", type=Path, metavar="FILE.json")


def run(args: argparse.Namespace) -> int:
    if not (args.check or args.published):
        raise ValueError("give --check, --published, or both")
    record: dict[str, Any] = {"kind": "load simulation", "environment": environment("cpu")}
    record["seed"] = args.seed
    if args.published:
        record["published"] = published_results(args.seed)
    if args.check:
        record["check"] = check(args)
    if args.output is not None:
        write_json(args.output, record)
    return 0 if not args.check or record["check"]["agrees"] else 1
