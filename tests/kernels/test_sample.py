"""Filtering against an independent oracle, draws against exact probabilities, banned ids."""

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import rows_not_finite
from torch import Tensor

from mimo_fast.kernels.sample import NOT_FINITE, filter_scores, gumbel, sample
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors


def kept_values(logits: Sequence[float], sampler: MiMoSampler, slack=1e-5) -> list[list[float]]:
    """Every list of scaled logits, ascending, that upstream's rule may keep of a row.

    Several where a cumulative probability is within `slack` of 1 - top_p, as float32 may round.
    """
    # Divided in float32, because that may tie what was not.
    temperature = torch.tensor(sampler.temperature or 1.0)
    scores = sorted(float(torch.tensor(value) / temperature) for value in logits)
    if sampler.top_k:
        kth = scores[-min(sampler.top_k, len(scores))]
        scores = [score for score in scores if score >= kth]
    scores = [score for score in scores if score > -math.inf]
    if not sampler.top_p:
        return [scores]
    weights = [math.exp(score - scores[-1]) for score in scores]
    total, cumulative = math.fsum(weights), 0.0
    certain = possible = 0
    for weight in weights[:-1]:
        cumulative += weight / total
        certain += cumulative <= 1 - sampler.top_p - slack
        possible += cumulative <= 1 - sampler.top_p + slack
    return [scores[dropped:] for dropped in range(certain, possible + 1)]


def assert_kept(logits: Tensor, samplers: Sequence[MiMoSampler]) -> None:
    scores = filter_scores(logits, sampler_tensors(samplers))
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    for row, got, sampler in zip(logits.double().tolist(), scores.tolist(), samplers, strict=True):
        kept = sorted(value for value in got if value > -math.inf)
        assert kept in kept_values(row, sampler), (row, sampler)
        for value, logit in zip(got, row, strict=True):
            scaled = logit / (sampler.temperature or 1.0)
            assert value in (-math.inf, pytest.approx(scaled, rel=1e-6))


temperatures = st.sampled_from((None, 0.3, 0.9, 1.0, 2.5))
shares = st.none() | st.sampled_from((0.0, 0.01, 0.5, 0.95, 1.0)) | st.floats(0, 1)
places = st.none() | st.integers(0, 14)
samplers = st.builds(MiMoSampler, st.just(True), temperatures, places, shares)
# Small integers make ties, at the thresholds too.
logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32), st.just(-math.inf))


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    size = draw(st.integers(1, 12))
    row = st.lists(logit, min_size=size, max_size=size).filter(lambda x: max(x) > -math.inf)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))


@settings(max_examples=300)
@given(logit_rows(), st.data())
def test_filter_keeps_what_upstreams_rule_keeps(logits, data):
    assert_kept(logits, [data.draw(samplers) for _ in logits])


CORNERS = [
    [2.0] * 9,
    [0.0, *[-math.inf] * 8],
    [-math.inf] * 8 + [5.0],
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0],
    [40.0, 39.0, -40.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [-88.0, -87.0, -89.0, -90.0, -88.0, -87.0, -89.0, -90.0, -87.0],
]


