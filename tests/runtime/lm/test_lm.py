"""Patches, embeddings and cached steps equal plain recomputation, at several dimensions."""

import pytest
import torch
import torch.nn.functional as F
from helpers import gaussian
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from variants import Loaded, random_prompt

from mimo_fast.kernels.rope import rope_table
from mimo_fast.kernels.sample import gumbel
from mimo_fast.kernels.sample_codes import code_steps
from mimo_fast.runtime.lm.executor import layer_by_layer
from mimo_fast.runtime.lm.state import NO_POSITION
from mimo_fast.runtime.lm.transformer import self_attend, transformer
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors


def recompute_embeddings(loaded: Loaded, ids: Tensor) -> Tensor:
    """Group by group and channel by channel, from the tensors of the file."""
    config, tensors = loaded.model.lm.config, loaded.tensors
    encoder = config.patch_encoder
    table = rope_table(encoder.head_dim, encoder.rope_theta, config.group_size)
    rows = []
    for group in ids.split(config.group_size, dim=1):
        if group[0, 0] != loaded.model.empty_token:
            rows.append(tensors["model.embed_tokens.weight"][group[0, 0]])
            continue
        frames = torch.zeros(config.group_size, encoder.dim)
        for g in range(config.group_size):
            for c in range(config.channels):
                if group[c + 1, g] != config.empty_codes[c]:
                    frames[g] += tensors[f"speech_embeddings.{c}.weight"][group[c + 1, g]]
        attend = self_attend(encoder, table, config.patch_encoder_causal)
        encoded = transformer(frames[None], loaded.model.lm.patch_encoder, encoder.norm_eps, attend)
        rows.append(F.linear(encoded.flatten(), tensors["speech_group_downcast.weight"]))
    return torch.stack(rows)


def recompute_hidden(loaded: Loaded, ids: Tensor) -> Tensor:
    """The backbone over a whole sequence at once, without a cache: [T, D]."""
    config = loaded.model.lm.config
    x = recompute_embeddings(loaded, ids)
    table = rope_table(config.backbone.head_dim, config.backbone.rope_theta, len(x))
    attend = self_attend(config.backbone, table, causal=True)
    return transformer(x[None], loaded.model.lm.backbone, config.backbone.norm_eps, attend)[0]


def recompute_patch(loaded: Loaded, local: Tensor) -> Tensor:
    """Greedy codes [C, G] after a patch decoder input [D], each step over the whole sequence."""
    config, tensors = loaded.model.lm.config, loaded.tensors
    decoder = config.patch_decoder
    table = rope_table(decoder.head_dim, decoder.rope_theta, 100)
    attend = self_attend(decoder, table, causal=True)
    codes = torch.full((config.channels, config.group_size), -1)
    inputs = [local]
    for step in range(config.group_size + max(config.delays)):
        hidden = transformer(
            torch.stack(inputs)[None], loaded.model.lm.patch_decoder, decoder.norm_eps, attend
        )[0, -1]
        following = torch.zeros(decoder.dim)
        for c in range(config.channels):
            frame = step - config.delays[c]
            if not 0 <= frame < config.group_size:
                continue
            logits = F.linear(hidden, tensors[f"local_transformer_lm_heads.{c}.weight"])
            logits[config.empty_codes[c]] = -torch.inf
            code = int(logits.argmax())
            codes[c, frame] = code
            row = tensors[f"speech_embeddings.{c}.weight"][code]
            if config.patch_encoder.dim != config.patch_decoder.dim:
                row = F.linear(row, tensors["speech_embeddings_to_local.weight"])
            following = following + row
        inputs.append(following)
    assert (codes >= 0).all()
    return codes


def test_greedy_patches_equal_recomputation(loaded):
    lm = loaded.model.lm
    local = gaussian(4, lm.config.patch_decoder.dim) * 3
    state = lm.new_state([0] * 5, 1)
    codes = lm.decode_patch(local, state, torch.tensor([4, 0, 2, 1]), sampler_tensors([GREEDY] * 4))
    assert codes.shape == (4, lm.config.channels, lm.config.group_size)
    assert torch.equal(codes, torch.stack([recompute_patch(loaded, row) for row in local]))
    assert len(codes.flatten(1).unique(dim=0)) == 4, "the patches should depend on their input"


def test_sampled_patches_hold_no_empty_code(loaded):
    lm, config = loaded.model.lm, loaded.model.lm.config
    local = gaussian(1, config.patch_decoder.dim, seed=1).expand(40, -1)
    state = lm.new_state(list(range(40)), 1)
    settings = sampler_tensors([MiMoSampler(True, 2.0)] * 40)
    codes = lm.decode_patch(local, state, torch.arange(40), settings)
    sizes, empty = torch.tensor([config.code_sizes, config.empty_codes])[:, :, None]
    assert ((codes >= 0) & (codes < sizes) & (codes != empty)).all()
    for channel, size in enumerate(config.code_sizes):
        reached = len(codes[:, channel].unique())
        assert reached > min(size, 20) // 2, "hot sampling should reach most codes"
    # A patch is the same alone, and greedy sampling is sampling at temperature 0.
    alone = lm.decode_patch(local[:1], state, torch.tensor([7]), settings.select([7]))
    assert torch.equal(alone[0], codes[7])
    cold, greedy = (
        lm.decode_patch(local[:1], state, torch.tensor([0]), sampler_tensors([sampler]))
        for sampler in (MiMoSampler(True, 1e-4), GREEDY)
    )
    assert torch.equal(cold, greedy)


