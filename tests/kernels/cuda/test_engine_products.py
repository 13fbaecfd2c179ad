"""Products of the persistent kernel, bit for bit those of quantized_mma.cu and row_tiles.cu."""

import random as python_random
from dataclasses import dataclass, replace

import pytest
import torch
from engine_launches import FORMATS, SHARED, OneProduct, grid_of, normed, today
from helpers import assert_rounded, slow_after
from test_cuda_kernels import random, weight_of
from torch import Tensor

from mimo_fast.kernels.cuda.engine import Order
from mimo_fast.kernels.cuda.engine_launch import DEPTHS, Grid
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.norm import RMSNorm

HALF, BFLOAT = torch.float16, torch.bfloat16
SUBNORMAL = 2.0**-25
"""Half the distance of neighbours among the smallest values of float16."""

LARGE = 227 * 1024
"""Bytes of shared memory of a block on data-centre cards."""

WIDE = (4096, 5504, 8192, 11008)


@dataclass(frozen=True)
class Case:
    """A product; see `OneProduct`."""

    name: str
    n: int
    k: int
    rows: int
    dtype: torch.dtype = BFLOAT
    norm: bool = False
    bias: bool = False
    residual: bool = False
    order: Order = Order.WHOLE
    copied: bool = False
    fold: int = 1
    active: range = range(0)
    seed: int = 0

    @property
    def weight(self) -> QuantizedWeight | Tensor:
        if self.name == "dense":
            return random(self.n, self.k, seed=self.seed + 1, dtype=self.dtype)
        return weight_of(self.name, self.n, self.k, self.bias, self.dtype)

    @property
    def dense_bias(self) -> Tensor | None:
        wanted = self.bias and self.name == "dense"
        return random(self.n, seed=self.seed + 2, dtype=self.dtype) if wanted else None

    @property
    def weight_of_norm(self) -> RMSNorm | None:
        if not self.norm:
            return None
        return RMSNorm(random(self.k, seed=self.seed + 3, dtype=self.dtype) * 3, 1e-6)

    @property
    def gated(self) -> bool:
        return self.order is Order.GATED

    @property
    def columns(self) -> int:
        return self.n // 2 if self.gated else len(self.active) or self.n

    @property
    def x(self) -> Tensor:
        shape = self.rows, self.k // self.fold
        return random(*shape, seed=self.seed + 4, dtype=self.dtype)

    @property
    def beside(self) -> Tensor | None:
        shape = self.rows, self.columns
        return random(*shape, seed=self.seed + 5, dtype=self.dtype) if self.residual else None

    def made(self, engine, grid: Grid, rows: slice = slice(None), seed=1, first=0, tight=False):
        """By the persistent kernel, of some rows."""
        product = OneProduct(
            engine,
            grid,
            self.weight,
            self.dtype,
            self.weight_of_norm,
            self.dense_bias,
            self.order,
            residual=self.residual,
            copied=self.copied,
            first=first,
            fold=self.fold,
            active=self.active,
            tight=tight,
        )
        return product(self.x[rows], None if self.beside is None else self.beside[rows], seed)

    def today(self, emulated, engine) -> Tensor:
        """In float16, whose range does not hold x times the norm's weight, x is normed before."""
        x, weight, norm = self.x, self.weight, self.weight_of_norm
        x = x.view(-1, self.k)
        if norm is not None and self.dtype == HALF:
            x, norm = normed(engine, x, norm, grid_of()), None
        if isinstance(weight, Tensor) and self.active:
            weight = weight[self.active.start : self.active.stop].clone()
        return today(emulated, x, weight, norm, self.beside, self.gated, self.dense_bias)

    def check(self, emulated, engine, got: Tensor) -> None:
        if self.name == "dense" and self.dtype == HALF:
            return self.check_rounded(engine, got)
        assert torch.equal(got, self.today(emulated, engine)), self
        return None

    def check_rounded(self, engine, got: Tensor) -> None:
        """Of dense float16, which no other kernel takes: float32 sums, rounded."""
        x, weight, norm = self.x.view(-1, self.k), self.weight, self.weight_of_norm
        assert isinstance(weight, Tensor)
        if norm is not None:
            x = normed(engine, x, norm, grid_of())
        if self.active:
            weight = weight[self.active.start : self.active.stop]
        bias = 0 if self.dense_bias is None else self.dense_bias.double()
        want = x.double() @ weight.double().T + bias
        noise = 1e-6 * (x.double().abs() @ weight.double().abs().T) + SUBNORMAL
        if self.gated:
            (gate, up), (of_gate, of_up) = want.chunk(2, -1), noise.chunk(2, -1)
            want = gate / (1 + (-gate).exp()) * up
            noise = 1.1 * of_gate * up.abs() + of_up * gate.abs() + 1e-6 * want.abs()
        if self.beside is not None:
            want = want + self.beside.double()
        # What is larger than float16 has is infinite.
        most = torch.finfo(HALF).max
        fits, beyond = want.abs() + noise <= most, want.abs() - noise > most + 16
        assert torch.equal(got[beyond].double(), want[beyond].sign() * torch.inf)
        assert_rounded(got[fits], want[fits], noise=noise[fits])


