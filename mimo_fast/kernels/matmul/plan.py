"""Which implementation computes a product, decided once for a weight.

`TABLE` has every implementation: what it requires of the weight, the device and the dtype, for how
many rows of x it is used, and what of a layer is inside. The first whose requirements hold for a
number of rows computes it; what is not inside runs before (the norm) or after it (SwiGLU, then the
residual) as an operation of its own.

`plan` asks the table once for each weight, device, dtype, MIMO_FAST_KERNELS and whether x needs a
gradient, and keeps the answer with the weight. A call compares its rows with at most a few bounds.

| rows     | quantized, CUDA                    | quantized, Triton           | dense, GPU        |
|----------|------------------------------------|-----------------------------|-------------------|
| 1 ... 4  | mma                                | gemv                        | gemv              |
| 5 ... 64 | mma                                | dot                         | torch's product   |
| ... 96   | mma                                | unpack, torch's product     | torch's product   |
| 97 ...   | unpack, torch's product; or fused  | unpack, torch's product     | torch's product   |

Where the new path ROW_TILES is on, 9 to 256 rows of a quantized weight are tiles, with mma's bits,
and 1 to 256 of a dense one in bfloat16, so that a row has the same bits in any number of these.
With Triton before 3.7 gemv spills registers on nf4, and dot takes 1 ... 4 rows of it as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels import dispatch
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.kernels.dispatch import forced
from mimo_fast.kernels.matmul import cpu
from mimo_fast.kernels.matmul.adapted import StoredWeight
from mimo_fast.kernels.matmul.launch import (
    GEMV_ROWS,
    GROUPS,
    NORMED_ROWS,
    TABLES_FIT,
    cuda_dense_tiles,
    cuda_fused,
    cuda_mma,
    cuda_tiles,
    cuda_unpack_mm,
    dense_blocks_gemv,
    dense_gemv,
    quantized_dot,
    quantized_gemv,
    triton_unpack_mm,
)
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.matmul.reference import dense_product, epilogues
from mimo_fast.kernels.matmul.weight import Weight, check_width
from mimo_fast.kernels.norm import RMSNorm

MANY = sys.maxsize

MMA_ROWS = 96
"""Rows up to which the CUDA mma kernel is used: beyond, unpacking costs less, though more
launches."""

TILES = range(9, 257)
"""Rows for which the CUDA kernel with tiles of rows is used: fewer cost the other one what one
does, and of more arithmetic bounds a product."""

ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16)
WIDE_RANGE = (torch.float32, torch.bfloat16)
"""Of kernels that round x times the norm's weight to x.dtype before they know the row's scale:
float16 has no range for that."""


BOTH: dict[str, Any] = {"residual": True, "swiglu": True}
"""What follows a product, inside."""


@dataclass(frozen=True)
class Setting:
    """What a plan depends on.

    Args:
        forced: MIMO_FAST_KERNELS. gradient: whether x requires one.
    """

    weight: StoredWeight
    device: torch.device
    dtype: torch.dtype
    forced: str
    gradient: bool

    @property
    def packed(self) -> QuantizedWeight:
        """The weight, where it is `quantized`."""
        assert isinstance(self.weight, QuantizedWeight)
        return self.weight


Requirement = Callable[[Setting], str]
"""Why an implementation cannot compute a product, or "" if it can."""


@dataclass(frozen=True)
class Implementation:
    """A row of the table.

    Args:
        run: (x, weight, norm, residual, swiglu) -> y. Those that are not inside are None or False.
        first, last: rows of x for which it is used.
        norm: dtypes of x in which the norm is inside. residual, swiglu: whether they are; a
            residual alone comes after SwiGLU, so it is inside only where both are.
        order: a name of the order of a row's sums where it does not depend on the number of rows,
            else "". Implementations of one order give a row the same bits.
        parted: whether `run` takes x [N, T, K] as N parts with `parts=True`.
    """

    name: str
    run: Callable[..., Tensor]
    requires: tuple[Requirement, ...]
    first: int = 0
    last: int = MANY
    norm: tuple[torch.dtype, ...] = ()
    residual: bool = False
    swiglu: bool = False
    order: str = ""
    parted: bool = False

    def refuses(self, setting: Setting) -> str:
        """The first requirement that does not hold, or ""."""
        return next(filter(None, (require(setting) for require in self.requires)), "")

    def rows(self) -> str:
        """Its range of rows, in words."""
        if self.last == MANY:
            return "any rows" if self.first <= 1 else f"{self.first} rows and more"
        return f"{max(1, self.first)} to {self.last} rows"


def quantized(setting: Setting) -> str:
    return "" if isinstance(setting.weight, QuantizedWeight) else "the weight is dense"


def dense(setting: Setting) -> str:
    return "" if isinstance(setting.weight, Weight) else "the weight is quantized"


def one_block(setting: Setting) -> str:
    assert isinstance(setting.weight, Weight)
    return "" if len(setting.weight.blocks) == 1 else "the weight is in several row blocks"


def no_gradient(setting: Setting) -> str:
    return "x requires a gradient" if setting.gradient else ""


def gpu_kernels(setting: Setting) -> str:
    """Triton's, and those of CUDA that take their place."""
    if setting.forced == "torch":
        return f"{dispatch.ENVIRONMENT}=torch"
    if setting.device.type != "cuda" and setting.forced != "triton":
        return "x is not on a GPU"
    return dispatch.refusal(setting.device) or no_gradient(setting)


