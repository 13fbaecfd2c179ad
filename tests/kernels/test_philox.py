"""Philox against published vectors; Gumbel noise: its distribution, and no draw used twice."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels.sample import gumbel, philox

WORD = 0xFFFFFFFF


def philox_words(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox 4x32-10 on Python integers: all four words."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_oracle_gives_random123_known_answers(counter, key, words):
    assert tuple(philox_words(counter, key)) == words


@example(0, 0, 0, 0)
@given(st.integers(0, 2**63 - 1), *[st.integers(0, WORD) | st.sampled_from((0, 1, WORD))] * 3)
def test_philox_is_the_oracles_first_word(key, c0, c1, c2):
    word = philox(*(torch.tensor([value]) for value in (key, c0, c1, c2)))
    assert word.tolist() == philox_words((c0, c1, c2, 0), (key & WORD, key >> 32))[:1]


def test_philox_broadcasts():
    key, ids = torch.tensor([[3], [5]]), torch.arange(4)
    words = philox(key, ids, torch.tensor([[7], [8]]), torch.tensor([[0], [1]]))
    counters = [[(i, 7 + row, row, 0) for i in range(4)] for row in range(2)]
    want = [[philox_words(each, (3 + 2 * each[2], 0))[0] for each in row] for row in counters]
    assert words.tolist() == want


def noise_of(seed: int, draws: Tensor, slot: int, size: int) -> Tensor:
    return gumbel(torch.full_like(draws, seed), draws, torch.full_like(draws, slot), size)


def test_gumbel_has_the_moments_and_tail_of_its_distribution():
    n = 1_000_000
    noise = noise_of(1, torch.arange(n // 1000), 0, 1000).double().flatten()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    # The fourth central moment is 27/5 of the squared variance.
    assert abs(noise.var() - math.pi**2 / 6) < 5 * math.sqrt(4.4 / n) * math.pi**2 / 6
    for x in (-1.5, 0.0, 2.0, 6.0):
        p = math.exp(-math.exp(-x))
        assert abs((noise <= x).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_gumbel_ends_are_finite(monkeypatch):
    for word in (0, WORD):
        drawn = torch.tensor([[word]])
        monkeypatch.setattr("mimo_fast.kernels.sample.philox", lambda *_, drawn=drawn: drawn)
        (value,) = gumbel(*torch.zeros(3, 1, dtype=torch.int64), 1).flatten().tolist()
        uniform = (word + 0.5) / 2**32
        assert value == pytest.approx(-math.log(-math.log1p(-uniform)), rel=1e-6)


def test_draws_are_independent_across_seed_draw_slot_and_id():
    n, size = 20_000, 5
    index = torch.arange(n)
    zero = torch.zeros_like(index)
    streams = {
        "draw": gumbel(zero, index, zero, size),
        "slot": gumbel(zero, zero, index + 1, size),
        "seed": gumbel(index + 1, zero, zero, size),
        "high seed": gumbel((index + 1) << 32, zero, zero, size),
        "id": gumbel(zero[:1] + 10**9, zero[:1], zero[:1], n * size).view(n, size),
    }
    seen = torch.cat(list(streams.values()))
    assert len(seen.unique(dim=0)) == len(seen), "a row of noise was drawn twice"
    bound = 5 / math.sqrt(n)
    for name, noise in streams.items():
        table = torch.stack((noise[:-1, 0], noise[1:, 0], noise[:-1, 1], noise[1:, 4]))
        correlation = torch.corrcoef(table.double()) - torch.eye(4)
        assert correlation.abs().max() < bound, name
    third = torch.stack([noise[:, 2] for noise in streams.values()])
    across = torch.corrcoef(third.double()) - torch.eye(5)
    assert across.abs().max() < bound
