"""Sampler settings and stop rules."""

import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import fault
from torch import Tensor

import mimo_fast
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.sampling import (
    GREEDY,
    MiMoSampler,
    MiMoStopper,
    check_seed,
    one_seed,
    row_seeds,
    sampler_tensors,
)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_that_make_no_sense_are_refused(bad, word):
    assert word in fault(lambda: MiMoSampler(True, **bad), ValueError)


def test_sampler_tensors_of_each_setting():
    like = SimpleNamespace(do_sample=True, temperature=0.5, top_k=None, top_p=0.25)
    settings = [MiMoSampler(True, 0.0, 7, 0.9), MiMoSampler(True, 2, 0, 1), like]
    tensors = sampler_tensors([MiMoSampler(), MiMoSampler(True), *settings])
    assert tensors.greedy.tolist() == [True, False, True, False, False]
    assert tensors.temperature.tolist() == [1.0, 1.0, 1.0, 2.0, 0.5]
    assert tensors.top_k.tolist() == [0, 0, 7, 0, 0]
    assert tensors.tail.tolist() == [-1.0, -1.0, pytest.approx(0.1), 0.0, 0.75]
    assert not tensors.all_greedy
    assert sampler_tensors([GREEDY, MiMoSampler(True, 0)]).all_greedy


def test_select_repeats_rows():
    rows = ((0.5, 1, 0.5), (0.6, 2, 0.75), (0.7, 3, 1.0))
    tensors = sampler_tensors([MiMoSampler(True, *row) for row in rows])
    chosen = tensors.select([2, 0], repeat=2)
    assert isinstance(chosen, SamplerTensors)
    assert chosen.top_k.tolist() == [3, 3, 1, 1]
    assert chosen.tail.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert torch.equal(chosen.temperature, tensors.temperature[[2, 2, 0, 0]])
    assert chosen.greedy.tolist() == [False] * 4


GROUP, CHANNELS = 4, 8
STEP = GROUP * (CHANNELS + 1)


def flat_rows(last_tokens: Sequence[int], groups: int) -> Tensor:
    """Flattened ids [B, groups * STEP]: the last group's text token as given, 50 elsewhere."""
    ids = torch.full((len(last_tokens), groups * STEP), 50)
    ids[:, -STEP] = torch.tensor(last_tokens)
    return ids


def test_stopper_reads_each_row_s_text_token_of_the_last_group():
    stopper = MiMoStopper(GROUP, CHANNELS, [7, 9])
    assert stopper(flat_rows([7, 8, 9, 50], 3)).tolist() == [True, False, True, False]
    assert stopper(flat_rows([8, 8], 3), None).dtype == torch.bool
    ids = flat_rows([8], 2)
    ids[0, 0] = 7
    ids[0, -STEP + 1 :] = 7
    assert stopper(ids).tolist() == [False]


@pytest.mark.parametrize(("groups", "done"), [(4, False), (5, True), (6, True)])
def test_stopper_max_length_counts_groups(groups, done):
    stopper = MiMoStopper(GROUP, CHANNELS, [7], max_length=5)
    assert stopper(flat_rows([8, 8], groups)).tolist() == [done] * 2
    assert stopper(flat_rows([7, 8], groups)).tolist() == [True, done]


@pytest.mark.parametrize(("groups", "done"), [(2, False), (3, True)])
def test_stopper_min_length_delays_stop_tokens_but_not_max_length(groups, done):
    stopper = MiMoStopper(GROUP, CHANNELS, [7], min_length=3)
    assert stopper(flat_rows([7], groups)).tolist() == [done]
    both = MiMoStopper(GROUP, CHANNELS, [7], max_length=2, min_length=9)
    assert both(flat_rows([7], groups)).tolist() == [True]


def test_stopper_without_rules_never_stops():
    assert MiMoStopper(GROUP, CHANNELS)(flat_rows([0], 500)).tolist() == [False]
    nothing = torch.empty(2, 0, dtype=torch.int64)
    assert MiMoStopper(GROUP, CHANNELS, [7])(nothing).tolist() == [False] * 2


@pytest.mark.parametrize(
    "seed", [0, 5, 2**63 - 1, np.int64(5), np.uint8(5), np.uint64(2**63 - 1), torch.tensor(5)]
)
def test_integers_of_every_type_are_seeds(seed):
    assert check_seed(seed) == int(seed)
    assert type(check_seed(seed)) is int
    assert row_seeds(seed, 2) == [int(seed)] * 2
    assert one_seed(seed) == int(seed)


NO_SEEDS = [
    *((seed, ValueError) for seed in (-1, 2**63, 2**64, np.int64(-1), np.uint64(2**63))),
    *((seed, TypeError) for seed in (True, np.bool_(True), 1.0, np.float32(1), "1", b"1")),
    *((seed, TypeError) for seed in (torch.tensor(True), torch.tensor(1.5), {}, object())),
]


@pytest.mark.parametrize(("seed", "kind"), NO_SEEDS)
def test_everything_else_is_refused(seed, kind):
    for take in (check_seed, one_seed, lambda seed: row_seeds(seed, 2)):
        assert "seed" in fault(lambda take=take: take(seed), kind)


def test_seeds_of_rows():
    assert row_seeds([1, np.int64(2)], 2) == [1, 2]
    assert row_seeds(np.array([1, 2]), 2) == row_seeds(torch.tensor([1, 2]), 2) == [1, 2]
    assert "2 seeds for 3 prompts" in fault(lambda: row_seeds([1, 2], 3), ValueError)
    assert len(set(row_seeds(None, 9))) == 9
    assert all(0 <= seed < 2**63 for seed in row_seeds(None, 9))


ENTRIES = {
    "generate": lambda model, seed: mimo_fast.generate(model, IDS, max_new_tokens=1, seed=seed),
    "forward": lambda model, seed: model.forward(IDS, max_new_tokens=1, seed=seed),
    "task": lambda model, seed: model.text_dialogue_sft("a", max_new_tokens=1, seed=seed),
    "by example": lambda model, seed: model.in_context_learning_s2s(
        "a", [], torch.zeros(9600), max_new_tokens=1, seed=seed
    ),
    "stream": lambda model, seed: list(
        model.stream("text_dialogue", "a", max_new_tokens=1, seed=seed)
    ),
    "prompt": lambda model, seed: model.get_tts_sft_prompt("a", seed=seed),
    "session": lambda model, seed: model.session(seed=seed),
    "conversation": lambda model, seed: model.conversation(seed),
}
IDS = torch.zeros(9, 8, dtype=torch.int64)


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_rule_holds_wherever_a_seed_is_given(model, entry):
    for seed in (2**63 - 1, np.int64(3), np.uint64(3), torch.tensor(3), None):
        ENTRIES[entry](model, seed)
    history = model.history
    for seed, kind in NO_SEEDS:
        assert "seed" in fault(lambda seed=seed: ENTRIES[entry](model, seed), kind)
    assert history is None or torch.equal(model.history, history)


def test_a_seed_of_numpy_draws_as_its_value(model):
    drawn = [
        [chunk.text for chunk in model.stream("text_dialogue", "a", max_new_tokens=4, seed=seed)]
        for seed in (3, np.int64(3), torch.tensor(3))
    ]
    assert drawn[0] == drawn[1] == drawn[2]
