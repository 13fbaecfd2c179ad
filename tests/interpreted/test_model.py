"""The kernels fit together: the kit's stages with every op on its Triton path.

The interpreter takes a millisecond a program, so of the stages that repeat themselves only the shortest input is run.
"""

import pytest
import torch

import mimo_fast
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.verify import STAGES, Golden, verify

LEFT_OUT = (
    "generate.asr", "generate.dialogue_multiturn", "generate.tts_en", "text_logits.dialogue_multiturn",
    "text_logits.tts_instruct_clone", "local_hidden.dialogue_multiturn", "local_hidden.tts_instruct_clone",
    "wav_dec8.0", "wav_dec8.2", "wav_decall.0", "wav_decall.2", "stream_wav.4", "codes.0", "codes.2", "packed.0",
    "packed.2", "enc_hidden.0", "enc_hidden.2",
)


class ShortestInputs(Golden):
    def named(self, prefix: str) -> list[str]:
        name = prefix.partition(":")[2]
        return [suffix for suffix in super().named(prefix) if f"{name}.{suffix}" not in LEFT_OUT]


@pytest.fixture(scope="module")
def results(kit, triton_kernels):
    assert use_triton(torch.zeros(1))
    model = mimo_fast.load(kit / "checkpoint" / "lm", kit / "checkpoint" / "codec", device="cpu")
    golden = ShortestInputs(kit)
    golden.meta["prompts"] = {"tts_instruct": golden.meta["prompts"]["tts_instruct"]}
    return {result.stage: result for result in verify(model, golden)}


@pytest.mark.parametrize("stage", STAGES)
def test_golden_stage(results, stage):
    result = results[stage]
    assert result.ok, f"{stage}: {result.error} > {result.bound} in {result.worst}, {result.compared} compared"
