"""MiMo-V2.5-ASR's kit with every op on its Triton path, on its shortest waves."""

import pytest
import torch
from helpers import KIT

import mimo_fast
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.testing.asr_parity import ASR_STAGES, AsrGolden
from mimo_fast.testing.parity import Stage, verify

CODEC = KIT / "checkpoint" / "codec"
ONE = {"groups": {"tiny"}, "prompts": {"en_tiny"}, "generated": {"en_tiny"}}
SEVERAL = ONE | {"groups": {"short", "tiny"}}
"""What the interpreter computes in seconds; the rest has the same kernels over more frames."""


def compare(golden: AsrGolden, entries: dict[str, set[str]], stages: dict[str, Stage]) -> None:
    """With so much of the kit."""
    assert use_triton(torch.zeros(1))
    for entry, names in entries.items():
        golden.meta[entry] = {name: golden.meta[entry][name] for name in names}
    model = mimo_fast.load(KIT / "asr" / "lm", CODEC, device="cpu", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsrGolden, "stages", stages)
        results = list(verify(model, golden))
    assert [result.stage for result in results] == list(stages)
    for result in results:
        assert result.ok, f"{result.stage}: {result.error} > {result.bound} in {result.worst}"


def test_the_first_tokens(few_programs):
    golden, groups = AsrGolden(KIT / "asr", CODEC), 2
    whole = golden.tensors["generate.en_tiny"]
    golden.tensors["generate.en_tiny"] = whole[:, : 4 * groups]
    generated = golden.meta["generated"]["en_tiny"]
    generated["ids"] = generated["ids"][:groups]
    stages = {name: ASR_STAGES[name] for name in ("codes", "text logits", "generate")}
    compare(golden, ONE, stages)


@pytest.mark.slow
def test_asr_golden_stages(few_programs):
    compare(AsrGolden(KIT / "asr", CODEC), SEVERAL, ASR_STAGES)
