"""Rotary embedding against complex rotation in float64, and the property it exists for."""

import pytest
import torch
from helpers import assert_rounded, seeded
from torch import Tensor

from mimo_fast.kernels.rope import rope, rope_frequencies, rope_table


def oracle(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Halves of a head as real and imaginary parts, rotated by the position's angle."""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[..., None, None] * rates
    rotated = rotated * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 6.4e5), (128, 6.4e5), (64, 1e4), (2, 1e4)])
def test_table_is_cos_and_sin(head_dim, theta):
    table = rope_table(head_dim, theta, 8192)
    assert (table.shape, table.dtype) == ((2, 8192, head_dim // 2), torch.float32)
    position = torch.arange(8192, dtype=torch.float64)[:, None]
    angles = position * theta ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
    # The angle itself is float32: three roundings of it.
    bound = 1e-6 + angles * 2.0**-22
    for got, want in zip(table.double(), (angles.cos(), angles.sin()), strict=True):
        assert ((got - want).abs() <= bound).all()


def test_rounded_frequencies():
    """Only the frequencies are rounded: angles, cosines and sines are float32's."""
    exact, rounded = (
        rope_frequencies(64, 1e4, rounding=kind) for kind in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(rounded, exact.bfloat16().float())
    assert not torch.equal(rounded, exact)
    angles = torch.arange(6000.0, dtype=torch.float64)[:, None] * rounded.double()
    table = rope_table(64, 1e4, 6000, rounding=torch.bfloat16)
    # Of 8 bits and of 13, so their product is exact in float32.
    assert torch.equal(angles, angles.float().double())
    for got, want in zip(table.double(), (angles.cos(), angles.sin()), strict=True):
        assert (got - want).abs().max() <= 1e-7


def test_position_zero_turns_nothing():
    x = torch.randn(1, 3, 8)
    assert torch.equal(rope(x, rope_table(8, 10000.0, 1)), x)


@pytest.mark.parametrize(("t", "heads", "head_dim"), [(1, 1, 2), (7, 5, 16), (33, 3, 64)])
def test_rope_rotates(dtype, t, heads, head_dim):
    x = torch.randn(2, t, heads, head_dim, generator=seeded(t)).to(dtype)
    got = rope(x, rope_table(head_dim, 10000.0, t))
    assert got.dtype == dtype
    assert_rounded(got, oracle(x, torch.arange(t), 10000.0), noise=2e-5)


def test_rows_at_positions_of_their_own():
    table = rope_table(16, 640000.0, 500)
    starts = [0, 7, 493]
    rows = torch.stack([table[:, start : start + 4] for start in starts], dim=1)
    x = torch.randn(3, 4, 2, 16, generator=seeded(0))
    positions = torch.tensor(starts)[:, None] + torch.arange(4)
    assert_rounded(rope(x, rows), oracle(x, positions, 640000.0), noise=2e-4)
