"""The tables of the persistent kernel: what csrc/cuda/engine is told of a transformer.

A launch goes through phases, each of which reads what one before it has made. What blocks exchange
are vectors [rows, columns] in the dtype that is computed in; a vector's number is that of the
columns before it, so one table serves every number of rows. Every step of a loop has vectors of its
own.

`csrc/cuda/engine/program.cuh` has the same structures; `mimo_fast_engine_sizes` states their sizes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from math import lcm

import torch
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.adapted import AdaptedWeight, AnyWeight
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, nbytes
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.sample_codes import CodeStep

NONE = -1
POINTERS, MOST_ACTIVE, MOST_STEPS, MOST_ROWS, MOST_TOGETHER = 12, 8, 16, 8, 4
OCTET = 8
"""Rows of W that go together, and columns of what is exchanged."""

COLUMNS = cuda.COLUMNS
DRAWN = 4
"""Columns of a code that was drawn."""

PARTS = 8
"""Parts of a row's positions, at most, that attention is divided into."""

OF_TEXT = 32
"""Pieces of 4 columns that a block publishes of a row whose text is drawn."""

MOST_IDS = 2**20 - 1
"""Ids of text, at most."""

OWN_BYTES = 1024
"""Of a head of a row in `own_cache`: 16 keys and 16 values of 16."""

MOST_NORMED, MOST_POSITIONS, MOST_HEADS_JOB = 8192, 16, 48
"""At most: columns of what is normed; positions, and columns of q in a job, of HEADS."""


class Operation(IntEnum):
    PRODUCT, NORMALIZE, ATTEND, DRAW, EMBED = range(5)
    PRODUCT_OF_ROWS, ATTEND_RING, ATTEND_FRAMES, TEXT = range(5, 9)


class Order(IntEnum):
    """Which rows of W a tile has, and what becomes of its sums."""

    WHOLE, HALF, GATED, HEADS, ACTIVE = range(5)


class Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "scales", "zeros")),
        *(
            (name, ctypes.c_int32)
            for name in ("n", "k", "bits", "grouped", "order", "first", "keep", "job")
        ),
    )


class Phase(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "bias")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("operation", "from_", "columns", "to", "width", "residual"),
                *("input", "residual_input", "output", "from_prologue"),
                *("layer", "fold", "partial"),
            )
        ),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("layer_norm", "layer_norm_bias")),
        *((name, ctypes.c_int32) for name in ("gelu", "spare")),
    )


def _pointers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, ctypes.c_void_p) for name in names)


def _integers(*names: str, kind: type = ctypes.c_int32) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names)


class Program(ctypes.Structure):
    _fields_ = (
        *_pointers("matrices", "phases"),
        *_integers("count", "loop_begin", "loop_end", "steps", "loop_columns", "rows"),
        *_pointers("exchanged", "error"),
        ("pointers", ctypes.c_void_p * POINTERS),
        *_pointers("rope"),
        *_integers("positions", "heads", "kv_heads", "head_dim"),
        *_integers("together", "causal", "cached", "spare"),
        *_pointers("own_cache", "keys", "values"),
        *_integers("layer_stride", "slot_stride", "head_stride", kind=ctypes.c_int64),
        *_integers("capacity", "stream_rows"),
        *_pointers("slots", "starts"),
        ("active", ctypes.c_void_p * MOST_STEPS),
        ("active_count", ctypes.c_int32 * MOST_STEPS),
        ("first_row", ctypes.c_int32 * MOST_STEPS),
        ("active_rows", ctypes.c_int32 * MOST_STEPS),
        *_pointers("embeddings"),
        *_integers("table_rows", "embed_dim"),
        *_pointers("noise", "temperature", "top_k", "tail", "greedy", "codes"),
        *_integers("channels", "frames"),
        *_pointers("seeds", "draws", "banned", "tokens"),
        *_integers("banned_stride", kind=ctypes.c_int64),
        *_integers("vocabulary", "text_slot"),
        *_integers("x_columns", "sums_floats", "scratch_bytes", "pause"),
        *_pointers("clocks"),
        *_integers("context", "ahead", "groups", "stream_groups", "group_rows", "pointer_columns"),
        *_integers("group_values", kind=ctypes.c_int64),
        *_pointers("kept_keys", "kept_values"),
        *_integers("layers", "fresh"),
    )


