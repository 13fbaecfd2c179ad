"""MiMo-V2.5-ASR's kit with every op on its Triton path, on its shortest waves."""

import pytest
import torch
from helpers import KIT

import mimo_fast
from mimo_fast.kernels import decode_attention
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.kernels.matmul import launch as qmatmul_launch
from mimo_fast.testing.asr_parity import ASR_STAGES, AsrGolden
from mimo_fast.testing.parity import verify

SHORT = {"groups": {"short", "tiny"}, "prompts": {"en_tiny"}, "generated": {"en_tiny"}}
"""What the interpreter computes in seconds; the rest has the same kernels over more frames."""


def test_asr_golden_stages(triton_kernels):
    assert use_triton(torch.zeros(1))
    codec = KIT / "checkpoint" / "codec"
    golden = AsrGolden(KIT / "asr", codec)
    for entry, names in SHORT.items():
        golden.meta[entry] = {name: golden.meta[entry][name] for name in names}
    model = mimo_fast.load(KIT / "asr" / "lm", codec, device="cpu", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        # Taller tiles and fewer splits than a launch takes; each kernel's own tests take its own.
        patch.setattr(qmatmul_launch, "gemv_block_n", lambda *args: 64)
        patch.setattr(decode_attention, "SPLITS", ((10**9, 4),))
        results = list(verify(model, golden))
    assert [result.stage for result in results] == list(ASR_STAGES)
    for result in results:
        assert result.ok, f"{result.stage}: {result.error} > {result.bound} in {result.worst}"
