"""Launches of the persistent kernel, and what it refuses.

A launch is cooperative: all its blocks run at once, one on each multiprocessor, and wait for what
others make. One that waits too long gives up and says so in a word in device memory; what it was to
make is then NaN, or NOT_FINITE where it is codes.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.cuda.engine import (
    COLUMNS,
    MOST_HEADS_JOB,
    MOST_NORMED,
    MOST_POSITIONS,
    OCTET,
    Matrix,
    Order,
    Phase,
    Program,
    Tables,
    job_columns,
    jobs_of,
)
from mimo_fast.kernels.defaults import ENVIRONMENT
from mimo_fast.kernels.matmul.adapted import AnyWeight
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm

THREADS, DEPTHS = (512, 256, 128), (8, 4)
"""Threads of a block, and parts of 1 KB that each warp asks for ahead; the first that leave enough
shared memory."""

WHOLE_CLASSES, LEAST_X = 2048, 1024
"""Columns of x at a time: a multiple of the first, or at least the second."""

KEPT_SHARE = 0.6
"""Of L2, for weights that are to stay in it: an H100 with 50 MB reads 143 MB again and again the
fastest when told to keep 32 MB of them (benchmarks/results/2026-11-28-h100-engine.json)."""

_PREFIX = "mimo_fast_engine_"


@cache
def library() -> ctypes.CDLL | None:
    """The library with the functions of the persistent kernel; None where it lacks them."""
    loaded = cuda.library()
    return None if loaded is None or not hasattr(loaded, f"{_PREFIX}run") else declared(loaded)


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of these functions in a library, and returns it.

    Raises:
        RuntimeError: its structures are not these.
    """
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    program = ctypes.POINTER(Program)
    for name, arguments in (
        ("run", [program, number, *[integer] * 4, pointer, pointer, integer, pointer]),
        ("shared", [program, integer, integer]),
        ("scratch", [integer] * 4),
        ("draw_scratch", [integer]),
        ("ring", [integer] * 2),
        ("frames", [integer] * 3),
        ("text_scratch", [integer] * 2),
        ("sizes", [pointer]),
    ):
        function = getattr(loaded, _PREFIX + name)
        function.argtypes, function.restype = arguments, integer
    sizes = (integer * 3)()
    loaded.mimo_fast_engine_sizes(sizes)
    own = [ctypes.sizeof(structure) for structure in (Matrix, Phase, Program)]
    if [*sizes] != own:
        raise RuntimeError(f"the persistent kernel's structures have {[*sizes]} bytes, not {own}")
    return loaded


@dataclass(frozen=True)
class Grid:
    """How a device is divided.

    Args:
        blocks: one on each multiprocessor.
        shared: bytes of shared memory that a block may have.
        threads, depth, x_columns: of `THREADS` and `DEPTHS`, and columns of x at a time; None for
            what fits best.
        kept_bytes: of weights that are to stay in L2 over a loop.
    """

    blocks: int
    shared: int
    threads: int | None = None
    depth: int | None = None
    x_columns: int | None = None
    kept_bytes: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Grid:
        """That of a GPU."""
        card = torch.cuda.get_device_properties(device)
        shared: int = card.shared_memory_per_block_optin  # type: ignore[attr-defined]
        kept = int(KEPT_SHARE * card.L2_cache_size)
        return cls(card.multi_processor_count, shared, kept_bytes=kept)


