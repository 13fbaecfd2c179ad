"""The RVQ kernels: codes equal to the reference's but for near-ties, sums bitwise equal."""

import pytest
import torch
from helpers import random_books, refuses, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.bench.accuracy import compare_codes
from mimo_fast.kernels import rvq
from mimo_fast.kernels.rvq import (
    FEW_FRAMES,
    Codebooks,
    rvq_decode,
    rvq_decode_ref,
    rvq_encode,
    rvq_encode_ref,
)
from mimo_fast.kernels.sample import NOT_FINITE

SHORT, LONG = 10**9, 0
SIZES = st.lists(st.integers(1, 140), min_size=1, max_size=4)
pytestmark = pytest.mark.usefixtures("poisoned")
both = pytest.mark.parametrize("few_frames", [SHORT, LONG], ids=["short", "long"])


def random_frames(frames: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(frames, dim, generator=seeded(seed)) * 2


def encode(x: Tensor, books: list[Tensor], few_frames: int) -> Tensor:
    """By the configuration of short inputs or of long ones, however few frames there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rvq, "FEW_FRAMES", few_frames)
        return rvq_encode(x, Codebooks.pack(books))


def assert_same_codes(x: Tensor, books: list[Tensor], got: Tensor, max_near_ties: int = 0) -> None:
    """Equal up to a frame's first near-tie: float64 distances within 1e-5 of each other."""
    want = rvq_encode_ref(x, books)
    assert (got.shape, got.dtype) == (want.shape, torch.int64)
    wrong, near_ties = compare_codes(x, books, got, want)
    assert wrong == 0
    assert near_ties <= max_near_ties


@both
@pytest.mark.parametrize("frames", [1, 4, 5, 16, 19])
@pytest.mark.parametrize(("sizes", "dim"), [([200, 130, 16], 40), ([5, 1, 64, 129], 33), ([7], 1)])
def test_codes_are_the_references(few_frames, frames, sizes, dim):
    x, books = random_frames(frames, dim), random_books(sizes, dim)
    assert_same_codes(x, books, encode(x, books, few_frames))


@pytest.mark.parametrize(("few_frames", "large"), [(SHORT, []), (LONG, [1024, 1024])])
def test_published_width(few_frames, large):
    x, books = random_frames(4, 1280), random_books([*large, 128, 128], 1280)
    assert_same_codes(x, books, encode(x, books, few_frames))


def test_the_threshold_changes_nothing():
    x, books = random_frames(FEW_FRAMES, 16), random_books([16], 16)
    assert torch.equal(rvq_encode(x, books)[:, :-1], rvq_encode(x[:-1], books))


def test_many_frames(monkeypatch):
    """With a taller tile than any launch takes, because the interpreter pays per program."""
    tile = {"BLOCK_T": 1024, "BLOCK_V": 32, "BLOCK_D": 32, "BLOCK_R": 32}
    monkeypatch.setattr(rvq, "_tile", lambda frames: (tile, 4, 1))
    x, books = random_frames(100_000, 32), random_books([64, 16], 32)
    assert_same_codes(x, books, rvq_encode(x, books), max_near_ties=5)


@both
def test_frames_near_codebook_boundaries(few_frames):
    """Half-way between two rows plus a nudge that float32 distances can resolve."""
    books = random_books([64, 32], 48)
    rng = seeded(5)
    a, b = (books[0][torch.randint(64, (60,), generator=rng)] for _ in range(2))
    nudge = torch.tensor([1e-4, -1e-4, 1e-3, -1e-3, 0.0]).repeat(12)[:, None]
    x = (a + b) / 2 + nudge * (a - b)
    # Those in the very middle may fall on either side.
    assert_same_codes(x, books, encode(x, books, few_frames), max_near_ties=12)


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(1, 70), st.integers(0, 20), st.integers(0, 9), st.booleans())
def test_any_sizes(sizes, dim, frames, seed, short):
    x, books = random_frames(frames, dim, seed), random_books(sizes, dim, seed + 1)
    assert_same_codes(x, books, encode(x, books, SHORT if short else LONG), max_near_ties=1)


