"""What a persistent engine costs: phases x (bytes, exchanges, issue), and cards that run them.

A table lists the phases of a piece of a group as csrc/cuda/engine runs them (the patch decoder) or
as it is planned (the others). A phase waits for what other blocks made, stages it, multiplies the
units of weights (16 rows x 128 columns) of its blocks, and publishes:

    chain  = phases x handling + issue / clock + waiting x sum (exchange - trip)
    stream = bytes that L2 does not keep / bandwidth
    in turn: chain + stream
    hidden:  max(chain + bytes / L2's bandwidth, stream)

*handling*: all of a phase that is neither its units nor waiting, with one trip to L2, at one row.
*waiting*: how much longer than alone an exchange takes between the phases of the kernel. *in turn*
is what the kernel does today: exchanges queue behind copies that all blocks ask for at once.
*hidden* is what it does where its blocks do not wait for each other, and what it would do if
copies did not hold up what is exchanged.

Seconds are those of a `Calibration` (engine_calibration.py), and runs of the kernel are compared
with them by engine_report.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mimo_fast.config import CodecConfig, LMConfig, TransformerConfig
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, patch_rows

UNIT = 16 * 128
SCALES = 16 * 4
"""Bytes of a unit's scales and zeros, of a row 2 each (csrc/cuda/engine/decoder.cu)."""

SCHEDULERS = 4
"""Of an SM, each of which issues an instruction of a warp a clock (NVIDIA, white papers)."""

BLOCKS, THREADS = 128, 512
COLUMNS = 8
"""Rows of x that one product on tensor cores takes (mma m16n8k16)."""

INSTRUCTIONS = {8: 260, 4: 173, 16: 173}
"""Of a warp for a unit. int8 and int4: compiled for sm_80 to sm_120 and counted, of a prototype
(docs/LOG.md); the clocks that products of the second version took (2026-11-28-h100-engine-2.json)
rise by 230 and 190 for each unit of a scheduler. 16 bits: assumed to be at most int4's, since
nothing is unpacked."""

STAGE, ATTENTION = 40, 250
"""Of a warp for 32 pieces of a row, and for two heads of a row. Assumed: read off exchange.cuh and
attention.cuh, not compiled. They count for rows after the first, whose own are in the handling,
as are the patch decoder's reads of keys and values from L2."""

SPLITS = 16
"""Of a head's keys and values, by as many blocks. Planned."""


@dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Args:
        units: 16 x 128 of weights of all blocks, `bits` each value.
        reads, whole: pieces of 16 bytes of a row (four float32) that a block reads before it
            begins, and that all blocks made; 0: none.
        more: bytes that are read besides: keys and values, norms, biases, heads.
        heads: for whose attention every block computes itself.
        own: `more` is of each row.
    """

    name: str
    units: int
    bits: int
    reads: int
    whole: int
    more: float = 0
    heads: int = 0
    own: bool = False

    @property
    def unit_bytes(self) -> int:
        return UNIT * self.bits // 8 + (SCALES if self.bits < 16 else 0)

    def nbytes(self, rows: int) -> float:
        """Read from memory for all rows."""
        return self.units * self.unit_bytes + self.more * (rows if self.own else 1)

    def issue(self, rows: int, blocks: int) -> float:
        """Slots of a scheduler: its units, and what further rows add."""
        units = self.units / blocks / SCHEDULERS * math.ceil(rows / COLUMNS)
        beside = self.reads / 32 * STAGE + self.heads / 2 * ATTENTION
        return units * INSTRUCTIONS[self.bits] + (rows - 1) * beside / SCHEDULERS


@dataclass(frozen=True)
class Table:
    """Phases with how often each comes in a step, and the steps.

    each: rows of a stream, as the positions that a patch encoder sees at once.
    """

    name: str
    phases: tuple[tuple[int, Phase], ...]
    steps: int = 1
    each: int = 1

    @property
    def count(self) -> int:
        """Phases, and so exchanges, of all steps."""
        return self.steps * sum(times for times, _ in self.phases)

    def nbytes(self, streams: int = 1) -> float:
        """Of all steps."""
        rows = streams * self.each
        return self.steps * sum(times * phase.nbytes(rows) for times, phase in self.phases)

    @property
    def unit_count(self) -> int:
        """Of a step."""
        return sum(times * phase.units for times, phase in self.phases)

    @property
    def again(self) -> float:
        """Bytes of a step's units, which the next step reads again."""
        return sum(times * phase.units * phase.unit_bytes for times, phase in self.phases)


def units_of(rows: int, columns: int) -> int:
    return rows * columns // UNIT