def grouped_by_blocks(setting: Setting) -> str:
    """A scale for each of the kernels' blocks, or for the whole row."""
    weight = setting.packed
    if weight.torch_scales is not None:
        return "the weight is packed for torch's CPU products"
    by_row = weight.group == weight.shape[1] and weight.zeros is None
    return "" if weight.group in GROUPS or by_row else f"groups of {weight.group}"


def gemv_takes(setting: Setting) -> str:
    if setting.packed.levels is None or TABLES_FIT:
        return ""
    return f"a table of levels spills registers with Triton {dispatch.TRITON.version}"


def cuda_takes(setting: Setting) -> str:
    return cuda.refuses(setting.packed, setting.device, setting.dtype)


def cuda_takes_dense(setting: Setting) -> str:
    assert isinstance(setting.weight, Weight)
    return cuda.refuses(setting.weight.blocks[0], setting.device, setting.dtype)


def shown(path: NewPath) -> Requirement:
    """That a new path is on."""

    def requires(setting: Setting) -> str:
        on = enabled(path, setting.device)
        return "" if on else "not shown to be faster on this GPU (kernels/defaults.py)"

    return requires


def of_4_bits(setting: Setting) -> str:
    return "" if setting.packed.bits == 4 else "it is for 4 bits"


def native_takes(setting: Setting) -> str:
    return native.refuses(setting.packed) or no_gradient(setting)


def packed_for_torch(setting: Setting) -> str:
    if setting.packed.torch_scales is None:
        return "the weight is not packed for torch's CPU products"
    return "" if setting.dtype == torch.bfloat16 else "x is not bfloat16"


def widening_pays(setting: Setting) -> str:
    if setting.device.type != "cpu":
        return "x is not on a CPU"
    if setting.dtype not in (torch.bfloat16, torch.float16):
        return "x is not of 16 bits"
    if cpu.multiplies(setting.dtype):
        return "the CPU has instructions for 16-bit products"
    return no_gradient(setting)


def native_matmul(
    x: Tensor, weight: QuantizedWeight, norm: RMSNorm | None, residual: Tensor | None, swiglu: bool
) -> Tensor:
    return native.quantized_matmul(check_width(x, weight.shape[1]), weight, norm, residual, swiglu)


def torch_packed(x: Tensor, weight: QuantizedWeight, *_: object) -> Tensor:
    assert weight.torch_scales is not None
    return cpu.packed_product(check_width(x, weight.shape[1]), weight, weight.torch_scales)


