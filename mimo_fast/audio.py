"""Audio files, bytes, streams and arrays -> float32 mono waveform, bounded; waveform -> WAV file, all or nothing."""

import io
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from .errors import AudioError
from .features import check_rate, log_mel, resample, resample_blocks

__all__ = ["AudioSource", "DecodeLimits", "load_audio", "log_mel", "resample", "save_wav"]

AudioSource = str | os.PathLike | bytes | BinaryIO | Tensor | np.ndarray

FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"}
MAX_CHANNELS = 8
BLOCK = 2**16  # frames decoded at a time
READ_BLOCK = 2**20  # bytes read from a file object at a time
SCALES = {torch.uint8: (128, 128), torch.int8: (0, 2**7), torch.int16: (0, 2**15), torch.int32: (0, 2**31)}


@dataclass(frozen=True)
class DecodeLimits:
    """The most that one call accepts, counted while decoding: what a header claims is never believed.

    `seconds` of audio; `bytes` of the encoded input, and of the float32 waveform returned.
    """

    seconds: float = 1800.0
    bytes: int = 256 * 2**20


@torch.no_grad()
def load_audio(
    source: AudioSource,
    sample_rate: int,
    *,
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 (frozen)
    source_rate: int | None = None,
) -> Tensor:
    """Decode `source`, mix its channels to their mean and resample -> float32 [n] at `sample_rate`, on the CPU.

    A path (of a regular file), encoded bytes or a binary file object holds WAV, FLAC, OGG or MP3; a file object is
    read from its position, at most `limits.bytes`. A tensor or array is decoded audio at `source_rate` (default:
    `sample_rate`), [n] or [channels, n]; integers are scaled to [-1, 1). At most 8 channels, 1 kHz..768 kHz.
    Silence is valid. Of a file cut short, what can be decoded is returned.

    Raises:
        AudioError: the source cannot be read or decoded, exceeds `limits`, is empty, or holds NaN or infinite samples.
    """
    check_rate(sample_rate)
    if isinstance(source, Tensor | np.ndarray):
        rate = check_rate(sample_rate if source_rate is None else source_rate, "source_rate")
        return _collect(_array_blocks(source), rate, sample_rate, limits, "the audio array")
    name = _name(source)
    if source_rate is not None:
        raise AudioError(f"source_rate is for tensors and arrays; {name} states its own rate: leave source_rate out")
    with _open(source, name, limits) as file:
        rate = check_rate(file.samplerate, f"the sample rate of {name}")
        return _collect(_file_blocks(file, name), rate, sample_rate, limits, name)


def _collect(blocks: Iterator[Tensor], rate: int, sample_rate: int, limits: DecodeLimits, name: str) -> Tensor:
    """Resample and join mono blocks [n]; the one place where limits and samples are checked."""

    def bounded() -> Iterator[Tensor]:
        frames = 0
        for block in blocks:
            frames += len(block)
            if frames > limits.seconds * rate:
                raise AudioError(f"{name} is longer than {limits.seconds:g} s; shorten it or raise DecodeLimits.seconds")
            if 4 * frames * sample_rate > limits.bytes * rate:
                raise AudioError(f"{name} decodes to more than {limits.bytes} bytes; raise DecodeLimits.bytes")
            yield block

    pieces = []
    for piece in resample_blocks(bounded(), rate, sample_rate):
        if not piece.isfinite().all():
            raise AudioError(f"{name} holds NaN or infinite samples; export it again")
        pieces.append(piece)
    if not sum(map(len, pieces)):
        raise AudioError(f"{name} holds no samples")
    return torch.cat(pieces)


def _array_blocks(source: Tensor | np.ndarray) -> Iterator[Tensor]:
    if source.ndim not in (1, 2) or (source.ndim == 2 and not 1 <= source.shape[0] <= MAX_CHANNELS):
        raise AudioError(
            f"the audio array has shape {list(source.shape)}; it must be [n] or [channels, n], 1 to {MAX_CHANNELS} channels"
        )
    for start in range(0, source.shape[-1], BLOCK):
        block = _as_float(source[..., start : start + BLOCK])
        yield block if block.ndim == 1 else block.mean(dim=0)


def _as_float(block: Tensor | np.ndarray) -> Tensor:
    name = str(block.dtype)
    if isinstance(block, np.ndarray):
        native = np.float32 if block.dtype.kind == "f" else block.dtype.newbyteorder("=")
        block = torch.from_numpy(np.array(block, native)) if block.dtype.kind in "fiu" else torch.zeros(0, dtype=torch.bool)
    if block.is_floating_point():
        return block.detach().to("cpu", torch.float32)
    if block.dtype not in SCALES:
        raise AudioError(f"the audio array holds {name}; use a float dtype, or 8-, 16- or 32-bit integers")
    offset, scale = SCALES[block.dtype]
    return (block.to("cpu", torch.float32) - offset) / scale


