"""SwiGLU against float64."""

import pytest
import torch
from helpers import assert_rounded

from mimo_fast.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 74), (2, 22016)])
def test_swiglu(dtype, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * 4).to(dtype)
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
    torch.testing.assert_close(swiglu(x), torch.tensor([[0.0, 600.0, 0.0]]))


def test_the_first_half_is_the_gate():
    assert swiglu(torch.tensor([0.0, 5.0])).item() == 0.0
    assert swiglu(torch.tensor([5.0, 0.0])).item() == 0.0
    assert swiglu(torch.tensor([-50.0, 1.0])).abs().item() < 1e-18
    assert swiglu(torch.tensor([1.0, -50.0])).item() == pytest.approx(
        -50 / (1 + 2.718281828459045**-1)
    )