def torch_unpacked(x: Tensor, weight: QuantizedWeight, *_: object) -> Tensor:
    return cpu.unpacked_product(check_width(x, weight.shape[1]), weight)


def torch_widened(x: Tensor, weight: Weight, *_: object) -> Tensor:
    return weight.product(lambda block, bias: cpu.widened_product(x, block, bias))


ON_GPU = (quantized, gpu_kernels, grouped_by_blocks)
BY_CUDA = (*ON_GPU, cuda_takes)

TABLE = (
    Implementation(
        "CUDA tiles",
        cuda_tiles,
        (*BY_CUDA, shown(NewPath.ROW_TILES)),
        first=TILES.start,
        last=TILES.stop - 1,
        norm=WIDE_RANGE,
        order="units",
        **BOTH,
    ),
    Implementation(
        "CUDA mma", cuda_mma, BY_CUDA, last=MMA_ROWS, norm=WIDE_RANGE, order="units", **BOTH
    ),
    Implementation(
        "CUDA fused gemm",
        cuda_fused,
        (*BY_CUDA, of_4_bits, shown(NewPath.FUSED_PROMPT_PRODUCTS)),
        first=MMA_ROWS + 1,
        order="blocks",
        **BOTH,
    ),
    Implementation(
        "CUDA unpack + mm",
        cuda_unpack_mm,
        BY_CUDA,
        first=MMA_ROWS + 1,
        residual=True,
        parted=True,
    ),
    Implementation(
        "Triton gemv",
        quantized_gemv,
        (*ON_GPU, gemv_takes),
        last=GEMV_ROWS,
        norm=ANY_DTYPE,
        **BOTH,
    ),
    Implementation(
        "Triton dot",
        quantized_dot,
        ON_GPU,
        last=NORMED_ROWS,
        norm=WIDE_RANGE,
        **BOTH,
    ),
    Implementation(
        "Triton unpack + mm",
        triton_unpack_mm,
        ON_GPU,
        first=NORMED_ROWS + 1,
        residual=True,
        parted=True,
    ),
    Implementation(
        "CUDA dense tiles",
        cuda_dense_tiles,
        (dense, gpu_kernels, one_block, cuda_takes_dense, shown(NewPath.ROW_TILES)),
        first=1,
        last=TILES.stop - 1,
        norm=WIDE_RANGE,
        order="units",
        **BOTH,
    ),
    Implementation(
        "Triton dense gemv",
        dense_gemv,
        (dense, gpu_kernels, one_block),
        first=1,
        last=GEMV_ROWS,
        norm=ANY_DTYPE,
        **BOTH,
    ),
    Implementation(
        "Triton dense gemv by block",
        dense_blocks_gemv,
        (dense, gpu_kernels),
        first=1,
        last=GEMV_ROWS,
        norm=ANY_DTYPE,
    ),
    Implementation("CPU native", native_matmul, (quantized, native_takes), norm=ANY_DTYPE, **BOTH),
    Implementation(
        "torch packed", torch_packed, (quantized, packed_for_torch), first=1, last=cpu.PACKED_ROWS
    ),
    Implementation("torch unpacked", torch_unpacked, (quantized,)),
    Implementation("torch widened", torch_widened, (dense, widening_pays), first=cpu.WIDENED_ROWS),
    Implementation("torch dense", dense_product, (dense,)),
)
"""The fastest first. Of either kind of weight the last takes everything."""


