"""Audio of any source -> float32 mono waveform, within limits."""

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.paths import check_readable, name_of, reason_of, soundfile_library
from mimo_fast.audio.resample import MIN_RATE, check_rate, resample_blocks
from mimo_fast.errors import AudioError
from mimo_fast.modes import in_own_modes

AudioSource = str | os.PathLike | bytes | BinaryIO | Tensor | np.ndarray

FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3"}
MAX_CHANNELS = 8
MIXING_LOSS = 6.0  # dB that a mixture may lose before one channel is taken instead
BLOCK = 2**16  # frames decoded at a time
READ_BLOCK = 2**20  # bytes read from a file object at a time
MOST_BYTES = 2**42  # of a file that is read but not held
SCALES = {
    torch.uint8: (128, 2**7),
    torch.int8: (0, 2**7),
    torch.int16: (0, 2**15),
    torch.int32: (0, 2**31),
}


@checked
@dataclass(frozen=True)
class DecodeLimits:
    """Limits of one call, counted while decoding whatever the header claims.

    seconds: of audio. bytes: of the encoded input, and of the returned float32 waveform.
    """

    seconds: float = 1800.0
    bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if not self.seconds >= 0 or self.bytes < 0:  # NaN would be no limit
            problem = "limits must be numbers from 0 on"
            raise ValueError(f"{problem}, not {self.seconds} seconds and {self.bytes} bytes")


@checked
@in_own_modes
def load_audio(
    source: AudioSource,
    sample_rate: int,
    *,
    limits: DecodeLimits = DecodeLimits(),
    source_rate: int | None = None,
) -> Tensor:
    """Decodes, mixes to mono and resamples -> float32 [n] at `sample_rate`, on the CPU.

    A path (of a regular file), encoded bytes or a binary file object holds WAV, FLAC, OGG or MP3; a
    file object is read from its position on, at most `limits.bytes`. A tensor or array is decoded
    audio at `source_rate` (default: `sample_rate`), [n] or [channels, n]; integers are scaled to
    [-1, 1). At most 8 channels, 1 kHz..768 kHz. The mean of the channels is taken; where they
    cancel out or most are silent, so that it loses over 6 dB of their power, the strongest channel
    alone, with a warning. Silence is valid. A file cut short gives what is
    there, unless its format shows the damage (FLAC).

    Raises:
        AudioError: the source cannot be read or decoded, exceeds `limits`, is empty, or holds NaN
            or infinite samples.
    """
    sample_rate = check_rate(sample_rate)
    with _opened(source, limits, sample_rate, source_rate) as opened:
        mixer = _Mixer()
        wav = _joined(opened.blocks(mixer), sample_rate, limits, opened)
        chosen = mixer.choice(opened.name)
        if chosen is None:
            return wav
        # Read again, so that no more than a block of each channel is held.
        return _joined(opened.blocks(_Mixer(chosen)), sample_rate, limits, opened)


def audio_blocks(
    source: AudioSource,
    sample_rate: int,
    *,
    limits: DecodeLimits = DecodeLimits(),
    source_rate: int | None = None,
) -> Iterator[Tensor]:
    """`load_audio` in parts [n], which join to its result: memory does not grow with the audio.

    Audio of several channels is decoded twice: before the first part it is known whether they can
    be mixed.

    Raises:
        AudioError: as `load_audio`, once the part in question is reached.
    """
    sample_rate = check_rate(sample_rate)
    with _opened(source, limits, sample_rate, source_rate) as opened:
        yield from _mixed(opened, sample_rate, limits)


def mixed_blocks(
    read: Callable[[], Iterator[Tensor]],
    source_rate: int,
    channels: int,
    sample_rate: int,
    name: str,
    limits: DecodeLimits = DecodeLimits(),
) -> Iterator[Tensor]:
    """`audio_blocks` of what another decoder reads.

    Args:
        read: gives blocks float32 [channels, n] at `source_rate`, from the start whenever it is
            called.
        name: of the recording in errors.
    """
    rate = check_rate(source_rate, f"the sample rate of {name}")
    yield from _mixed(_Opened(read, rate, channels, name), check_rate(sample_rate), limits)


def _mixed(opened: "_Opened", sample_rate: int, limits: DecodeLimits) -> Iterator[Tensor]:
    mixer = _Mixer()
    if opened.channels > 1:
        for _ in opened.blocks(mixer):
            pass
    # Without frames, so that it measures nothing while it mixes.
    mixer = _Mixer(mixer.choice(opened.name))
    yield from _resampled(opened.blocks(mixer), sample_rate, limits, opened)


def check_audio(path: str | os.PathLike[str]) -> None:
    """Raises AudioError where no audio can be read from the beginning of a file."""
    limits = DecodeLimits(bytes=MOST_BYTES)
    with _opened(path, limits, MIN_RATE, None) as opened:
        if next(opened.read(), None) is None:
            raise AudioError(f"{opened.name} holds no samples")


@dataclass
class _Opened:
    """A source that can be read from its start, as often as is needed.

    Args:
        read: its blocks [channels, n].
        rate: sample rate.
    """

    read: Callable[[], Iterator[Tensor]]
    rate: int
    channels: int
    name: str

    def blocks(self, mixer: "_Mixer") -> Iterator[Tensor]:
        """Mono blocks [n]."""
        return map(mixer.mono, self.read())