def drawn(seed: int, most_units: int = 22) -> tuple[Case, Grid, dict[str, int | bool]]:
    """A case, a grid and how it is launched."""
    rng = python_random.Random(seed)
    order = rng.choice((Order.WHOLE, Order.WHOLE, Order.GATED, Order.ACTIVE))
    copied = rng.random() < 0.4
    octets = rng.randint(1, 24)
    units = rng.randint(1, 9 if copied else most_units)
    case = Case(
        "dense" if order is Order.ACTIVE else rng.choice(FORMATS),
        n=8 * octets * (2 if order is Order.GATED else 1),
        k=128 * units,
        rows=rng.randint(1, 8),
        dtype=rng.choice((BFLOAT, BFLOAT, HALF)),
        norm=rng.random() < 0.5 and order is not Order.ACTIVE,
        bias=rng.random() < 0.5 and order is not Order.ACTIVE,
        residual=rng.random() < 0.5 and order is not Order.ACTIVE,
        order=order,
        copied=copied,
        seed=seed * 10,
    )
    if order is Order.ACTIVE:
        first = 4 * rng.randrange(2 * octets)
        case = replace(case, active=range(first, rng.randint(first + 1, case.n)))
    elif order is Order.WHOLE and copied and rng.random() < 0.4:
        # What nobody waits for: any number of columns, several rows as one.
        folds = [fold for fold in (2, 4) if units % fold == 0]
        fold = rng.choice([1, *folds])
        off = {"norm": False, "residual": False}
        case = replace(
            case,
            **off,
            n=case.n - rng.randrange(8),
            rows=rng.randint(1, 8 // fold) * fold,
            fold=fold,
        )
    parts = rng.choice((None, 128 * rng.randint(1, most_units)))
    blocks, threads, depth = rng.randint(1, 7), 32 * rng.randint(1, 5), rng.choice(DEPTHS)
    grid = grid_of(blocks, threads, LARGE, depth=depth, x_columns=parts)
    return case, grid, {"seed": seed, "first": rng.randrange(7), "tight": rng.random() < 0.5}


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(emulated, engine, name, dtype):
    """Odd numbers of units, fewer units than classes, one class of 16 with a unit less."""
    for k in (128, 384, 1024, 1152, 2048, 2688):
        for rows in (1, 3, 8):
            case = Case(name, 40, k, rows, dtype)
            case.check(emulated, engine, case.made(engine, grid_of()))


@pytest.mark.parametrize("dtype", slow_after(1, [BFLOAT, HALF]), ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("order", [Order.WHOLE, Order.GATED], ids=str)
def test_norm_bias_and_residual(emulated, engine, name, dtype, order):
    for k in (384, 1152):
        case = Case(name, 48, k, 5, dtype, norm=True, bias=True, residual=True, order=order)
        for copied in (False, True):
            got = replace(case, copied=copied).made(engine, grid_of())
            case.check(emulated, engine, got)


def test_the_orders_of_rows(emulated, engine):
    """HALF in place of WHOLE where there are more blocks than tiles; ACTIVE from any row on."""
    for blocks, order in ((2, Order.WHOLE), (3, Order.HALF), (9, Order.HALF)):
        case = Case("int4", 40, 384, 3)
        product = OneProduct(engine, grid_of(blocks), case.weight)
        assert [matrix.order for matrix in product.launches.tables.matrices] == [order]
        case.check(emulated, engine, product(case.x))
    for active in (range(8, 9), range(36, 100), range(100)):
        case = Case("dense", 100, 256, 3, order=Order.ACTIVE, active=active)
        case.check(emulated, engine, case.made(engine, grid_of()))


@pytest.mark.parametrize("name", slow_after(1, FORMATS))
def test_columns_of_x_in_several_parts(emulated, engine, name):
    """Of any size, with a norm whose squares come of all of them, and one tile a group or more."""
    case = Case(name, 104, 2688, 4, norm=True, residual=True)
    for columns in (128, 384, 1024, 1408, 2048, 2560, 2688):
        for tight in (False, True):
            got = case.made(engine, grid_of(2, 96, x_columns=columns), tight=tight)
            case.check(emulated, engine, got)


@pytest.mark.parametrize("seed", range(2))
def test_any_product_has_the_bits_of_todays(emulated, engine, seed):
    for each in range(20):
        case, grid, how = drawn(20 * seed + each)
        case.check(emulated, engine, case.made(engine, grid, **how))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_of_many_products(emulated, engine, seed):
    for each in range(100):
        case, grid, how = drawn(1000 + 100 * seed + each)
        case.check(emulated, engine, case.made(engine, grid, **how))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("k", WIDE)
def test_wide_weights(emulated, engine, name, k, dtype):
    """Those of the backbone, with x at once and in the parts that fit on the smallest cards."""
    norm = k <= 8192
    for rows in (1, 8):
        case = Case(name, 40, k, rows, dtype, norm=norm, bias=True, residual=True)
        for shared, threads in ((SHARED, 256), (LARGE, 512)):
            got = case.made(engine, grid_of(2, threads, shared))
            case.check(emulated, engine, got)


@pytest.mark.parametrize("name", slow_after(1, FORMATS))
def test_a_row_has_the_same_bits_alone_and_among_others(engine, name):
    case = Case(name, 72, 1408, 8, norm=True, bias=True, residual=True)
    together = case.made(engine, grid_of(4, 96))
    for row in range(8):
        alone = case.made(engine, grid_of(3, 64), rows=slice(row, row + 1), seed=row)
        assert torch.equal(alone, together[row : row + 1])


def test_a_row_does_not_depend_on_its_neighbours(engine):
    case = Case("int4", 40, 384, 4, norm=True)
    alone = case.made(engine, grid_of(), rows=slice(1, 2))
    product = OneProduct(engine, grid_of(), case.weight, norm=case.weight_of_norm)
    for value in (torch.nan, torch.inf, 3e38):
        others = torch.full_like(case.x, value)
        others[1] = case.x[1]
        assert torch.equal(product(others)[1:2], alone)


@pytest.mark.parametrize("name", slow_after(1, FORMATS))
def test_any_grid_gives_the_same_bits(engine, name):
    """Blocks, threads, parts ahead, columns of x, tiles together, the first tile's block."""
    case = Case(name, 176, 1408, 3, norm=True, residual=True)
    want = case.made(engine, grid_of(1, 32))
    grids = (
        grid_of(blocks, threads, depth=depth, x_columns=columns)
        for blocks, threads, depth, columns in (
            (1, 288, 8, 1408),
            (2, 64, 4, 1024),
            (5, 96, 4, 256),
            (11, 32, 8, 640),
            (30, 64, 4, None),
        )
    )
    for i, grid in enumerate(grids):
        for tight in (False, True):
            assert torch.equal(case.made(engine, grid, seed=i, first=7 * i, tight=tight), want)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_a_norm_of_its_own(engine, dtype):
    """Rounded once, of sums in float32."""
    for k in (128, 1152, 8192):
        x, weight = random(8, k, dtype=dtype) * 4, random(k, seed=3, dtype=dtype)
        want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        want = want * weight.double()
        norm = RMSNorm(weight, 1e-6)
        got = normed(engine, x, norm, grid_of())
        assert_rounded(got, want, noise=1e-6 * want.abs() + SUBNORMAL)
        assert torch.equal(normed(engine, x[2:5], norm, grid_of(7, 32)), got[2:5])


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_values_that_are_not_finite_go_on_and_nobody_waits_for_them(engine, name):
    """The word of what has not been made is a NaN, too: no value is published as that."""
    case = Case(name, 16, 256, 3, copied=True, residual=True)
    product = OneProduct(engine, grid_of(), case.weight, residual=True, copied=True)
    ones = torch.full((3, 16), -1, dtype=torch.int16).view(torch.bfloat16)
    assert bool(ones.isnan().all())
    assert bool(product(case.x, ones).isnan().all())
    x = case.x
    x[1] = torch.full((256,), -1, dtype=torch.int16).view(torch.bfloat16)
    got = product(x, case.beside)
    assert bool(got[1].isnan().all())
    assert torch.equal(got[::2], product(case.x, case.beside)[::2])
