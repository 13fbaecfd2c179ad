"""Hostile audio sources: not audio, damaged, lying or endless; limits and interrupts."""

import contextlib
import io
import os
import signal
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_memory
from sounds import encode, error_of, noise
from torch.testing import assert_close

from mimo_fast.audio import resample as audio_resample
from mimo_fast.audio.files import DecodeLimits, load_audio
from mimo_fast.errors import AudioError


def test_paths_that_cannot_be_read(tmp_path, monkeypatch):
    missing = tmp_path / "missing.wav"
    assert error_of(missing) == f"cannot read {missing}: No such file or directory"
    assert f"{tmp_path} is a folder" in error_of(tmp_path)
    assert "cannot read ''" in error_of("")
    assert "cannot read 'a\\x00b'" in error_of("a\0b")
    assert r"two\nlines.wav" in error_of(tmp_path / "two\nlines.wav")
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(noise(10)))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert error_of(secret) == f"cannot read {secret}: Permission denied"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_pipes_and_devices_are_refused_without_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        assert f"{path} is not a regular file" in error_of(path)


@pytest.mark.parametrize("name", ["a.txt", "a.wav", "a.raw", "a.au", "a.vox", "a.gsm", "a"])
def test_text_is_not_audio_whatever_its_name(name, tmp_path):
    path = tmp_path / name
    path.write_text("Just some words, nothing to hear.\n" * 1000)
    message = error_of(path)
    assert str(path) in message
    assert message.endswith("convert it to WAV, FLAC, OGG or MP3")


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "W64"])
def test_other_containers_are_named_and_refused(kind):
    message = f"the audio data is {kind} audio; convert it to WAV, FLAC, OGG or MP3"
    assert error_of(encode(noise(100), kind=kind)) == message


def test_objects_that_are_no_source():
    assert "from the int object" in error_of(7)
    assert "from the NoneType object" in error_of(None)
    assert "gave str, not bytes; open it in binary mode" in error_of(io.StringIO("text"))
    closed = io.BytesIO(b"x")
    closed.close()
    assert "cannot read the BytesIO object: I/O operation on closed file" in error_of(closed)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_headers_cut_short(kind, tmp_path):
    path = tmp_path / "cut.wav"
    for size in (0, 1, 4, 30):
        path.write_bytes(encode(noise(1000), kind=kind)[:size])
        assert str(path) in error_of(path)