@contextmanager
def _opened(
    source: AudioSource, limits: DecodeLimits, sample_rate: int, source_rate: int | None
) -> Iterator[_Opened]:
    if isinstance(source, Tensor | np.ndarray):
        rate = check_rate(sample_rate if source_rate is None else source_rate, "source_rate")
        shape = source.shape
        channels = shape[0] if len(shape) == 2 else 1
        yield _Opened(lambda: _array_blocks(source), rate, channels, "the audio array")
        return
    name = name_of(source)
    if source_rate is not None:
        problem = f"source_rate is for tensors and arrays; {name} states its own rate"
        raise AudioError(f"{problem}: leave source_rate out")
    encoded = _encoded(source, name, limits)
    # Ctrl-C inside soundfile's callbacks would be swallowed and read as the end of the file;
    # threads get no signals.
    with ThreadPoolExecutor(1) as decoder:
        files = [decoder.submit(_open, encoded, name).result()]
        unread = True

        def read() -> Iterator[Tensor]:
            nonlocal unread
            if not unread:
                if isinstance(encoded, io.BytesIO):
                    encoded.seek(0)
                files.append(decoder.submit(_open, encoded, name).result())
            unread = False
            return _file_blocks(files[-1], name, decoder)

        try:
            yield _Opened(read, _check_header(files[0], name), files[0].channels, name)
        finally:
            for file in files:
                decoder.submit(file.close)  # after a read that an interrupt left running


@dataclass
class _Mixer:
    """Blocks [channels, n] -> mono [n]: their mean, or one channel; it measures what is lost.

    Args:
        chosen: the channel to take; None for the mean.
    """

    chosen: int | None = None
    _frames: int = 0
    _sums: Tensor | None = None

    def mono(self, block: Tensor) -> Tensor:
        if len(block) == 1 or self.chosen is not None:
            return block[self.chosen or 0]
        mean = block.mean(dim=0)
        samples = torch.cat((block, mean[None])).double()
        sums = torch.stack((samples.sum(dim=1), samples.square().sum(dim=1)))
        self._sums = sums if self._sums is None else self._sums + sums
        self._frames += block.shape[1]
        return mean

    def choice(self, name: str) -> int | None:
        """The channel to take in place of the mean, with a warning; None where the mean does."""
        lost, strongest = self.loss()
        if lost <= MIXING_LOSS:
            return None
        warnings.warn(
            f"mixing the channels of {name} would lose {min(lost, 99):.0f} dB, as they cancel out "
            f"or most are silent: channel {strongest + 1} is used alone",
            stacklevel=4,
        )
        return strongest

    def loss(self) -> tuple[float, int]:
        """Decibels that the mean lacks to the channels, and the strongest of these.

        Two channels that have nothing in common lose 3 dB against the power of both, as ordinary
        stereo does, and one beside silence no more. Of more channels one may hold all that
        matters, so that the strongest counts. A constant offset is no sound.
        """
        if self._sums is None or not self._frames:
            return 0.0, 0
        sums, squares = self._sums / self._frames
        *channels, mixed = (squares - sums.square()).clamp(min=0).tolist()
        strongest = max(channels)
        wanted = sum(channels) / 2 if len(channels) == 2 else strongest
        if not 0 < wanted < math.inf:
            return 0.0, 0
        lost = -10 * math.log10(mixed / wanted) if mixed > 0 else math.inf
        # Of channels that differ by rounding the first.
        return lost, next(i for i, power in enumerate(channels) if power > 0.999 * strongest)


def _joined(
    blocks: Iterator[Tensor], sample_rate: int, limits: DecodeLimits, opened: _Opened
) -> Tensor:
    return torch.cat(list(_resampled(blocks, sample_rate, limits, opened)))


def _resampled(
    blocks: Iterator[Tensor], sample_rate: int, limits: DecodeLimits, opened: _Opened
) -> Iterator[Tensor]:
    """Resamples mono blocks [n]: the one place where length and samples are checked."""
    rate, name = opened.rate, opened.name

    def bounded() -> Iterator[Tensor]:
        frames = 0
        for block in blocks:
            frames += len(block)
            if frames > limits.seconds * rate:
                problem = f"{name} is longer than {limits.seconds:g} s"
                raise AudioError(f"{problem}; {_remedy(limits, 'seconds')}")
            if 4 * frames * sample_rate > limits.bytes * rate:
                problem = f"{name} decodes to over {limits.bytes} bytes"
                raise AudioError(f"{problem}; {_remedy(limits, 'bytes')}")
            yield block

    samples = 0
    for piece in resample_blocks(bounded(), rate, sample_rate):
        if not piece.isfinite().all():
            raise AudioError(f"{name} holds NaN or infinite samples; export it again")
        samples += len(piece)
        yield piece
    if not samples:
        raise AudioError(f"{name} holds no samples")


