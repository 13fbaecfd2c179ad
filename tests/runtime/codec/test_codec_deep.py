"""Streams of a trained codec whose vocoder looks ten patches ahead, as the published one's does.

Its vocoder is `python -m training vocoder`'s; what is before it is nano's.
"""

import math
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import snr_db
from test_codec_stream import cut
from test_codec_stream import stream_in as stream_parts
from torch import Tensor

from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from training.vocoder import VOCODER, deep_codec

WORDS = Path(__file__).parents[2] / "words"
SPOKEN = "please_read_the_small_yellow_box", "i_have_four_good_yellow_things"


@pytest.fixture(scope="module")
def codec():
    return deep_codec(VOCODER)


@pytest.fixture(scope="module")
def codes(codec) -> Tensor:
    waves = [soundfile.read(WORDS / f"{name}.flac", dtype="float32")[0] for name in SPOKEN]
    return codec.encode(torch.cat([torch.from_numpy(wav) for wav in waves]))


@pytest.fixture(scope="module")
def oneshot(codec, codes) -> Tensor:
    return codec.decode(codes)


def stream_in(codec, codes: Tensor, sizes: list[int], **options) -> Tensor:
    return torch.cat(stream_parts(codec, codes, cut(codes.shape[1], sizes), **options))


@pytest.mark.parametrize("sizes", [[PATCH_FRAMES], [1, 7, 25]])
def test_a_stream_that_waits_for_its_reach_is_one_shot_decoding(codec, codes, oneshot, sizes):
    wav = stream_in(codec, codes, sizes, moments=codec.moments(codes))
    assert wav.shape == oneshot.shape
    assert (wav - oneshot).abs().max() < 1e-4 * oneshot.abs().max()
    assert snr_db(wav, oneshot) > 110


def test_what_follows_matters_to_a_trained_vocoder(codec, codes, oneshot):
    """Each patch of look-ahead brings the stream closer, until nothing but rounding is left."""
    moments = codec.moments(codes)
    found = [
        snr_db(stream_in(codec, codes, [PATCH_FRAMES], lookahead=patches, moments=moments), oneshot)
        for patches in (0, 1, 2)
    ]
    assert 10 < found[0] < 35
    assert found[0] + 15 < found[1] < 90
    assert found[1] + 15 < found[2]


def test_the_first_samples_come_once_ten_patches_follow(codec, codes):
    stream = codec.stream(moments=codec.moments(codes))
    assert codec.receptive_patches == LOOKAHEAD
    patches = codes.split(PATCH_FRAMES, dim=1)
    lengths = [len(stream.push(patch)) for patch in patches[: LOOKAHEAD + 2]]
    assert lengths[:LOOKAHEAD] == [0] * LOOKAHEAD
    assert lengths[LOOKAHEAD] > 0
    assert lengths[LOOKAHEAD + 1] == PATCH_FRAMES * codec.config.samples_per_frame


def test_an_elastic_stream_begins_close_and_ends_exact(codec, codes, oneshot):
    """Given one-shot decoding's statistics: heard after two patches, exact where ten follow."""
    moments, patch = codec.moments(codes), PATCH_FRAMES * codec.config.samples_per_frame
    options = {"moments": moments, "weight": math.inf}
    parts = stream_parts(codec, codes, cut(codes.shape[1], [4]), lookahead="elastic", **options)
    wav = torch.cat(parts)
    assert wav.shape == oneshot.shape
    assert len(parts[0]) == 0 < len(parts[1])
    early = [slice(i * patch, (i + 1) * patch) for i in range(3)]
    assert all(snr_db(wav[part], oneshot[part]) > 35 for part in early)
    exact = stream_in(codec, codes, [PATCH_FRAMES], moments=moments)
    settled = slice((LOOKAHEAD + 1) * patch, None)
    assert codes.shape[1] > 2 * LOOKAHEAD * PATCH_FRAMES
    assert snr_db(wav[:patch], exact[:patch]) < 80
    assert snr_db(wav[settled], exact[settled]) > 110
