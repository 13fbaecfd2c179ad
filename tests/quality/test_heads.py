"""What formats cost: identical models cost nothing, and teacher forcing gives the scores that
decoding draws from."""

import math

import pytest
import torch

from mimo_fast.generation import generate
from mimo_fast.quality.heads import Lesson, Scores, compare, head_quality, teacher_forced


@pytest.fixture(scope="module")
def lesson(model, golden):
    """A prompt and our greedy continuation of it, which holds words and patches."""
    ids = golden.get("prompts:dialogue").long()
    grown = generate(model, ids, max_new_tokens=24)
    grown[0, 1::4] = grown[0, 2::4] = grown[0, 3::4] = -100
    return Lesson(grown, ids.shape[1] // 4)


def test_teacher_forced_choices_are_the_greedy_tokens(model, lesson):
    scores = teacher_forced(model.lm, lesson)
    groups = lesson.ids.unflatten(1, (-1, 4))[:, lesson.first :]
    assert torch.equal(scores.text.argmax(-1), groups[0, :, 0])
    spoken = groups[0, :, 0] == model.lm.empty_id
    assert 0 < spoken.sum() <= 24
    for channel, found in enumerate(scores.codes):
        assert torch.equal(found.argmax(-1), groups[channel + 1][spoken].flatten())
        assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5)


def test_a_model_equals_itself(model, lesson):
    scores = [teacher_forced(model.lm, lesson)]
    heads = compare(scores, scores)
    assert len(heads) == 9
    assert all((head.kl, head.agreement) == (0, 1) for head in heads)
    assert heads[0].predictions == 24
    assert {head.predictions for head in heads[1:]} == {
        4 * int((scores[0].text.argmax(-1) == model.lm.empty_id).sum())
    }


def test_divergence_by_hand():
    reference = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log()
    head = head_quality(reference, other)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert head.kl == pytest.approx((first + math.log(2)) / 2)
    # Of equal scores the first counts as preferred.
    assert head.agreement == 0.5
    assert head_quality(reference[:0], other[:0]).predictions == 0


def test_a_worse_model_is_told_from_a_better(model, lesson):
    scores = teacher_forced(model.lm, lesson)
    noise = torch.randn(scores.text.shape, generator=torch.Generator().manual_seed(0))
    noisy = Scores((scores.text + 0.5 * noise).log_softmax(-1), scores.codes)
    heads = compare([scores], [noisy])
    assert heads[0].kl > 0.01
    assert all(head.kl == 0 for head in heads[1:])
