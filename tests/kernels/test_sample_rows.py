"""What top-k and top-p keep, on thousands of rows, against upstream's rule in float64."""

import math

import numpy as np
import pytest
import torch
from rows import ROWS, SAMPLERS, SIZE, rows_of
from torch import Tensor

from mimo_fast.kernels.sample import filter_scores, gumbel, sample
from mimo_fast.kernels.sample_text import sample_text_ref
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

SLACK = 1e-5
KINDS = ["normal", "steep", "narrow", "ties", "pairs", "-inf", "one-hot", "flat"]


def kept_by_upstreams_rule(logits: Tensor, sampler: MiMoSampler) -> tuple[np.ndarray, np.ndarray]:
    """What must and what may be kept, bool [R, V]; they differ within SLACK of 1 - top_p.

    Of equal logits at the threshold, those of lower ids are dropped first.
    """
    # Divided in float32, because that may tie what was not.
    scores = (logits / torch.tensor(sampler.temperature)).double().numpy()
    if sampler.top_k:
        descending = -np.sort(-scores, axis=1)
        kth = descending[:, min(sampler.top_k, scores.shape[1]) - 1, None]
        scores = np.where(scores < kth, -np.inf, scores)
    order = np.argsort(scores, axis=1, kind="stable")
    weights = np.exp(np.take_along_axis(scores, order, 1) - scores.max(1, keepdims=True))
    cumulative = (weights / weights.sum(1, keepdims=True)).cumsum(1)
    bounds = []
    for slack in (SLACK, -SLACK):
        dropped = np.zeros_like(scores, dtype=bool)
        if sampler.top_p:
            dropped = cumulative <= 1 - sampler.top_p + slack
            dropped[:, -1] = False
        kept = np.empty_like(dropped)
        np.put_along_axis(kept, order, ~dropped, 1)
        bounds.append(kept & (scores > -np.inf))
    return bounds[0], bounds[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_kept_ids_are_those_of_upstreams_rule(kind, sampler):
    logits = rows_of(kind)
    scores = filter_scores(logits, sampler_tensors([sampler]).select([0], repeat=ROWS))
    got = (scores > -math.inf).numpy()
    must, may = kept_by_upstreams_rule(logits, sampler)
    assert got.any(1).all()
    assert not (must & ~got).any()
    assert not (got & ~may).any()
    if kind == "normal" and sampler.top_p != 1:
        assert (must != may).any(1).mean() < 0.05, "too many rows are undecided to say anything"


@pytest.mark.parametrize("banned", [None, "some", "all"])
def test_noise_for_kept_ids_alone_draws_the_same(banned):
    logits = rows_of("normal")
    settings = sampler_tensors([*SAMPLERS, GREEDY]).select(torch.arange(ROWS) % (len(SAMPLERS) + 1))
    index = torch.arange(ROWS)
    ban = None if banned is None else torch.arange(SIZE) % 3 < (1 if banned == "some" else 3)
    noise = gumbel(index, index + 7, torch.zeros_like(index), SIZE)
    want = sample(logits, settings, noise, ban)
    assert torch.equal(sample_text_ref(logits, settings, index, index + 7, ban), want)
    few = sample_text_ref(logits[:3], settings.select([0, 1, 9]), index[:3], index[:3] + 7, ban)
    assert torch.equal(few, sample(logits[:3], settings.select([0, 1, 9]), noise[:3], ban))
