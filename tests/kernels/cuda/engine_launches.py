"""Launches of the persistent kernel's source (csrc/cuda/engine), compiled for the CPU: tables of a
few phases, and buffers whose old values would show."""

import ctypes
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from emulated import SOURCES, compile_for_cpu
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.cuda.engine import COLUMNS, OCTET, Order, Tables, Vector
from mimo_fast.kernels.cuda.engine_launch import Grid, Launcher, declared, sums_of_job
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.sample_codes import CodeStep

SOURCE = SOURCES / "engine.cu"
SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on the smallest cards."""

STUCK, DISOWNED = 719, 720
"""What a launch gives that can't go on; of which a block touched what another one owns."""

STALE = 7.0
"""What buffers hold before a launch: a value that would pass for one of the model's."""

FORMATS = ("int4", "int4-sym", "int8", "int8-g128", "dense")


def compiled(target: Path, source: Path = SOURCE) -> ctypes.CDLL:
    """What a source is for the CPU, once for each of its texts."""
    return declared(ctypes.CDLL(str(compile_for_cpu([source], target))))


def faulty_build(folder: Path, bugs: Mapping[str, tuple[str, str]]) -> ctypes.CDLL:
    """A build with all bugs, of which one at most is on: `set_bug`, from 1 on; 0 for none.

    bugs: what is wrong -> text of the source, and what stands in its place, where ON is whether it
        is.
    """
    changes = {
        right: re.sub(r"\bON\b", f"(bug == {number})", wrong)
        for number, (right, wrong) in enumerate(bugs.values(), 1)
    }
    switch = 'inline int bug = 0;\nextern "C" void set_bug(int value) { bug = value; }\n'
    library = changed(folder, changes, switch)
    library.set_looks_in_vain(4)
    return library


def grid_of(blocks: int = 3, threads: int = 64, shared: int = SHARED, **settings: int) -> Grid:
    return Grid(blocks, shared, threads, **settings)


def same(got: Tensor, want: Tensor) -> bool:
    """Whether values are the same, and NaN where the others are."""
    finite = torch.equal(got[~got.isnan()], want[~want.isnan()])
    return finite and torch.equal(got.isnan(), want.isnan())


def tighten(launcher: Launcher, rows: int, capacity: int) -> None:
    """Leaves a block place for the sums of one job alone, so that every other one waits for it."""
    program, _ = launcher._fixed(rows, capacity)
    products = (each for each in launcher._tables.matrices if each.n)
    program.sums_floats = max(sums_of_job(each, rows) for each in products)


