"""The patch embedding kernel: prefill and decode sizes, the empty code, any strides."""

import pytest
import torch
from helpers import assert_rounded, refuses, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.kernels.patch_embed import FEW_FRAMES, patch_embed, patch_embed_ref
from mimo_fast.kernels.sample import NOT_FINITE

SIZES = (65, 17, 9)
FEW = st.integers(1, 5)
# n, g, dim, channels
SHAPES = [(1, 4, 1024, 8), (FEW_FRAMES // 4, 4, 1024, 8), (1, 1, 1, 1)]
SHAPES += [(5, 3, 33, 3), (40, 4, 1030, 2), (0, 4, 8, 3)]
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(n: int, g: int, dim: int, channels: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    """codes, table, offsets, empty; a quarter of the codes is empty, and empty rows are NaN."""
    rng = seeded(n * g + dim)
    sizes = [SIZES[c % len(SIZES)] for c in range(channels)]
    empty = [size - 1 if c % 2 else 0 for c, size in enumerate(sizes)]
    codes = torch.stack([torch.randint(size, (n, g), generator=rng) for size in sizes], dim=1)
    codes = codes.where(torch.rand(codes.shape, generator=rng) > 0.25, torch.tensor(empty)[:, None])
    offsets = torch.tensor([sum(sizes[:c]) for c in range(channels)])
    table = torch.randn(sum(sizes), dim, generator=rng).to(dtype)
    table[offsets + torch.tensor(empty)] = torch.nan
    return codes, table, offsets, torch.tensor(empty)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_of_rows(dtype, shape):
    codes, table, offsets, empty = inputs(*shape, dtype)
    got = patch_embed(codes, table, offsets, empty)
    assert got.dtype == dtype
    assert_rounded(got, patch_embed_ref(codes, table.double(), offsets, empty), noise=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), FEW, st.integers(1, 70), FEW, st.permutations(range(3)))
def test_codes_of_any_strides(n, g, dim, channels, order):
    codes, table, offsets, empty = inputs(n, g, dim, channels)
    back = [order.index(axis) for axis in range(3)]
    strided = codes.permute(order).contiguous().permute(back)
    want = patch_embed_ref(codes, table, offsets, empty)
    assert_close(patch_embed(strided, table, offsets, empty), want, rtol=1e-6, atol=1e-6)


def test_the_rows_of_a_wider_table():
    codes, table, offsets, empty = inputs(4, 4, 48, 3)
    part = table[:, 5:37]
    want = patch_embed_ref(codes, part, offsets, empty)
    assert_close(patch_embed(codes, part, offsets, empty), want, rtol=1e-6, atol=1e-6)


def test_a_patch_of_empty_codes_is_zero():
    _, table, offsets, empty = inputs(1, 4, 24, 3)
    nothing = empty[None, :, None].expand(2, -1, 4)
    assert torch.equal(patch_embed(nothing, table, offsets, empty), torch.zeros(2, 4, 24))


def test_a_code_that_could_not_be_drawn_makes_its_frame_nan():
    """And no other frame; no row before the table is read."""
    codes, table, offsets, empty = inputs(3, 4, 40, 3)
    want = patch_embed(codes, table, offsets, empty)
    for channel in range(3):
        broken = codes.clone()
        broken[1, channel, 2] = NOT_FINITE
        for got in (
            patch_embed(broken, table, offsets, empty),
            patch_embed_ref(broken, table, offsets, empty),
        ):
            assert got[1, 2].isnan().all()
            whole = torch.ones(3, 4, dtype=torch.bool)
            whole[1, 2] = False
            torch.testing.assert_close(got[whole], want[whole], rtol=1e-6, atol=1e-6)


def test_channels_must_agree():
    codes, table, offsets, empty = inputs(2, 4, 8, 3)
    refuses("3 channels", patch_embed, codes, table, offsets[:2], empty)
    refuses("contiguous", patch_embed, codes, table.T.contiguous().T, offsets, empty)
