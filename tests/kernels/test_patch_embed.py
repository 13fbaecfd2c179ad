"""Patch embedding: a sum of table rows in which the empty code adds nothing."""

import pytest
import torch
from helpers import assert_rounded, seeded
from torch import Tensor

from mimo_fast.kernels.patch_embed import patch_embed

SIZES = (65, 17, 9)


def tables(dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    table = torch.randn(sum(SIZES), dim, generator=seeded(dim)).to(dtype)
    return table, torch.tensor([0, 65, 82]), torch.tensor([64, 16, 0])


def random_codes(n: int, g: int) -> Tensor:
    rng = seeded(n * g)
    return torch.stack([torch.randint(size, (n, g), generator=rng) for size in SIZES], dim=1)


@pytest.mark.parametrize(("n", "g", "dim"), [(1, 1, 1), (5, 4, 33), (0, 4, 8), (3, 2, 48)])
def test_sum_of_rows(dtype, n, g, dim):
    table, offsets, empty = tables(dim, dtype)
    codes = random_codes(n, g)
    want = torch.zeros(n, g, dim, dtype=torch.float64)
    for row in range(n):
        for frame in range(g):
            for channel in range(len(SIZES)):
                code = int(codes[row, channel, frame])
                if code != empty[channel]:
                    want[row, frame] += table[int(offsets[channel]) + code].double()
    got = patch_embed(codes, table, offsets, empty)
    assert got.dtype == dtype
    assert_rounded(got, want, noise=1e-6)


def test_empty_codes_add_nothing_although_their_rows_are_not_zero():
    table, offsets, empty = tables(16)
    assert (table[offsets + empty].abs().sum(-1) > 0).all()
    nothing = empty[None, :, None].expand(2, -1, 4)
    assert torch.equal(patch_embed(nothing, table, offsets, empty), torch.zeros(2, 4, 16))
    one = nothing.clone()
    one[1, 2, 3] = 5
    got = patch_embed(one, table, offsets, empty)
    assert torch.equal(got[1, 3], table[82 + 5])
    assert got.count_nonzero() == 16


def test_not_even_nan_in_an_empty_row_leaks():
    table, offsets, empty = tables(16)
    want = patch_embed(random_codes(6, 4), table, offsets, empty)
    table[offsets + empty] = torch.nan
    assert torch.equal(patch_embed(random_codes(6, 4), table, offsets, empty), want)


def test_the_same_code_of_another_channel_is_not_empty():
    table, offsets, empty = tables(4)
    codes = torch.tensor([[[16], [16], [8]]])
    assert torch.equal(patch_embed(codes, table, offsets, empty)[0, 0], table[16] + table[82 + 8])


def test_padding_rows_of_the_kit_are_not_zero(model):
    """Else nothing above would show that the language model masks them."""
    lm = model.lm
    assert (lm.code_embeddings[lm.code_offsets + lm.empty_codes].abs().sum(-1) > 0).all()
