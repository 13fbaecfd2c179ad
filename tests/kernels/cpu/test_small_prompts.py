"""Prompts of a small model in native calls: the bits of positions one by one, in any company."""

import pytest
import torch
from helpers import source_of, write_pair
from test_small_model import NANO

from mimo_fast.config import LMConfig, read_json
from mimo_fast.kernels.cpu import library as native
from mimo_fast.runtime.lm.executor import FusedBackbone, layer_by_layer
from mimo_fast.runtime.lm.model import LM, PlacedIds
from mimo_fast.runtime.lm.state import DecodeState

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

LENGTHS = (1, 7, 40, 3)
SLOTS = (2, 0, 3, 1)


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> LM:
    sizes = NANO | {"max_position_embeddings": 1024}
    directory = write_pair(tmp_path_factory.mktemp("prompts"), sizes, {})[0]
    lm = LM(LMConfig.from_dict(read_json(directory / "config.json")), 1, source_of(directory))
    assert isinstance(lm._executor.backbone, FusedBackbone)
    return lm


def prompt(lm: LM, groups: int, seed: int) -> torch.Tensor:
    """Text and speech in turns [C + 1, groups G]."""
    config, generator = lm.config, torch.Generator().manual_seed(seed)
    shape = groups, config.group_size
    spoken = torch.rand(groups, generator=generator) < 0.5
    text = torch.randint(2, 200, (groups,), generator=generator)
    text = torch.where(spoken, lm.empty_id, text)[:, None].expand(shape)
    codes = [
        torch.where(
            spoken[:, None], torch.randint(0, size, shape, generator=generator), empty
        ).flatten()
        for size, empty in zip(config.code_sizes, config.empty_codes, strict=True)
    ]
    return torch.stack([text.flatten(), *codes])


def prompts(lm: LM) -> list[torch.Tensor]:
    return [prompt(lm, groups, seed) for seed, groups in enumerate(LENGTHS)]


def contents(state: DecodeState) -> list[torch.Tensor]:
    """All that a prefill writes: hidden states, lengths, keys and values up to them."""
    lengths = [int(state.lengths[slot]) for slot in SLOTS]
    kept = [
        part[:, slot, :, :length]
        for part in state.cache.parts
        for slot, length in zip(SLOTS, lengths, strict=True)
    ]
    return [state.hidden[list(SLOTS)], state.lengths[list(SLOTS)], *kept]


def same(left: DecodeState, right: DecodeState) -> bool:
    return all(torch.equal(*pair) for pair in zip(contents(left), contents(right), strict=True))


def alone(lm: LM) -> DecodeState:
    state = lm.new_state([0] * 4, 64)
    for slot, ids in zip(SLOTS, prompts(lm), strict=True):
        lm.prefill(ids, state, slot)
    return state


def test_prompts_together_have_the_bits_of_lone_ones(lm):
    state = lm.new_state([0] * 4, 64)
    lm.prefill_together(
        [PlacedIds(ids, slot) for slot, ids in zip(SLOTS, prompts(lm), strict=True)], state
    )
    assert same(state, alone(lm))


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(lm, chunk):
    state, size = lm.new_state([0] * 4, 64), lm.config.group_size
    for start in range(0, max(LENGTHS), chunk):
        rest = [
            PlacedIds(ids[:, start * size : (start + chunk) * size], slot, start)
            for slot, ids in zip(SLOTS, prompts(lm), strict=True)
            if ids.shape[1] > start * size
        ]
        lm.prefill_together(rest, state)
    assert same(state, alone(lm))


def test_threads_change_no_bits(lm):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        state = alone(lm)
        with lm.threads():
            assert torch.get_num_threads() == 1
            assert native.compiled().available_threads() == 3
            assert same(alone(lm), state)
        torch.set_num_threads(1)
        assert native.compiled().available_threads() == 1
        assert same(alone(lm), state)
    finally:
        torch.set_num_threads(threads)


def test_a_prompt_longer_than_a_chunk_is_that_of_plain_torch(lm, monkeypatch):
    ids = prompt(lm, 600, 9)
    states = [lm.new_state([0], 600) for _ in range(2)]
    lm.prefill(ids, states[0], 0)
    hidden = torch.cat([*lm.hidden_chunks(ids, states[0], 0)])
    assert torch.equal(hidden[-1], states[0].hidden[0])
    with monkeypatch.context() as patch:
        patch.setattr(lm, "_executor", layer_by_layer(lm.network))
        patch.setenv("MIMO_FAST_KERNELS", "torch")
        want = torch.cat([*lm.hidden_chunks(ids, states[1], 0)])
    assert float((hidden - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert int(states[0].lengths[0]) == 600


def test_a_group_after_a_prompt_is_one_more_position(lm):
    """A prompt's last group, fed by `step`, gives what the whole prompt gives."""
    ids, size = prompt(lm, 9, 3), lm.config.group_size
    whole, stepped = lm.new_state([0], 9), lm.new_state([0], 9)
    lm.prefill(ids, whole, 0)
    lm.prefill(ids[:, :-size], stepped, 0)
    lm.stage(stepped, 0, int(ids[0, -1]), ids[1:, -size:])
    lm.step(stepped, torch.tensor([0]))
    assert torch.equal(whole.hidden[0], stepped.hidden[0])
    assert torch.equal(whole.lengths, stepped.lengths)


def test_two_parts_of_a_slot_are_refused(lm):
    state, ids = lm.new_state([0], 9), prompt(lm, 2, 0)
    with pytest.raises(ValueError, match="of one slot"):
        lm.prefill_together([PlacedIds(ids, 0), PlacedIds(ids, 0, 2)], state)


def test_an_int8_cache_is_filled_one_prompt_after_the_other(lm):
    states = [lm.new_state([0] * 4, 64, quantized_cache=True) for _ in range(2)]
    parts = [PlacedIds(ids, slot) for slot, ids in zip(SLOTS, prompts(lm), strict=True)]
    lm.prefill_together(parts, states[0])
    for part in parts:
        lm.prefill(part.ids, states[1], part.slot)
    assert same(*states)
