"""Waveform -> audio file, all or nothing, or the parts of a WAV stream."""

import io
import os
import struct
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import as_samples
from mimo_fast.audio.paths import (
    FORMATS,
    audio_format,
    check_target,
    name_of,
    reason_of,
    soundfile_library,
    write_whole,
)
from mimo_fast.audio.resample import check_rate
from mimo_fast.errors import AudioError
from mimo_fast.modes import in_own_modes

BLOCK = 2**16
"""Frames encoded at a time: libsndfile's Vorbis encoder overflows its stack on a long waveform."""

UNKNOWN_LENGTH = 2**32 - 1
"""Size in the header of a WAV that is still being written, as sox and ffmpeg understand it."""

MOST_SAMPLES = 2**31 - 64
"""What a WAV's 32 bits of length can count, two bytes a sample: 24 hours at 24 kHz."""


Seal = Callable[[bytes, str], bytes]
"""An encoded file and libsndfile's name of its format -> the file as it is written."""


def check_output(target: Any) -> None:
    """Finds out, before there is audio, whether it can be written to a path or a file object.

    Raises:
        AudioError: it cannot.
        TypeError: it is neither.
    """
    if isinstance(target, str | os.PathLike):
        check_target(target)
    elif not callable(getattr(target, "write", None)):
        problem = f"cannot write audio to an object of type {type(target).__name__}"
        raise TypeError(f"{problem}; pass a path or a binary file object")


@checked
@in_own_modes
def save_wav(target: str | os.PathLike[str] | BinaryIO, wav: Tensor, sample_rate: int) -> None:
    """Writes float `wav` [n], clipped to [-1, 1), as a 16-bit PCM WAV like soundfile.write's.

    The suffix of a path chooses the format: .wav, .flac, .ogg (Vorbis), .opus or .mp3. A path
    appears complete or not at all: an error or an interrupt leaves what was there, whose mode and
    links are kept. A buffered binary file object gets a whole WAV at its position and need not be
    seekable.

    Raises:
        AudioError: `wav` is not [n] finite floats, `target` cannot be written, or its suffix is
            unknown.
    """
    write_sealed(target, wav, sample_rate)


def write_sealed(
    target: str | os.PathLike[str] | BinaryIO,
    wav: Tensor,
    sample_rate: int,
    seal: Seal | None = None,
) -> None:
    """`save_wav` of an encoded file to which `seal` adds what belongs to it."""
    sample_rate = check_rate(sample_rate)
    check_output(target)
    wav = as_samples(wav)
    if wav.ndim != 1 or not wav.is_floating_point():
        raise AudioError(f"save_wav takes float samples [n], not {wav.dtype} {list(wav.shape)}")
    if len(wav) > MOST_SAMPLES:
        hours = len(wav) / sample_rate / 3600
        raise AudioError(f"{hours:.0f} hours are more than a WAV file holds: write them in parts")
    if not wav.isfinite().all():
        problem = "the waveform holds NaN or infinite samples"
        raise AudioError(f"{problem}, which an audio file cannot hold")
    path = target if isinstance(target, str | os.PathLike) else None
    form = FORMATS[".wav"] if path is None else audio_format(path)
    data = _encoded(wav, sample_rate, form, name_of(target))
    if seal is not None:
        data = seal(data, form[0])
    if path is not None:
        write_whole(path, data)
        return
    try:
        cast(BinaryIO, target).write(data)
    except (OSError, ValueError, TypeError) as error:  # TypeError: it takes text
        raise AudioError(f"cannot write {name_of(target)}: {reason_of(error)}") from error


def wav_header(sample_rate: int) -> bytes:
    """Header of a 16-bit mono WAV of unknown length, which `pcm16` samples follow."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    size = struct.pack("<I", UNKNOWN_LENGTH)
    return b"RIFF" + size + b"WAVE" + form + b"data" + size


def pcm16(samples: Tensor) -> bytes:
    """float -> int16 as libsndfile: the upper half of the nearest 32-bit integer, saturated."""
    scaled = samples.to("cpu", torch.float64).mul(2**31).round().div(2**16).floor()
    return scaled.clamp(-(2**15), 2**15 - 1).numpy().astype("<i2").tobytes()


def _encoded(wav: Tensor, sample_rate: int, form: tuple[str, str], name: str) -> bytes:
    if form[0] == "WAV":
        return wav_file(wav, sample_rate)
    library, samples = soundfile_library(), wav.clamp(-1, 1).float().cpu().numpy()
    try:
        # Ctrl-C inside soundfile's callbacks would be swallowed; threads get no signals.
        with ThreadPoolExecutor(1) as encoder:
            return encoder.submit(_compressed, library, samples, sample_rate, form).result()
    except library.LibsndfileError as error:
        # Opus, for one, knows five rates.
        problem = f"cannot write {name} at {sample_rate} Hz: {reason_of(error)}"
        raise AudioError(f"{problem}; use .wav or .flac") from error


def _compressed(
    library: Any, samples: np.ndarray, sample_rate: int, form: tuple[str, str]
) -> bytes:
    encoded = io.BytesIO()
    with library.SoundFile(encoded, "w", sample_rate, 1, form[1], format=form[0]) as file:
        for start in range(0, len(samples), BLOCK):
            file.write(samples[start : start + BLOCK])
    return encoded.getvalue()


def wav_file(wav: Tensor, sample_rate: int) -> bytes:
    """float samples [n] as a 16-bit WAV."""
    encoded = io.BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setparams((1, 2, sample_rate, len(wav), "NONE", ""))
        for block in wav.split(BLOCK):
            file.writeframes(pcm16(block))
    return encoded.getvalue()
