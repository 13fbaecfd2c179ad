"""The adapters' kit, unmerged, with every op on its Triton path."""

import pytest
import torch
from helpers import ADAPTERS, KIT_PAIR
from safetensors.torch import load_file

import mimo_fast
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.sampling import GREEDY, sampler_tensors

KINDS = ("qkvo", "all_linear_saved", "dora_rslora", "heads_embeddings", "bias_lora_only")
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
PROMPT = "tts_en"


@pytest.fixture(scope="module")
def lm(triton_kernels) -> mimo_fast.LM:
    adapters = {kind: ADAPTERS / kind for kind in KINDS}
    return mimo_fast.load(*KIT_PAIR, device="cpu", adapters=adapters, max_seq_len=64).lm


def test_prompts_patches_and_steps_of_rows_with_all_of_them(lm, golden, few_programs):
    """Each row has what upstream has with PEFT: logits and hidden states, greedy codes, the first
    groups of its reply."""
    assert use_triton(torch.zeros(1))
    ids, rows = golden.get(f"prompts:{PROMPT}").long(), len(KINDS)
    state = lm.new_state([0] * rows, 64)
    state.adapters[:rows] = [lm.place_of(kind) for kind in KINDS]
    for slot in range(rows):
        lm.prefill(ids, state, slot)
    slots, greedy = torch.arange(rows), sampler_tensors([GREEDY] * rows, lm.device)
    local = []
    for kind, hidden in zip(KINDS, state.hidden[:rows].split(1), strict=True):
        variant = lm.variant(lm.place_of(kind))
        local.append(variant.local_hidden(hidden))
        for got, what in (
            (variant.text_logits(hidden), "text_logits"),
            (local[-1], "local_hidden"),
        ):
            want = GOLDEN[f"{kind}.{what}.{PROMPT}"]
            assert (got[0] - want).abs().max() < 1e-4 * want.abs().max(), (kind, what)
    # A patch takes the interpreter seconds: one from each side says what the launches of all are.
    some = slots[2:3]
    codes = lm.decode_patch(local[2], state, some, greedy.select(some))
    assert torch.equal(codes[0].T, GOLDEN[f"{KINDS[2]}.local_greedy.{PROMPT}"])
    said = [GOLDEN[f"{kind}.generate.{PROMPT}"].long() for kind in KINDS]
    drawn = lm.sample_text(state, slots, greedy)
    assert drawn.tolist() == [int(ids[0, 0]) for ids in said]
    spoken = slots[drawn == lm.empty_id]
    assert len(spoken) == 1
    codes = lm.sample_patch(state, spoken, greedy.select(spoken))
    assert torch.equal(codes[0], said[int(spoken)][1:, :4])
    lm.step(state, slots)
    assert lm.sample_text(state, slots, greedy).tolist() == [int(ids[0, 4]) for ids in said]
