"""Encoding by graph gives the codes of encoding without, whatever pads the recording."""

import copy
import threading

import pytest
import torch
from helpers import in_threads, slow_after, write_pair
from replays import Counted
from torch import Tensor
from variants import SMALL, WIDE

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError, NumericError
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.runtime.codec import encoder_graphs
from mimo_fast.runtime.codec.encoder_graphs import (
    BUCKETS,
    EncoderGraphs,
    PaddedEncoder,
    code_frames,
    longest_encode,
)
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.offload import offload

SECONDS = (0.0001, 0.5, 2.0, 5.0, 0.02, 1.997, 3.3)


def graphed(codec: Codec) -> tuple[Codec, Counted]:
    codec, counted = copy.copy(codec), Counted()
    codec.encoder_graphs = EncoderGraphs(codec, counted)
    return codec, counted


@pytest.fixture(scope="module", params=["kit", "small", "wide", "late"])
def plain(request, tmp_path_factory) -> Codec:
    """The kit's codec; one without pooling; one that is causal and windowed; a window alone."""
    if request.param == "kit":
        return request.getfixturevalue("model").codec
    variants = {"small": (SMALL.lm, SMALL.codec), "wide": (WIDE.lm, WIDE.codec)}
    lm, codec = variants.get(
        request.param, ({}, {"encoder_attn_window_size": [20, 7], "stride_size": 3})
    )
    pair = write_pair(tmp_path_factory.mktemp(request.param), lm, codec)
    return mimo_fast.load(*pair, device="cpu").codec


@pytest.fixture(scope="module")
def speech(audio) -> Tensor:
    return load_audio(audio[0], 24000)


