"""The matmul kernels under Triton's interpreter against float64 products."""

import pytest
import torch
from helpers import normal, quantized, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimo_fast.kernels.matmul import launch as qmatmul_launch
from mimo_fast.kernels.matmul.launch import GEMV_ROWS, quantized_dot, quantized_gemv
from mimo_fast.kernels.matmul.plan import plan
from mimo_fast.kernels.matmul.product import Weight, matmul, matmul_ref
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format

INT4 = ["int4", "int4-g64", "int4-g32", "int4-sym"]
FORMATS = [*INT4, "int8", "int8-g128", "int8-g32", "nf4", "nf4-g128"]
SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11}
SCALES = torch.tensor([1e4, 1e-4, 1.0])
"""Of rows of x: its product with a norm's weight may leave float16; eps is most of its mean square;
as usual."""

pytestmark = pytest.mark.usefixtures("poisoned")


def random_norm(k: int, eps: float = 1e-6, dtype: torch.dtype = torch.float32) -> RMSNorm:
    return RMSNorm(normal(k, seed=k, dtype=dtype) * 3, eps)


def weight_of(name: str, rows: torch.Tensor, bias: torch.Tensor) -> Weight | QuantizedWeight:
    if name == "dense":
        return Weight.stack([rows.to(bias.dtype)], [bias])
    return quantized(rows, name, bias)


def wide_norm(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    wide = x.double()
    if norm is None:
        return wide
    return wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def check(x, weight, residual=None, swiglu=False, *, norm=None, got=None):
    """Within twice the rounding of weight, sum and result that a plain product in x.dtype makes."""
    got = matmul(x, weight, norm=norm, residual=residual, swiglu=swiglu) if got is None else got
    if isinstance(weight, Weight):
        dense = torch.cat(weight.blocks)
        bias = None if weight.biases[0] is None else torch.cat(weight.biases)
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
    assert (got.shape, got.dtype) == (want.shape, x.dtype)
    excess = (got.double() - want).abs() - 2 * ROUNDING[x.dtype] * size
    assert bool((excess <= 0).all()), f"exceeds its bound by {excess.max():.3g}"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", [1, 3, 5, 17])
def test_formats(name, m, dtype):
    weight = quantized(normal(19, 384), name, normal(19, seed=1, dtype=dtype))
    check(normal(m, 384, seed=2, dtype=dtype), weight)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_few_rows_of_a_table_by_the_dot_kernel(m, swiglu, dtype):
    """As before Triton 3.7."""
    weight = quantized(normal(22, 384), "nf4", normal(22, seed=1, dtype=dtype))
    x, norm = normal(m, 384, seed=2, dtype=dtype), random_norm(384, dtype=dtype)
    residual = normal(m, 11 if swiglu else 22, seed=3, dtype=dtype)
    normed = norm if dtype == torch.float32 else None
    got = quantized_dot(x, weight, normed, residual, swiglu)
    check(x, weight, residual, swiglu, norm=normed, got=got)


@pytest.mark.parametrize("m", [2, 4, 70])
@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize(("residual", "swiglu"), [(True, False), (False, True), (True, True)])
def test_epilogues(name, m, residual, swiglu):
    weight = quantized(normal(38, 128), name, normal(38, seed=1))
    out = 19 if swiglu else 38
    check(normal(m, 128, seed=2), weight, normal(m, out, seed=3) if residual else None, swiglu)


@given(SHAPES, st.sampled_from(FORMATS), st.booleans(), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def test_any_shape_and_row_stride(shape, name, normed, seed):
    m, n, blocks, gap = shape
    group = Format.parse(name).group or 32
    weight = quantized(normal(n, group * blocks, seed=seed), name)
    # Whatever lies between rows must not be read.
    x = torch.full((m, group * blocks + gap), torch.nan)
    x[:, : group * blocks] = normal(m, group * blocks, seed=seed + 1)
    check(x[:, : group * blocks], weight, norm=random_norm(group * blocks) if normed else None)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 17, 64, 65])