class ErrorWord:
    """What the launches of one model tell when they give up.

    Args:
        device: that they run on.
        what: gives up, and what then happens, for the warning.

    Attributes:
        word: int32 [1], not 0 once a launch has given up, as later ones then do.
        on: Whether none is known to have given up.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self.word = torch.zeros(1, dtype=torch.int32, device=device)
        self.on, self._what = True, what

    def gave_up(self) -> bool:
        """Whether a launch has given up since this was last asked; waits for the device.

        It warns then, and `on` is False from now on.
        """
        if not self.on or not int(self.word):
            return False
        self.on = False
        warnings.warn(f"{self._what}, as from the start with {ENVIRONMENT}=0", stacklevel=3)
        return True


class Launcher:
    """Launches of one table.

    Args:
        error: int32 [1], 0 at first; not 0 once a launch has given up, as later ones then do.
        loaded: another build of the library than the package's.
    """

    def __init__(
        self,
        tables: Tables,
        grid: Grid,
        error: Tensor,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        found = library() if loaded is None else loaded
        assert found is not None
        self._library, self._tables, self._grid, self.error = found, tables, grid, error
        self._on_device = tables.on_device(error.device)
        # A captured launch holds the address of what was there when it was captured.
        self._exchanged = list[Tensor]()
        self._programs = dict[tuple[int, ...], tuple[Program, tuple[int, int]]]()

    def holds(self, rows: int, capacity: int = 0, stream_rows: int = 0, groups: int = 0) -> bool:
        """Whether a block's shared memory holds what so many rows need, over a cache of so many
        positions, if it attends over one; the others are fields of `Program`, as for `run`."""
        try:
            self._fixed(rows, capacity, stream_rows, groups)
        except ValueError:
            return False
        return True

    def run(
        self,
        rows: int,
        given: Mapping[str, Tensor],
        outputs: Sequence[Tensor],
        **fields: int | Tensor,
    ) -> None:
        """Launches it for some rows on the current stream.

        Args:
            rows: of x; with a field `groups`, of each of them.
            given: inputs and outputs of the tables by name, contiguous.
            outputs: what the launch writes, among them tensors of `given`.
            fields: of `Program`, of this launch alone.

        Raises:
            ValueError: there are more rows than the tables take, an input or output is missing, or
                a block's shared memory does not hold what so many rows need.
            RuntimeError: the device refused the launch.
        """
        most = self._tables.most_rows
        if not 1 <= rows <= most or given.keys() != {*self._tables.names}:
            problem = f"{rows} rows and {[*given]}, not 1 to {most} and {self._tables.names}"
            raise ValueError(problem)
        form = [fields.get(name, 0) for name in ("capacity", "stream_rows", "groups")]
        capacity, stream_rows, groups = (int(each) for each in form)
        fixed, (threads, depth) = self._fixed(rows, capacity, stream_rows, groups)
        program = Program.from_buffer_copy(fixed)
        for i, name in enumerate(self._tables.names):
            assert given[name].is_contiguous()
            program.pointers[i] = given[name].data_ptr()
        for name, value in fields.items():
            setattr(program, name, value.data_ptr() if isinstance(value, Tensor) else value)
        count, grid = self._tables.all_columns * rows * max(1, groups), self._grid
        exchanged = self._room(count)
        program.exchanged = exchanged.data_ptr()
        addresses = (ctypes.c_void_p * len(outputs))(*(output.data_ptr() for output in outputs))
        sizes = (ctypes.c_int64 * len(outputs))(*(output.nbytes for output in outputs))
        blocks = grid.blocks // max(1, groups)
        how = self._tables.dtype == torch.float16, blocks, threads, depth
        with cuda._current(self.error):
            error = self._library.mimo_fast_engine_run(
                ctypes.byref(program),
                count * exchanged.itemsize,
                *how,
                addresses,
                sizes,
                len(outputs),
                cuda._stream(self.error),
            )
        cuda._check(error, f"a persistent launch of {rows} rows")

    def attempt(
        self,
        rows: int,
        given: Mapping[str, Tensor],
        outputs: Sequence[Tensor],
        **fields: int | Tensor,
    ) -> None:
        """`run`, but a launch that the device refuses is one that gave up, except in a capture."""
        try:
            self.run(rows, given, outputs, **fields)
        except RuntimeError:
            if self.error.is_cuda and torch.cuda.is_current_stream_capturing():
                raise
            self.error.fill_(1)
            for output in outputs:
                output.view(torch.uint8).fill_(0xFF)

    def _room(self, count: int) -> Tensor:
        """At least so many values, of which those of earlier launches stay where they are."""
        if not self._exchanged or self._exchanged[-1].numel() < count:
            dtype, device = self._tables.dtype, self.error.device
            self._exchanged.append(torch.empty(count, dtype=dtype, device=device))
        return self._exchanged[-1]

    def _fixed(
        self, rows: int, capacity: int, stream_rows: int = 0, groups: int = 0
    ) -> tuple[Program, tuple[int, int]]:
        """What all launches of so many rows over such a cache are told, their threads and depth."""
        form = rows, capacity, stream_rows, groups
        if form not in self._programs:
            tables = self._tables
            matrices, phases = self._on_device
            program = Program(
                matrices=matrices.data_ptr(),
                phases=phases.data_ptr(),
                count=len(tables.phases),
                loop_begin=tables.loop.start,
                loop_end=tables.loop.stop or len(tables.phases),
                steps=tables.steps,
                loop_columns=tables.loop_columns,
                rows=rows,
                capacity=capacity,
                stream_rows=stream_rows,
                groups=groups,
                group_rows=rows,
                group_values=tables.all_columns * rows,
                error=self.error.data_ptr(),
            )
            for name, value in tables.fields.items():
                setattr(program, name, value)
            for i, step in enumerate(tables.code_steps):
                program.active[i], program.active_count[i] = (
                    step.heads.data_ptr(),
                    step.heads.shape[1],
                )
                program.first_row[i], program.active_rows[i] = step.first, step.last - step.first
            program.scratch_bytes = self._scratch(rows, capacity, stream_rows)
            self._programs[form] = program, self._divide(program)
        return self._programs[form]

    def _scratch(self, rows: int, capacity: int, stream_rows: int) -> int:
        """Bytes that attention over a cache, or the draw of a code or token, takes of x's place."""
        tables, bytes_of = self._tables, self._library
        if stream_rows:
            context, ahead = tables.fields["context"], tables.fields.get("ahead")
            if ahead is not None:
                return int(bytes_of.mimo_fast_engine_frames(rows, context, ahead))
            return int(bytes_of.mimo_fast_engine_ring(stream_rows, context))
        widest = max((step.widest for step in tables.code_steps), default=0)
        needed = [bytes_of.mimo_fast_engine_draw_scratch(widest)]
        if "vocabulary" in tables.fields:
            needed.append(bytes_of.mimo_fast_engine_text_scratch(rows, self._grid.blocks))
        if capacity:
            shape = (tables.fields[name] for name in ("heads", "kv_heads", "head_dim"))
            needed.append(bytes_of.mimo_fast_engine_scratch(*shape, capacity))
        return int(max(needed))

    def _divide(self, program: Program) -> tuple[int, int]:
        """Divides shared memory for a program; threads and depth."""
        grid, products = self._grid, [each for each in self._tables.matrices if each.n]
        least = max(sums_of_job(each, program.rows) for each in products)
        most = max(
            sums_of_job(each, program.rows) * -(-jobs_of(each) // grid.blocks) for each in products
        )
        wanted = self._divisions(sorted({each.k for each in products}))
        for program.x_columns, threads, depth in wanted:
            program.sums_floats = least
            told = ctypes.byref(program), threads, depth
            if (left := grid.shared - self._library.mimo_fast_engine_shared(*told)) >= 0:
                # Two buffers, of whole pieces of 16 bytes.
                program.sums_floats += min(most - least, left // 32 * 4)
                return threads, depth
        rows = f"{program.rows} rows of up to {max(each.k for each in products)} columns"
        raise ValueError(f"{grid.shared} bytes of shared memory do not hold {rows}")

    def _divisions(self, widths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Columns of x at a time, threads and depth, the best first.

        Where x does not fit, each group of tiles has it staged anew: so much so that room for whole
        rows of all but the widest products comes before a deeper queue.

        widths: of the products' x, ascending.
        """
        grid, widest = self._grid, widths[-1]
        several = range((widest - 1) // WHOLE_CLASSES * WHOLE_CLASSES, 0, -WHOLE_CLASSES)
        few = range(min(widest, WHOLE_CLASSES) - COLUMNS, LEAST_X - 1, -COLUMNS)
        usual = [widest, *several, *few]
        # Where columns are normed as x is staged, all of them are there at once.
        if least := self._tables.least_x:
            usual = [*(columns for columns in usual if columns > least), least]
        if grid.x_columns is not None:
            usual = [grid.x_columns]
        enough = widths[-2] if len(widths) > 1 else widest
        for threads in THREADS if grid.threads is None else (grid.threads,):
            for whole in (True, False):
                for depth in DEPTHS if grid.depth is None else (grid.depth,):
                    for columns in usual:
                        last = depth == (grid.depth or DEPTHS[-1])
                        if (columns >= enough) is whole and (last or columns not in few):
                            yield columns, threads, depth


def sums_of_job(matrix: Matrix, rows: int) -> int:
    """float32 sums of a job: of each tile and class [rows, 16], padded as `sums_of_task` in
    csrc/cuda/engine/engine.cuh has it."""
    classes = min(matrix.k // COLUMNS, 16 if matrix.k >= WHOLE_CLASSES else 8)
    tiles = -(-3 * matrix.job // (2 * OCTET)) if matrix.order == Order.HEADS else 1
    return tiles * classes * rows * (16 if rows == 1 else 20)


@cache
def _probe(device: torch.device) -> int:
    """The CUDA error of a first launch on a device, -1 where it gives up; 0 for none.

    It fails where not all blocks can run at once, as in some parts of a divided GPU.
    """
    grid = Grid.of(device)
    tables = Tables(torch.bfloat16, grid.blocks)
    x, made = (torch.ones(1, LEAST_X, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.zeros(LEAST_X, LEAST_X, dtype=torch.bfloat16, device=device)
    again = tables.product(weight, "x", residual="x")
    tables.normalize(again, RMSNorm(x[0].clone(), 0.0), output="made")
    error = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        Launcher(tables, grid, error).run(1, {"x": x, "made": made}, [made])
    except RuntimeError as refused:
        return int(str(refused).rpartition(" ")[2])
    return 0 if bool((made == 1).all()) else -1


def refuses_device(device: torch.device) -> str:
    """Why the persistent kernel does not run on a device, or "" where it does."""
    if reason := cuda.refuses_device(device):
        return reason
    if library() is None:
        return "the CUDA kernels were built without it"
    if error := _probe(device):
        return f"this GPU refused a launch of all its multiprocessors at once (CUDA error {error})"
    return ""


def refuses_weight(weight: AnyWeight, dtype: torch.dtype, octets: bool = True) -> str:
    """Why it does not take a weight, or "" where it does.

    octets: whether all of its rows are to be whole octets.
    """
    if dtype not in cuda.DTYPES:
        return f"it computes in bfloat16 and float16, not {dtype}"
    if isinstance(weight, QuantizedWeight):
        reason = cuda.refuses_form(weight, dtype)
        if not reason and weight.torch_scales is not None:
            reason = "it is packed for torch's CPU products"
    elif isinstance(weight, Weight):
        reason = _refuses_dense(weight, dtype)
    else:
        reason = "it has an adapter beside it"
    if not reason and ((octets and weight.shape[0] % OCTET) or weight.shape[1] % COLUMNS):
        reason = f"it has {weight.shape[0]} rows of {weight.shape[1]} values"
    return reason and f"a weight: {reason}"


def _refuses_dense(weight: Weight, dtype: torch.dtype) -> str:
    block = weight.blocks[0]
    if len(weight.blocks) > 1:
        return "it is in several row blocks"
    if block.dtype != dtype:
        return f"it is {block.dtype}, not {dtype}"
    whole = block.is_contiguous() and block.data_ptr() % 16 == 0
    return "" if whole else "it is not contiguous, or not aligned to 16 bytes"


def refuses_width(columns: int) -> str:
    """Why it does not norm rows of so many values, or "" where it does."""
    fits = columns % COLUMNS == 0 and columns <= MOST_NORMED
    return "" if fits else f"{columns} columns are no multiple of {COLUMNS} up to {MOST_NORMED}"


def refuses_few_positions(heads: int, kv_heads: int, head_dim: int, positions: int) -> str:
    """Why it does not attend within a product, or "" where it does."""
    if heads != kv_heads:
        return f"{heads} heads share {kv_heads} of keys and values"
    job = job_columns(head_dim)
    if head_dim % 4 or head_dim > 16 or job > MOST_HEADS_JOB or heads * head_dim % job:
        return f"{heads} heads of {head_dim}"
    return "" if positions <= MOST_POSITIONS else f"{positions} positions"


def refuses_cache_of(head_dim: int) -> str:
    """Why it does not attend over a cache, or "" where it does."""
    fits = head_dim in (8, 16, 32, 64, 128)
    return "" if fits else f"heads of {head_dim}"
