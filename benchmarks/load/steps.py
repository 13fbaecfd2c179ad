"""What a step takes: measured tables, and predictions from bytes and arithmetic, marked as such.

A step decodes a group of some rows, makes the audio of those that spoke, and prefills prompts:

    seconds = table(rows) + groups of context of all rows x context + prompt groups x prompt

`table` is read between its measured rows. Predictions for a card and more rows than were measured:

    table(rows) = table(measured) + (floor(rows) - floor(measured)) / share
    share = floor(measured) / table(measured)

with floor = max(bytes / read bandwidth, arithmetic / rate of a matrix product) of `bench/floor.py`:
what is beyond the floor for the rows that were measured stays, and the rest grows as the floor
does, no nearer to it than before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import RESULTS, read_records
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import Work, patch_work
from mimo_fast.bench.synthetic import preset_configs, preset_setup, weightless_lm
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, decoder_weights, patch_rows
from mimo_fast.runtime.lm.state import kv_bytes

H100_GROUPS = "2026-11-28-nvidia-h100-80gb-hbm3.jsonl"
H100_CODEC = "2026-11-28-h100-overlap.json"
H100_FORMAT = "int4"
"""The only format of which several rows were measured with prompts as graphs."""


@dataclass(frozen=True)
class StepTable:
    """Seconds of a step.

    Attributes:
        rows: (rows, seconds) of a step that decodes so many, ascending.
        prompt: Seconds of a group of a prompt, beside the fixed ones of each pass.
        prompt_base: Seconds of a pass over prompts.
        context: Seconds of each cached group of each row.
        codec: (rows, seconds) of the audio of so many rows; empty where `rows` holds it.
        sources: Where each figure is from, or that it is predicted.
    """

    rows: tuple[tuple[int, float], ...]
    prompt: float
    prompt_base: float = 0.0
    context: float = 0.0
    codec: tuple[tuple[int, float], ...] = ()
    sources: tuple[str, ...] = ()

    def step(self, rows: int, prompts: int, prompt_groups: int, cached: int, spoke: int) -> float:
        """Seconds of a step.

        Args:
            rows: that decode a group; `cached`: groups of context of all of them.
            prompts: passes over prompts, of `prompt_groups` groups.
            spoke: rows whose group is audio.
        """
        seconds = between(self.rows, rows) + cached * self.context
        seconds += prompts * self.prompt_base + prompt_groups * self.prompt
        return seconds + (between(self.codec, spoke) if self.codec else 0.0)


def between(points: Sequence[tuple[int, float]], x: float) -> float:
    """The line through the points at x; beyond the last that of the last two; 0 at 0."""
    if x <= 0:
        return 0.0
    if x <= points[0][0] or len(points) == 1:
        # One row or less: a step costs what that of the fewest rows does.
        return points[0][1] * (1 if x <= points[0][0] else x / points[0][0])
    i = next((i for i, (rows, _) in enumerate(points) if rows >= x), len(points) - 1)
    (a, s), (b, t) = points[i - 1], points[i]
    return s + (t - s) * (x - a) / (b - a)


LEAST_STEPS = 5
"""Steps of as many rows that tell what one takes."""


def measured_table(points: Sequence[Mapping[str, Any]]) -> StepTable:
    """From the steps of an engine in closed loops, in which it never rests.

    points: `seconds`, `steps` {rows: (steps, seconds)} and `prefills` (groups, seconds) of each.
    """
    steps = dict[int, list[float]]()
    for point in points:
        for rows, (count, seconds) in point["steps"].items():
            found = steps.setdefault(int(rows), [0.0, 0.0])
            found[0] += count
            found[1] += seconds
    groups, prefilling = (sum(point["prefills"][i] for point in points) for i in (0, 1))
    count, busy = (sum(found[i] for found in steps.values()) for i in (0, 1))
    # What is between the steps: a thread hands over to the next one.
    between = max(sum(point["seconds"] for point in points) - busy - prefilling, 0.0) / count
    rows = tuple(
        (rows, seconds / steps + between)
        for rows, (steps, seconds) in sorted(steps.items())
        if steps >= LEAST_STEPS
    )
    source = "measured: steps of closed loops of the same engine"
    return StepTable(rows, prefilling / groups if groups else 0.0, sources=(source,))


@dataclass(frozen=True)
class Card:
    """Bandwidth, rate of bfloat16 products, memory; `share` of each as far as was measured."""

    name: str
    read_Bps: float
    flops: float
    memory: float
    cache: int
    gpus: int = 1

    @property
    def ceiling(self) -> Ceiling:
        rates = {"float32": self.flops / 2, "bfloat16": self.flops}
        return Ceiling(self.read_Bps, self.read_Bps, rates)


CARDS = {
    # The first is replaced by what was measured beside its groups.
    "H100": Card("H100 SXM", 3350e9, 989e12, 80e9, 50 * 2**20),
    # NVIDIA, Ada architecture: dense, accumulated in float32.
    "4090": Card("RTX 4090", 1008e9, 165e12, 24e9, 72 * 2**20),
    "8xH100": Card("8 x H100 SXM", 3350e9, 989e12, 80e9, 50 * 2**20, gpus=8),
}

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def published(
    card_name: str,
    quantization: str = H100_FORMAT,
    batched_codec: bool = True,
    results: Path = RESULTS,
) -> tuple[StepTable, Card]:
    """The published dimensions on a card, from groups measured on an H100.

    Args:
        quantization: of the weights.
        batched_codec: whether streams' chunks are one computation, whose time is predicted; else
            each takes what a lone one was measured to take.
    """
    groups = [
        each
        for each in read_records(results / H100_GROUPS)
        if each["kind"] == "groups" and each["quantization"] == H100_FORMAT
    ]
    short = sorted(
        (
            each
            for each in groups
            if each["prompt_groups"] == min(e["prompt_groups"] for e in groups)
        ),
        key=lambda each: each["batch"],
    )
    ceiling = short[0]["ceiling"]
    h100 = replace(CARDS["H100"], read_Bps=ceiling["read_Bps"], flops=ceiling["flops"]["bfloat16"])
    card = CARDS[card_name]
    measured_card = card_name in ("H100", "8xH100")
    if measured_card:
        card = replace(h100, name=card.name, gpus=card.gpus)
    else:
        # As much of the published rates as an H100 was measured to reach of its own.
        reached = h100.read_Bps / CARDS["H100"].read_Bps, h100.flops / CARDS["H100"].flops
        card = replace(card, read_Bps=card.read_Bps * reached[0], flops=card.flops * reached[1])
    context = short[0]["prompt_groups"]
    form = None if quantization == "bf16" else quantization

    def floor(on: Card, rows: int, weights: str | None) -> float:
        return group_work(rows, context, weights, on.cache).floor(on.ceiling, torch.bfloat16)

    known = {each["batch"]: each["audio_group"]["p50"] for each in short}
    most = max(known)
    measured_floor = {rows: floor(h100, rows, H100_FORMAT) for rows in known}
    share = measured_floor[most] / known[most]
    table = []
    for rows in ROWS:
        nearest = max((n for n in known if n <= rows), default=min(known))
        beyond = floor(card, rows, form) - measured_floor[nearest]
        table.append((rows, known[nearest] + max(beyond, 0.0) / share))
    as_measured = measured_card and quantization == H100_FORMAT
    sources = [
        f"measured: groups of {', '.join(map(str, known))} rows, {H100_FORMAT}, {H100_GROUPS}"
        if as_measured
        else f"predicted: groups, from those of {H100_FORMAT} on an H100, {H100_GROUPS}",
    ]
    if as_measured:
        sources.append(f"predicted: groups of more than {most} rows")
    lone = lone_codec(results)
    codec, about = codec_table(lone, h100, card, batched_codec)
    sources.append(about)
    kv = kv_bytes(preset_configs("7b")[0].backbone, 1, 1, torch.bfloat16, True)
    per_group = prompt_seconds(groups)
    scale = h100.flops / card.flops
    sources.append("predicted: keys and values are read at the bandwidth, int8")
    sources.append(
        f"{'measured' if as_measured else 'predicted'}: prompts as graphs, {H100_GROUPS}"
    )
    made = StepTable(
        tuple(table),
        prompt=per_group[1] * scale,
        prompt_base=per_group[0],
        context=kv / card.read_Bps,
        codec=codec,
        sources=tuple(sources),
    )
    # The context that the groups were measured at is in the table already.
    rows = tuple((n, max(s - n * context * made.context, 1e-4)) for n, s in made.rows)
    return replace(made, rows=rows), card


def group_work(rows: int, context: int, quantization: str | None, cache: int) -> Work:
    lm = weightless_lm(preset_configs("7b")[0], quantization, torch.bfloat16)
    return patch_work(lm, context, rows, True, cache)


def lone_codec(results: Path) -> float:
    """Seconds of a lone stream's chunk of the published codec on an H100."""
    records = json.loads((results / H100_CODEC).read_text(encoding="utf-8"))["records"]
    (found,) = [r for r in records if (r["streams"], r["way"], r["reply"]) == (1, "waits", "tts")]
    return found["pieces"]["codec"]["ms"] / 1e3