@pytest.mark.parametrize("name", ["dense", "int8", "int8-g128", "int4", "int4-sym", "nf4"])
def test_norm_and_every_epilogue(name, m, dtype):
    rows, bias = normal(22, 256, seed=1) / 16, normal(22, seed=2, dtype=dtype)
    weight = weight_of(name, rows, bias)
    for turn in range(3 if m == 1 else 1):
        x = (normal(m, 256, seed=3) * SCALES[(torch.arange(m) + turn) % 3, None]).to(dtype)
        residual, norm = normal(m, 11, seed=4, dtype=dtype), random_norm(256, dtype=dtype)
        check(x, weight, residual, True, norm=norm)


@pytest.mark.parametrize("m", [5, 17, 64])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_norm_within_the_dot_kernel_in_16_bits(name, m):
    """The path of bfloat16, tested in float16: x times the norm's weight is rounded once."""
    weight = quantized(normal(19, 256), name)
    x, norm = normal(m, 256, seed=1, dtype=torch.float16), random_norm(256, dtype=torch.float16)
    assert not plan(weight, x.device, torch.float16).at(m).norm
    assert plan(weight, x.device, torch.bfloat16).at(m).norm
    check(x, weight, norm=norm, got=quantized_dot(x, weight, norm, None, False))


@pytest.mark.parametrize("m", [4, 16, 40])
@pytest.mark.parametrize("name", ["dense", "int4", "int8"])
def test_normed_errors_are_at_most_twice_those_of_eager_torch(name, m, dtype):
    part = quantized(normal(64, 512), "int8" if name == "dense" else name)
    dense = dequantize(part)
    weight = Weight.stack([dense.to(dtype)]) if name == "dense" else part
    x, norm = normal(m, 512, seed=1, dtype=dtype), random_norm(512, dtype=dtype)
    want = wide_norm(x, norm) @ (dense.to(dtype) if name == "dense" else dense).double().T
    eager = matmul_ref(torch.nn.functional.rms_norm(x, (512,), norm.weight, norm.eps), weight)
    results = matmul(x, weight, norm=norm), eager
    error, eager_error = ((got.double() - want).abs().max() for got in results)
    assert 0 < error <= 2 * eager_error


@pytest.mark.parametrize("name", ["dense", "int4", "int8"])
@pytest.mark.parametrize("m", [1, 5])
def test_zero_rows_stay_finite(name, m):
    rows, bias = normal(6, 128), normal(6, seed=1)
    weight = weight_of(name, rows, bias)
    got = matmul(torch.zeros(m, 128), weight, norm=random_norm(128))
    assert torch.equal(got, bias.expand(m, -1))


@pytest.mark.parametrize("m", [1, 4, 33])
def test_every_result_is_written_and_none_beyond(m):
    weight = quantized(normal(21, 128), "int4")
    room = torch.full((m + 1, 21), torch.nan)
    x = normal(m, 128, seed=1)
    norm = random_norm(128)
    launched = quantized_gemv if m <= GEMV_ROWS else quantized_dot
    launched(x, weight, norm, None, False, out=room[:m])
    check(x, weight, norm=norm, got=room[:m])
    assert room[m].isnan().all()


@pytest.mark.parametrize(("name", "columns"), [("int4", 11008), ("int8", 4096), ("nf4", 4096)])
def test_long_rows(name, columns):
    weight = quantized(normal(16, columns, seed=1), name)
    check(normal(1, columns), weight)
    check(normal(1, columns), weight, norm=random_norm(columns))


