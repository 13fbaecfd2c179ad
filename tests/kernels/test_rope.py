"""Rotary embedding against complex rotation in float64, and the property it exists for."""

import pytest
import torch
from helpers import assert_rounded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels.rope import rope, rope_table


def oracle(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Half i of a head is the real part, half i + Dh / 2 the imaginary part, of a number rotated by
    its angle."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double())
    rotated = rotated * torch.polar(
        torch.ones(1, dtype=torch.float64), positions.double()[..., None, None] * rates
    )
    return torch.cat((rotated.real, rotated.imag), dim=-1)


@pytest.mark.parametrize(
    ("head_dim", "theta"), [(16, 640000.0), (128, 640000.0), (64, 10000.0), (2, 10000.0)]
)
def test_table_is_cos_and_sin(head_dim, theta):
    table = rope_table(head_dim, theta, 8192)
    assert table.shape == (2, 8192, head_dim // 2)
    assert table.dtype == torch.float32
    position = torch.arange(8192, dtype=torch.float64)[:, None]
    angles = position * theta ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    # The angle itself is float32: three roundings of it.
    bound = 1e-6 + angles * 2.0**-22
    for got, want in zip(table.double(), (angles.cos(), angles.sin()), strict=True):
        assert ((got - want).abs() <= bound).all()


def test_position_zero_turns_nothing():
    x = torch.randn(1, 3, 8)
    assert torch.equal(rope(x, rope_table(8, 10000.0, 1)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "heads", "head_dim"), [(1, 1, 2), (7, 5, 16), (33, 3, 64)])
def test_rope_rotates(dtype, t, heads, head_dim):
    x = torch.randn(2, t, heads, head_dim, generator=torch.Generator().manual_seed(t)).to(dtype)
    got = rope(x, rope_table(head_dim, 10000.0, t))
    assert got.dtype == dtype
    assert_rounded(got, oracle(x, torch.arange(t), 10000.0), noise=2e-5)


def test_rows_at_positions_of_their_own():
    table = rope_table(16, 640000.0, 500)
    starts = [0, 7, 493]
    rows = torch.stack([table[:, start : start + 4] for start in starts], dim=1)
    x = torch.randn(3, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor(starts)[:, None] + torch.arange(4)
    assert_rounded(rope(x, rows), oracle(x, positions, 640000.0), noise=2e-4)


@settings(max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_scores_depend_on_the_distance_alone(first, second, shift):
    q, k = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(first))
    table = rope_table(32, 10000.0, 1001)

    def score(i: int, j: int) -> Tensor:
        return (rope(q, table[:, i : i + 1]) * rope(k, table[:, j : j + 1])).sum()

    torch.testing.assert_close(
        score(first, second), score(first + shift, second + shift), rtol=0, atol=2e-3
    )


def test_lengths_are_kept():
    x = torch.randn(9, 4, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rope(x, rope_table(64, 10000.0, 9)).norm(dim=-1), x.norm(dim=-1))