def codec_table(
    lone: float, h100: Card, card: Card, batched: bool
) -> tuple[tuple[tuple[int, float], ...], str]:
    """Seconds of the audio of so many rows, and where that is from."""
    _, config = preset_configs("7b")
    rows, mel = PATCH_FRAMES * config.pool, patch_rows(config)
    vocoder = config.vocoder_layers * (
        4 * config.vocoder_dim**2 + 2 * config.vocoder_dim * config.vocoder_ffn
    )
    flop = 2.0 * (rows * decoder_weights(config) + mel * vocoder)
    nbytes = 2 * (decoder_weights(config) + vocoder)

    def floor(on: Card, streams: int) -> float:
        return max(nbytes / on.read_Bps, streams * flop / on.flops)

    first = lone + max(floor(card, 1) - floor(h100, 1), 0.0)
    if not batched:
        table = tuple((n, n * first) for n in ROWS)
        return table, f"measured: the codec's chunk of one stream, {H100_CODEC}; one by one"
    table = tuple((n, first + 2 * (floor(card, n) - floor(card, 1))) for n in ROWS)
    return table, (
        "predicted: the codec in batches: a lone chunk's time, measured, and twice what the "
        "arithmetic of further ones takes"
    )


def prompt_seconds(groups: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(Seconds of a pass, seconds of each of its groups), by the line through the measured ones."""
    lone = {each["prompt_groups"]: each["prefill"] for each in groups if each["batch"] == 1}
    points = sorted(lone.items())[:2]
    (a, s), (b, t) = points
    slope = (t - s) / (b - a)
    return max(s - slope * a, 0.0), slope


def streams_that_fit(
    card: Card, quantization: str, groups: int, cache: str | None = "int8"
) -> dict[str, Any]:
    """How many rows of so many groups fit a card's memory, and the bytes of what else is there."""
    setup = replace(
        preset_setup("7b", None if quantization == "bf16" else quantization, torch.bfloat16),
        max_seq_len=groups,
        kv_cache=cache,
    )
    one, two = (replace(setup, max_batch=n).total for n in (64, 128))
    row = (two - one) / 64
    fixed = one - 64 * row
    return {
        "memory": card.memory,
        "fixed_bytes": fixed,
        "row_bytes": row,
        "streams": max(0, math.floor((card.memory - fixed) / row)),
        "groups": groups,
        "kv_cache": cache or "bf16",
    }
