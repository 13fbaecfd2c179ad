"""Residual vector quantization: nearest rows in float64, ties, subsets, decoding."""

from itertools import pairwise

import pytest
import torch
from helpers import assert_rounded, random_books, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels.rvq import rvq_decode, rvq_encode


def assert_nearest(x: Tensor, books: list[Tensor], codes: Tensor) -> int:
    """Every chosen distance is within 1e-5 of the least; returns how many codes differ."""
    assert (codes.shape, codes.dtype) == ((len(books), len(x)), torch.int64)
    residual, near = x.double(), 0
    for index, book in zip(codes, books, strict=True):
        wide = book.double()
        exactly = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(residual, wide, compute_mode=exactly).square()
        least, nearest = distances.min(-1)
        chosen = distances.gather(1, index[:, None])[:, 0]
        assert (chosen <= least * (1 + 1e-5)).all()
        near += int((index != nearest).sum())
        residual = residual - wide[index]
    return near


@pytest.mark.parametrize("sizes", [[64, 64, 16], [1024], [1], [5, 1, 9]])
@pytest.mark.parametrize(("dim", "t"), [(24, 200), (3, 2), (129, 33)])
def test_codes_are_nearest_rows(sizes, dim, t):
    books = random_books(sizes, dim)
    x = torch.randn(t, dim, generator=seeded(1)) * 2
    assert assert_nearest(x, books, rvq_encode(x, books)) == 0


def test_codes_of_many_frames_are_nearest_rows():
    books = random_books([64, 64, 16], 16)
    x = torch.randn(100_000, 16, generator=seeded(1)) * 2
    near = sum(assert_nearest(part, books, rvq_encode(part, books)) for part in x.split(20_000))
    assert near <= 10


def test_frames_near_codebook_boundaries():
    """Half-way between two rows plus nudges, the least below float32 resolution."""
    books = random_books([64, 32], 48)
    rng = seeded(5)
    a, b = (books[0][torch.randint(64, (5000,), generator=rng)] for _ in range(2))
    nudge = torch.tensor([1e-3, -1e-3, 1e-4, -1e-4, 1e-7]).repeat(1000)[:, None]
    x = (a + b) / 2 + nudge * (a - b)
    codes = rvq_encode(x, books)
    assert assert_nearest(x, books, codes) <= 1000
    clear = nudge[:, 0].abs() > 1e-6
    assert assert_nearest(x[clear], books, codes[:, clear]) == 0


def test_ties_take_the_first_row():
    row = torch.tensor([[1.0, 2.0, 3.0]])
    book = torch.cat((torch.zeros(1, 3), row, row, row))
    assert rvq_encode(row.repeat(4, 1), [book, book]).tolist() == [[1] * 4, [0] * 4]
    # As far from +1 as from -1.
    assert rvq_encode(torch.zeros(1, 1), [torch.tensor([[-1.0], [1.0]])]).tolist() == [[0]]
    assert rvq_encode(torch.zeros(1, 1), [torch.tensor([[1.0], [-1.0]])]).tolist() == [[0]]


def test_fewer_codebooks_give_the_first_rows():
    books = random_books([64, 64, 16, 16], 12)
    x = torch.randn(40, 12, generator=seeded(2))
    full = rvq_encode(x, books)
    for n in range(5):
        assert torch.equal(rvq_encode(x, books[:n]), full[:n])
        if n:
            assert torch.equal(rvq_decode(full[:n], books), rvq_decode(full[:n], books[:n]))


def test_decode_sums_rows():
    books = random_books([9, 5, 7], 11)
    codes = torch.stack([torch.randint(len(book), (20,), generator=seeded(3)) for book in books])
    want = sum(book.double()[index] for index, book in zip(codes, books, strict=True))
    assert_rounded(rvq_decode(codes, books), want, noise=1e-6)


def test_decode_of_encode_is_what_encode_subtracted():
    """Orthogonal rows far apart: the sum of one of each is recovered exactly."""
    books = [torch.eye(6)[i : i + 2] * 2.0 ** (5 - i) for i in (0, 2, 4)]
    codes = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]])
    x = rvq_decode(codes, books)
    assert torch.equal(rvq_encode(x, books), codes)
    assert torch.equal(rvq_decode(rvq_encode(x, books), books), x)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 20))
def test_codebooks_with_a_zero_row_never_make_it_worse(seed, count, dim):
    books = random_books([8] * count, dim, seed)
    for book in books:
        book[3] = 0
    x = torch.randn(10, dim, generator=seeded(seed + 1))
    codes = rvq_encode(x, books)
    decoded = [rvq_decode(codes[:n], books) for n in range(1, count + 1)]
    errors = [(x - part).square().sum(-1) for part in (0, *decoded)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5) + 1e-5).all()


def test_frames_are_independent():
    books = random_books([64, 16], 10)
    x = torch.randn(30, 10, generator=seeded(4))
    order = torch.randperm(30, generator=seeded(5))
    assert torch.equal(rvq_encode(x[order], books), rvq_encode(x, books)[:, order])
