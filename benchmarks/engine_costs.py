"""What a persistent launch costs: its tables' phases x (bytes, exchanges, issue), on a card.

A `Launch` reads the tables that csrc/cuda/engine runs by (mimo_fast/runtime/lm/programs.py): what
the busiest block does in each phase. A phase waits for what other blocks made, stages it,
multiplies the units of weights (16 rows x 128 columns) of its blocks, and publishes:

    chain    = sum over phases of handling + clocks + waiting x (exchange - trip)
    stream   = bytes that L2 does not keep / bandwidth
    in turn  = fill + chain + stream
    ahead    = fill + the chain beside queues that memory fills meanwhile (`Launch.ahead`)

*handling*, *waiting* and exchanges are those of a `Calibration`, so of the kernel that was measured
(engine_measured.py), without what its blocks took to attend for half of the heads each. *in turn*
is how that kernel behaved: exchanges waited for copies. *ahead* is what copies that do not hold up
exchanges would give. *fill*: what is exchanged becomes "not there yet" before the kernel starts.

Nothing of this engine has been measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.engine_calibration import Calibration
from benchmarks.engine_grids import LISTED, Shared, part_size
from benchmarks.engine_measured import SCHEDULERS
from mimo_fast.kernels.cuda.engine import (
    COLUMNS,
    NONE,
    OCTET,
    Matrix,
    Operation,
    Order,
    Phase,
    Program,
    Tables,
    jobs_of,
)
from mimo_fast.kernels.cuda.engine_launch import WHOLE_CLASSES, Grid, Launcher, sums_of_job

INSTRUCTIONS = {8: 335, 4: 249, 16: 325}
"""Of a warp for a unit with asking for a later one, by its bits: counted in what nvcc 13.0 makes of
the engine of commit 99a0c08 for sm_90, with the usual way through the stream alone."""

FOUND, FOUND_OF_HEADS = 45, 187
"""Of a warp for a tile besides, to find the rows of W that it has; in jobs of whole heads by
divisions. Counted so."""

STAGE, SUM, PUBLISH, OWN = 40, 2, 60, 300
"""Of a warp: for 32 pieces of 8 columns of x, for a class of 32 results, for 32 results, and for a
head of a row among few positions. Assumed: read off product.cuh and patch_attention.cuh, not
compiled. They count for what the measured kernel had not: rows after the first, and x that is
staged more than once."""

OWN_CLOCKS = 1200
"""Of the warp that attends for a head among few positions, one instruction after the other.
Assumed, from its loads, shuffles and sums that wait for each other."""

ATTEND = 70
"""Of a warp, for two positions of a head of q over a cache. Assumed, as these."""

ROUND, SAMPLED = 400, 36
"""Clocks of a round of a draw, and rounds with top-k and top-p: a greedy draw has one, top-k 32
more. Assumed, from what waits for each other: results of runs of ids, a barrier, their sum."""

TEXT = 10_000
"""Clocks of a draw of text with top-k beside its exchange: the block's own list and what one block
makes of all of them. Assumed, from loads, reductions and barriers that wait for each other."""

PIECE = 16
"""Bytes of 8 columns: what a thread asks for at once."""

UNITS, HANDLING = "issue of the products", "handling: loads, staging, sums, publishing"
BESIDE = "attention, draws, and staging and sums of further rows"
AGAIN, EXCHANGES = "x staged in parts, or again", "exchanges, as alone"
WAITING, CACHE = "waiting beyond them", "reads of keys and values"
STREAM, FILL = "bytes of weights", "filling what is exchanged"


@dataclass(frozen=True)
class Cost:
    """A phase in a step: what its busiest block does.

    Args:
        nbytes, largest: of weights, of all blocks and of that with the most.
        tiles, mean_tiles: of the block with the most, and of a block in the mean.
        units: of 16 x 128 weights, of the block with the most.
        issued: of these, those of its busiest scheduler.
        found: instructions a unit to find the rows of its tile, which a warp does once.
        reads: for each exchange, one after the other: bytes that a block reads, and bytes that all
            of them made.
        items: 8 columns of x that a thread stages, at most.
        stagings: how often columns of x are staged.
        beside: slots of a scheduler for what is neither units nor handling.
        alone: clocks of what is done one after the other: attention of a head, a draw.
        read: bytes of keys and values, from memory, in none of the queues.
        kept: whether its weights are to stay in L2.
    """

    name: str
    bits: int = 16
    nbytes: int = 0
    largest: int = 0
    tiles: int = 0
    mean_tiles: float = 0.0
    units: int = 0
    issued: int = 0
    found: float = 0.0
    reads: tuple[tuple[int, int], ...] = ()
    items: int = 0
    stagings: int = 0
    beside: float = 0.0
    alone: float = 0.0
    read: int = 0
    kept: bool = False

    def multiplying(self, card: Calibration) -> float:
        """Seconds that the units take to issue."""
        return self.issued * (INSTRUCTIONS[self.bits] + self.found) / card.clock

    def terms(self, card: Calibration, blocks: int, threads: int) -> dict[str, float]:
        """Seconds of the chain, so without bytes of weights, by what they are."""
        pieces = [(part / PIECE, part == whole) for part, whole in self.reads]
        alone = sum(max(card.exchange(*x, blocks, threads) - card.trip, 0.0) for x in pieces)
        # Each further exchange of a phase is handled as a phase is.
        handled = (card.handling - card.attending) * max(len(self.reads), 1)
        # Keys, then values, each asked for when the former are there.
        read = 2 * card.trip + self.read / card.read_Bps if self.read else 0.0
        return {
            UNITS: self.multiplying(card),
            HANDLING: handled / card.clock,
            BESIDE: (self.beside + self.alone) / card.clock,
            AGAIN: max(self.stagings - 1, 0) * card.trip,
            EXCHANGES: alone,
            WAITING: alone * (card.waiting - 1),
            CACHE: read,
        }

    def seconds(self, card: Calibration, blocks: int, threads: int) -> float:
        return sum(self.terms(card, blocks, threads).values())


@dataclass(frozen=True)
class Launch:
    """A launch of tables for some rows.

    Args:
        context: positions that attention over a cache sees.
        change: what becomes of a phase in another design; None if nothing.
    """

    name: str
    tables: Tables
    grid: Grid
    rows: int
    context: int = 0
    change: Callable[[Cost], Cost | None] = lambda cost: cost

    @cached_property
    def divided(self) -> tuple[Program, tuple[int, int]]:
        """What shared memory holds, threads and depth, as `Launcher` divides it."""
        error = torch.zeros(1, dtype=torch.int32)
        launcher = Launcher(self.tables, self.grid, error, loaded=Shared())
        return launcher._fixed(self.rows, self.context)

    @property
    def threads(self) -> int:
        return self.divided[1][0]

    @property
    def depth(self) -> int:
        return self.divided[1][1]

    @cached_property
    def steps(self) -> tuple[tuple[Cost, ...], ...]:
        """The phases of each step, in order; those before a loop are of the first."""
        phases, begin = range(len(self.tables.phases)), self.tables.loop.start
        found = [
            [self.change(self._cost(i, step)) for i in phases if not step or i >= begin]
            for step in range(self.tables.steps)
        ]
        return tuple(tuple(x for x in step if x is not None) for step in found)

    @cached_property
    def costs(self) -> Counter[Cost]:
        """Phases that cost the same, with how often they come in a launch."""
        return Counter(cost for step in self.steps for cost in step)

    @property
    def exchanges(self) -> int:
        """In the chain, one after the other."""
        return sum(times * len(cost.reads) for cost, times in self.costs.items())

    @property
    def nbytes(self) -> int:
        """Of weights that a launch reads, from memory or L2."""
        return sum(times * cost.nbytes for cost, times in self.costs.items())

    @property
    def kept(self) -> int:
        """Bytes of weights of a step that are to stay in L2."""
        return sum(cost.nbytes for cost in self.steps[-1] if cost.kept)

    @property
    def exchanged(self) -> int:
        """Bytes that are filled before."""
        return self.tables.all_columns * self.rows * 2

    def terms(self, card: Calibration) -> dict[str, float]:
        """Seconds of its terms; their sum is its time in turn."""
        found = dict[str, float]()
        for cost, times in self.costs.items():
            for name, seconds in cost.terms(card, self.grid.blocks, self.threads).items():
                found[name] = found.get(name, 0.0) + times * seconds
        again = min(self.kept, card.kept) * (len(self.steps) - 1)
        # Filling is assumed to be as fast as reading.
        return found | {
            STREAM: (self.nbytes - again) / card.read_Bps,
            FILL: self.exchanged / card.read_Bps,
        }

    def in_turn(self, card: Calibration) -> float:
        return sum(self.terms(card).values())

    def ahead(self, card: Calibration) -> float:
        """The chain, beside a queue of weights a block that memory fills all the time.

        The queue is as long as a block's warps ask ahead. Products wait where it is empty; all
        blocks have equal parts of the bytes, and what L2 keeps comes at its bandwidth.
        """
        at = card, self.grid.blocks, self.threads
        longest = self.threads // 32 * self.depth * 1024 * self.grid.blocks / card.read_Bps
        share = min(1.0, card.kept / self.kept) if self.kept else 0.0
        # The queue, and what a phase takes of it, as seconds of reading.
        queue, taken = 0.0, self.exchanged / card.read_Bps
        for number, step in enumerate(self.steps):
            for cost in step:
                held = cost.nbytes * share if cost.kept and number else 0.0
                wanted = (cost.nbytes - held) / card.read_Bps + held / card.cache_Bps
                multiplying = cost.multiplying(card)
                before = cost.seconds(*at) - multiplying
                queue = min(longest, queue + before)
                spent = max(multiplying, wanted - queue)
                queue = min(longest, max(queue + spent - wanted, 0.0))
                taken += before + spent
        return taken

    # ---- A phase

    def _cost(self, index: int, step: int) -> Cost:
        phase = self.tables.phases[index]
        of: dict[Operation, Callable[[], Cost]] = {
            Operation.PRODUCT: lambda: self._product(index, step),
            Operation.NORMALIZE: lambda: Cost("norm", reads=self._whole(phase)),
            Operation.ATTEND: lambda: self._attend(phase),
            Operation.DRAW: lambda: self._draw(phase, step),
            Operation.EMBED: lambda: self._embed(phase, step),
            Operation.TEXT: lambda: Cost("text", reads=(self._lists(),), alone=TEXT),
        }
        return of[Operation(phase.operation)]()

    def _whole(self, phase: Phase) -> tuple[tuple[int, int], ...]:
        """An exchange of which a block reads all, or none where x was there before."""
        made = 2 * phase.columns * self.rows
        return ((made, made),) if phase.from_ != NONE else ()

    def _product(self, index: int, step: int) -> Cost:
        phase, matrix = self.tables.phases[index], self.tables.matrices[index]
        rows, blocks, threads = self.rows // phase.fold, self.grid.blocks, self.threads
        order = Order(matrix.order)
        jobs = jobs_of(matrix)
        if order is Order.ACTIVE:
            jobs = -(-self._program.active_rows[step] // (2 * OCTET))
        each = -(-3 * matrix.job // (2 * OCTET)) if order is Order.HEADS else 1
        octets = {Order.HALF: 1, Order.HEADS: 3 * matrix.job // OCTET}.get(order, 2)
        row = matrix.k * matrix.bits // 8 + self._scales(matrix)
        tiles, job = -(-jobs // blocks) * each, octets * OCTET * row
        units = matrix.k // COLUMNS
        stagings, issued = self._stages(matrix, units, tiles, each)
        items = rows * matrix.k // OCTET
        width = OCTET if order in (Order.HALF, Order.GATED) else 2 * OCTET
        results = (rows - 1) * tiles * width / 32
        classes = classes_of(matrix)
        sums = 2 * classes if order is Order.GATED else classes
        beside = (stagings * items - matrix.k / OCTET) / 32 * STAGE + results * (
            sums * SUM + PUBLISH
        )
        if order is Order.HEADS:
            heads = matrix.job // self.tables.fields["head_dim"] * tiles // each
            beside += (rows - 1) * heads * OWN
        chunks = -(-matrix.k // min(self._program.x_columns, matrix.k))
        return Cost(
            name_of(self.tables, index),
            bits=matrix.bits,
            nbytes=jobs * job,
            largest=tiles // each * job,
            tiles=tiles,
            mean_tiles=jobs * each / blocks,
            units=tiles * units,
            issued=issued,
            found=(FOUND_OF_HEADS if order is Order.HEADS else FOUND) * classes / units,
            reads=self._whole(phase),
            items=-(-items // threads),
            stagings=stagings * chunks,
            beside=beside / SCHEDULERS,
            alone=OWN_CLOCKS if order is Order.HEADS else 0.0,
            kept=bool(matrix.keep),
        )

    def _stages(self, matrix: Matrix, units: int, tiles: int, each: int) -> tuple[int, int]:
        """How often all of x is staged, and units of a block's busiest scheduler."""
        program, warps = self._program, self.threads // 32
        classes = classes_of(matrix)
        together = max(program.sums_floats // sums_of_job(matrix, self.rows), 1) * each
        of_class = [len(range(c, units, classes)) for c in range(classes)]
        loads = Counter[int]()
        groups = -(-tiles // together)
        for group in range(groups):
            count = min(together, tiles - group * together)
            for task in range(count * classes):
                loads[task % warps % SCHEDULERS] += of_class[task % classes]
        whole = program.x_columns >= matrix.k
        return (1 if whole else groups), max(loads.values())

    @property
    def _program(self) -> Program:
        return self.divided[0]

    def _scales(self, matrix: Matrix) -> int:
        """Bytes of a row's scales, and zeros, which int4 is taken to have."""
        groups = matrix.k // COLUMNS if matrix.grouped else int(matrix.bits == 8)
        return groups * (4 if matrix.bits == 4 else 2)

    def _attend(self, phase: Phase) -> Cost:
        fields = self.tables.fields
        heads, kv_heads, width = (fields[x] for x in ("heads", "kv_heads", "head_dim"))
        share, size = heads // kv_heads, part_size(self.context)
        parts = -(-self.context // size)
        jobs = -(-self.rows * kv_heads * parts // self.grid.blocks)
        positions = min(size, self.context) * jobs
        reads = [(2 * (share + 2) * width * jobs, 2 * phase.columns * self.rows)]
        if parts > 1:
            part = 4 * share * (width + 2) * parts
            reads.append((part, part * self.rows * kv_heads))
        made = 4 * kv_heads * width * self.context * self.rows
        beside = positions / 2 * share * ATTEND / SCHEDULERS
        return Cost("attention", reads=tuple(reads), beside=beside, read=made)

    def _draw(self, phase: Phase, step: int) -> Cost:
        active = self._program.active_count[step]
        size = self.tables.code_steps[step].widest
        jobs = -(-self.rows * active // self.grid.blocks)
        logits = 2 * phase.columns * self.rows
        return Cost("draw", reads=((2 * size, logits),), alone=jobs * ROUND)

    def _lists(self) -> tuple[int, int]:
        """What a block that settles a row's text reads of all blocks, with top-k, and all of it."""
        row = 8 * (1 + LISTED) * self.grid.blocks
        return row * -(-self.rows // self.grid.blocks), row * self.rows

    def _embed(self, phase: Phase, step: int) -> Cost:
        if step + 1 == self.tables.steps:
            return Cost("embed")
        drawn = 8 * self._program.active_count[step] * self.rows
        return Cost("embed", reads=((drawn, drawn),))


def classes_of(matrix: Matrix) -> int:
    """Of units, whose sums are apart (csrc/cuda/row_order.cuh)."""
    return min(matrix.k // COLUMNS, 16 if matrix.k >= WHOLE_CLASSES else 8)


def name_of(tables: Tables, index: int) -> str:
    """Of a product."""
    phase, matrix = tables.phases[index], tables.matrices[index]
    by_order = {
        Order.HEADS: "qkv and attention",
        Order.GATED: "gate/up",
        Order.ACTIVE: "code heads",
    }
    if name := by_order.get(Order(matrix.order)):
        return name
    if phase.output != NONE:
        return {"patches": "joint", "logits": "text head"}[tables.names[phase.output]]
    if phase.residual != NONE or phase.residual_input != NONE:
        return "down" if tables.matrices[index - 1].order == Order.GATED else "out"
    return "qkv" if tables.phases[index + 1].operation == Operation.ATTEND else "joint"
