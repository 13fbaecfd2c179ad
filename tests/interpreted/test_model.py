"""Every stage of the kit with every op on its Triton path.

What several stages compute alike (codes and encoder output of a recording, hidden states after a
prompt) is computed once.
"""

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch

import mimo_fast
from mimo_fast.errors import AudioError
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.testing import parity as stages
from mimo_fast.testing.parity import STAGES, Golden, verify

DECODED_AGAIN = "codec stream"
"""The same kernels as in "decoded once", over ten times as many frames."""


def remembered(function: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    known: dict[Hashable, Any] = {}

    def call(*args: Any) -> Any:
        at = key(*args)
        if at not in known:
            known[at] = function(*args)
        return known[at]

    return call


@pytest.fixture(scope="module")
def results(kit, triton_kernels, few_programs):
    assert use_triton(torch.zeros(1))
    model = mimo_fast.load(kit / "checkpoint/lm", kit / "checkpoint/codec", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(STAGES, DECODED_AGAIN)
        encode_mel = remembered(model.codec.encode_mel, lambda mel: mel.numpy().tobytes())
        patch.setattr(model.codec, "encode_mel", encode_mel)
        encode = remembered(model.codec.encode, lambda wav, n=None: (wav.numpy().tobytes(), n))
        patch.setattr(model.codec, "encode", encode)
        prefilled = remembered(stages._prefilled, lambda model, golden, name: name)
        patch.setattr(stages, "_prefilled", prefilled)
        return {result.stage: result for result in verify(model, Golden(kit))}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != DECODED_AGAIN])
def test_golden_stage(results, stage):
    result = results[stage]
    assert result.ok, f"{result.error} > {result.bound} in {result.worst} of {result.compared}"


def test_recordings_encoded_together(kit, triton_kernels):
    """Each has the codes that it has alone, and a neighbour without numbers changes nothing."""
    codec = mimo_fast.load(kit / "checkpoint/lm", kit / "checkpoint/codec", device="cpu").codec
    assert use_triton(codec.conv1[0])
    generator = torch.Generator().manual_seed(0)
    waves = [0.1 * torch.randn(n, generator=generator) for n in (4000, 700, 9000)]
    lost = torch.full((2000,), torch.nan)
    first, second, error, third = codec.encode_together([*waves[:2], lost, waves[2]])
    assert isinstance(error, AudioError)
    for wav, codes in zip(waves, (first, second, third), strict=True):
        assert torch.equal(codes, codec.encode(wav))