@pytest.mark.parametrize("top_k", [None, 1, 2, 4, 8, 9, 100])
@pytest.mark.parametrize("top_p", [None, 0.0, 1e-6, 0.3, 0.85, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_filter_on_flat_one_hot_tied_and_steep_rows(top_k, top_p, temperature):
    sampler = MiMoSampler(True, temperature, top_k, top_p)
    assert_kept(torch.tensor(CORNERS), [sampler] * len(CORNERS))


@pytest.mark.parametrize(
    ("logits", "sampler", "kept"),
    [
        # All ties at the threshold of top-k.
        ([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], MiMoSampler(True, None, 2), [1, 2, 3, 4]),
        # Sums of powers of two are exact: 1/8 + 1/8 + 1/4 is 1 - 0.5.
        ([math.log(x) for x in (0.125, 0.5, 0.125, 0.25)], MiMoSampler(True, top_p=0.5), [1]),
        ([0.0, 9.0, 0.0], MiMoSampler(True, top_p=1e-9), [1]),
    ],
)
def test_kept_ids(logits, sampler, kept):
    scores = filter_scores(torch.tensor([logits]), sampler_tensors([sampler]))
    assert (scores[0] > -torch.inf).nonzero().flatten().tolist() == kept


def test_mixed_settings_in_a_batch_equal_each_alone():
    rng = seeded(0)
    mixed = [MiMoSampler(True, 0.7, 5, 0.9), GREEDY, MiMoSampler(True, 1.5)]
    mixed += [MiMoSampler(True, None, None, 0.3), MiMoSampler(True, 0.2, 1, 1.0)]
    mixed += [MiMoSampler(True, 0.0, 3, 0.5)]
    logits = torch.randn(6, 33, generator=rng) * 3
    banned = torch.rand(6, 33, generator=rng) < 0.2
    rows = torch.arange(6)
    noise = gumbel(rows + 100, rows, rows * 0, 33)
    together = sample(logits, sampler_tensors(mixed), noise, banned)
    for row, sampler in enumerate(mixed):
        one = slice(row, row + 1)
        alone = sample(logits[one], sampler_tensors([sampler]), noise[one], banned[one])
        assert alone.item() == together[row].item()
        kept = filter_scores(logits[one], sampler_tensors([sampler]))
        assert torch.equal(kept, filter_scores(logits, sampler_tensors(mixed))[one])


def noise_of(seed: int, draws: int, size: int) -> Tensor:
    """Noise [draws, size] of one seed."""
    index = torch.arange(draws)
    return gumbel(torch.full_like(index, seed), index, torch.zeros_like(index), size)


def draw(logits: Tensor, sampler: MiMoSampler, noise: Tensor, banned=None) -> Tensor:
    """One id from the same logits [V] for each row of noise [N, V]."""
    n = len(noise)
    settings = sampler_tensors([sampler]).select([0], repeat=n)
    return sample(logits.expand(n, -1), settings, noise, banned)


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Probability of a result at least as uneven; ids expected less than 8 times are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 8
    pooled = [(counts[~rare].double(), expected[~rare])]
    if expected[rare].sum() > 0:
        pooled.append((counts[rare].sum().double()[None], expected[rare].sum()[None]))
    got, want = (torch.cat(parts) for parts in zip(*pooled, strict=True))
    statistic = ((got - want).square() / want).sum()
    freedom = torch.tensor(len(got) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def test_chi_square_tail_is_right():
    # 95% quantiles of the chi-square distribution.
    for freedom, quantile in ((1, 3.841459), (10, 18.307038)):
        tail = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(quantile / 2))
        assert float(tail) == pytest.approx(0.05, abs=1e-5)
    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert chi_square_p(torch.tensor([600, 400]), even) < 1e-3


DRAWS = 200_000
SETTINGS = [(), (0.6, 50, 0.95), (0.9, None, 0.95), (1.3, 4), (0.5, 8, 0.97), (2.0, None, 0.85)]


@pytest.fixture(scope="module")
def noises() -> dict[str, Tensor]:
    """Noise [200000, 11] along each axis that names a draw."""
    index = torch.arange(DRAWS)
    zero = torch.zeros_like(index)
    return {
        "draws": gumbel(zero + 20261, index, zero, 11),
        "seeds": gumbel(index + 77, zero, zero + 2, 11),
        "slots": gumbel(zero + 5, zero + 9, index, 11),
    }


@pytest.mark.parametrize("axis", ["draws", "seeds", "slots"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_exact_probabilities(noises, axis, setting):
    sampler = MiMoSampler(True, *setting)
    logits = torch.tensor([1.0, 0.5, 0.5, -0.2, 2.0, -1.0, 0.0, 1.4, -2.5, 0.5, -5.0])
    banned = torch.zeros(11, dtype=torch.bool)
    banned[7] = True
    counts = draw(logits, sampler, noises[axis], banned).bincount(minlength=11)
    (kept,) = kept_values(logits.tolist(), sampler)
    scores = logits.double() / (sampler.temperature or 1.0)
    removed = scores < kept[0] - 1e-6
    # Which of tied ids top-p drops is arbitrary: no threshold here may fall on a tie.
    assert (~removed).sum() == len(kept)
    scores[removed | banned] = -torch.inf
    probabilities = scores.softmax(-1)
    assert counts[probabilities == 0].sum() == 0
    assert chi_square_p(counts, probabilities) > 1e-3


def test_draws_from_a_wide_vocabulary():
    logits = torch.randn(1025, generator=seeded(5)) * 2
    noise = noise_of(3, 4000, 1025)
    counts = draw(logits, MiMoSampler(True), noise).bincount(minlength=len(logits))
    assert chi_square_p(counts, logits.double().softmax(-1)) > 1e-3


def test_draws_do_not_depend_on_the_batch():
    rng = seeded(1)
    logits = torch.randn(7, 300, generator=rng)
    seeds = torch.tensor([9, 2**62 + 1, 9, 0, 4, 2**32, 5])
    draws, slots = torch.tensor([0, 3, 1, 0, 2**31, 7, 7]), torch.tensor([0, 1, 0, 0, 4, 2, 2])
    batch = sampler_tensors([MiMoSampler(True, 0.9, top_p=0.95)] * 7)
    together = gumbel(seeds, draws, slots, 300)
    ids = sample(logits, batch, together, None)
    for row, one in ((row, slice(row, row + 1)) for row in (0, 3, 6, 1)):
        alone = gumbel(seeds[one], draws[one], slots[one], 300)
        assert torch.equal(alone, together[one])
        assert sample(logits[one], batch.select([row]), alone, None).item() == ids[row].item()
    # The vocabulary's size does not matter either.
    assert torch.equal(gumbel(seeds, draws, slots, 40), together[:, :40])


def test_greedy_takes_the_first_of_the_best():
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    greedy, banned = sampler_tensors([GREEDY] * 2), torch.tensor([False, True, False, False])
    assert sample(logits, greedy, None, None).tolist() == [1, 0]
    assert sample(logits, greedy, None, banned).tolist() == [2, 0]


def test_greedy_row_ignores_noise():
    logits, noise = torch.tensor([[0.0, 1.0, 0.9]] * 3), torch.tensor([[99.0, 0.0, 0.0]] * 3)
    mixed = sampler_tensors([MiMoSampler(False, 0.5), MiMoSampler(True), MiMoSampler(True, 0)])
    assert sample(logits, mixed, noise, None).tolist() == [1, 0, 1]


def test_where_nothing_is_left_the_best_id_not_banned_is_taken():
    logits = torch.tensor([[0.0, 5.0, 2.0, 3.0], [4.0, 0.0, 1.0, -9.0]])
    banned = torch.tensor([[False, True, False, False], [True, False, True, False]])
    for chosen in ((True, 1.0, 1), (True, 1.0, None, 1e-6), (False, 1.0, 1)):
        sampler = MiMoSampler(*chosen)
        noise = torch.zeros(2, 4)
        noise[:, 0] = 50.0
        assert sample(logits, sampler_tensors([sampler] * 2), noise, banned).tolist() == [3, 1]


def test_banned_ids_are_removed_after_top_k_and_top_p():
    """Upstream's order: a banned id takes one of the k places and its mass counts."""
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    banned = torch.tensor([True, False, False, False])
    noise = noise_of(4, 2000, 4)
    assert set(draw(logits, MiMoSampler(True, 1.0, 2), noise, banned).tolist()) == {1}
    logits = torch.tensor([8.0, 3.0, 2.0, 1.0])
    assert set(draw(logits, MiMoSampler(True, 1.0, None, 0.9), noise, banned).tolist()) == {1}


@settings(max_examples=60)
@given(logit_rows(), st.data())
def test_banned_ids_are_never_drawn(logits, data):
    n, size = logits.shape
    masks = st.lists(st.booleans(), min_size=size, max_size=size)
    banned = torch.tensor([data.draw(masks) for _ in range(n)])
    banned[banned.all(-1), 0] = False
    picked = [data.draw(samplers) for _ in range(n)]
    noise = gumbel(torch.arange(n), torch.arange(n), torch.arange(n), size)
    ids = sample(logits, sampler_tensors(picked), noise, banned)
    allowed = logits.masked_fill(banned, -torch.inf)
    for row in range(n):
        if allowed[row].max() > -torch.inf:
            assert not banned[row, ids[row]]
            assert logits[row, ids[row]] > -torch.inf


@pytest.mark.parametrize("size", [2, 129])
def test_logits_that_are_no_numbers_draw_nothing(size):
    logits, banned, lost = rows_not_finite(size)
    index = torch.arange(len(logits))
    noise = gumbel(index, index, index * 0, size)
    for sampler in (GREEDY, MiMoSampler(True, 0.8, 20, 0.9), MiMoSampler(True, 1.0, None, 0.5)):
        ids = sample(logits, sampler_tensors([sampler] * len(logits)), noise, banned)
        assert torch.equal(ids == NOT_FINITE, lost)
        kept = ~lost
        some = sampler_tensors([sampler] * int(kept.sum()))
        assert torch.equal(ids[kept], sample(logits[kept], some, noise[kept], banned[kept]))


def test_half_precision_logits_are_filtered_in_float32():
    logits = torch.randn(4, 50, generator=seeded(2)) * 4
    for dtype in (torch.bfloat16, torch.float16):
        low = logits.to(dtype)
        batch = sampler_tensors([MiMoSampler(True, 0.7, 20, 0.9)] * 4)
        assert torch.equal(filter_scores(low, batch), filter_scores(low.float(), batch))
