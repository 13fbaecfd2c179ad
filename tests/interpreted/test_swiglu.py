"""The SwiGLU kernel against plain torch in float32."""

import pytest
import torch
from helpers import assert_rounded
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_fast.kernels.swiglu import swiglu, swiglu_ref

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2,), (1, 22016), (3, 5, 74), (7, 2050), (0, 8)])
def test_swiglu(dtype, shape):
    x = inputs(*shape, dtype=dtype)
    got = swiglu(x)
    assert got.dtype == dtype
    # One rounding, plus float32 inside and the coarse steps of the smallest float16.
    want = swiglu_ref(x.double())
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_rounded(got, want, noise=want.abs() * 8 * 2.0**-24 + tiny)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 1100), st.integers(1, 3), st.integers(0, 7))
def test_rows_of_any_stride(n, width, step, pad):
    x = inputs(n * step, 2 * width + pad)[::step, : 2 * width]
    torch.testing.assert_close(swiglu(x), swiglu_ref(x), rtol=2e-6, atol=1e-30)


def test_rows_that_are_not_contiguous():
    x = inputs(12, 5).T
    torch.testing.assert_close(swiglu(x), swiglu_ref(x), rtol=2e-6, atol=1e-30)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_far_ends():
    x = torch.tensor([[-200.0, 200.0, 0.0, torch.nan, 3.0, 3.0, 3.0, 1.0]])
    torch.testing.assert_close(
        swiglu(x), torch.tensor([[0.0, 600.0, 0.0, torch.nan]]), equal_nan=True
    )


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(2, 7))
