"""Products with a weight that has an adapter beside it, against float64 and against one another."""

import copy
import pickle

import pytest
import torch
from helpers import assert_rounded, quantized, seeded
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.transformer import Product, takes_parts
from mimo_fast.kernels.matmul.adapted import AdaptedWeight, Rows, joined, padded
from mimo_fast.kernels.matmul.product import (
    QuantizedWeight,
    Weight,
    matmul,
    matmul_by_part,
    matmul_ref,
    qmatmul_bytes,
)
from mimo_fast.kernels.matmul.quantized_weight import dequantize
from mimo_fast.kernels.norm import RMSNorm

COLUMNS = 128
BLOCKS = ([48, 16, 16], [5, 7, 0], [64], [24, 24])
RANKS = ([2, 0, 7], [0, 8, 0], [64], [1, 3])

needs_native = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)


def made(
    blocks: list[int],
    ranks: list[int],
    form: str = "dense",
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
    seed: int = 0,
) -> tuple[AdaptedWeight, Tensor]:
    """A weight with an adapter, and the matrix in float64 that it stands for, its bias last."""
    rng = seeded(seed)
    drawn = [(n, r) for n, r in zip(blocks, ranks, strict=True) if n]
    parts = [torch.randn(n, COLUMNS, generator=rng) / COLUMNS**0.5 for n, _ in drawn]
    bias = torch.randn(sum(blocks), generator=rng).to(dtype)
    base: Weight | QuantizedWeight
    if form == "dense":
        parts = [part.to(dtype) for part in parts]
        own = [None if scaled else part for part in bias.split([n for n, _ in drawn])]
        base, wide = Weight.stack(parts, own), torch.cat(parts).double()
    else:
        base = quantized(torch.cat(parts), form, None if scaled else bias)
        wide = dequantize(base).double()
    a_rows, rows, first = list[Tensor](), list[Rows](), 0
    for count, rank in drawn:
        if rank:
            a = (torch.randn(rank, COLUMNS, generator=rng) / COLUMNS**0.5).to(dtype)
            b = (torch.randn(count, rank, generator=rng) / rank**0.5).to(dtype)
            wide[first : first + count] += b.double() @ a.double()
            a, b = padded(a, b)
            a_rows.append(a)
        rows.append(Rows(count, Weight.stack([b]) if rank else None))
        first += count
    factor = torch.rand(sum(blocks), generator=rng) + 0.5 if scaled else None
    weight = AdaptedWeight(
        base, Weight.stack([torch.cat(a_rows)]), tuple(rows), factor, bias if scaled else None
    )
    if factor is not None:
        wide *= factor.double()[:, None]
    return weight, torch.cat((wide, bias.double()[:, None]), dim=1)


