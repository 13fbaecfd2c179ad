"""Sounds for tests, encoded and as arrays, and the error that loading one ends in."""

import io

import av
import numpy as np
import pytest
import soundfile

from mimo_fast.audio.files import load_audio
from mimo_fast.errors import AudioError


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, shape).astype(np.float32)


def encode(
    samples: np.ndarray, rate: int = 24000, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def heard(data: bytes, form: str) -> np.ndarray:
    """Samples [n] at 24 kHz of encoded audio; of 16-bit samples where the form is pcm."""
    if form in ("pcm", "pcm16"):
        return np.frombuffer(data, "<i2") / 32768
    with av.open(io.BytesIO(data)) as box:
        assert box.streams.audio[0].rate in (24000, 48000)
        resampler = av.AudioResampler("fltp", "mono", 24000)
        frames = [part for frame in box.decode(audio=0) for part in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def error_of(source: object, **arguments: object) -> str:
    """The message of the AudioError that loading `source` must end in: always one line."""
    with pytest.raises(AudioError) as caught:
        load_audio(source, 24000, **arguments)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
