"""The SwiGLU kernel against plain torch in float32."""

import pytest
import torch
from helpers import assert_rounded, normal, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimo_fast.kernels.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", [(2,), (1, 22016), (3, 5, 74), (7, 2050), (0, 8)])
def test_swiglu(dtype, shape):
    x = normal(*shape, dtype=dtype, scale=4)
    got = swiglu(x)
    assert got.dtype == dtype
    # One rounding, plus float32 inside and the coarse steps of the smallest float16.
    want = swiglu_ref(x.double())
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_rounded(got, want, noise=want.abs() * 8 * 2.0**-24 + tiny)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 1100), st.integers(1, 3), st.integers(0, 7))
def test_rows_of_any_stride(n, width, step, pad):
    x = normal(n * step, 2 * width + pad, scale=4)[::step, : 2 * width]
    assert_close(swiglu(x), swiglu_ref(x), rtol=2e-6, atol=1e-30)


def test_rows_that_are_not_contiguous():
    x = normal(12, 5, scale=4).T
    assert_close(swiglu(x), swiglu_ref(x), rtol=2e-6, atol=1e-30)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_far_ends():
    x = torch.tensor([[-200.0, 200.0, 0.0, torch.nan, 3.0, 3.0, 3.0, 1.0]])
    assert_close(swiglu(x), torch.tensor([[0.0, 600.0, 0.0, torch.nan]]), equal_nan=True)


def test_an_odd_width_is_refused():
    refuses("must be even", swiglu, torch.zeros(2, 7))
