"""Projects other cards from a measured one: bytes, bandwidth, and a latency for each kernel.

TEXT has the formula and its assumptions. The profiler's busy time of kernels is not used: kernels
that overlap count as busy while they wait for each other. A kernel's latency beyond its bytes is
its start and end, the wait for its first data, too few blocks for the card, and the host's work
between two kernels.

The floor of a card needs no record; `mimo_fast.bench.floor` tells what its last-level cache can
keep from one step of the patch decoder to the next.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import torch

from benchmarks.columns import duration, share, table
from benchmarks.records import NOT_MEASURED, Entry, Measured, sources
from mimo_fast.bench.floor import Work, patch_work
from mimo_fast.bench.synthetic import preset_configs, preset_setup, weightless_lm
from mimo_fast.runtime.memory import GB

FORMATS = ("int4", "int8", "bf16")
POSITIONS = 1000
"""Groups of context."""

SEQUENCE = 8192
"""Positions that the cache has room for, when checking whether a card's memory suffices."""


@dataclass(frozen=True)
class Card:
    """A card's published figures, from the document `source`.

    Args:
        cache_mb: of its L2, in units of 2^20 bytes, as vendors give it.
        pattern: of its name in the driver.
    """

    name: str
    gb_per_s: int
    gb: int
    cache_mb: int
    pattern: str
    source: str


CARDS = (
    Card("RTX 3060 12 GB", 360, 12, 3, r"RTX 3060$", "NVIDIA, GeForce RTX 3060 specifications"),
    Card("RTX 4070", 504, 12, 36, r"RTX 4070$", "NVIDIA, GeForce RTX 4070 specifications"),
    Card("RTX 4090", 1008, 24, 72, r"RTX 4090$", "NVIDIA, GeForce RTX 4090 specifications"),
    Card("RTX 5090", 1792, 32, 96, r"RTX 5090$", "NVIDIA, GeForce RTX 5090 specifications"),
    Card("L4", 300, 24, 48, r"\bL4$", "NVIDIA, L4 datasheet"),
    Card("A100 SXM 80 GB", 2039, 80, 40, r"A100-SXM4-80GB", "NVIDIA, A100 datasheet"),
    Card("H100 SXM", 3350, 80, 50, r"H100 80GB HBM3", "NVIDIA, H100 datasheet"),
    Card("H200 SXM", 4800, 141, 50, r"\bH200$", "NVIDIA, H200 datasheet"),
)


TEXT = """\
No measurement: what the formula gives for other cards from what one was measured to do.

    t = bytes / (published bandwidth x share) + kernels x latency
    latency = (group - bytes / read bandwidth) / kernels
    share = read bandwidth / published bandwidth

with the seconds and bytes of an audio group and the number of its kernels from its profile, and \
the bandwidth that the same card was measured to read with \
([projection.py](../benchmarks/projection.py)). Only the first term scales with a card's \
bandwidth; what kernels take beyond their bytes is taken to be the same on every card, and none of \
it to be hidden behind the longer reads of a slower one. *Floor* is what no program beats: bytes / \
published bandwidth, without those of the patch decoder that the card's L2 can keep over its 11 \
steps, which today's kernels, and so the projection, read again each time.
"""

COLUMNS = (
    "card",
    "weights",
    "published bandwidth",
    "L2",
    f"fits with {SEQUENCE} of context",
    "floor",
    f"an audio group, batch 1, {POSITIONS} of context",
    "measured beside it",
)


@dataclass(frozen=True)
class Basis:
    """A measured group of a known card: its profile and its card, share of the published bandwidth
    that reads reach, and the number of kernels and seconds of each beyond their bytes."""

    profile: Entry
    card: Card
    share: float
    latency: float
    kernels: float


def card_of(device: str) -> Card | None:
    """The card of a driver's name."""
    return next((card for card in CARDS if re.search(card.pattern, device)), None)


def basis(measured: Measured, quantization: str) -> Basis | None:
    """The newest group at batch 1 of a known card, from captured graphs."""
    found = [
        e
        for e in measured.find("profile")
        if e.on_gpu
        and (e.title, e["batch"], e["mode"]) == (f"7b {quantization}", 1, "graph")
        and card_of(e.device) is not None
    ]
    if not found:
        return None
    profile = max(found, key=lambda e: e.date)
    card, read = card_of(profile.device), profile["ceiling"]["read_Bps"]
    assert card is not None
    besides = profile["audio_group"]["p50"] - sum(profile["bytes"].values()) / read
    kernels = profile["kernels_a_group"]
    return Basis(profile, card, read / (card.gb_per_s * GB), max(besides, 0.0) / kernels, kernels)


@cache
def group_work(quantization: str, cache_bytes: int) -> Work:
    """Work of an audio group at batch 1, from the published dimensions."""
    config, _ = preset_configs("7b")
    lm = weightless_lm(config, None if quantization == "bf16" else quantization, torch.bfloat16)
    return patch_work(lm, POSITIONS, cache=cache_bytes)


@cache
def needed_bytes(quantization: str) -> int:
    """Bytes of a card's memory that one stream needs."""
    setup = preset_setup("7b", None if quantization == "bf16" else quantization, torch.bfloat16)
    return replace(setup, max_seq_len=SEQUENCE).total


def project(card: Card, quantization: str, known: Basis | None) -> tuple[float, float | None]:
    """Floor and projected seconds of a group, None where nothing comparable has been measured."""
    work, bandwidth = group_work(quantization, card.cache_mb * 2**20), card.gb_per_s * GB
    floor = (work.total - work.cached) / bandwidth
    if known is None:
        return floor, None
    return floor, work.total / (bandwidth * known.share) + known.kernels * known.latency


def section(measured: Measured) -> str:
    """A table of all cards and formats, with measurements beside their projection."""
    rows, notes = [], []
    for form in FORMATS:
        found, beside, needed = basis(measured, form), "-", needed_bytes(form) / GB
        if found is not None:
            beside = f"{found.profile.device}: {duration(found.profile['audio_group']['p50'])}"
            notes.append(
                f"{form}: reads reach {share(found.share)} of the published bandwidth; "
                f"{found.kernels:,.0f} kernels a group take {duration(found.latency)} each beyond "
                f"their bytes. {sources([found.profile])}"
            )
        # The measured card has a measurement.
        for card in (c for c in CARDS if found is None or c != found.card):
            floor, seconds = project(card, form, found)
            projected = NOT_MEASURED if seconds is None else duration(seconds)
            rows.append(
                (
                    card.name,
                    form,
                    f"{card.gb_per_s:,} GB/s",
                    f"{card.cache_mb} MB",
                    f"{'yes' if needed <= card.gb else 'no'}: {needed:.1f} of {card.gb} GB",
                    f"floor: {duration(floor)}",
                    f"projection: {projected}",
                    beside,
                )
            )
    cited = "; ".join(dict.fromkeys(card.source for card in CARDS))
    notes.append(
        f"Bandwidth, memory and L2 of the cards: {cited}, and the architectures' white papers."
    )
    return "\n".join([TEXT, "\n\n".join([table(COLUMNS, rows, 2), *notes])])
