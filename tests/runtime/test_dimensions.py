"""Checkpoints of other dimensions run from end to end without a change of code."""

import math
from collections.abc import Iterator

import pytest
import torch
from helpers import fault, write_pair
from variants import WIDE, random_prompt

import mimo_fast
from mimo_fast.audio.files import load_audio


def test_the_variants_differ_where_they_should(loaded):
    config, tensors = loaded.model.lm.config, loaded.tensors
    assert ("lm_head.weight" in tensors) != config.tie_embeddings
    projects = config.patch_encoder.dim != config.patch_decoder.dim
    assert ("speech_embeddings_to_local.weight" in tensors) == projects


def test_codec_end_to_end(loaded, audio):
    codec = loaded.model.codec
    wav = load_audio(audio[0], codec.sample_rate)
    codes = codec.encode(wav)
    config = codec.config
    mel_frames = 1 + len(wav) // config.hop
    frames = math.ceil(math.ceil(mel_frames / config.stride) / config.pool)
    assert codes.shape == (len(config.codebook_sizes), frames)
    for index, size in zip(codes, config.codebook_sizes, strict=True):
        assert ((index >= 0) & (index < size)).all()
    assert len(codes[0].unique()) > 3, "the codes should depend on the audio"
    decoded = codec.decode(codes)
    assert decoded.shape == (codes.shape[1] * config.samples_per_frame,)
    assert decoded.isfinite().all()
    stream = codec.stream()
    parts = [stream.push(chunk) for chunk in codes.split(7, dim=1)]
    parts.append(stream.finish())
    assert sum(map(len, parts)) == len(decoded)


def test_speech_prompt_and_text_to_speech(talking, audio, tmp_path):
    model = talking
    speech = model.speech(str(audio[1]))
    assert speech.codes.shape[0] == model.audio_channels
    assert speech.codes.shape[1] % model.group_size == 0
    out = tmp_path / "out.wav"
    text = model.tts_sft("Hello.", out, max_new_tokens=5, seed=1)
    assert isinstance(text, str)
    assert len(load_audio(out, model.codec.sample_rate)) > 0
    again = tmp_path / "again.wav"
    assert model.tts_sft("Hello.", again, max_new_tokens=5, seed=1) == text
    assert again.read_bytes() == out.read_bytes()


@pytest.fixture
def talking(loaded, monkeypatch) -> Iterator[mimo_fast.MimoAudio]:
    """A model whose text channel always opens an audio position."""
    model = loaded.model
    monkeypatch.setattr(
        model.lm,
        "sample_text",
        lambda _state, slots, *_: torch.full((len(slots),), model.empty_token),
    )
    return model


def test_streamed_dialogue(talking, audio):
    def stream() -> torch.Tensor:
        chunks = list(talking.stream("spoken_dialogue", str(audio[0]), max_new_tokens=6, seed=3))
        assert {chunk.sample_rate for chunk in chunks} == {talking.codec.sample_rate}
        return torch.cat([chunk.audio for chunk in chunks])

    samples, wav = talking.group_size * talking.codec.config.samples_per_frame, stream()
    # The group that ends a reply is not part of it.
    assert len(wav) == 5 * samples
    assert wav.isfinite().all()
    assert wav.abs().max() > 0
    assert torch.equal(wav, stream())


def test_second_turn_of_a_dialogue(talking, audio, tmp_path):
    files, options = (str(audio[0]), str(tmp_path / "reply.wav")), {"max_new_tokens": 4, "seed": 0}
    samples = 3 * talking.group_size * talking.codec.config.samples_per_frame
    talking.clear_history()
    for again in (False, True):
        talking.spoken_dialogue_sft(*files, add_history=again, **options)
        assert len(load_audio(files[1], talking.codec.sample_rate)) == samples


def test_generate_in_both_layouts(loaded):
    model, config = loaded.model, loaded.model.lm.config
    ids = random_prompt(config, model.empty_token, 6)
    new = mimo_fast.generate(model, ids, max_new_tokens=3)
    assert new.shape == (config.channels + 1, 9 * config.group_size)
    flat = mimo_fast.generate(model, ids.T.reshape(1, -1), max_new_tokens=3)
    assert flat.shape == (1, 9 * config.row_width)
    assert torch.equal(flat.view(-1, config.channels + 1).T, new)


@pytest.mark.parametrize(
    ("lm", "codec", "problem"),
    [
        (WIDE.lm, WIDE.codec | {"num_quantizers": 11}, "12 codebooks"),
        # The codec lacks a code, or has one that the language model reads as the empty code.
        ({}, {"codebook_size": [64, 64, 15]}, "belong together"),
        ({}, {"codebook_size": [64, 64, 17]}, "belong together"),
    ],
)
def test_language_model_and_codec_that_do_not_belong_together(tmp_path, lm, codec, problem):
    pair = write_pair(tmp_path, lm, codec)
    assert problem in fault(lambda: mimo_fast.load(*pair, device="cpu"))