@dataclass(frozen=True)
class Vector:
    """What phases exchange, [rows, columns].

    Args:
        first: its number; of a loop's, that of the first step.
        looped: whether every step has one of its own.
    """

    first: int
    columns: int
    looped: bool = False


def job_columns(head_dim: int) -> int:
    """Columns of q that a job of HEADS has: whole heads and whole octets."""
    return lcm(OCTET, head_dim)


class Tables:
    """Phases in their order, and what they read.

    A method that adds a phase returns the vector that it makes; x of a phase is a vector, or the
    name of an input that each launch gives, [rows, columns].

    Args:
        blocks: that a launch has. Tiles go round from one product to the next, so that all blocks
            read as much of the weights as they can.
        kept_bytes: weights, from the first of a loop on, that are to stay in L2.

    Attributes:
        columns, loop_columns: Of all vectors outside the loop, and of those of a step.
        names: Of inputs and outputs, by their numbers.
        fields: Of `Program`, the same in every launch.
        code_steps: Which heads are active in each step of the loop.
        kept: Tensors whose addresses the tables hold.
        most_rows: That a launch takes.
        least_x: Columns of x that shared memory holds at least.
    """

    most_rows = MOST_ROWS
    least_x = 0

    def __init__(self, dtype: torch.dtype, blocks: int, kept_bytes: int = 0) -> None:
        self.dtype, self.blocks = dtype, blocks
        self.matrices, self.phases = list[Matrix](), list[Phase]()
        self.names = list[str]()
        self.fields = dict[str, int]()
        self.kept = list[Tensor]()
        self.code_steps: Sequence[CodeStep] = ()
        self.columns = self.loop_columns = 0
        self.steps, self.loop = 1, range(0)
        self._looping = False
        self._next_block, self._left_to_keep = 0, kept_bytes

    # ---- Vectors and pointers

    def vector(self, columns: int, looped: bool | None = None) -> Vector:
        """One more; by default of the loop if that has begun.

        Raises:
            ValueError: columns are no whole octets, or it is outside after one of the loop.
        """
        looped = self._looping if looped is None else looped
        if columns % OCTET or columns < 1:
            raise ValueError(f"a vector of {columns} columns is not made of octets")
        if looped:
            made = Vector(self.columns + self.loop_columns, columns, looped)
            self.loop_columns += columns
        elif self.loop_columns:
            raise ValueError("vectors outside the loop come before those inside")
        else:
            made = Vector(self.columns, columns)
            self.columns += columns
        return made

    @property
    def all_columns(self) -> int:
        """Columns that are exchanged in a launch."""
        return self.columns + self.steps * self.loop_columns

    def pointer(self, name: str) -> int:
        """The number of an input or output."""
        if name not in self.names:
            if len(self.names) == POINTERS:
                raise ValueError(f"more than {POINTERS} inputs and outputs")
            self.names.append(name)
        return self.names.index(name)

    def keep(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the tables."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def set(self, **fields: int | Tensor) -> None:
        """Fields of `Program` that are the same in every launch."""
        for name, value in fields.items():
            self.fields[name] = self.keep(value) if isinstance(value, Tensor) else value

    @contextmanager
    def repeated(self, steps: int) -> Iterator[None]:
        """The phases that are added inside are repeated; they are the last ones."""
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"{steps} steps, not 1 to {MOST_STEPS}")
        begin, self.steps, self._looping = len(self.phases), steps, True
        yield
        self.loop, self._looping = range(begin, len(self.phases)), False

    # ---- Phases

    def product(
        self,
        weight: AnyWeight | Tensor,
        x: Vector | str,
        *,
        norm: RMSNorm | None = None,
        residual: Vector | str | None = None,
        order: Order = Order.WHOLE,
        job: int = 0,
        layer: int = 0,
        to: Vector | None = None,
        width: int = 0,
        output: str | None = None,
    ) -> Vector:
        """A product: what the epilogues leave of norm(x) W^T + b.

        Args:
            order: WHOLE becomes HALF where there are fewer tiles than blocks.
            job: of HEADS, columns of q in a job.
            to: the vector that it fills; by default a new one.
            width: columns of the result, where W does not state them.
            output: the result as an output, too, if it has a name.
        """
        matrix = self._matrix(weight, order, job)
        width = width or width_of(matrix)
        to = to or self.vector(width)
        phase = self._phase(Operation.PRODUCT, x, matrix.k, to, width, residual, norm)
        phase.layer = layer
        if output is not None:
            phase.output = self.pointer(output)
        self._add_product(phase, matrix, weight)
        return to

    def deliver(self, weight: AnyWeight, x: Vector, output: str, fold: int = 1) -> None:
        """x W^T + b as an output [rows / fold, N], which no phase reads.

        fold: neighbouring rows that are one row of x.
        """
        matrix = self._matrix(weight, Order.WHOLE, 0)
        phase = self._phase(Operation.PRODUCT, x, matrix.k, None, matrix.n)
        phase.fold, phase.output = fold, self.pointer(output)
        self._add_product(phase, matrix, weight)

    def _add_product(self, phase: Phase, matrix: Matrix, weight: AnyWeight | Tensor) -> None:
        bias = weight.bias if isinstance(weight, QuantizedWeight) else None
        if isinstance(weight, Weight):
            bias = weight.biases[0]
        if bias is not None:
            phase.bias = self.keep(_aligned(bias))
        self._add(phase, matrix)

    def normalize(self, x: Vector | str, norm: RMSNorm, output: str | None = None) -> Vector:
        """rms_norm(x), as an output, too, if it has a name."""
        columns = len(norm.weight)
        to = self.vector(columns)
        phase = self._phase(Operation.NORMALIZE, x, columns, to, columns, None, norm)
        if output is not None:
            phase.output = self.pointer(output)
        self._add(phase)
        return to

    def attend(self, qkv: Vector, heads: int, kv_heads: int, head_dim: int, layer: int) -> Vector:
        """Attention of one new position of each row over the cache, in parts."""
        share = heads // kv_heads
        # Of float32, which is two columns.
        partial = self.vector(2 * kv_heads * PARTS * share * (head_dim + 2))
        to = self.vector(heads * head_dim)
        phase = self._phase(Operation.ATTEND, qkv, qkv.columns, to, to.columns)
        phase.layer, phase.partial = layer, partial.first
        self._add(phase)
        return to

    def draw(self, logits: Vector) -> Vector:
        """The codes of a step's active channels."""
        to = self.vector(DRAWN * MOST_ACTIVE)
        self._add(self._phase(Operation.DRAW, logits, logits.columns, to, to.columns))
        return to

    def text(self, logits: Vector, vocabulary: int, slot: int = 0) -> None:
        """The last phase: each row's text token, where a launch is given `tokens`.

        slot: of its noise.

        Raises:
            ValueError: the phase before is not the product that makes the logits, it is in a loop,
                or there are not so many logits.
        """
        before = self.phases[-1]
        made = before.operation == Operation.PRODUCT and before.to == logits.first
        if not made or self._looping:
            raise ValueError("text is drawn once, right after the product that makes its logits")
        if not 1 <= vocabulary <= min(logits.columns, MOST_IDS):
            raise ValueError(f"{vocabulary} ids of {logits.columns} logits")
        phase = self._phase(Operation.TEXT, logits, logits.columns, None, vocabulary)
        phase.partial = self.vector(4 * OF_TEXT * self.blocks).first
        self._add(phase)
        self.set(vocabulary=vocabulary, text_slot=slot)

    def embed(self, drawn: Vector, to: Vector) -> None:
        """The sum of the codes' embeddings, as the next step's `to`."""
        phase = self._phase(Operation.EMBED, drawn, drawn.columns, to, to.columns)
        phase.from_prologue |= 4
        self._add(phase)

    def _phase(
        self,
        operation: Operation,
        x: Vector | str,
        columns: int,
        to: Vector | None,
        width: int,
        residual: Vector | str | None = None,
        norm: RMSNorm | None = None,
    ) -> Phase:
        phase = Phase(
            operation=operation,
            from_=NONE,
            columns=columns,
            to=NONE if to is None else to.first,
            width=width,
            residual=NONE,
            input=NONE,
            residual_input=NONE,
            output=NONE,
            fold=1,
            partial=NONE,
        )
        for i, (given, number, input_) in enumerate(
            ((x, "from_", "input"), (residual, "residual", "residual_input"))
        ):
            if isinstance(given, str):
                setattr(phase, input_, self.pointer(given))
            elif given is not None:
                setattr(phase, number, given.first)
                phase.from_prologue |= (self._looping and not given.looped) << i
        if norm is not None:
            phase.norm, phase.eps = self.keep(_aligned(norm.weight)), norm.eps
        return phase

    def _add(self, phase: Phase, matrix: Matrix | None = None) -> None:
        if self.loop or (self.phases and self.phases[-1].operation == Operation.TEXT):
            raise ValueError("nothing comes after the loop, or after the text")
        self.phases.append(phase)
        self.matrices.append(matrix or Matrix())

    def _matrix(self, weight: AnyWeight | Tensor, order: Order, job: int) -> Matrix:
        assert not isinstance(weight, AdaptedWeight)
        if isinstance(weight, Weight):
            (weight,) = weight.blocks
        if isinstance(weight, QuantizedWeight):
            parts: tuple[Tensor | None, ...] = weight.words, weight.scales, weight.zeros
            bits, grouped = weight.bits, weight.group == COLUMNS
        else:
            parts, bits, grouped = (weight, None, None), 16, False
        n, k = weight.shape
        if order is Order.WHOLE and n < 2 * OCTET * self.blocks:
            order = Order.HALF
        addresses = (None if part is None else self.keep(part) for part in parts)
        matrix = Matrix(*addresses, n, k, bits, grouped, order, self._next_block, 0, job)
        self._next_block = (self._next_block + jobs_of(matrix)) % self.blocks
        size = nbytes(*parts)
        if self._looping and size <= self._left_to_keep:
            matrix.keep = 1
            self._left_to_keep -= size
        return matrix

    # ---- On the device

    def on_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Matrices and phases, as bytes."""
        parts = (
            (Matrix * len(self.matrices))(*self.matrices),
            (Phase * len(self.phases))(*self.phases),
        )
        matrices, phases = (
            torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device, copy=True)
            for part in parts
        )
        return matrices, phases


def jobs_of(matrix: Matrix) -> int:
    """What blocks divide among themselves; of ACTIVE as if all rows were."""
    if matrix.order == Order.HEADS:
        return matrix.n // 3 // matrix.job
    octets = -(-width_of(matrix) // OCTET)
    return octets if matrix.order in (Order.HALF, Order.GATED) else -(-octets // 2)


def width_of(matrix: Matrix) -> int:
    if matrix.order == Order.HEADS:
        return int(matrix.n) // 3
    return int(matrix.n) // 2 if matrix.order == Order.GATED else int(matrix.n)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied unless contiguous at a multiple of 16 bytes."""
    if tensor.data_ptr() % 16 == 0 and tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
