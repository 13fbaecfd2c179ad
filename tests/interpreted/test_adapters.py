"""The kit's adapters, merged while loading, with every op on its Triton path."""

import pytest
import torch
from helpers import ADAPTERS, KIT_PAIR, slow_after
from safetensors.torch import load_file

import mimo_fast
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.sampling import GREEDY, sampler_tensors

GOLDEN = load_file(ADAPTERS / "golden.safetensors")
PROMPT = "tts_en"


KINDS = ("all_linear_saved", "qkvo", "dora_rslora", "heads_embeddings", "bias_lora_only")
GROUPS = 2
"""What the interpreter computes in seconds; the rest has the same kernels."""


@pytest.mark.parametrize("kind", slow_after(1, KINDS))
def test_says_what_upstream_says_with_peft(golden, few_programs, kind):
    assert use_triton(torch.zeros(1))
    adapters = {kind: ADAPTERS / kind}
    model = mimo_fast.load(*KIT_PAIR, device="cpu", adapters=adapters, max_seq_len=64)
    lm, size = model.lm, model.group_size
    ids = golden.get(f"prompts:{PROMPT}").long()
    state = lm.new_state([0], ids.shape[1] // size)
    lm.prefill(ids, state, 0)
    local = lm.local_hidden(state.hidden[:1])
    for got, name in (
        (lm.text_logits(state.hidden[:1])[0], "text_logits"),
        (local[0], "local_hidden"),
    ):
        want = GOLDEN[f"{kind}.{name}.{PROMPT}"]
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), name
    greedy = sampler_tensors([GREEDY], lm.device)
    codes = lm.decode_patch(local, state, state.rows[:1], greedy)
    assert torch.equal(codes[0].T, GOLDEN[f"{kind}.local_greedy.{PROMPT}"])
    tokens = GOLDEN[f"{kind}.generate.{PROMPT}"].long()[:, : GROUPS * size]
    said = mimo_fast.generate(model, ids, max_new_tokens=GROUPS)
    assert torch.equal(said[:, ids.shape[1] :], tokens)
