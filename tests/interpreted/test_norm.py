"""The norm kernels against plain torch in float32."""

import pytest
import torch
from helpers import assert_rounded, refuses, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.kernels.norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref

SHAPES = [(3, 64), (1, 1), (2, 5, 37), (4096,), (2, 1280), (0, 16)]
NOISE = 5e-6
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> list[Tensor]:
    """x, weight, bias."""
    rng = seeded(sum(shape))
    x = torch.randn(shape, generator=rng) + mean
    weight, bias = (torch.randn(shape[-1], generator=rng) for _ in range(2))
    return [tensor.to(dtype) for tensor in (x, weight, bias)]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float() for tensor in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("eps", "scale"), [(1e-6, 1), (0.5, 1), (1e-6, 300)])
def test_rms_norm(dtype, shape, eps, scale):
    """Squares of 300 overflow float16: statistics are float32."""
    x, weight, _ = inputs(shape, dtype)
    x = x * scale
    got = rms_norm(x, weight, eps)
    assert got.dtype == dtype
    assert_rounded(got, rms_norm_ref(*wide(x, weight), eps).double(), noise=NOISE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1), (5.0, 1), (0.0, 300)])
def test_layer_norm(dtype, shape, mean, scale):
    x, weight, bias = inputs(shape, dtype, mean)
    x = x * scale
    got = layer_norm(x, weight, bias, 1e-5)
    assert got.dtype == dtype
    assert_rounded(got, layer_norm_ref(*wide(x, weight, bias), 1e-5).double(), noise=NOISE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.integers(1, 3), st.integers(0, 7))
def test_rows_of_any_stride(rows, dim, step, pad):
    x, weight, bias = inputs((max(rows * step, 1), dim + pad), torch.float32)
    # Both weights begin off a 16-byte boundary.
    x, weight, bias = x[: rows * step : step, :dim], weight[pad:], bias[pad:]
    want = rms_norm_ref(x, weight, 1e-6)
    assert_close(rms_norm(x, weight, 1e-6), want, rtol=1e-5, atol=NOISE)
    want = layer_norm_ref(x, weight, bias, 1e-2)
    assert_close(layer_norm(x, weight, bias, 1e-2), want, rtol=1e-5, atol=NOISE)


def test_columns_that_are_not_contiguous():
    x, weight, bias = inputs((6, 6), torch.float32)
    assert_close(rms_norm(x.T, weight, 1e-6), rms_norm_ref(x.T, weight, 1e-6))
    assert_close(layer_norm(x.T, weight, bias, 1e-5), layer_norm_ref(x.T, weight, bias, 1e-5))


def test_the_result_goes_where_it_is_asked():
    x, weight, _ = inputs((3, 24), torch.float32)
    out = torch.full_like(x, torch.nan)
    assert rms_norm(x, weight, 1e-6, out=out) is out
    assert_close(out, rms_norm_ref(x, weight, 1e-6))


def test_zero_rows_stay_finite():
    x, weight, bias = torch.zeros(2, 8), torch.ones(8), torch.full((8,), 3.0)
    assert torch.equal(rms_norm(x, weight, 1e-6), x)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), x + 3)


def test_a_weight_of_another_width_is_refused():
    x = torch.zeros(2, 8)
    refuses("last dimension", rms_norm, x, torch.ones(7), 1e-6)
    refuses("last dimension", layer_norm, x, torch.ones(9), torch.ones(9), 1e-5)
