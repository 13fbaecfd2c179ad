"""The persistent kernel that a GPU has run: its phases, for the calibration of the cost model.

It decoded patches in bfloat16, one row at a time, and has been replaced by an engine over tables
(engine_costs.py). Its runs are in benchmarks/results/*-engine*.json, its source is
csrc/cuda/engine/decoder.cu of commit 4849a0f. A phase waited for what other blocks made, staged it,
multiplied the units of weights (16 rows x 128 columns) of its blocks, and published:

    chain  = phases x handling + issue / clock + waiting x sum (exchange - trip)
    stream = bytes that L2 does not keep / bandwidth

*handling*: all of a phase that is neither its units nor waiting, with one trip to L2.
*waiting*: how much longer than alone an exchange took between the phases of the kernel. Chain and
stream came in turn: exchanges queued behind copies that all blocks ask for at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mimo_fast.config import LMConfig, TransformerConfig

UNIT = 16 * 128
SCALES = 16 * 4
"""Bytes of a unit's scales and zeros, of a row 2 each."""

SCHEDULERS = 4
"""Of an SM, each of which issues an instruction of a warp a clock (NVIDIA, white papers)."""

BLOCKS, THREADS = 128, 512

INSTRUCTIONS = {8: 260, 4: 173}
"""Of a warp for a unit: compiled for sm_80 to sm_120 and counted, of a prototype (docs/LOG.md); the
clocks that products of the second version took (2026-11-28-h100-engine-2.json) rise by 230 and 190
for each unit of a scheduler."""


@dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Args:
        units: 16 x 128 of weights of all blocks, `bits` each value.
        reads, whole: pieces of 16 bytes (four float32) that a block read before it began, and that
            all blocks made.
        more: bytes that were read besides: norms, biases, heads.
    """

    name: str
    units: int
    bits: int
    reads: int
    whole: int
    more: float = 0

    @property
    def unit_bytes(self) -> int:
        return UNIT * self.bits // 8 + SCALES

    @property
    def nbytes(self) -> float:
        return self.units * self.unit_bytes + self.more

    def issue(self, blocks: int) -> float:
        """Slots of a scheduler."""
        return self.units / blocks / SCHEDULERS * INSTRUCTIONS[self.bits]


@dataclass(frozen=True)
class Table:
    """Phases with how often each came in a step, and the steps."""

    phases: tuple[tuple[int, Phase], ...]
    steps: int

    @property
    def count(self) -> int:
        """Phases, and so exchanges, of all steps."""
        return self.steps * sum(times for times, _ in self.phases)

    @property
    def nbytes(self) -> float:
        """Of all steps."""
        return self.steps * sum(times * phase.nbytes for times, phase in self.phases)

    @property
    def again(self) -> float:
        """Bytes of a step's units, which the next step read again."""
        return sum(times * phase.units * phase.unit_bytes for times, phase in self.phases)


def measured_patch_decoder(config: LMConfig, bits: int, heads: bool = True) -> Table:
    """heads: with logits, draws and embeddings, and not hidden states alone."""
    decoder, steps = config.patch_decoder, config.patch_steps
    sums = decoder.dim // 2
    rows = config.group_size * sum(config.code_sizes) / steps
    ends = [(1, Phase("norm", 0, bits, sums, sums, 2 * decoder.dim))]
    if heads:
        norm = replace(ends[0][1], name="norm and logits", more=2 * decoder.dim * (1 + rows))
        logits = math.ceil(rows / 4)
        ends = [(1, norm), (1, Phase("draw", 0, bits, logits, logits))]
    layers = [(decoder.layers, phase) for phase in _layer(decoder, bits)]
    return Table((*layers, *ends), steps)


def _layer(config: TransformerConfig, bits: int) -> tuple[Phase, ...]:
    """K of qkv, out and down was split in 2, and every block attended for half of the heads."""
    dim, ffn = config.dim, config.ffn_dim
    width = config.heads * config.head_dim
    qkv = width + 2 * config.kv_heads * config.head_dim
    # Partial sums of both halves; q, k and v of the heads that a block's half of K needed.
    sums = 2 * dim // 4
    return (
        Phase("qkv", _units(qkv, dim), bits, sums, sums, 2 * (dim + qkv)),
        Phase("out", _units(dim, width), bits, qkv // 4, 2 * qkv // 4),
        Phase("gate/up", _units(2 * ffn, dim), bits, sums, sums, 2 * dim),
        Phase("down", _units(dim, ffn), bits, ffn // 8, ffn // 4),
    )


def _units(rows: int, columns: int) -> int:
    return rows * columns // UNIT