def test_a_row_of_the_language_model_draws_alone_what_it_draws_in_a_batch(model):
    sampler, lm = MiMoSampler(True, 1.0, top_p=0.95), model.lm
    hidden = gaussian(3, lm.config.backbone.dim, seed=3)

    def both(seeds: list[int], rows: list[int], drawn: list[int]) -> tuple[list[int], Tensor]:
        state = lm.new_state(seeds, 1)
        state.hidden[: len(rows)] = hidden[rows]
        state.draws[: len(rows)] = torch.tensor(drawn)
        batch = sampler_tensors([sampler] * len(seeds))
        slots = torch.arange(len(seeds))
        return lm.sample_text(state, slots, batch).tolist(), lm.sample_patch(state, slots, batch)

    text, codes = both([11, 12, 13], [0, 1, 2], [0, 5, 9])
    for row, seed in ((2, 13), (0, 11), (1, 12)):
        alone_text, alone_codes = both([seed], [row], [[0, 5, 9][row]])
        assert alone_text == text[row : row + 1]
        assert torch.equal(alone_codes[0], codes[row])
    again_text, again_codes = both([11, 12, 13], [0, 1, 2], [1, 6, 10])
    # The next group does not repeat the draws.
    assert (again_text, again_codes.tolist()) != (text, codes.tolist())


def test_no_two_draws_of_a_group_or_of_the_next_share_noise(loaded, monkeypatch):
    lm, named = loaded.model.lm, []

    def recorded(seeds: Tensor, draws: Tensor, slots: Tensor, size: int) -> Tensor:
        named.extend(zip(seeds.tolist(), draws.tolist(), slots.tolist(), strict=True))
        return gumbel(seeds, draws, slots, size)

    # Where noise is not made inside of a native sampler.
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    monkeypatch.setattr(lm, "_executor", layer_by_layer(lm.network))
    for op in ("sample_text", "sample_codes"):
        monkeypatch.setattr(f"mimo_fast.kernels.{op}.gumbel", recorded)
    state, settings = lm.new_state([5, 6], 1), sampler_tensors([MiMoSampler(True)] * 2)
    for _ in range(2):
        lm.sample_text(state, state.rows[:2], settings)
        lm.sample_patch(state, state.rows[:2], settings)
    assert len(named) == 2 * 2 * (1 + lm.config.group_size)
    assert len(set(named)) == len(named)


def test_embeddings_equal_recomputation(loaded):
    lm = loaded.model.lm
    ids = random_prompt(lm.config, lm.empty_id, 9)
    groups = ids.unflatten(1, (-1, lm.config.group_size))
    got = lm.embed(groups[0, :, 0], groups[1:].transpose(0, 1))
    torch.testing.assert_close(got, recompute_embeddings(loaded, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefilled", [1, 4, 8, 9])
def test_prefill_and_steps_equal_recomputation(loaded, prefilled, monkeypatch):
    """For any cut into prefills and single steps, beside a row of another length."""
    lm, size = loaded.model.lm, loaded.model.lm.config.group_size
    monkeypatch.setattr("mimo_fast.runtime.lm.model.PREFILL_CHUNK", 3)
    ids, other = random_prompt(lm.config, lm.empty_id, 9), random_prompt(lm.config, lm.empty_id, 14)
    want, wanted = recompute_hidden(loaded, ids), recompute_hidden(loaded, other)
    state = lm.new_state([0, 0], 14)
    state.cache.k.fill_(torch.nan)
    state.cache.v.fill_(torch.nan)
    lm.prefill(ids[:, : prefilled * size], state, 1)
    lm.prefill(other[:, : 5 * size], state, 0)
    torch.testing.assert_close(state.hidden[1], want[prefilled - 1], rtol=1e-3, atol=1e-4)
    for t in range(prefilled, 9):
        for slot, part, at in ((1, ids, t), (0, other, t - prefilled + 5)):
            row = part[:, at * size : (at + 1) * size]
            lm.stage(state, slot, int(row[0, 0]), row[1:])
        lm.step(state, torch.tensor([1, 0]))
        torch.testing.assert_close(state.hidden[1], want[t], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state.hidden[0], wanted[t - prefilled + 5], rtol=1e-3, atol=1e-4)
    assert state.lengths.tolist() == [5 + 9 - prefilled, 9, NO_POSITION]


def test_text_logits_are_tied_or_not(loaded):
    lm, tensors = loaded.model.lm, loaded.tensors
    hidden = gaussian(3, lm.config.backbone.dim)
    head = tensors["model.embed_tokens.weight" if lm.config.tie_embeddings else "lm_head.weight"]
    torch.testing.assert_close(lm.text_logits(hidden), F.linear(hidden, head))


delays = st.lists(st.integers(0, 12), min_size=1, max_size=10)


@given(delays, st.integers(1, 7))
def test_each_channel_of_each_frame_is_produced_once_and_in_order(delay_pattern, group_size):
    sizes = range(5, 5 + len(delay_pattern))
    steps = code_steps(sizes, [0] * len(sizes), delay_pattern, group_size)
    assert len(steps) == group_size + max(delay_pattern)
    frames: dict[int, list[int]] = {c: [] for c in range(len(sizes))}
    for step in steps:
        channels, positions, firsts, widths, _ = step.heads.tolist()
        assert channels == sorted(channels)
        assert widths == [sizes[c] for c in channels]
        assert firsts == [sum(sizes[:c]) for c in channels]
        for channel, frame in zip(channels, positions, strict=True):
            frames[channel].append(frame)
    assert all(produced == list(range(group_size)) for produced in frames.values())
    assert steps[-1].heads.shape[1] > 0
