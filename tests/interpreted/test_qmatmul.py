"""The matmul kernels under Triton's interpreter against float64 products of the dequantized
weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_fast.kernels.matmul import launch as qmatmul_launch
from mimo_fast.kernels.matmul.launch import GEMV_ROWS, quantized_dot, quantized_gemv
from mimo_fast.kernels.matmul.plan import plan
from mimo_fast.kernels.matmul.product import Weight, matmul, matmul_ref
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format, quantize

FORMATS = [
    "int4",
    "int4-g64",
    "int4-g32",
    "int4-sym",
    "int8",
    "int8-g128",
    "int8-g32",
    "nf4",
    "nf4-g128",
]
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11}
SCALES = torch.tensor([1e4, 1e-4, 1.0])
"""Of rows of x: its product with a norm's weight may leave float16; eps is most of its mean square;
as usual."""

pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_norm(k: int, eps: float = 1e-6, dtype: torch.dtype = torch.float32) -> RMSNorm:
    return RMSNorm(random(k, seed=k, dtype=dtype) * 3, eps)


def wide_norm(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    wide = x.double()
    if norm is None:
        return wide
    return wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def check(x, weight, residual=None, swiglu=False, *, norm=None, got=None):
    """Within twice the rounding of weight, sum and result to x.dtype that a plain product in it
    makes, norm or none."""
    got = matmul(x, weight, norm=norm, residual=residual, swiglu=swiglu) if got is None else got
    if isinstance(weight, Weight):
        dense, bias = (
            torch.cat(weight.blocks),
            weight.biases[0] if len(weight.blocks) == 1 else None,
        )
        if weight.biases[0] is not None:
            bias = torch.cat(weight.biases)
    else:
        dense, bias = dequantize(weight), weight.bias
    wide = wide_norm(x, norm)
    want = wide @ dense.double().T + (0 if bias is None else bias.double())
    size = wide.abs() @ dense.double().abs().T + want.abs()
    if swiglu:
        (gate, up), (gate_size, up_size) = want.chunk(2, -1), size.chunk(2, -1)
        want = gate / (1 + (-gate).exp()) * up
        size = gate_size * (up.abs() + 1) + up_size * (gate.abs() + 1)
    if residual is not None:
        want, size = want + residual.double(), size + residual.double().abs()
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    excess = (got.double() - want).abs() - 2 * ROUNDING[x.dtype] * size
    assert bool((excess <= 0).all()), f"exceeds its bound by {excess.max():.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", [1, 3, 5, 17])
def test_formats(name, m, dtype):
    weight = quantize(random(19, 384), Format.parse(name), random(19, seed=1, dtype=dtype))
    check(random(m, 384, seed=2, dtype=dtype), weight)


@pytest.mark.parametrize("m", [2, 4, 70])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize(("residual", "swiglu"), [(True, False), (False, True), (True, True)])
def test_epilogues(name, m, residual, swiglu):
    weight = quantize(random(38, 128), Format.parse(name), random(38, seed=1))
    out = 19 if swiglu else 38
    check(random(m, 128, seed=2), weight, random(m, out, seed=3) if residual else None, swiglu)


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    blocks=st.integers(1, 5),
    name=st.sampled_from(FORMATS),
    gap=st.integers(0, 3),
    normed=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=25)
def test_any_shape_and_row_stride(m, n, blocks, name, gap, normed, seed):
    group = Format.parse(name).group or 32
    weight = quantize(random(n, group * blocks, seed=seed), Format.parse(name))
    # Whatever lies between rows must not be read.
    x = torch.full((m, group * blocks + gap), torch.nan)
    x[:, : group * blocks] = random(m, group * blocks, seed=seed + 1)
    check(x[:, : group * blocks], weight, norm=random_norm(group * blocks) if normed else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 17, 64, 65])
@pytest.mark.parametrize("name", ["dense", "int8", "int8-g128", "int4", "int4-sym", "nf4"])
def test_norm_and_every_epilogue(name, m, dtype):
    rows, bias = random(22, 256, seed=1) / 16, random(22, seed=2, dtype=dtype)
    weight = (
        Weight.stack([rows.to(dtype)], [bias])
        if name == "dense"
        else quantize(rows, Format.parse(name), bias)
    )
    for turn in range(3 if m == 1 else 1):
        x = (random(m, 256, seed=3) * SCALES[(torch.arange(m) + turn) % 3, None]).to(dtype)
        check(
            x, weight, random(m, 11, seed=4, dtype=dtype), True, norm=random_norm(256, dtype=dtype)
        )


@pytest.mark.parametrize("m", [5, 17, 64])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_norm_within_the_dot_kernel_in_16_bits(name, m):
    """As bfloat16 takes it, in the range that float16 has: the product with the norm's weight is
    rounded once."""
    weight = quantize(random(19, 256), Format.parse(name))
    x, norm = random(m, 256, seed=1, dtype=torch.float16), random_norm(256, dtype=torch.float16)
    assert not plan(weight, x.device, torch.float16).at(m).norm
    assert plan(weight, x.device, torch.bfloat16).at(m).norm
    check(x, weight, norm=norm, got=quantized_dot(x, weight, norm, None, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [4, 16, 40])
@pytest.mark.parametrize("name", ["dense", "int4", "int8"])
def test_normed_errors_are_at_most_twice_those_of_eager_torch(name, m, dtype):
    part = quantize(random(64, 512), Format.parse("int8" if name == "dense" else name))
    dense = dequantize(part)
    weight = Weight.stack([dense.to(dtype)]) if name == "dense" else part
    x, norm = random(m, 512, seed=1, dtype=dtype), random_norm(512, dtype=dtype)
    want = wide_norm(x, norm) @ (dense.to(dtype) if name == "dense" else dense).double().T
    eager = matmul_ref(torch.nn.functional.rms_norm(x, (512,), norm.weight, norm.eps), weight)
    error, eager_error = (
        (got.double() - want).abs().max() for got in (matmul(x, weight, norm=norm), eager)
    )
    assert 0 < error <= 2 * eager_error


@pytest.mark.parametrize("name", ["dense", "int4", "int8"])
@pytest.mark.parametrize("m", [1, 5])
def test_zero_rows_stay_finite(name, m):
    rows, bias = random(6, 128), random(6, seed=1)
    weight = (
        Weight.stack([rows], [bias])
        if name == "dense"
        else quantize(rows, Format.parse(name), bias)
    )
    assert torch.equal(
        matmul(torch.zeros(m, 128), weight, norm=random_norm(128)), bias.expand(m, -1)
    )


@pytest.mark.parametrize("m", [1, 4, 33])
def test_every_result_is_written_and_none_beyond(m):
    weight = quantize(random(21, 128), Format.parse("int4"))
    room = torch.full((m + 1, 21), torch.nan)
    x = random(m, 128, seed=1)
    norm = random_norm(128)
    launched = quantized_gemv if m <= GEMV_ROWS else quantized_dot
    launched(x, weight, norm, None, False, out=room[:m])
    check(x, weight, norm=norm, got=room[:m])
    assert room[m].isnan().all()


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("int4", 16, 11008), ("int8", 8, 4096), ("nf4", 8, 4096)]
)
def test_long_rows(name, rows, columns):
    weight = quantize(random(rows, columns, seed=1), Format.parse(name))
    check(random(1, columns), weight)
    check(random(1, columns), weight, norm=random_norm(columns))


def test_many_rows_of_weight_take_larger_tiles(monkeypatch):
    monkeypatch.setattr(qmatmul_launch, "SMALL_N", 16)
    assert qmatmul_launch.gemv_block_n(1, 37) > qmatmul_launch.gemv_block_n(1, 16)
    for name in ("int4", "int8"):
        weight = quantize(random(38, 128, seed=1), Format.parse(name))
        check(random(1, 128), weight)
        check(random(1, 128), weight, random(1, 19, seed=2), swiglu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("blocks", "k"), [([5], 1), ([8, 4, 4], 127), ([3, 3], 1300)])
@pytest.mark.parametrize(
    ("swiglu", "normed"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_dense(dtype, m, blocks, k, swiglu, normed):
    parts = [random(n, k, seed=n, dtype=dtype) / k**0.5 for n in blocks]
    weight = Weight.stack(parts, [random(n, seed=n + 9, dtype=dtype) for n in blocks])
    if swiglu and sum(blocks) % 2:
        with pytest.raises(ValueError, match=r"gate|odd|size"):
            matmul(random(m, k, dtype=dtype), weight, swiglu=swiglu)
        return
    out = sum(blocks) // (2 if swiglu else 1)
    residual, norm = (
        random(m, out, seed=2, dtype=dtype),
        random_norm(k, dtype=dtype) if normed else None,
    )
    check(random(m, k, seed=1, dtype=dtype), weight, residual, swiglu, norm=norm)
    joined = Weight.stack([torch.cat(weight.blocks)], [torch.cat(weight.biases)])
    check(random(m, k, seed=1, dtype=dtype), joined, residual, swiglu, norm=norm)


@pytest.mark.parametrize("normed", [False, True])
def test_rows_and_repeats_are_bit_equal(normed):
    """Each row of x is its own sum in a fixed order, whatever rows come with it."""
    weight, norm = (
        quantize(random(24, 256), Format.parse("int4")),
        random_norm(256) if normed else None,
    )
    x = random(4, 256, seed=1)
    together = matmul(x, weight, norm=norm)
    assert torch.equal(together, matmul(x, weight, norm=norm))
    assert torch.equal(together, torch.cat([matmul(row[None], weight, norm=norm) for row in x]))


def test_leading_dimensions():
    weight = quantize(random(6, 64), Format.parse("int8"))
    x = random(2, 1, 3, 64)
    assert matmul(x, weight).shape == (2, 1, 3, 6)
    assert matmul(x[0, 0, 0], weight).shape == (6,)
    torch.testing.assert_close(matmul(x, weight), matmul_ref(x, weight), rtol=1e-4, atol=1e-5)
    assert matmul(x[:0], weight).shape == (0, 1, 3, 6)


def test_groups_the_kernels_lack_take_the_plain_path():
    part = quantize(random(4, 256), Format.parse("int4"))
    odd = QuantizedWeight(part.words, part.scales[:, :1], part.zeros[:, :1], None, 4)
    check(random(2, 256, seed=1), odd)
    check(random(2, 256, seed=1), odd, norm=random_norm(256))


def test_shapes_that_do_not_match_are_refused():
    weight = quantize(random(5, 64), Format.parse("int8"))
    for x, residual, swiglu in (
        (random(2, 32), None, False),
        (random(2, 64), random(2, 4), False),
        (random(2, 64), None, True),
    ):
        with pytest.raises(ValueError, match=r"last dimension|residual|rows"):
            matmul(x, weight, residual=residual, swiglu=swiglu)
    for product in (weight, Weight.stack([random(5, 64)])):
        with pytest.raises(ValueError, match=r"norm's weight is \[32\], not \[64\]"):
            matmul(random(2, 64), product, norm=random_norm(32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_rows_are_the_weight_rounded_once(name, dtype):
    weight, room = (
        quantize(random(21, 384), Format.parse(name)),
        torch.full((10, 384), torch.nan, dtype=dtype),
    )
    qmatmul_launch.unpack(weight, 5, room[:9])
    assert torch.equal(room[:9], dequantize(weight)[5:14].to(dtype))
    assert bool(room[9].isnan().all())


def test_many_rows_are_multiplied_a_block_of_the_weight_at_a_time(monkeypatch):
    monkeypatch.setattr(qmatmul_launch, "UNPACKED_AT_ONCE", 16 * 256)
    weight = quantize(random(38, 256), Format.parse("int4"), random(38, seed=1))
    check(random(66, 256, seed=2), weight, random(66, 19, seed=3), True, norm=random_norm(256))