@dataclass(frozen=True)
class Step:
    """Up to so many rows, an implementation; norm: whether the norm is inside for this dtype."""

    most_rows: int
    implementation: Implementation
    norm: bool

    def run(
        self,
        x: Tensor,
        weight: StoredWeight,
        norm: RMSNorm | None,
        residual: Tensor | None,
        swiglu: bool,
    ) -> Tensor:
        chosen = self.implementation
        if norm is not None and not self.norm:
            x, norm = norm(x), None
        if chosen.swiglu or (chosen.residual and not swiglu):
            return chosen.run(x, weight, norm, residual, swiglu)
        return epilogues(chosen.run(x, weight, norm, None, False), residual, swiglu)

    def parted(self, x: Tensor, weight: StoredWeight, around: Around) -> Tensor:
        """`run` by an implementation that takes parts: what is around it is by row."""
        run = partial(self.implementation.run, parts=True)
        return replace(self, implementation=replace(self.implementation, run=run)).run(
            x, weight, *around
        )


Around = tuple[RMSNorm | None, Tensor | None, bool]
"""norm, residual, swiglu."""


@dataclass(frozen=True)
class Plan:
    """How products with one weight are computed; the last step has no bound."""

    steps: tuple[Step, ...]

    def __call__(
        self,
        x: Tensor,
        weight: StoredWeight,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        """`matmul` with the weight that it was made for."""
        rows = x.numel() // (x.shape[-1] or 1)
        for step in self.steps:
            if rows <= step.most_rows:
                return step.run(x, weight, norm, residual, swiglu)
        raise AssertionError("the last step of a plan has no bound")

    def by_part(
        self,
        x: Tensor,
        weight: StoredWeight,
        norm: RMSNorm | None = None,
        residual: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        """Products of x [N, T, K], each part with the bits that it has alone."""
        parts, rows, _ = x.shape
        step, whole = self.at(rows), self.at(parts * rows)
        order = step.implementation.order
        if parts == 1 or (order and order == whole.implementation.order):
            return whole.run(x, weight, norm, residual, swiglu)
        # torch's operations by row on a CPU do not give a value the same bits at every place.
        if step.implementation.parted and x.is_cuda:
            return step.parted(x, weight, (norm, residual, swiglu))
        added = [None] * parts if residual is None else residual
        return torch.stack(
            [
                step.run(part[None], weight, norm, None if term is None else term[None], swiglu)[0]
                for part, term in zip(x, added, strict=True)
            ]
        )

    def at(self, rows: int) -> Step:
        """The step that computes so many rows."""
        return next(step for step in self.steps if rows <= step.most_rows)


def plan(
    weight: StoredWeight, device: torch.device, dtype: torch.dtype, gradient: bool = False
) -> Plan:
    """How products of x, on this device and of this dtype, with the weight are computed; made once
    and kept with the weight."""
    key = device, dtype, forced(), gradient
    known = weight.plans.get(key)
    if known is None:
        known = weight.plans[key] = make(Setting(weight, *key))
    return known


def make(setting: Setting) -> Plan:
    """The first of `TABLE` for every number of rows."""
    takers = [each for each in TABLE if not each.refuses(setting)]
    bounds = {each.last for each in takers} | {each.first - 1 for each in takers if each.first}
    steps: list[Step] = []
    for bound in sorted(bounds):
        chosen = next(each for each in takers if each.first <= bound <= each.last)
        if steps and steps[-1].implementation is chosen:
            steps.pop()
        steps.append(Step(bound, chosen, setting.dtype in chosen.norm))
    return Plan(tuple(steps))


def explain(
    weight: StoredWeight, device: torch.device, dtype: torch.dtype, rows: int
) -> tuple[str, dict[str, list[str]]]:
    """The implementation that computes a product of so many rows; and why not those that the table
    has before it for this kind of weight: reason -> their names."""
    setting = Setting(weight, device, dtype, forced(), False)
    chosen = plan(weight, device, dtype).at(rows).implementation
    kind = quantized if isinstance(weight, QuantizedWeight) else dense
    passed_over: dict[str, list[str]] = {}
    for each in TABLE[: TABLE.index(chosen)]:
        if kind in each.requires:
            reason = each.refuses(setting) or f"for {each.rows()}"
            passed_over.setdefault(reason, []).append(each.name)
    return chosen.name, passed_over
