"""The kernels fit together: the whole kit with every op on its Triton path."""

import pytest
import torch

import mimo_fast
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.verify import STAGES, Golden, verify


@pytest.fixture(scope="module")
def results(kit, triton_kernels):
    assert use_triton(torch.zeros(1))
    model = mimo_fast.load(kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", device="cpu")
    return {result.stage: result for result in verify(model, Golden(kit))}


@pytest.mark.parametrize("stage", STAGES)
def test_golden_stage(results, stage):
    result = results[stage]
    assert result.ok, f"{stage}: {result.error} > {result.bound} in {result.worst}"
