"""Decoding from every kind of source."""

import io
import re

import numpy as np
import pytest
import soundfile
import torch
from helpers import refuses
from sounds import encode, error_of, noise
from torch.testing import assert_close

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.resample import resample
from mimo_fast.errors import AudioError

BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 24, "FLOAT": 24, "DOUBLE": 24}
FILES = [("WAV", subtype) for subtype in BITS] + [("WAVEX", "PCM_16"), ("RF64", "PCM_16")]
FILES += [("FLAC", "PCM_16"), ("FLAC", "PCM_24")]


@pytest.mark.parametrize(("kind", "subtype"), FILES)
def test_lossless_files(kind, subtype):
    samples = noise(70_000)
    wav = load_audio(encode(samples, 24000, kind, subtype), 24000)
    assert wav.dtype == torch.float32
    assert_close(wav, torch.from_numpy(samples), rtol=0, atol=2.0 ** (1 - BITS[subtype]))


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None)])
def test_lossy_files(kind, subtype):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(100_000) / 24000).astype(np.float32)
    wav = load_audio(encode(tone, 24000, kind, subtype), 24000)
    assert len(wav) == len(tone)
    noise_power = (wav[2000:-2000].numpy() - tone[2000:-2000]).std() ** 2
    assert noise_power < 0.01 * tone.var()


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("rate", [8000, 24000, 44100, 192000])
def test_channels_are_averaged_before_resampling(channels, rate):
    # A mean of many channels that have nothing in common would lose too much to be taken.
    samples = (noise(5000, channels) + noise(5000, 1)) / 2
    wav = load_audio(encode(samples, rate, "WAV", "FLOAT"), 24000)
    expected = resample(torch.from_numpy(samples).mean(dim=1), rate, 24000)
    assert_close(wav, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 24000, 192000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "FLOAT"])
def test_one_sample(rate, subtype):
    wav = load_audio(encode(np.array([0.5], np.float32), rate, "WAV", subtype), 24000)
    assert len(wav) == -(-24000 // rate)
    assert wav.abs().max() > 0.01


def test_every_source_gives_the_same_samples(tmp_path):
    class Pipe(io.RawIOBase):
        """Binary, not seekable, and short of bytes at each read."""

        def __init__(self, data: bytes) -> None:
            self.data = io.BytesIO(data)

        def read(self, size: int = -1) -> bytes:
            return self.data.read(min(size, 1000))

    data = encode(noise(30_000, 2), 44100)
    path = tmp_path / "日本 語.wav"
    path.write_bytes(data)
    expected = load_audio(data, 24000)
    behind = io.BytesIO(b"header" + data)
    behind.seek(6)
    with path.open("rb") as file:
        sources = (path, str(path), bytearray(data), memoryview(data), io.BytesIO(data))
        for source in (*sources, file, behind, Pipe(data)):
            assert torch.equal(load_audio(source, 24000), expected)  # type: ignore[arg-type]


def test_kit_audio_equals_its_pcm(audio):
    stereo, rate = soundfile.read(audio[2], dtype="int16")
    expected = torch.from_numpy(stereo.astype(np.float32) / 2**15).mean(dim=1)
    assert torch.equal(load_audio(audio[2], rate), expected)


INTEGERS = [
    (np.uint8, [0, 128, 255], [-1, 0, 127 / 128]),
    (np.int8, [-128, 0, 127], [-1, 0, 127 / 128]),
    (np.int16, [-(2**15), 0, 2**14], [-1, 0, 0.5]),
    (np.int32, [-(2**31), 0, 2**30], [-1, 0, 0.5]),
    (">i2", [-(2**15), 0, 2**14], [-1, 0, 0.5]),
    (">f4", [-1, 0, 0.5], [-1, 0, 0.5]),
    (np.float64, [-1, 0, 2.5], [-1, 0, 2.5]),
    (np.float16, [-1, 0, 2.5], [-1, 0, 2.5]),
]


@pytest.mark.parametrize(("dtype", "values", "expected"), INTEGERS)
def test_array_types(dtype, values, expected):
    array = np.array(values, dtype)  # type: ignore[call-overload]
    array.flags.writeable = False
    assert load_audio(array, 24000).tolist() == expected
    if array.dtype.isnative:
        assert load_audio(torch.from_numpy(array.copy()), 24000).tolist() == expected


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray])
def test_arrays_are_mixed_and_resampled(make):
    samples = noise(2, 100_000)
    wav = load_audio(make(samples), 24000, source_rate=44100)  # type: ignore[operator]
    expected = resample(torch.from_numpy(samples).mean(dim=0), 44100, 24000)
    assert_close(wav, expected, rtol=0, atol=1e-6)


def test_the_result_is_a_copy_without_gradient():
    source = torch.zeros(100, requires_grad=True)
    wav = load_audio(source, 24000)
    wav += 1
    assert not wav.requires_grad
    assert source.sum() == 0


@pytest.mark.parametrize("shape", [(), (9, 100), (0, 100), (100, 2), (1, 2, 100)])
@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_array_shapes_that_are_refused(make, shape):
    assert re.search(r"the audio array is \[.*must be \[n\]", error_of(make(shape)))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16, np.complex64, object, "U1"])
def test_array_types_that_are_refused(dtype):
    assert "convert it to float32" in error_of(np.zeros(10, dtype))  # type: ignore[call-overload]


@pytest.mark.parametrize("rate", [0, 999, 768_001])
def test_rates_outside_the_range(rate):
    assert "source_rate" in error_of(torch.zeros(10), source_rate=rate)
    refuses("the sample rate is", load_audio, torch.zeros(10), rate, kind=AudioError)


def test_source_rate_is_for_arrays_only():
    assert "leave source_rate out" in error_of(encode(noise(10)), source_rate=16000)


def test_silence_is_valid():
    assert torch.equal(load_audio(encode(np.zeros(1000), 48000), 24000), torch.zeros(500))


def test_empty_audio():
    assert error_of(b"") == "the audio data is empty"
    encoded = encode(np.zeros(0)), encode(np.zeros(0), 44100, "RF64")
    for source in (*encoded, torch.zeros(0), np.zeros((2, 0))):
        assert "no samples" in error_of(source)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
@pytest.mark.parametrize("rate", [24000, 44100, 8000])
def test_not_a_number(bad, place, rate):
    samples = noise(100_000)
    samples[place] = bad
    assert "NaN or infinite" in error_of(encode(samples, rate, "WAV", "FLOAT"))
    assert "NaN or infinite" in error_of(samples, source_rate=rate)
