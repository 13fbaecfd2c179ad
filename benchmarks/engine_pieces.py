"""The launches of a group, at the published dimensions, on four cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from benchmarks.columns import duration
from benchmarks.engine_calibration import Calibration
from benchmarks.engine_costs import Cost, Launch
from benchmarks.engine_grids import PROCESSORS, grid_of
from benchmarks.engine_measured import BLOCKS
from benchmarks.projection import CARDS
from mimo_fast.bench.synthetic import preset_configs, weightless_lm
from mimo_fast.kernels.cuda.engine import MOST_ROWS
from mimo_fast.kernels.cuda.engine_launch import Grid
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.programs import (
    backbone_tables,
    patch_decoder_tables,
    patch_encoder_tables,
)

CONTEXT = 254
"""Groups, as the group that was measured kernel by kernel (docs/LOG.md)."""

PREDICTED = "H100 SXM", "H200 SXM", "RTX 4090", "RTX 5090"
FORMATS = 8, 4


@cache
def configs() -> Any:
    return preset_configs("7b")


def cards(calibration: Calibration) -> Iterator[tuple[str, Calibration]]:
    """The four, the measured one as it was measured; that one alone if nothing is published."""
    known = calibration.published
    if known is None or known.name not in PREDICTED:
        yield calibration.device, calibration
    if known is not None:
        for card in CARDS:
            if card.name in PREDICTED:
                yield card.name, calibration if card == known else calibration.scaled(card)


@cache
def network(bits: int) -> Network:
    """Published dimensions without data; layers of all three transformers in int8 or int4."""
    config, _ = configs()
    parts = dict.fromkeys(("backbone", "patch_decoder", "patch_encoder"), f"int{bits}")
    return weightless_lm(config, {"lm_head": "int8", **parts}, torch.bfloat16).network


def grid(card: Calibration) -> Grid:
    """Of a card by its published name; else as the measured kernel's, with what L2 keeps."""
    known = card.published
    if known is not None and known.name in PROCESSORS:
        return grid_of(known.name, known.cache_mb * 2**20)
    return replace(grid_of("H100 SXM", 0), blocks=BLOCKS, kept_bytes=int(card.kept))


@dataclass(frozen=True)
class Pieces:
    """The launches of a group of some streams: how often each, the backbone first."""

    launches: tuple[tuple[int, Launch], ...]

    @classmethod
    @cache
    def of(cls, on: Grid, bits: int, streams: int) -> Pieces:
        group = configs()[0].group_size
        made = network(bits)
        together = min(MOST_ROWS // group, streams)
        decoder = patch_decoder_tables(made, on.blocks, on.kept_bytes)
        return cls(
            (
                (
                    1,
                    Launch("word", backbone_tables(made, on.blocks), on, streams, CONTEXT),
                ),
                (
                    -(-streams // together),
                    Launch(
                        "patch encoder", patch_encoder_tables(made, on.blocks), on, together * group
                    ),
                ),
                (1, Launch("patch decoder", decoder, on, streams)),
            )
        )

    def seconds(self, card: Calibration) -> list[tuple[float, float]]:
        """In turn and ahead: each piece, then their sum."""
        found = [(n * x.in_turn(card), n * x.ahead(card)) for n, x in self.launches]
        in_turn, ahead = (sum(x) for x in zip(*found, strict=True))
        return [*found, (in_turn, ahead)]


def pair(seconds: tuple[float, float]) -> str:
    return " / ".join(map(duration, seconds))


def by_name(launch: Launch) -> dict[str, list[tuple[Cost, int]]]:
    found = dict[str, list[tuple[Cost, int]]]()
    for cost, times in launch.costs.items():
        found.setdefault(cost.name, []).append((cost, times))
    return found