class Launches:
    """Launches of one table, each with buffers of its own.

    Args:
        outputs: of the inputs and outputs that a launch is given, what it writes: a name and the
            number of columns.
        tight: whether launches are `tighten`ed.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        tables: Tables,
        grid: Grid,
        outputs: Mapping[str, int],
        tight: bool = False,
    ) -> None:
        self.library, self.tables, self.outputs, self.tight = library, tables, outputs, tight
        self.error = torch.zeros(1, dtype=torch.int32)
        self.launcher = Launcher(tables, grid, self.error, library)

    def __call__(
        self,
        rows: int,
        given: Mapping[str, Tensor],
        seed: int = 1,
        fold: int = 1,
        written: Sequence[Tensor] = (),
        **fields: int | Tensor,
    ) -> dict[str, Tensor]:
        """Outputs by name, [rows / fold, columns]; nobody gave up, and what follows an output is as
        it was.

        Raises:
            RuntimeError: the launch could not go on.
        """
        self.library.set_seed_of_fibers(seed)
        count = rows // fold
        rooms = {
            name: torch.full((count + 1, columns), STALE, dtype=self.tables.dtype)
            for name, columns in self.outputs.items()
        }
        made = {name: room[:count] for name, room in rooms.items()}
        self.launcher._room(self.tables.all_columns * rows).fill_(STALE)
        if self.tight:
            capacity = fields.get("capacity", 0)
            assert isinstance(capacity, int)
            tighten(self.launcher, rows, capacity)
        everything = [*made.values(), *written]
        self.launcher.run(rows, {**given, **made}, everything, **fields)
        assert int(self.error) == 0
        assert all(bool((room[count:] == STALE).all()) for room in rooms.values())
        return made

    def vector(self, vector: Vector, rows: int, step: int = 0) -> Tensor:
        """What the last launch has exchanged, [rows, columns]."""
        first = vector.first + (self.tables.loop_columns * step if vector.looped else 0)
        columns = slice(first * rows, (first + vector.columns) * rows)
        return self.launcher._exchanged[-1][columns].view(rows, vector.columns)


def taken(weight: QuantizedWeight | Tensor, bias: Tensor | None) -> QuantizedWeight | Weight:
    """A weight as the tables take it; a quantized one has its bias within."""
    if isinstance(weight, QuantizedWeight):
        return weight
    return Weight.stack([weight], [] if bias is None else [bias])


def today(
    library: ctypes.CDLL,
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """A product by csrc/cuda/quantized_mma.cu or, of a dense weight, row_tiles.cu."""
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    made = torch.full((len(x), columns), torch.nan, dtype=x.dtype)
    around = norm, residual, gated, made, library
    if isinstance(weight, QuantizedWeight):
        return cuda.quantized_mma(x, weight, *around)
    return cuda.row_tiles(x, weight, *around, bias=bias)


def normed(engine, x: Tensor, norm: RMSNorm, grid: Grid) -> Tensor:
    """rms_norm(x) by a phase of its own."""
    tables = Tables(x.dtype, grid.blocks)
    # There is no launch without a product.
    tables.product(torch.eye(128, dtype=x.dtype), "beside")
    tables.normalize("x", norm, output="made")
    launches = Launches(engine, tables, grid, {"made": x.shape[1]})
    return launches(len(x), {"x": x, "beside": x[:, :128].contiguous()})["made"]


class OneProduct:
    """Tables of a single product.

    Args:
        weight: of ACTIVE, that of all channels, dense.
        residual: whether there is one.
        copied: whether x and the residual are vectors that the launch makes of its inputs, by
            products with the identity.
        first: the block that has the first tile.
        fold: neighbouring rows that are one row of x, which is copied then and not normed.
        active: of ACTIVE, the range of rows.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        grid: Grid,
        weight: QuantizedWeight | Tensor,
        dtype: torch.dtype = torch.bfloat16,
        norm: RMSNorm | None = None,
        bias: Tensor | None = None,
        order: Order = Order.WHOLE,
        *,
        residual: bool = False,
        copied: bool = False,
        first: int = 0,
        fold: int = 1,
        active: range = range(0),
        tight: bool = False,
    ) -> None:
        tables, self.fold, self.copied = Tables(dtype, grid.blocks), fold, copied
        n, k = weight.shape
        columns = n // 2 if order is Order.GATED else len(active) or n
        width = -(-columns // OCTET) * OCTET

        def place(name: str, width: int) -> Vector | str:
            identity = torch.eye(width, -(-width // COLUMNS) * COLUMNS, dtype=dtype)
            return tables.product(identity, name) if copied else name

        x, given = place("x", k // fold), taken(weight, bias)
        beside = place("residual", width) if residual else None
        tables._next_block = first % grid.blocks
        self.to: Vector | None = None
        if (width == columns and fold == 1) or active:
            given = weight if active else given
            around = {"norm": norm, "residual": beside, "order": order, "width": width}
            self.to = tables.product(given, x, **around)
            tables.phases[-1].output = tables.pointer("made")
        else:
            # Nobody waits for a result that is not made of octets.
            assert isinstance(x, Vector)
            tables.deliver(given, x, "made", fold)
        if active:
            heads = torch.tensor([[0], [0], [active.start], [len(active)], [0]])
            tables.code_steps = [CodeStep(heads, active.start, active.stop, len(active))]
        made = width if self.to is not None else columns
        self.columns, self.launches = (
            columns,
            Launches(library, tables, grid, {"made": made}, tight),
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None, seed: int = 1) -> Tensor:
        given = {"x": x}
        if residual is not None:
            more = -residual.shape[1] % COLUMNS if self.copied else 0
            given["residual"] = torch.nn.functional.pad(residual, (0, more))
        made = self.launches(len(x), given, seed, self.fold)["made"][:, : self.columns]
        if self.to is not None:
            assert same(self.launches.vector(self.to, len(x))[:, : self.columns], made)
        return made


def changed(folder: Path, changes: Mapping[str, str], before: str = "") -> ctypes.CDLL:
    """A build of the source with these texts in place of others, of which each is there once; with
    a text before all."""
    parts = [path for path in (SOURCES / "engine").glob("*.cuh") if path.name != "grid.cuh"]
    texts = {path: path.read_text() for path in (SOURCE, *parts)}
    for right, wrong in changes.items():
        found = [path for path, text in texts.items() for _ in range(text.count(right))]
        assert len(found) == 1, right
        texts[found[0]] = texts[found[0]].replace(right, wrong)
    texts[SOURCE] = before + texts[SOURCE]
    (folder / "engine").mkdir()
    for path in SOURCES.glob("*.cuh"):
        shutil.copyfile(path, folder / path.name)
    for path, text in texts.items():
        (folder / path.relative_to(SOURCES)).write_text(text)
    return compiled(folder / "changed.so", folder / SOURCE.name)