def _remedy(limits: DecodeLimits, field: str) -> str:
    """What to do about audio beyond its limits: only who has set some can raise them."""
    return "cut it" if limits == DecodeLimits() else f"cut it or raise DecodeLimits.{field}"


def _array_blocks(source: Tensor | np.ndarray) -> Iterator[Tensor]:
    source = as_samples(source) if isinstance(source, Tensor) else source
    shape = tuple(source.shape)
    if len(shape) not in (1, 2) or (len(shape) == 2 and not 1 <= shape[0] <= MAX_CHANNELS):
        wanted = f"[n] or [at most {MAX_CHANNELS} channels, n]"
        raise AudioError(f"the audio array is {list(shape)}; it must be {wanted}")
    for start in range(0, shape[-1], BLOCK):
        block = _as_float(source[..., start : start + BLOCK])
        yield block if block.ndim == 2 else block[None]


def check_dense(tensor: Tensor) -> None:
    """Raises AudioError for a tensor of audio that holds no samples, one by one."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "sparse"
        raise AudioError(f"the audio array is a {kind} tensor; convert it to a dense one of floats")


def as_samples(tensor: Tensor) -> Tensor:
    """A tensor of audio on the CPU, checked by `check_dense`."""
    check_dense(tensor)
    return tensor.detach().cpu()


def _as_float(block: Tensor | np.ndarray) -> Tensor:
    dtype = block.dtype
    if isinstance(block, np.ndarray) and block.dtype.kind in "fiu":
        native = np.float32 if block.dtype.kind == "f" else block.dtype.newbyteorder("=")
        block = torch.from_numpy(np.array(block, native))
    if isinstance(block, Tensor):
        samples = block.to(torch.float32)
        if block.is_floating_point():
            return samples
        if block.dtype in SCALES:
            offset, scale = SCALES[block.dtype]
            return (samples - offset) / scale
    raise AudioError(
        f"the audio array holds {dtype}; convert it to float32, or to 8-, 16- or 32-bit integers"
    )


def _encoded(source: Any, name: str, limits: DecodeLimits) -> bytes | io.BytesIO:
    """The object that soundfile opens, its size checked."""
    encoded: bytes | io.BytesIO
    if isinstance(source, str | os.PathLike):
        size = check_readable(source)
        # soundfile would encode a string strictly, but a name may be of any bytes.
        encoded = os.fsencode(source)
    else:
        held = isinstance(source, bytes | bytearray | memoryview)
        data = bytes(source) if held else _read(source, name, limits)
        encoded, size = io.BytesIO(data), len(data)
    if size > limits.bytes:
        raise AudioError(f"{name} is larger than {limits.bytes} bytes; {_remedy(limits, 'bytes')}")
    if not size:
        raise AudioError(f"{name} is empty")
    return encoded


def _read(source: Any, name: str, limits: DecodeLimits) -> bytes:
    """The rest of a binary file object, cut one byte after the limit."""
    if not hasattr(source, "read"):
        fix = "pass a path, bytes, a binary file object or an array"
        raise AudioError(f"cannot read audio from {name}; {fix}")
    chunks, room = [], limits.bytes + 1
    while room > 0:
        try:
            chunk = source.read(min(room, READ_BLOCK))
        except (OSError, ValueError) as error:
            raise AudioError(f"cannot read {name}: {reason_of(error)}") from error
        if not isinstance(chunk, bytes | bytearray | memoryview):
            problem = f"reading {name} gave {type(chunk).__name__}, not bytes"
            raise AudioError(f"{problem}; open it in binary mode")
        if not chunk:
            break
        chunks.append(chunk)
        room -= len(chunk)
    return b"".join(chunks)


def _open(encoded: bytes | io.BytesIO, name: str) -> Any:
    """A soundfile.SoundFile."""
    library = soundfile_library()
    try:
        file = library.SoundFile(encoded)
    # TypeError: a suffix that promises headerless audio.
    except (library.LibsndfileError, TypeError) as error:
        problem = f"cannot decode {name}: {reason_of(error)}"
        raise AudioError(f"{problem}; convert it to WAV, FLAC, OGG or MP3") from error
    # soundfile otherwise seeks after each read, which fails where the length is unknown.
    file.seekable = lambda: False
    return file


def _check_header(file: Any, name: str) -> int:
    if file.format not in FORMATS:
        raise AudioError(f"{name} is {file.format} audio; convert it to WAV, FLAC, OGG or MP3")
    if not 1 <= file.channels <= MAX_CHANNELS:
        problem = f"{name} has {file.channels} channels"
        raise AudioError(f"{problem}; mix it down to at most {MAX_CHANNELS}")
    return check_rate(file.samplerate, f"the sample rate of {name}")


def _file_blocks(file: Any, name: str, decoder: Executor) -> Iterator[Tensor]:
    frames = 0
    while True:
        try:
            block = decoder.submit(file.read, BLOCK, dtype="float32", always_2d=True).result()
        except soundfile_library().LibsndfileError as error:
            problem = f"{name} is damaged somewhere after {frames / file.samplerate:.2f} s"
            raise AudioError(f"{problem}: {reason_of(error)}; export it again") from error
        if not len(block):
            return
        frames += len(block)
        yield torch.from_numpy(block).T