@pytest.mark.parametrize("kind", ["WAV", "OGG", "MP3"])
def test_a_file_cut_short_plays_what_is_there(kind):
    data = encode(noise(100_000), kind=kind)
    assert 20_000 < len(load_audio(data[: len(data) // 2], 24000)) < 60_000


def test_damaged_flac_is_an_error_and_says_where():
    data = encode(noise(300_000), kind="FLAC")
    cut = data[: 2 * len(data) // 3]
    assert "damaged somewhere after 8.19 s: flac decoder lost sync" in error_of(cut)


def forged_wav(samples: np.ndarray, claim: int) -> bytes:
    data = bytearray(encode(samples))
    data[4:8] = data[40:44] = struct.pack("<I", claim)
    return bytes(data)


def forged_flac(samples: np.ndarray, claim: int) -> bytes:
    """Replaces the 36-bit number of frames in STREAMINFO."""
    data = bytearray(encode(samples, kind="FLAC"))
    data[21:26] = ((data[21] >> 4 << 36) | claim).to_bytes(5, "big")
    return bytes(data)


FORGED = [(forged_wav, claim) for claim in (2**32 - 1, 2**31, 10**9)]
FORGED += [(forged_flac, claim) for claim in (0, 2**36 - 1)]


@pytest.mark.parametrize(("forge", "claim"), FORGED)
def test_claims_of_enormous_length(forge, claim):
    data, decoded = forge(noise(1000), claim), []
    assert peak_memory(lambda: decoded.append(load_audio(data, 24000))) < 16 * 2**20
    assert_close(decoded[0], torch.from_numpy(noise(1000)), rtol=0, atol=2**-15)


def test_claims_of_tiny_length():
    assert len(load_audio(forged_flac(noise(1000), 10), 24000)) == 10
    assert len(load_audio(forged_wav(noise(1000), 20), 24000)) == 10
    assert "no samples" in error_of(forged_wav(noise(1000), 0))


CHANNELS = [(22, struct.pack("<H", n), f"has {n} channels") for n in (9, 1000)]
RATES = [(24, struct.pack("<I", n), f"is {n} Hz") for n in (999, 2**31 - 1)]
FORMATS = [*CHANNELS, *RATES, (24, bytes(4), "cannot decode")]


@pytest.mark.parametrize(("offset", "value", "message"), FORMATS)
def test_forged_formats(offset, value, message):
    data = bytearray(encode(noise(10_000)))
    data[offset : offset + len(value)] = value
    assert message in error_of(bytes(data))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["WAV", "FLAC", "OGG", "MP3"]))
def test_any_damage_ends_in_audio_or_audio_error(data, kind):
    damaged = bytearray(encode(noise(3000), kind=kind))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(200, len(damaged) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(AudioError):
        wav = load_audio(bytes(damaged), 24000)
        assert wav.ndim == 1
        assert len(wav) > 0
        assert wav.isfinite().all()


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """Two hours of silence in a small FLAC."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC") as flac:
        for _ in range(120):
            flac.write(np.zeros(60 * 8000, np.int16))
    return file.getvalue()


def test_a_decompression_bomb_meets_the_limits(bomb):
    assert len(bomb) < 2**18
    messages = []
    by_seconds, by_bytes = DecodeLimits(seconds=60), DecodeLimits(bytes=2**20)
    assert peak_memory(lambda: messages.append(error_of(bomb, limits=by_seconds))) < 32 * 2**20
    assert peak_memory(lambda: messages.append(error_of(bomb, limits=by_bytes))) < 32 * 2**20
    assert messages == [
        "the audio data is longer than 60 s; cut it or raise DecodeLimits.seconds",
        "the audio data decodes to over 1048576 bytes; cut it or raise DecodeLimits.bytes",
    ]


def test_limits_are_inclusive():
    for source in (noise(24000), encode(noise(24000), kind="FLAC")):
        assert len(load_audio(source, 24000, limits=DecodeLimits(seconds=1, bytes=96000))) == 24000
        assert "longer than 0.9999 s" in error_of(source, limits=DecodeLimits(seconds=0.9999))
        assert "95999 bytes" in error_of(source, limits=DecodeLimits(bytes=95999))


def test_the_byte_limit_is_of_the_waveform_returned():
    limits = DecodeLimits(bytes=48100)
    assert len(load_audio(encode(np.zeros(24000), 48000), 24000, limits=limits)) == 12000
    assert "48100 bytes" in error_of(encode(np.zeros(8000), 8000), limits=limits)


def test_encoded_bytes_are_limited_before_decoding(tmp_path, monkeypatch):
    data = encode(noise(1000))
    path = tmp_path / "large.wav"
    path.write_bytes(data)
    limits = DecodeLimits(bytes=len(data) - 1)
    monkeypatch.setattr("mimo_fast.audio.files._open", None)
    for source in (data, path, io.BytesIO(data)):
        assert f"is larger than {limits.bytes} bytes" in error_of(source, limits=limits)


def test_an_endless_stream_is_read_to_the_limit_only():
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    stream = Endless()
    assert "is larger than 3000000 bytes" in error_of(stream, limits=DecodeLimits(bytes=3_000_000))
    assert stream.given == 3_000_001


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Ctrl-C after `seconds`."""
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX")
def test_an_interrupt_ends_decoding_and_never_shortens_audio():
    data = encode(noise(500_000), kind="FLAC")
    lengths = []
    with alarm(0.1), contextlib.suppress(KeyboardInterrupt):
        while len(lengths) < 200:
            lengths.append(len(load_audio(data, 24000)))
    assert len(lengths) < 200
    assert set(lengths) <= {500_000}


def test_no_thread_is_left_behind(tmp_path):
    # Threads of earlier tests may end meanwhile.
    before = set(threading.enumerate())
    load_audio(encode(noise(100)), 24000)
    error_of(b"nothing to hear")
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("rate", [1009, 24001, 767_999])
def test_no_pair_of_rates_takes_long(rate, monkeypatch):
    """The table of coprime rates has up to 48,000 bands, which are computed together."""
    filters, calls = audio_resample._windowed_sinc, []
    monkeypatch.setattr(
        audio_resample, "_windowed_sinc", lambda *given: (calls.append(1), filters(*given))[1]
    )
    wav = load_audio(encode(noise(50), rate, "WAV", "PCM_16"), 768_000)
    assert len(wav) == -(-50 * 768_000 // rate)
    assert 0 < len(calls) < 100