class _ForwardFile(soundfile.SoundFile):
    """Reads forward only: soundfile otherwise seeks after each read, which fails at the end of a stream cut short."""

    def seekable(self) -> bool:
        return False


def _open(source: Any, name: str, limits: DecodeLimits) -> soundfile.SoundFile:
    if isinstance(source, str | os.PathLike):
        encoded = os.fspath(source)
        size = _regular_size(encoded, name)
    else:
        data = bytes(source) if isinstance(source, bytes | bytearray | memoryview) else _read(source, name, limits)
        encoded, size = io.BytesIO(data), len(data)
    if size > limits.bytes:
        raise AudioError(f"{name} is larger than {limits.bytes} bytes; shorten it or raise DecodeLimits.bytes")
    if not size:
        raise AudioError(f"{name} is empty")
    try:
        file = _ForwardFile(encoded)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless audio, which it knows by its suffix
        raise AudioError(f"cannot decode {name}: {_reason(error)}; convert it to WAV, FLAC, OGG or MP3") from error
    if file.format not in FORMATS:
        raise AudioError(f"{name} is {file.format} audio; convert it to WAV, FLAC, OGG or MP3")
    if not 1 <= file.channels <= MAX_CHANNELS:
        raise AudioError(f"{name} has {file.channels} channels; mix it down to at most {MAX_CHANNELS}")
    return file


def _file_blocks(file: soundfile.SoundFile, name: str) -> Iterator[Tensor]:
    frames = 0
    while True:
        try:
            block = file.read(BLOCK, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            seconds = frames / file.samplerate
            raise AudioError(f"{name} is damaged after {seconds:.2f} s: {_reason(error)}; export it again") from error
        if not len(block):
            return
        frames += len(block)
        yield torch.from_numpy(block).T.mean(dim=0)


def _regular_size(path: str | bytes, name: str) -> int:
    """Bytes in a readable regular file; pipes and devices are refused because they may never end."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{name} is not a regular file; pass an open binary file object to read from a pipe")
        with open(path, "rb"):
            return status.st_size
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error


def _read(source: Any, name: str, limits: DecodeLimits) -> bytes:
    """The rest of a binary file object, cut one byte after the limit."""
    if not hasattr(source, "read"):
        raise AudioError(f"cannot read audio from {name}; pass a path, bytes, a binary file object, or an array")
    chunks, room = [], limits.bytes + 1
    while room > 0:
        try:
            chunk = source.read(min(room, READ_BLOCK))
        except (OSError, ValueError) as error:
            raise AudioError(f"cannot read {name}: {error}") from error
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise AudioError(f"reading {name} gave {type(chunk).__name__}, not bytes; open it in binary mode")
        if not chunk:
            break
        chunks.append(chunk)
        room -= len(chunk)
    return b"".join(chunks)


def _name(source: Any) -> str:
    """What an error calls the source, always on one line."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "the audio data"
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "name", None)
    if not isinstance(path, str | os.PathLike):
        return f"the {type(source).__name__} object"
    text = os.fsdecode(path)
    return text if text.isprintable() and text else ascii(text)


def _reason(error: Exception) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else "no audio header"
    return " ".join(text.rstrip(".").split())


def save_wav(target: str | os.PathLike | BinaryIO, wav: Tensor, sample_rate: int) -> None:
    """Write float `wav` [n] as a 16-bit PCM WAV file, clipped to [-1, 1).

    A path appears complete or not at all: an error or an interrupt leaves what was there. A file object gets the
    whole file from its position on and need not be seekable.

    Raises:
        AudioError: `wav` is not [n] finite floats, or `target` cannot be written.
    """
    sample_rate = check_rate(sample_rate)
    wav = torch.as_tensor(wav).detach()
    if wav.ndim != 1 or not wav.is_floating_point():
        raise AudioError(f"save_wav takes float samples [n], not {wav.dtype} {list(wav.shape)}")
    samples = wav.to("cpu", torch.float32)
    if not samples.isfinite().all():
        raise AudioError("the waveform holds NaN or infinite samples, which a WAV file cannot hold")
    encoded = io.BytesIO()
    soundfile.write(encoded, samples.clamp(-1, 1).numpy(), sample_rate, format="WAV", subtype="PCM_16")
    name = _name(target)
    try:
        if isinstance(target, str | os.PathLike):
            _replace(Path(os.path.realpath(target)), encoded.getbuffer(), name)
        else:
            target.write(encoded.getbuffer())
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot write {name}: {getattr(error, 'strerror', None) or error}") from error


def _replace(path: Path, data: memoryview, name: str) -> None:
    if path.exists() and not path.is_file():
        raise AudioError(f"cannot write {name}: it is not a regular file; pass an open binary file object")
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