def spoken(speech: Tensor, codec: Codec, seconds: float) -> Tensor:
    count = max(1, round(seconds * codec.config.sample_rate))
    return speech.repeat(-(-count // len(speech)))[:count]


@pytest.mark.parametrize("seconds", slow_after(4, SECONDS))
def test_the_codes_are_those_without(plain, speech, seconds):
    codec, counted = graphed(plain)
    wav = spoken(speech, codec, seconds)
    want = plain.encode(wav)
    assert torch.equal(codec.encode(wav), want)
    assert (counted.captures, counted.replays) == (1, 1)
    # Once more in the same buffers, after another recording.
    codec.encode(spoken(speech, codec, 0.3))
    assert torch.equal(codec.encode(wav, 2), want[:2])
    assert torch.equal(codec.encode(wav), want)


def test_lengths_are_counted_without_encoding(plain, speech):
    config = plain.config
    for frames in (3, 7, BUCKETS[0]):
        longest = longest_encode(config, frames)
        assert code_frames(config, longest) == frames
        assert code_frames(config, longest + 1) == frames + 1
    for samples in (1, config.hop, 5 * config.hop - 1, 5 * config.hop, 4321):
        wav = spoken(speech, plain, samples / config.sample_rate)
        assert code_frames(config, len(wav)) == plain.encode(wav).shape[1]


@pytest.mark.parametrize("less", [0, 1, 240])
def test_a_recording_that_fills_its_graph(plain, speech, less):
    codec, counted = graphed(plain)
    count = longest_encode(codec.config, BUCKETS[0]) - less
    wav = spoken(speech, codec, count / codec.config.sample_rate)
    assert len(wav) == count
    assert torch.equal(codec.encode(wav), plain.encode(wav))
    assert counted.captures == 1


def test_padding_leaves_no_trace(plain, speech):
    """What the buffer held behind the samples, infinities too, changes no bit."""
    encoder = PaddedEncoder(plain, BUCKETS[0], 3)
    wav = spoken(speech, plain, 0.7)
    frames, found = code_frames(plain.config, len(wav)), []
    for filler in (0.0, 1e30):
        encoder.inputs.fill_(filler)
        encoder.inputs[: len(wav)] = wav
        encoder.inputs[-2:].view(torch.int64)[0] = len(wav)
        with torch.no_grad():
            found.append(encoder.run())
    assert torch.equal(*found)
    assert torch.equal(found[0][:, :frames], plain.encode(wav, 3))
    assert (found[0][:, frames:] == found[0][:, frames - 1 : frames]).all()


def test_what_no_graph_takes_goes_without(plain, speech, monkeypatch):
    codec, counted = graphed(plain)
    monkeypatch.setattr(encoder_graphs, "BUCKETS", (10, 20))
    wav = spoken(speech, codec, 3)
    assert codec.encode_later(wav) is None
    assert torch.equal(codec.encode(wav), plain.encode(wav))
    short = wav[: longest_encode(codec.config, 20)]
    assert codec.encode_later(short) is not None
    counted.captures = 0
    other = copy.copy(codec)
    assert other.encode_later(short) is None
    codec.encoder = offload(codec.encoder, codec.device)
    assert codec.encode_later(short) is None
    assert counted.captures == 0


def test_codes_wait_for_nobody_and_outlive_the_next_encode(plain, speech):
    codec, _ = graphed(plain)
    first, second = spoken(speech, codec, 1.2), spoken(speech, codec, 0.4).flip(0)
    pending = [codec.encode_later(wav) for wav in (first, second, first)]
    whole = torch.zeros(len(codec.codebooks), pending[1].frames, dtype=torch.int64)
    pending[1].copy_to(whole, 0)
    assert torch.equal(whole, plain.encode(second))
    for codes, wav in zip(pending, (first, second, first), strict=True):
        want = plain.encode(wav)
        assert torch.equal(codes.on_device(), want)
        codes.frames += 5
        assert torch.equal(codes.wait(), torch.cat((want, want[:, -1:].expand(-1, 5)), dim=1))
        codes.drop()
        part = torch.zeros(len(want), 2, dtype=torch.int64)
        codes.copy_to(part, 3)
        assert torch.equal(part, want[:, 3:5])


def test_threads_encode_at_the_same_time(plain, speech):
    codec, counted = graphed(plain)
    wavs = [spoken(speech, codec, 0.3 + 0.2 * i) for i in range(4)]
    start = threading.Barrier(4)

    def encode(i: int) -> Tensor:
        start.wait()
        return codec.encode(wavs[i])

    for got, wav in zip(in_threads(encode, 4), wavs, strict=True):
        assert torch.equal(got, plain.encode(wav))
    assert counted.replays == 4


def test_a_warm_up_captures_every_length(plain, speech):
    codec, counted = graphed(plain)
    codec.warm_up_encoder(2, progress=False)
    assert (counted.captures, counted.replays) == (len(BUCKETS), 0)
    codec.encode(spoken(speech, codec, 3), 2)
    assert (counted.captures, counted.replays) == (len(BUCKETS), 1)


def test_values_that_are_not_finite_are_told(plain, speech):
    codec, _ = graphed(plain)
    wav = spoken(speech, codec, 1.0).clone()
    wav[5000] = torch.nan
    assert (codec.encode_later(wav).wait() == NOT_FINITE).any()
    with pytest.raises(AudioError, match="NaN or infinite"):
        codec.encode(wav)
    broken = copy.copy(plain)
    broken.conv1 = broken.conv1[0] * torch.inf, broken.conv1[1]
    broken.encoder_graphs = EncoderGraphs(broken, Counted())
    with pytest.raises(NumericError):
        broken.encode(wav.nan_to_num())


@pytest.mark.parametrize("chosen", ["", "0", "1"])
def test_they_are_experimental(model, monkeypatch, chosen):
    monkeypatch.setenv("MIMO_FAST_EXPERIMENTAL", chosen)
    assert enabled(NewPath.ENCODER_GRAPHS, model.device) == (chosen == "1")
    # Where nothing runs as graphs the encoder does not either.
    assert model.codec.encoder_graphs is None