@both
@pytest.mark.parametrize("repeat", [1, 60, 128, 130])
def test_the_first_of_equal_rows(repeat, few_frames):
    """Within and across tiles; small integers make distances exact."""
    row = torch.tensor([[1.0, 2.0, 3.0]])
    book = torch.cat((torch.zeros(repeat, 3), row, row, row.repeat(130, 1)))
    codes = encode(row.repeat(5, 1), [book, book], few_frames)
    assert codes.tolist() == [[repeat] * 5, [0] * 5]
    # As far from +1 as from -1.
    assert rvq_encode(torch.zeros(1, 1), [torch.tensor([[1.0], [-1.0]])]).tolist() == [[0]]


def test_fewer_codebooks_give_the_first_rows():
    books = random_books([64, 64, 16, 16], 12)
    packed, x = Codebooks.pack(books), random_frames(10, 12)
    full = rvq_encode(x, packed)
    for n in range(5):
        assert len(packed.first(n)) == n
        assert torch.equal(rvq_encode(x, packed.first(n)), full[:n])
        assert torch.equal(rvq_encode(x, books[:n]), full[:n])
    assert torch.equal(rvq_encode(x, packed.first(None)), full)


def test_frames_of_any_stride():
    books = random_books([64, 16], 12)
    x = random_frames(21, 30)
    for view in (x[::3, 5:17], random_frames(12, 20).T):
        assert torch.equal(rvq_encode(view, books), rvq_encode_ref(view, books))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_x_must_fit():
    books = random_books([4], 12)
    refuses("float32", rvq_encode, random_frames(3, 12).half(), books)
    refuses(r"\[T, 12\]", rvq_encode, random_frames(3, 13), books)


@pytest.mark.parametrize("shape", [(1280, 2, 20), (33, 1, 1), (300, 5, 4), (16, 30, 6), (7, 0, 2)])
def test_decode_is_bitwise_the_reference(shape):
    dim, frames, count = shape
    books = random_books([9, 1, 130, 4, *[5] * 16][:count], dim)
    rng = seeded(3)
    codes = torch.stack([torch.randint(len(book), (frames,), generator=rng) for book in books])
    packed = Codebooks.pack(books)
    for n in {1, (count + 1) // 2, count}:
        want = rvq_decode_ref(codes[:n], books)
        assert torch.equal(rvq_decode(codes[:n], packed), want)
        assert torch.equal(rvq_decode(codes[:n].T.contiguous().T, books), want)
        assert torch.equal(rvq_decode(codes[:n].int(), packed), want)


def test_decode_refuses_more_codes_than_codebooks():
    books = random_books([4, 4], 5)
    for codes in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)):
        refuses("1 to 2 rows", rvq_decode, codes, books)


def test_packed_norms_and_books_are_the_references():
    books = random_books([64, 16, 3], 1280)
    packed = Codebooks.pack([book.to(torch.bfloat16) for book in books])
    assert packed.offsets.tolist() == [0, 64, 80, 83]
    for i, book in enumerate(books):
        assert torch.equal(packed.books[i], book.bfloat16().float())
        start, end = packed.offsets[i], packed.offsets[i + 1]
        assert torch.equal(packed.norms[start:end], packed.books[i].square().sum(-1))


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_frames_that_are_not_finite_have_no_codes(few_frames, value):
    x, books = random_frames(7, 40), random_books([70, 16], 40)
    want = encode(x, books, few_frames)
    broken = x.clone()
    broken[3, 5] = value
    for got in (encode(broken, books, few_frames), rvq_encode_ref(broken, books)):
        assert (got[:, 3] == NOT_FINITE).all()
        others = torch.arange(7) != 3
        assert torch.equal(got[:, others], want[:, others])


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_codebook_that_is_not_finite_gives_no_codes(few_frames, value):
    x, books = random_frames(7, 40), random_books([70, 130, 16], 40)
    books[1][129, 3] = value
    for got in (encode(x, books, few_frames), rvq_encode_ref(x, books)):
        # An infinite row is an infinite distance from one half of space, and NaN from the other.
        near = x[:, 3] - books[0][got[0], 3] > 0
        assert torch.equal(got[1] == NOT_FINITE, near | torch.tensor(value).isnan())
        assert (got[0] >= 0).all()


def test_a_code_that_is_none_is_nan_and_read_inside_the_table():
    books = random_books([9, 7, 5], 40)
    codes = torch.tensor([[1, -1, 3], [2, 2, 6], [4, 4, -1]])
    want = rvq_decode(codes.clamp(min=0), books)
    for got in (rvq_decode(codes, books), rvq_decode_ref(codes, books)):
        assert got[1:].isnan().all()
        assert torch.equal(got[0], want[0])