def test_many_rows_of_weight_take_larger_tiles(monkeypatch):
    monkeypatch.setattr(qmatmul_launch, "SMALL_N", 16)
    assert qmatmul_launch.gemv_block_n(1, 37) > qmatmul_launch.gemv_block_n(1, 16)
    for name in ("int4", "int8"):
        weight = quantized(normal(38, 128, seed=1), name)
        check(normal(1, 128), weight)
        check(normal(1, 128), weight, normal(1, 19, seed=2), swiglu=True)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("blocks", "k"), [([5], 1), ([8, 4, 4], 127), ([3, 3], 1300)])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_dense(dtype, m, blocks, k, swiglu, normed):
    parts = [normal(n, k, seed=n, dtype=dtype) / k**0.5 for n in blocks]
    weight = Weight.stack(parts, [normal(n, seed=n + 9, dtype=dtype) for n in blocks])
    if swiglu and sum(blocks) % 2:
        refuses(r"gate|odd|size", matmul, normal(m, k, dtype=dtype), weight, swiglu=swiglu)
        return
    out = sum(blocks) // (2 if swiglu else 1)
    residual = normal(m, out, seed=2, dtype=dtype)
    norm = random_norm(k, dtype=dtype) if normed else None
    check(normal(m, k, seed=1, dtype=dtype), weight, residual, swiglu, norm=norm)
    joined = Weight.stack([torch.cat(weight.blocks)], [torch.cat(weight.biases)])
    check(normal(m, k, seed=1, dtype=dtype), joined, residual, swiglu, norm=norm)


@pytest.mark.parametrize("normed", [False, True])
def test_rows_and_repeats_are_bit_equal(normed):
    weight = quantized(normal(24, 256), "int4")
    norm = random_norm(256) if normed else None
    x = normal(4, 256, seed=1)
    together = matmul(x, weight, norm=norm)
    assert torch.equal(together, matmul(x, weight, norm=norm))
    assert torch.equal(together, torch.cat([matmul(row[None], weight, norm=norm) for row in x]))


def test_leading_dimensions():
    weight = quantized(normal(6, 64), "int8")
    x = normal(2, 1, 3, 64)
    assert (matmul(x, weight).shape, matmul(x[0, 0, 0], weight).shape) == ((2, 1, 3, 6), (6,))
    assert_close(matmul(x, weight), matmul_ref(x, weight), rtol=1e-4, atol=1e-5)
    assert matmul(x[:0], weight).shape == (0, 1, 3, 6)


def test_groups_the_kernels_lack_take_the_plain_path():
    part = quantized(normal(4, 256), "int4")
    odd = QuantizedWeight(part.words, part.scales[:, :1], part.zeros[:, :1], None, 4)
    check(normal(2, 256, seed=1), odd)
    check(normal(2, 256, seed=1), odd, norm=random_norm(256))


def test_shapes_that_do_not_match_are_refused():
    weight = quantized(normal(5, 64), "int8")
    wide = normal(2, 64)
    cases = (normal(2, 32), None, False), (wide, normal(2, 4), False), (wide, None, True)
    for x, residual, swiglu in cases:
        with pytest.raises(ValueError, match=r"last dimension|residual|rows"):
            matmul(x, weight, residual=residual, swiglu=swiglu)
    for product in (weight, Weight.stack([normal(5, 64)])):
        with pytest.raises(ValueError, match=r"norm's weight is \[32\], not \[64\]"):
            matmul(normal(2, 64), product, norm=random_norm(32))


@pytest.mark.parametrize("name", FORMATS)
def test_unpacked_rows_are_the_weight_rounded_once(name, dtype):
    weight = quantized(normal(21, 384), name)
    room = torch.full((10, 384), torch.nan, dtype=dtype)
    qmatmul_launch.unpack(weight, 5, room[:9])
    assert torch.equal(room[:9], dequantize(weight)[5:14].to(dtype))
    assert bool(room[9].isnan().all())


def test_many_rows_are_multiplied_a_block_of_the_weight_at_a_time(monkeypatch):
    monkeypatch.setattr(qmatmul_launch, "UNPACKED_AT_ONCE", 16 * 256)
    weight = quantized(normal(38, 256), "int4", normal(38, seed=1))
    check(normal(66, 256, seed=2), weight, normal(66, 19, seed=3), True, norm=random_norm(256))
