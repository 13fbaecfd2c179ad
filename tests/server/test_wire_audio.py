"""Encoders that stream and decoders with limits, against PyAV and soundfile as they are."""

import asyncio
import io
import struct
import tempfile
import wave
from collections.abc import AsyncIterator

import av
import numpy as np
import pytest
import soundfile
import torch
from sounds import heard
from torch import Tensor

from mimo_fast.errors import AudioError
from mimo_fast.server.audio import FORMS, AudioThreads, Encoder, decode, decode_blocks, kind_of

RATE = 24000


def tone(seconds: float = 1.0, hertz: float = 440.0, rate: int = RATE) -> Tensor:
    t = torch.arange(round(seconds * rate), dtype=torch.float32, device="cpu") / rate
    return 0.5 * torch.sin(2 * torch.pi * hertz * t)


def encoded(name: str, audio: Tensor, speed: float = 1.0, part: int = 3840) -> list[bytes]:
    encoder = Encoder(name, RATE, speed)
    parts = [encoder.push(piece) for piece in audio.split(part)]
    return [*parts, *encoder.finish()]


def frequency(samples: np.ndarray) -> float:
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum)) * RATE / len(middle)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_heard_as_it_was(name: str) -> None:
    samples = heard(b"".join(encoded(name, tone(2.0))), name)
    # The resampler of this test keeps some samples.
    assert 1.999 <= len(samples) / RATE < 2.13
    assert frequency(samples) == pytest.approx(440, abs=2)
    assert np.abs(samples[RATE // 2 : RATE]).max() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", FORMS)
def test_what_comes_does_not_depend_on_the_parts(name: str) -> None:
    audio = tone(0.7)
    bytes_of = {b"".join(encoded(name, audio, part=part)) for part in (997, 3840, 10**6)}
    # A serial number is drawn for each Ogg stream.
    assert len(bytes_of) == 1 or name == "opus"


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.whole])
def test_it_streams(name: str) -> None:
    sizes = [len(part) for part in encoded(name, tone(3.0))]
    assert sum(map(bool, sizes[:4])) >= 3
    # The codec's look-ahead is all that waits.
    assert sum(sizes[-2:]) < sum(sizes) / 4


def test_common_readers_read_what_has_no_length() -> None:
    data = b"".join(encoded("wav", tone()))
    samples, rate = soundfile.read(io.BytesIO(data))
    assert (len(samples), rate) == (RATE, RATE)
    with wave.open(io.BytesIO(data)) as file:
        assert file.getparams()[:3] == (1, 2, RATE)
    samples, rate = soundfile.read(io.BytesIO(b"".join(encoded("flac", tone()))))
    assert (len(samples), rate) == (RATE, RATE)


def test_loud_samples_are_clipped_not_wrapped() -> None:
    data = b"".join(encoded("pcm", torch.tensor([2.0, -2.0, 1.0, 0.0], device="cpu")))
    assert np.frombuffer(data, "<i2").tolist() == [32767, -32767, 32767, 0]


@pytest.mark.parametrize("name", FORMS)
def test_nothing_said_is_a_whole_file(name: str) -> None:
    assert isinstance(b"".join(encoded(name, torch.zeros(0, device="cpu"))), bytes)


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.5, 4.0])
def test_speed_changes_the_length_and_not_the_pitch(speed: float) -> None:
    samples = heard(b"".join(encoded("pcm", tone(4.0), speed)), "pcm")
    assert len(samples) / RATE == pytest.approx(4.0 / speed, rel=0.03)
    assert frequency(samples) == pytest.approx(440, abs=4)


def files(samples: np.ndarray, rate: int = RATE) -> dict[str, bytes]:
    found = {}
    for name, (kind, subtype) in {
        "wav": ("WAV", "PCM_16"),
        "flac": ("FLAC", "PCM_16"),
        "mp3": ("MP3", None),
        "ogg": ("OGG", "OPUS"),
    }.items():
        out = io.BytesIO()
        soundfile.write(out, samples, rate, format=kind, subtype=subtype)
        found[name] = out.getvalue()
    for name, (kind, codec, codec_rate) in {
        "webm": ("webm", "libopus", 48000),
        "m4a": ("ipod", "aac", rate),
        "aac": ("adts", "aac", rate),
    }.items():
        out = io.BytesIO()
        with av.open(out, "w", format=kind) as box:
            stream = box.add_stream(codec, rate=codec_rate)
            stream.layout = "mono"
            frame = av.AudioFrame.from_ndarray(
                (samples.reshape(1, -1) * 32767).astype(np.int16), format="s16", layout="mono"
            )
            frame.sample_rate = rate
            context = stream.codec_context
            context.open(strict=False)
            resampler = av.AudioResampler(context.format, "mono", codec_rate, context.frame_size)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                box.mux(stream.encode(part))
            box.mux(stream.encode(None))
        found[name] = out.getvalue()
    return found


