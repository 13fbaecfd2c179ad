"""Audio files damaged in every way: sizes, fields, bodies, and sources that misbehave."""

import contextlib
import io
import random
from pathlib import Path
from typing import Any

import mutations as m
import numpy as np
import pytest
import soundfile
import torch
from sounds import encode
from trials import Case, Note, Wrong, check

COUNT, CHUNKS, SECONDS = 20_000, 4, 20

pytestmark = pytest.mark.slow

WAVS = ("PCM_16", "PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
PACKED = ("IMA_ADPCM", "MS_ADPCM", "GSM610", "G721_32", "NMS_ADPCM_16", "MPEG_LAYER_III")
OTHERS = ("AIFF", "AU", "CAF", "W64", "SVX", "NIST", "VOC", "IRCAM", "MAT5", "PVF", "XI", "HTK")


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_damaged_file_is_audio_or_an_error(chunk: int, tmp_path: Path) -> None:
    check("audio_files", COUNT, CHUNKS, chunk, tmp_path)


def originals() -> dict[str, list[bytes]]:
    """Small files of every format, by the mutators that know them."""

    def sound(channels: int, frames: int = 1500) -> np.ndarray:
        chance = np.random.default_rng(channels)
        return chance.uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)

    def written(sound: np.ndarray, rate: int, *formats: tuple[str, str | None]) -> list[bytes]:
        """What this machine's libsndfile can write of them."""
        found = []
        for kind, subtype in formats:
            with contextlib.suppress(soundfile.LibsndfileError):
                found.append(encode(sound, rate, kind, subtype))
        return found

    one, two = sound(1), sound(2)
    return {
        "wav": [encode(one, 16000, "WAV", subtype) for subtype in WAVS]
        + [encode(two, 24000, "WAV", "PCM_16"), encode(sound(8, 300), 8000, "WAV", "FLOAT")]
        + written(one, 8000, *(("WAV", subtype) for subtype in PACKED))
        + [encode(two, 44100, "WAVEX", "PCM_16"), encode(one, 24000, "RF64", "PCM_16")],
        "flac": [encode(one, 16000, "FLAC", "PCM_16"), encode(two, 48000, "FLAC", "PCM_24")],
        "ogg": [encode(one, 16000, "OGG", "VORBIS"), encode(two, 24000, "OGG", "OPUS")],
        "mp3": [encode(one, 16000, "MP3"), encode(two, 44100, "MP3", "MPEG_LAYER_III")],
        "other": written(one, 8000, *((kind, None) for kind in OTHERS)),
    }


KNOWING: dict[str, tuple[m.Mutator, ...]] = {
    "wav": (m.wav_field, m.wav_field, m.wav_field, m.float_samples, m.riff_chunk),
    "flac": (m.flac_field, m.flac_field),
    "ogg": (),
    "mp3": (m.id3_tag,),
    "other": (),
}
SHARES = ["wav"] * 9 + ["flac"] * 4 + ["ogg"] * 4 + ["mp3"] * 4 + ["other"]


class Odd(io.RawIOBase):
    """A file object that reads in small pieces and cannot seek, and may misbehave at `bad`."""

    def __init__(self, data: bytes, rng: random.Random) -> None:
        self._data, self._rng = io.BytesIO(data), rng
        self._bad = rng.choice([None, None, "str", "none", "error", "more", "closed", "array"])
        self.name: Any = rng.choice(["a.wav", 7, None, b"bytes", "two\nlines", Path("x")])

    def read(self, size: int = -1) -> Any:
        data = self._data.read(min(size, self._rng.choice([1000, 10**6])))
        if self._bad is None or self._rng.random() < 0.5:
            return data
        if self._bad == "error":
            raise OSError(5, "Input/output error")
        if self._bad == "closed":
            raise ValueError("read of closed file")
        odd = {"str": "text", "none": None, "more": data + bytes(10), "array": bytearray(data)}
        return odd[self._bad]


def prepare(folder: Path) -> Case:
    from mimo_fast import load_audio
    from mimo_fast.audio.files import DecodeLimits

    torch.set_num_threads(1)
    files = originals()

    def case(rng: random.Random, note: Note) -> None:
        kind = rng.choice(SHARES)
        data = rng.choice(files[kind])
        used = []
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            change = rng.choice([*KNOWING[kind], *KNOWING[kind], *m.BYTES])
            data = change(data, rng)
            used.append(change.__name__)
        if kind == "ogg" and rng.random() < 0.7:
            data = m.ogg_sums(data)
        way = rng.choice(["bytes"] * 6 + ["view", "object", "object", "odd", "path", "path"])
        rate = rng.choice([24000] * 6 + [8000, 16000, 44100, 768000])
        limits = rng.choice([DecodeLimits()] * 5 + [DecodeLimits(0.05), DecodeLimits(bytes=4000)])
        note(f"{kind}: {', '.join(used)}; {len(data)} bytes as {way} at {rate} Hz, {limits}")
        source: Any = data
        if way == "view":
            source = memoryview(bytearray(data))
        elif way == "object":
            source = io.BytesIO(data)
        elif way == "odd":
            source = Odd(data, rng)
        elif way == "path":
            names = ("a.wav", "a.mp3", "a.raw", "a.ogg", "a.flac", "a", "é\udcff.wav", "a\nb.wav")
            source = folder / rng.choice(names)
            source.write_bytes(data)
            source = rng.choice([source, str(source)])
        wav = load_audio(source, rate, limits=limits)
        if wav.ndim != 1 or wav.dtype != torch.float32 or wav.device.type != "cpu" or not len(wav):
            raise Wrong(f"a waveform is {wav.dtype} {list(wav.shape)} on {wav.device}")
        if not wav.isfinite().all():
            raise Wrong("a waveform is not finite")
        if len(wav) > limits.seconds * rate + 1 or 4 * len(wav) > limits.bytes + 4:
            raise Wrong("a waveform exceeds the limits")

    return case
