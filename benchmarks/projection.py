"""What other cards would do, from what one has been measured to do: bytes, bandwidth, and what a
kernel costs.

    t = bytes / (published bandwidth x share) + kernels x cost

`share` is what part of its published bandwidth the measured card reached while its kernels ran, and
`cost` what the time of a group holds, for each kernel, beside them:

    cost = (group - busy) / kernels        share = bytes / (busy x published bandwidth)

with a group's seconds (measured without the profiler) and bytes, the number of its kernels, and
`busy`, the seconds of them all, from a record of kind `profile`. It assumes that another card
reaches the same share, and launches at the same cost; a projection is no measurement. Without a
record there is only the floor, bytes / published bandwidth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import torch

from benchmarks.measured import Entry, Measured
from mimo_fast.bench.floor import patch_work
from mimo_fast.bench.synthetic import preset_configs, preset_setup, weightless_lm
from mimo_fast.runtime.memory import GB

FORMATS = ("int4", "int8", "bf16")
POSITIONS = 1000
"""Of context: groups."""

SEQUENCE = 8192
"""Positions that the cache has room for, where it is asked whether a card's memory suffices."""


@dataclass(frozen=True)
class Card:
    """A card's published figures. pattern: what its driver calls it; source: whose document."""

    name: str
    gb_per_s: int
    gb: int
    pattern: str
    source: str


CARDS = (
    Card("RTX 3060 12 GB", 360, 12, r"RTX 3060$", "NVIDIA, GeForce RTX 3060 specifications"),
    Card("RTX 4070", 504, 12, r"RTX 4070$", "NVIDIA, GeForce RTX 4070 specifications"),
    Card("RTX 4090", 1008, 24, r"RTX 4090$", "NVIDIA, GeForce RTX 4090 specifications"),
    Card("RTX 5090", 1792, 32, r"RTX 5090$", "NVIDIA, GeForce RTX 5090 specifications"),
    Card("L4", 300, 24, r"\bL4$", "NVIDIA, L4 datasheet"),
    Card("A100 SXM 80 GB", 2039, 80, r"A100-SXM4-80GB", "NVIDIA, A100 datasheet"),
    Card("H100 SXM", 3350, 80, r"H100 80GB HBM3", "NVIDIA, H100 datasheet"),
    Card("H200 SXM", 4800, 141, r"\bH200$", "NVIDIA, H200 datasheet"),
)


@dataclass(frozen=True)
class Basis:
    """What was measured on a card in a format: the two figures of the formula, and the number of
    kernels."""

    profile: Entry
    share: float
    cost: float
    kernels: float

    @property
    def seconds(self) -> float:
        """Of an audio group, as measured."""
        return self.profile["audio_group"]["p50"]


@dataclass(frozen=True)
class Projection:
    """An audio group at batch 1 on a card; seconds: None where nothing comparable has been
    measured."""

    card: Card
    quantization: str
    floor: float
    seconds: float | None
    needed: int

    @property
    def fits(self) -> bool:
        return self.needed <= self.card.gb * GB


def card_of(device: str) -> Card | None:
    """By the name that its driver gives."""
    return next((card for card in CARDS if re.search(card.pattern, device)), None)


def basis(measured: Measured, quantization: str) -> Basis | None:
    """The newest of a known card's groups at batch 1, from captured graphs."""
    found = measured.find(
        "profile",
        where=lambda e: (
            e.on_gpu
            and e.title == f"7b {quantization}"
            and e["batch"] == 1
            and e["mode"] == "graph"
            and card_of(e.device) is not None
        ),
    )
    if not found:
        return None
    profile = max(found, key=lambda e: e.date)
    card, kernels, total = (
        card_of(profile.device),
        profile["kernels_a_group"],
        profile["audio_group"]["p50"],
    )
    assert card is not None
    # A profiler makes kernels look longer than they are, but they cannot be longer than the group.
    busy = min(profile["kernel_seconds"], total)
    share = sum(profile["bytes"].values()) / (busy * card.gb_per_s * GB)
    return Basis(profile, share, (total - busy) / kernels, kernels)


@cache
def group_bytes(quantization: str) -> int:
    """Of an audio group at batch 1, from the published dimensions."""
    config, _ = preset_configs("7b")
    lm = weightless_lm(config, None if quantization == "bf16" else quantization, torch.bfloat16)
    return patch_work(lm, POSITIONS).total


@cache
def needed_bytes(quantization: str) -> int:
    """Of a card's memory, for one stream."""
    setup = preset_setup("7b", None if quantization == "bf16" else quantization, torch.bfloat16)
    return replace(setup, max_seq_len=SEQUENCE).total


def project(card: Card, quantization: str, known: Basis | None) -> Projection:
    nbytes = group_bytes(quantization)
    floor = nbytes / (card.gb_per_s * GB)
    seconds = None if known is None else floor / known.share + known.kernels * known.cost
    return Projection(card, quantization, floor, seconds, needed_bytes(quantization))
