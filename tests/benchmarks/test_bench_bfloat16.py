"""The study of bfloat16: its rendering of upstream's codec is upstream's, and no op of ours is
farther from the exact result than upstream's order of operations.
"""

import pytest
import torch
from helpers import KIT, KIT_PAIR, kit_config, snr_db
from safetensors.torch import load_file

from benchmarks.studies.bfloat16 import OPS, Draws, relative
from benchmarks.studies.codec_bfloat16 import UpstreamCodec
from mimo_fast.config import CodecConfig


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def rendered(dtype: torch.dtype) -> UpstreamCodec:
    tensors = load_file(KIT_PAIR[1] / "model.safetensors")
    config = CodecConfig.from_dict(kit_config("codec"))
    return UpstreamCodec(config, tensors.__getitem__, [*tensors], dtype)


def test_the_rendering_is_upstreams_in_float32():
    truth = load_file(KIT / "golden" / "codec.safetensors")
    codec = rendered(torch.float32)
    for i in range(3):
        codes = truth[f"codes.{i}"].long()
        assert torch.equal(codec.encode(truth[f"mel.{i}"]), codes)
        assert snr_db(codec.decode(codes[:8]), truth[f"wav_dec8.{i}"]) >= 80


def test_the_rendering_rounds_in_bfloat16():
    truth = load_file(KIT / "golden" / "codec.safetensors")
    codec = rendered(torch.bfloat16)
    different = (codec.encode(truth["mel.0"]) != truth["codes.0"]).double().mean()
    assert 0 < different < 0.3
    wav = codec.decode(truth["codes.0"][:8].long())
    assert wav.dtype == torch.bfloat16
    assert 20 < snr_db(wav, truth["wav_dec8.0"]) < 60


QUICK = ("RMSNorm", "LayerNorm", "attention in a window", "sum of 8 code embeddings", "ISTFT head")


@pytest.mark.parametrize(
    "name", [pytest.param(op, marks=[] if op in QUICK else [pytest.mark.slow]) for op in OPS]
)
def test_no_op_is_farther_from_exact_than_upstreams(name):
    theirs, ours, exact = OPS[name](Draws(torch.device("cpu")))
    assert ours.shape == theirs.shape == exact.shape
    assert 0 < relative(ours, exact) <= 1.01 * relative(theirs, exact)
    assert relative(theirs, exact) < 0.01