def wanted(x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + b in float64, and the sum of the absolute values of its terms."""
    x, w, b = x.double(), wide[:, :-1], wide[:, -1]
    return x @ w.T + b, x.abs() @ w.T.abs() + b.abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("blocks", "ranks"), [*zip(BLOCKS, RANKS, strict=True)])
@pytest.mark.parametrize("scaled", [False, True])
def test_is_the_product_with_the_sum(dtype, blocks, ranks, scaled):
    for rows in ((1,), (3,), (2, 5), (70,)):
        weight, wide = made(blocks, ranks, dtype=dtype, scaled=scaled)
        x = torch.randn(*rows, COLUMNS, generator=seeded(7)).to(dtype)
        want, magnitude = wanted(x, wide)
        # The products with W and with A are rounded before the last sum.
        noise = magnitude * (4 * torch.finfo(dtype).eps) + 1e-6
        for product in (matmul, matmul_ref):
            got = product(x, weight)
            assert got.dtype == dtype
            assert_rounded(got, want, noise=noise)


@pytest.mark.parametrize("form", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("forced", ["", "torch"])
def test_a_quantized_weight_is_read_as_it_is(form, scaled, forced, monkeypatch):
    monkeypatch.setenv("MIMO_FAST_KERNELS", forced)
    for blocks, ranks in zip(BLOCKS, RANKS, strict=True):
        weight, wide = made(blocks, ranks, form, scaled=scaled)
        x = torch.randn(5, COLUMNS, generator=seeded(7))
        want, magnitude = wanted(x, wide)
        # x in fixed point of 16 bits, see csrc/cpu/quantized_matmul.cpp.
        assert_rounded(matmul(x, weight), want, noise=magnitude * 2.0**-14)


@pytest.mark.parametrize("form", ["dense", "int4"])
def test_what_a_layer_does_around_it(form):
    weight, _ = made([24, 24], [1, 3], form, scaled=form == "int4")
    rng = seeded(3)
    x, gain = torch.randn(6, COLUMNS, generator=rng), torch.rand(COLUMNS, generator=rng)
    residual = torch.randn(6, 24, generator=rng)
    got = matmul(x, weight, norm=RMSNorm(gain, 0.1), residual=residual, swiglu=True)
    want = matmul_ref(x, weight, norm=RMSNorm(gain, 0.1), residual=residual, swiglu=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    gate, up = matmul_ref(RMSNorm(gain, 0.1)(x), weight).chunk(2, dim=-1)
    torch.testing.assert_close(want, residual + torch.nn.functional.silu(gate) * up)


def test_rows_joined_for_one_launch_are_the_same_rows():
    for blocks, ranks in zip(BLOCKS, RANKS, strict=True):
        weight, _ = made(blocks, ranks, scaled=True)
        whole = AdaptedWeight(
            weight.base, weight.a, joined(weight.rows), weight.factor, weight.bias
        )
        assert len(whole.rows) == 1
        x = torch.randn(5, COLUMNS, generator=seeded(7))
        torch.testing.assert_close(matmul(x, whole), matmul(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["dense", "int8"])
def test_parts_have_the_bits_that_they_have_alone(form):
    weight, _ = made([48, 16, 16], [2, 0, 7], form)
    x = torch.randn(3, 4, COLUMNS, generator=seeded(1))
    got = matmul_by_part(x, weight)
    for part, alone in zip(got, x, strict=True):
        assert torch.equal(part, matmul_by_part(alone[None], weight)[0])


def test_gradients_flow_through_it():
    weight, wide = made([48, 16, 16], [2, 0, 7], scaled=True)
    x = torch.randn(3, COLUMNS, generator=seeded(1), requires_grad=True)
    matmul(x, weight).sum().backward()
    assert x.grad is not None
    want = wide[:, :-1].sum(dim=0).float()
    torch.testing.assert_close(x.grad, want.expand(3, -1), rtol=1e-4, atol=1e-4)


def test_bytes_that_a_product_reads():
    weight, _ = made([48, 16], [2, 0], "int8")
    assert weight.shape == (64, COLUMNS)
    # Ranks are padded to 8.
    assert weight.added_nbytes == 4 * (8 * COLUMNS + 48 * 8)
    assert weight.nbytes == weight.base.nbytes + weight.added_nbytes
    activations = 4 * (3 * (COLUMNS + 64))
    assert qmatmul_bytes(3, weight, 64, 4) == weight.nbytes + activations


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 64])
def test_padding_changes_no_product(rank):
    a, b = torch.randn(rank, 5), torch.randn(3, rank)
    wide = padded(a, b)
    assert len(wide[0]) == wide[1].shape[1]
    assert len(wide[0]) % 8 == 0
    assert len(wide[0]) - rank < 8
    torch.testing.assert_close(wide[1] @ wide[0], b @ a)


@needs_native
@pytest.mark.parametrize("form", ["dense", "int8", "int4"])
@pytest.mark.parametrize("scaled", [False, True])
class TestNative:
    def test_is_that_of_plain_torch(self, form, scaled):
        for blocks, ranks in zip(BLOCKS, RANKS, strict=True):
            weight, wide = made(blocks, ranks, form, scaled=scaled)
            assert takes_parts([weight])
            x = torch.randn(6, COLUMNS, generator=seeded(2))
            want, magnitude = wanted(x, wide)
            assert_rounded(Product(weight)(x), want, noise=magnitude * 2.0**-14)

    def test_a_row_does_not_depend_on_the_others(self, form, scaled):
        weight, _ = made([48, 16, 16], [2, 0, 7], form, scaled=scaled)
        x, product = torch.randn(70, COLUMNS, generator=seeded(2)), Product(weight)
        alone = torch.cat([product(row[None]) for row in x])
        for rows in (2, 3, 9, 70):
            assert torch.equal(product(x[:rows]), alone[:rows])

    def test_memory_that_held_something_else(self, form, scaled):
        weight, _ = made([48, 16, 16], [2, 0, 7], form, scaled=scaled)
        x, product = torch.randn(9, COLUMNS, generator=seeded(2)), Product(weight)
        want = product(x)
        for _ in range(10):
            for width in (80, 16, 8, 48):
                poison = torch.full((9, width), float("nan"))
                del poison
            assert torch.equal(product(x), want)

    def test_copies_read_their_own_weights(self, form, scaled):
        weight, _ = made([48, 16, 16], [2, 0, 7], form, scaled=scaled)
        x, product = torch.randn(2, COLUMNS, generator=seeded(2)), Product(weight)
        want = product(x)
        for copied in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
            assert torch.equal(copied(x), want)
            copied.weight.a.blocks[0].neg_()
            assert not torch.equal(copied(x), want)
        assert torch.equal(product(x), want)


@needs_native
class TestMisfits:
    """What does not fit is an error, not memory of something else."""

    def test_shapes(self):
        weight, _ = made([48, 16], [2, 8], scaled=True)
        first, second = weight.rows
        narrow = Rows(16, Weight.stack([torch.zeros(16, 4)]))
        short = Rows(16, Weight.stack([torch.zeros(15, 8)]))
        for changed in (
            {"rows": (first, narrow)},
            {"rows": (first, short)},
            {"rows": (first, second, second)},
            {"rows": (first,)},
            {"a": Weight.stack([torch.zeros(16, 64)])},
            {"a": Weight.stack([torch.zeros(8, COLUMNS)])},
            {"a": Weight.stack([torch.zeros(24, COLUMNS)])},
            {"a": Weight.stack([torch.zeros(8, COLUMNS), torch.zeros(8, COLUMNS)])},
            {"factor": torch.ones(63)},
            {"bias": torch.ones(65)},
        ):
            fields = vars(weight) | changed
            with pytest.raises(ValueError, match=r"fit|width|row blocks|of no|not float32"):
                Product(AdaptedWeight(**fields))

    @pytest.mark.parametrize("name", ["a", "factor", "bias"])
    def test_dtypes(self, name):
        weight, _ = made([48, 16], [2, 8], scaled=True)
        value = getattr(weight, name)
        if isinstance(value, Weight):
            value = Weight.stack([value.blocks[0].double()])
        else:
            value = value.double()
        with pytest.raises(ValueError, match="not float32"):
            Product(AdaptedWeight(**(vars(weight) | {name: value})))

    def test_native_arguments(self):
        product = native.compiled().Linear(columns=16)
        rows = torch.zeros(8, 16)
        product.add_block(weight=rows.data_ptr(), bias=0, rows=8)
        given = {"a": rows.data_ptr(), "b": rows.data_ptr(), "rank": 8, "first": 0, "rows": 8}
        for changed in (
            {"rank": 0},
            {"rank": 7},
            {"rank": -8},
            {"first": -1},
            {"first": 1},
            {"first": 2**62},
            {"rows": 0},
            {"rows": 9},
            {"rows": 2**62},
            {"a": 0},
            {"b": 0},
        ):
            with pytest.raises(ValueError, match=r"rank|rows of an adapter|A and B"):
                product.adapt(**(given | changed))
        with pytest.raises(ValueError, match="the adapter that it belongs to"):
            product.scale(factor=rows.data_ptr(), bias=0)
        product.adapt(**given)
        with pytest.raises(ValueError, match="a factor is missing"):
            product.scale(factor=0, bias=0)
