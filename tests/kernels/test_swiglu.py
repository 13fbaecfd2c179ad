"""SwiGLU against float64."""

import pytest
import torch
from helpers import assert_rounded, seeded
from torch.testing import assert_close

from mimo_fast.kernels.swiglu import swiglu


@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 74), (2, 22016)])
def test_swiglu(dtype, shape):
    x = (torch.randn(shape, generator=seeded(shape[-1])) * 4).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    got = swiglu(x)
    assert got.dtype == dtype
    want = gate / (1 + (-gate).exp()) * up
    # silu(gate) is rounded, then its product with up; exp, sum and quotient before that in float32.
    # Float16 underflows.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_rounded(got, want, roundings=2, noise=want.abs() * 4 * 2.0**-24 + tiny * (1 + up.abs()))


def test_far_ends():
    x = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert_close(swiglu(x), torch.tensor([[0.0, 600.0, 0.0]]))