def layer_phases(config: TransformerConfig, bits: int) -> tuple[Phase, ...]:
    """As decoder.cu has them: K of qkv, out and down split in 2, attention in every block."""
    dim, ffn = config.dim, config.ffn_dim
    width = config.heads * config.head_dim
    qkv = width + 2 * config.kv_heads * config.head_dim
    # Partial sums of both halves; q, k and v of the heads that a block's half of K needs.
    sums = 2 * dim // 4
    return (
        Phase("qkv", units_of(qkv, dim), bits, sums, sums, 2 * (dim + qkv)),
        Phase("out", units_of(dim, width), bits, qkv // 4, 2 * qkv // 4, heads=config.heads // 2),
        Phase("gate/up", units_of(2 * ffn, dim), bits, sums, sums, 2 * dim),
        Phase("down", units_of(dim, ffn), bits, ffn // 8, ffn // 4),
    )


def patch_decoder(config: LMConfig, bits: int, heads: bool = True) -> Table:
    """As built. heads: with logits, draws and embeddings, and not hidden states alone."""
    decoder, steps = config.patch_decoder, config.patch_steps
    sums = decoder.dim // 2
    rows = config.group_size * sum(config.code_sizes) / steps
    ends = [(1, Phase("norm", 0, bits, sums, sums, 2 * decoder.dim))]
    if heads:
        norm = replace(ends[0][1], name="norm and logits", more=2 * decoder.dim * (1 + rows))
        logits = math.ceil(rows / 4)
        ends = [(1, norm), (1, Phase("draw", 0, bits, logits, logits))]
    layers = [(decoder.layers, phase) for phase in layer_phases(decoder, bits)]
    return Table("patch decoder", (*layers, *ends), steps)


def patch_encoder(config: LMConfig, bits: int) -> Table:
    """Planned: a group's frames at once, between the two joints, in the decoder's format."""
    encoder, wide = config.patch_encoder, config.backbone.dim
    joined = config.group_size * encoder.dim
    joints = (
        (1, Phase("joint in", units_of(wide, joined), bits, joined // 2, joined // 2)),
        (
            1,
            Phase(
                "joint out", units_of(config.patch_decoder.dim, wide), bits, wide // 2, wide // 2
            ),
        ),
    )
    layers = [(encoder.layers, phase) for phase in layer_phases(encoder, bits)]
    return Table("patch encoder", (*layers, *joints), each=config.group_size)


def backbone(config: LMConfig, bits: int, context: int) -> Table:
    """Planned: a layer of six phases, keys and values in splits, then the int8 text head."""
    lm = config.backbone
    qkv, out, gate_up, down = layer_phases(lm, bits)
    keys = 2 * lm.kv_heads * lm.head_dim
    q = lm.heads // lm.kv_heads * lm.head_dim
    # A block has a split of a head of keys, then a part of the merged heads.
    attention = Phase("attention", 0, bits, q // 2, qkv.whole, 2 * keys * context, own=True)
    width = lm.heads * lm.head_dim
    merge = Phase("merge", 0, bits, width * SPLITS // 4 // BLOCKS, width * SPLITS // 4)
    layer = qkv, attention, merge, replace(out, reads=width // 8, whole=width // 4, heads=0)
    layers = [(lm.layers, phase) for phase in (*layer, gate_up, down)]
    sums = lm.dim // 2
    head = Phase("text head", units_of(config.vocab_size, lm.dim), 8, sums, sums, 2 * lm.dim)
    # The best of each block.
    return Table("backbone", (*layers, (1, head), (1, Phase("draw", 0, 8, BLOCKS, BLOCKS))))


def codec_decoder(codec: CodecConfig) -> Table:
    """Planned: the layers of decoder and vocoder for a patch of each stream, in 16 bits.

    Without convolutions, the inverse STFT and the keys and values of earlier patches. Vocoder rows
    are counted as the decoder's where those are more.
    """
    rows = PATCH_FRAMES * codec.pool

    def phases(dim: int, ffn: int, heads: int, copies: int) -> tuple[Phase, ...]:
        sums = 2 * dim // 4
        found = (
            Phase("qkv", units_of(3 * dim, dim), 16, sums, sums),
            Phase("out", units_of(dim, dim), 16, 3 * dim // 4, 6 * dim // 4, heads=heads // 2),
            Phase("up", units_of(ffn, dim), 16, sums, sums),
            Phase("down", units_of(dim, ffn), 16, ffn // 8, ffn // 4),
        )
        # More rows than the table's: pieces and heads of all of them, weights once.
        return tuple(
            replace(x, reads=x.reads * copies, whole=x.whole * copies, heads=x.heads * copies)
            for x in found
        )

    decoder = phases(codec.dim, codec.decoder_ffn, codec.decoder_heads, 1)
    more = math.ceil(patch_rows(codec) / rows)
    vocoder = phases(codec.vocoder_dim, codec.vocoder_ffn, codec.vocoder_heads, more)
    layers = [(codec.decoder_layers, x) for x in decoder]
    return Table("codec", (*layers, *((codec.vocoder_layers, x) for x in vocoder)), each=rows)
