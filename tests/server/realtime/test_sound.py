"""Formats of a wire: parts join, and G.711 is what the recommendation says."""

import pytest
import torch

from mimo_fast.audio.resample import resample
from mimo_fast.server.realtime.sound import FORMATS, PCM, Decoder, Encoder, Format, Resampler


@pytest.mark.parametrize(("source", "target"), [(24000, 16000), (24000, 8000), (8000, 24000)])
@pytest.mark.parametrize("size", [7, 313, 5000])
def test_parts_join_to_the_whole(source, target, size):
    wav = torch.randn(3001, generator=torch.Generator().manual_seed(1))
    resampler = Resampler(source, target)
    parts = [resampler.push(part) for part in wav.split(size)]
    joined = torch.cat([*parts, resampler.push(wav[:0], ended=True)])
    torch.testing.assert_close(joined, resample(wav, source, target), rtol=0, atol=1e-6)


def test_half_a_sample_waits():
    data = torch.arange(-50, 50, dtype=torch.int16).numpy().astype("<i2").tobytes()
    decoder = Decoder(PCM, 24000)
    parts = [decoder.push(data[at : at + 3]) for at in range(0, len(data), 3)]
    assert (torch.cat(parts) * 32768).tolist() == [*range(-50, 50)]


def test_samples_come_back():
    wav = torch.tensor([0.0, 0.5, -0.5, 0.25, 2.0, -2.0])
    data = Encoder(PCM, 24000).push(wav)
    back = Decoder(PCM, 24000).push(data)
    assert back.tolist() == pytest.approx([0, 0.5, -0.5, 0.25, 32767 / 32768, -1])


# Ends and zeros are those of the tables of G.711; the values between were worked out by hand.
ULAW = {0: 0xFF, 8031 * 4: 0x80, -8031 * 4: 0x00, 1 * 4: 0xFE, 1000: 0xCE, -1000: 0x4E}
ALAW = {0: 0xD5, -8: 0x55, 32767: 0xAA, -32768: 0x2A, 1000: 0xFA, -1000: 0x7A}


@pytest.mark.parametrize(("name", "codes"), [("audio/pcmu", ULAW), ("audio/pcma", ALAW)])
def test_known_codes(name, codes):
    format = FORMATS[name]
    wav = torch.tensor([float(sample) for sample in codes]) / 32768
    assert [*Encoder(format, format.rate).push(wav)] == [*codes.values()]


@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_every_code_comes_back(name):
    format = FORMATS[name]
    codes = bytes(range(256))
    wav = Decoder(format, format.rate).push(codes)
    again = Encoder(format, format.rate).push(wav)
    # G.711 has two zeros.
    same = [a == b or wav[i] == 0 for i, (a, b) in enumerate(zip(codes, again, strict=True))]
    assert all(same)
    steps = wav.unique()
    assert len(steps) >= 255
    assert float(wav.abs().max()) > 0.97


def test_telephone_speech_is_close():
    wav = 0.3 * torch.sin(torch.arange(8000) * 0.3)
    for name in ("audio/pcmu", "audio/pcma"):
        back = Decoder(FORMATS[name], 8000).push(Encoder(FORMATS[name], 8000).push(wav))
        noise = (back - wav).square().mean() / wav.square().mean()
        assert float(noise) < 10 ** (-35 / 10)


def test_channels_are_heard_together():
    left, right = torch.linspace(-0.5, 0.5, 100), torch.full((100,), 0.25)
    data = Encoder(PCM, 24_000).push(torch.stack((left, right), 1).flatten())
    decoder = Decoder(Format("audio/stereo", 24_000, 4, channels=2), 24_000)
    # Two bytes of a sample of four wait for the others.
    heard = torch.cat((decoder.push(data[:42]), decoder.push(data[42:])))
    torch.testing.assert_close(heard, (left + right) / 2, rtol=0, atol=1 / 32768)
