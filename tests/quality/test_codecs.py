"""The codec beside itself, in int8 and streamed."""

import math

import pytest
import torch
from helpers import snr_db

from mimo_fast.audio.files import load_audio
from mimo_fast.quality.codecs import compare_codec, compare_streams, streamed


@pytest.fixture(scope="module")
def codes(model, audio):
    return [model.codec.encode(load_audio(path, 24000), 8) for path in audio[:2]]


def test_a_codec_equals_itself(model, audio):
    wav = load_audio(audio[0], 24000)
    same = compare_codec(model.codec, model.codec, [wav], 8)
    assert (same.snr_db, same.mel_distance, same.code_agreement) == (math.inf, 0, 1)


def test_patches_before_audio_are_those_of_the_schedule(model, codes):
    codec = model.codec
    for way in ("exact", "elastic"):
        wav, before = streamed(codec, codes[0], way)
        assert len(wav) == len(codec.decode(codes[0]))
        stream, given = codec.stream(way), 0
        for chunk in codes[0].split(4, dim=1):
            given += 1
            if len(stream.push(chunk)):
                break
        assert before == given


def test_streams_are_compared_with_one_shot_decoding(model, codes):
    found = compare_streams(model.codec, codes)
    assert found["elastic"]["patches_before_audio"] <= found["exact"]["patches_before_audio"]
    for way, each in found.items():
        by_hand = [
            snr_db(streamed(model.codec, one, way)[0], model.codec.decode(one)) for one in codes
        ]
        assert each["snr_db"]["mean"] == pytest.approx(sum(by_hand) / 2, abs=1e-3)
        assert each["snr_db"]["worst"] == pytest.approx(min(by_hand), abs=1e-3)
        assert each["mel_distance"]["worst"] >= each["mel_distance"]["mean"] > 0


def test_what_does_not_differ_has_no_snr(model, codes, monkeypatch):
    whole = model.codec.decode(codes[0])
    monkeypatch.setattr("mimo_fast.quality.codecs.streamed", lambda *_: (whole.clone(), 1))
    found = compare_streams(model.codec, codes[:1])["exact"]
    assert found["snr_db"] == {"mean": None, "worst": None}
    assert found["mel_distance"] == {"mean": 0, "worst": 0}
    assert torch.isfinite(whole).all()
