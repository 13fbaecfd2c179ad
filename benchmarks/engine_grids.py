"""What cards that are not here give the persistent engine: blocks, shared memory, L2."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from mimo_fast.kernels.cuda.engine import (
    COLUMNS,
    MOST_NORMED,
    MOST_ROWS,
    PARTS,
    Matrix,
    Phase,
)
from mimo_fast.kernels.cuda.engine_launch import KEPT_SHARE, Grid

SHARED = {"RTX 4090": 99, "RTX 5090": 99}
"""KB of shared memory a block may have (CUDA C++ Programming Guide, compute capabilities 8.9 and
12.0); others have compute capability 9.0 here: 227."""

PROCESSORS = {"H100 SXM": 132, "H200 SXM": 132, "RTX 4090": 128, "RTX 5090": 170}
"""Multiprocessors, and so blocks (NVIDIA, architectures' white papers)."""

LEAST_PART = 64
"""Positions of a part of attention over a cache (csrc/cuda/engine/engine.cuh)."""

LISTED = 16
"""Ids that a block publishes of a row with top-k (csrc/cuda/engine/text_passes.cuh)."""


class Shared:
    """Stands in for a compiled library: what `Places` of engine.cuh says of shared memory."""

    def mimo_fast_engine_shared(self, program: Any, threads: int, depth: int) -> int:
        p, warps = program._obj, threads // 32
        blocks = p.x_columns // COLUMNS
        return sum(
            -(-size // 16) * 16
            for size in (
                warps * depth * 1024,
                warps * depth * 128,
                max(p.x_columns * p.rows * 2, p.scratch_bytes),
                2 * p.sums_floats * 4,
                MOST_NORMED // COLUMNS * MOST_ROWS * 4,
                blocks * MOST_ROWS * 4,
                MOST_ROWS * 4,
                warps * 5 * 16 * 4 if p.together else 0,
                MOST_ROWS * 9 * 16 * 4 if p.together else 0,
                p.count * ctypes.sizeof(Matrix),
                p.count * 24,
                3 * ctypes.sizeof(Phase),
                warps * 16,
                warps * 12,
                8,
            )
        )

    def mimo_fast_engine_draw_scratch(self, size: int) -> int:
        return 4 * (size + 2 * 4 * math.ceil(size / 32))

    def mimo_fast_engine_text_scratch(self, rows: int, blocks: int) -> int:
        return rows * 16 * 32 + 2 * 32 * 4 + MOST_ROWS * 16 + 8 * blocks * LISTED

    def mimo_fast_engine_scratch(self, heads: int, kv_heads: int, width: int, capacity: int) -> int:
        share = heads // kv_heads
        size = part_size(capacity)
        return 4 * ((2 * share + 3) * width + share * size + 16 * width + 2 * share)


def part_size(length: int) -> int:
    """Positions of a part of a row of so many."""
    return max(LEAST_PART, -(-math.ceil(length / PARTS) // LEAST_PART) * LEAST_PART)


def grid_of(card: str, cache_bytes: float) -> Grid:
    """`Grid.of` of a card that is not here."""
    shared = SHARED.get(card, 227) * 1024
    return Grid(PROCESSORS[card], shared, kept_bytes=int(KEPT_SHARE * cache_bytes))