@pytest.mark.parametrize("rate", [16000, 48000])
def test_every_kind_is_decoded(rate: int) -> None:
    for name, data in files(tone(1.5, rate=rate).numpy(), rate).items():
        assert kind_of(data[:16]) == name
        wav = decode(data, RATE, 10)
        assert wav.dtype == torch.float32
        assert 1.5 <= len(wav) / RATE < 1.62, name
        assert frequency(wav.numpy()) == pytest.approx(440, abs=2), name


def test_a_file_object_is_read_like_bytes_and_blocks_join_to_the_whole() -> None:
    data = files(tone(9.0).numpy())["flac"]
    blocks = list(decode_blocks(io.BytesIO(data), RATE, 10))
    assert len(blocks) > 2
    assert torch.equal(torch.cat(blocks), decode(data, RATE, 10))
    with tempfile.SpooledTemporaryFile(100) as spooled, tempfile.SpooledTemporaryFile() as held:
        for file in (spooled, held):
            file.write(data)
            assert torch.equal(torch.cat(blocks), decode(file, RATE, 10))
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert torch.equal(torch.cat(blocks), torch.from_numpy(samples))


def test_channels_are_mixed_and_those_that_cancel_are_not() -> None:
    left = tone().numpy()
    for right, loud in ((left, 0.5), (-left, 0.5)):
        out = io.BytesIO()
        soundfile.write(out, np.stack([left, right], axis=1), RATE, format="WAV")
        if right is left:
            wav = decode(out.getvalue(), RATE, 10)
        else:
            with pytest.warns(UserWarning, match="cancel out"):
                wav = decode(out.getvalue(), RATE, 10)
        assert float(wav.abs().max()) == pytest.approx(loud, abs=0.01)


def test_it_ends_at_its_limit_while_it_decodes() -> None:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 96000, 8, format="FLAC", subtype="PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros((96000, 8), np.int16))
    blocks, most = decode_blocks(out.getvalue(), RATE, 2.0), 0
    with pytest.raises(AudioError, match=r"longer than 2 s.*--max-audio-seconds"):
        most = sum(len(block) for block in blocks)
    assert most <= 3 * RATE


def wav(rate=RATE, channels=1, bits=16, form=1, data=b"\0\1" * 9000, size=None) -> bytes:
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", form, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    size = len(data) if size is None else size
    riff = b"RIFF" + struct.pack("<I", (size + 36) & 0xFFFFFFFF) + b"WAVEfmt "
    return riff + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", size) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no audio at all" * 100,
        b"RIFF\0\0\0\0WAVE",
        wav()[:30],
        wav(data=b""),
        wav(rate=0),
        wav(rate=1),
        wav(rate=4_000_000_000),
        wav(channels=0),
        wav(channels=200),
        wav(bits=0),
        wav(form=0x9999),
        wav(bits=32, form=3, data=np.full(9000, np.nan, "<f4").tobytes()),
        b"fLaC" + bytes(5000),
        b"OggS" + bytes(5000),
        b"ID3" + bytes(5000),
        b"\0\0\0\x1cftypM4A " + bytes(5000),
        b"\x1a\x45\xdf\xa3" + bytes(5000),
        b"\xff\xf1" + bytes(5000),
    ],
)
def test_what_is_no_audio_is_refused(data: bytes) -> None:
    with pytest.raises(AudioError):
        decode(data, RATE, 100)


def test_a_file_that_was_cut_off_gives_what_is_there() -> None:
    for name, data in files(tone(3.0).numpy()).items():
        if name == "m4a":
            # Its index is at its end.
            continue
        wav = decode(data[: len(data) * 2 // 3], RATE, 10)
        # A page of Ogg holds a second.
        assert 0.9 < len(wav) / RATE < 2.6, name
    assert len(decode(wav_of_unknown_length(), RATE, 10)) == 9000


def wav_of_unknown_length() -> bytes:
    return wav(size=0xFFFFFFFF)


def test_a_playlist_is_never_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[str]()
    monkeypatch.setattr(
        "mimo_fast.server.audio._refuse_opening", lambda url, *rest: opened.append(url)
    )
    lists = [
        b"#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
    ]
    for text in lists:
        with pytest.raises(AudioError, match="no audio that is known"):
            decode(text, RATE, 10)
    assert not opened


def test_threads_encode_as_it_comes_and_rest_between() -> None:
    async def chunks() -> AsyncIterator[Tensor]:
        for piece in tone(2.0).split(3840):
            yield piece

    async def main() -> None:
        threads = AudioThreads()
        for name in FORMS:
            parts = [part async for part in threads.encode(chunks(), name, RATE, 1.25)]
            assert all(parts)
            assert len(heard(b"".join(parts), name)) / RATE == pytest.approx(1.6, abs=0.13)
        pulled = threads.pull(lambda: iter([1, 2]))
        assert [await pulled.next() for _ in range(3)] == [1, 2, None]
        ended = list[bool]()

        def endless():
            try:
                while True:
                    yield 1
            finally:
                ended.append(True)

        pulled = threads.pull(endless)
        assert await pulled.next() == 1
        pulled.close()
        assert await pulled.next() is None
        threads.close()
        assert ended == [True]

    asyncio.run(main())
