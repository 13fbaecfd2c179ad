"""A recording, cut at its pauses into pieces of speech, their levels set; any length, in parts.

    blocks at 24 kHz -> level -> 16 kHz -> probability of speech, every 32 ms
    -> stretches of speech -> pieces of at most so many seconds -> level

Nothing here depends on how a recording is divided into blocks. What is held is the piece in
progress. `prepare_speech` gives the same for a recording that is to stay one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import AudioSource, load_audio
from mimo_fast.audio.noise import FLOOR, quieter_noise, with_noise_at
from mimo_fast.audio.resample import resample
from mimo_fast.audio.voice_activity import FRAME, RATE, VoiceActivity
from mimo_fast.modes import in_own_modes

BEGINS, ENDS = 0.5, 0.35
"""Probability at which speech begins, and below which it ends; those of Silero's own tools."""

LEAST = 3
"""Frames of speech, 96 ms, below which a stretch is a click."""

PAUSE = 0.3
"""Seconds without speech that end a stretch."""

LONG_PAUSE = 2.0
"""Seconds of a pause that no piece holds."""

PAD = 0.2
"""Seconds kept before and after a stretch, less where the next is nearer."""

LOUDNESS = 0.05
"""Root mean square of speech in a piece, as that of people close to a microphone."""

PEAK = 0.95
"""Largest sample of a piece."""

MOST_GAIN = 1000.0
"""60 dB: what is fainter is rounding in 16 bits."""

QUIETER = 0.25
"""Gain of steady noise in further hearings of a piece."""

SHIFT = 0.08
"""Seconds by which one of them is later: half of a group of codes, so that others are heard."""

LEVEL_BLOCK = 0.5
"""Seconds of the blocks whose peaks set the level before the detector."""

BLOCK = 2**16
"""Samples of a recording that are looked at together."""

FALL = 0.5 ** (1 / 60)
"""Of that level a block, so that it halves in 30 s without louder sound."""


@dataclass(frozen=True)
class Piece:
    """Speech of a recording.

    Attributes:
        start, end: Seconds in the recording at which speech begins and ends.
        wav: float32 [n], with some silence at both ends.
        again: Where there is much noise, the same to be heard again, each float32 [m]: with less
            of it, and that a little later. What a model is unsure of in noise comes out otherwise
            each time, and it is surest where it is right.
    """

    start: float
    end: float
    wav: Tensor
    again: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Cutting:
    """How pieces are cut.

    Args:
        longest: seconds of a piece.
        merges: whether a piece may hold several stretches of speech.
        pause: seconds without speech that end a stretch.
        waits: seconds without speech after which a piece is returned, though the next stretch
            might still belong to it.
    """

    longest: float = 30.0
    merges: bool = True
    pause: float = PAUSE
    waits: float = LONG_PAUSE


def pieces_of(blocks: Iterable[Tensor], rate: int, cutting: Cutting = Cutting()) -> Iterator[Piece]:
    """The pieces of a recording that comes in blocks [n], each as soon as it is known."""
    for pieces in pieces_by_block(blocks, rate, cutting):
        yield from pieces


def pieces_by_block(
    blocks: Iterable[Tensor], rate: int, cutting: Cutting = Cutting()
) -> Iterator[list[Piece]]:
    """`pieces_of`, with what each block completes, and at last what the end does.

    So whoever reads it is never kept for long, however long a silence is.
    """
    cutter = _Cutter(rate, cutting)
    for block in blocks:
        yield [cut.piece for cut in cutter.push(block)]
    yield [cut.piece for cut in cutter.finish()]


@dataclass(frozen=True)
class _Cut:
    """A piece as it was recorded; somebody speaks between the samples of `stretches`."""

    start: float
    end: float
    wav: Tensor
    stretches: Sequence[tuple[int, int]]
    rate: int

    @property
    def piece(self) -> Piece:
        wav = _centred(self.wav, self.stretches)
        noisy = with_noise_at((FLOOR, QUIETER), wav, self.stretches)
        first, *again = (_close(each, self.stretches) for each in noisy or [wav])
        if again:
            again.append(F.pad(again[-1], (round(SHIFT * self.rate), 0)))
        return Piece(self.start, self.end, first, tuple(again))


def parts_of(wav: Tensor, size: int, least: int) -> list[Tensor]:
    """A waveform [n] as parts of `size` samples, to be encoded each by itself, and the rest.

    A rest of less than `least` belongs to the part before it; a recording of less gets zeros at its
    end (upstream `preprocess_input` of MiMo-V2.5-ASR). One without samples stays as it is.
    """
    if 0 < len(wav) < least:
        return [F.pad(wav, (0, least - len(wav)))]
    count = len(wav) // size
    sizes = [size] * count + ([len(wav) - count * size] if len(wav) % size else [])
    if len(sizes) > 1 and sizes[-1] < least:
        rest = sizes.pop()
        sizes[-1] += rest
    return [*wav.split(sizes)] if sizes else [wav]


class _Detector:
    """Waveform at any rate, in parts -> probabilities of speech every FRAME samples at 16 kHz."""

    def __init__(self, rate: int) -> None:
        self._rate, self._activity = rate, VoiceActivity()
        # Whole periods of both rates; the margin is farther than the filter reaches.
        period = rate // math.gcd(rate, RATE)
        self._size = round(LEVEL_BLOCK * rate / period) * period
        self._margin = -(-rate // (100 * period)) * period
        self._waiting = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._before = torch.zeros(self._margin, dtype=torch.float32, device="cpu")
        self._level = 0.0

    def push(self, block: Tensor, ended: bool = False) -> Tensor:
        self._waiting = torch.cat((self._waiting, block))
        found = [self._waiting.new_zeros(0)]
        while len(self._waiting) >= self._size + self._margin:
            found.append(self._probabilities(self._size))
        if ended:
            # Silence completes the last block and frame.
            rest = len(self._waiting)
            silence = self._waiting.new_zeros(self._size + self._margin)
            self._waiting = torch.cat((self._waiting, silence))
            if rest:
                found.append(self._probabilities(self._size))
        return torch.cat(found)

    def _probabilities(self, size: int) -> Tensor:
        block = self._waiting[:size]
        offset = block.mean()
        self._level = max(self._level * FALL, float((block - offset).abs().quantile(0.999)))
        gain = min(0.5 / max(self._level, 1e-9), MOST_GAIN)
        wav = torch.cat((self._before, self._waiting[: size + self._margin]))
        at_16k = resample(wav - offset, self._rate, RATE)
        first = self._margin * RATE // self._rate
        self._before = wav[size : size + self._margin].clone()
        self._waiting = self._waiting[size:].clone()
        return self._activity.push(gain * at_16k[first : first + size * RATE // self._rate])


class _Cutter:
    def __init__(self, rate: int, cutting: Cutting) -> None:
        self._rate, self._cutting = rate, cutting
        self._detector = _Detector(rate)
        self._audio = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._origin = 0  # sample of the recording at which `_audio` begins
        self._frames = 0  # that have been looked at
        self._odds = deque[float]()  # of the frames of the stretch in progress
        self._start: int | None = None  # frame at which it begins
        self._quiet = 0  # frames since speech was heard in it
        self._spoken = 0  # frames of speech in it
        self._group = list[tuple[int, int]]()  # stretches of the next piece
        self._last = 0  # frame at which the piece before it ended
        self._frame_seconds = FRAME / RATE

    def push(self, block: Tensor) -> Iterator[_Cut]:
        self._audio = torch.cat((self._audio, block))
        yield from self._look(self._detector.push(block))
        self._forget()

    def finish(self) -> Iterator[_Cut]:
        yield from self._look(self._detector.push(self._audio[:0], ended=True))
        if self._start is not None:
            yield from self._end_stretch(self._frames - self._quiet)
        yield from self._end_piece(None)

    def _look(self, odds: Tensor) -> Iterator[_Cut]:
        longest = self._in_frames(self._cutting.longest)
        pause, waits = (
            self._in_frames(each) for each in (self._cutting.pause, self._cutting.waits)
        )
        for chance in odds.tolist():
            frame = self._frames
            self._frames += 1
            if self._start is None:
                if chance >= BEGINS:
                    self._start, self._quiet, self._spoken = frame, 0, 0
                    self._odds.clear()
                elif self._group and frame - self._group[-1][1] >= waits:
                    yield from self._end_piece(None)
            if self._start is None:
                continue
            self._odds.append(chance)
            self._spoken += chance >= BEGINS
            self._quiet = self._quiet + 1 if chance < ENDS else 0
            if self._quiet >= pause:
                yield from self._end_stretch(self._frames - self._quiet)
                self._start = None
            elif self._frames - self._start >= longest:
                # Nobody paused: where speech is least likely in the later half.
                half = len(self._odds) // 2
                late = list(self._odds)[half:]
                cut = self._start + half + min(range(len(late)), key=late.__getitem__)
                kept = list(self._odds)[cut - self._start :]
                yield from self._end_stretch(cut)
                self._start, self._spoken = cut, sum(each >= BEGINS for each in kept)
                self._odds = deque(kept)

    def _end_stretch(self, end: int) -> Iterator[_Cut]:
        start = self._start
        assert start is not None
        if self._spoken < LEAST:
            return
        group = self._group
        fits = group and (end - group[0][0]) * self._frame_seconds <= self._cutting.longest
        near = group and start - group[-1][1] <= self._in_frames(LONG_PAUSE)
        if group and not (self._cutting.merges and fits and near):
            yield from self._end_piece(start)
        self._group.append((start, end))

    def _end_piece(self, following: int | None) -> Iterator[_Cut]:
        """following: frame at which the next stretch begins, if it is known."""
        if not self._group:
            return
        (start, _), (_, end) = self._group[0], self._group[-1]
        pad = self._in_frames(PAD)
        # Between two pieces each has half of a short pause.
        first = max(start - pad, (start + self._last) // 2, 0)
        last = end + pad if following is None else min(end + pad, (end + following + 1) // 2)
        begin, stop = self._sample(first), self._sample(last)
        wav = self._audio[begin - self._origin : stop - self._origin]
        speech = [
            (self._sample(a) - begin, min(self._sample(b) - begin, len(wav)))
            for a, b in self._group
        ]
        times = start * self._frame_seconds, end * self._frame_seconds
        yield _Cut(*times, wav, speech, self._rate)
        self._group, self._last = [], end

    def _forget(self) -> None:
        """Drops what no piece will hold."""
        first = self._group[0][0] if self._group else self._start
        first = self._frames if first is None else first
        keep = self._sample(max(first - 2 * self._in_frames(PAD), 0))
        if keep > self._origin:
            self._audio, self._origin = self._audio[keep - self._origin :].clone(), keep

    def _in_frames(self, seconds: float) -> int:
        return round(seconds / self._frame_seconds)

    def _sample(self, frame: int) -> int:
        return frame * FRAME * self._rate // RATE


@checked
@in_own_modes
def prepare_speech(audio: AudioSource, sample_rate: int = 24_000) -> Tensor:
    """A recording as a model heard speech in its training -> float32 [n], on the CPU.

    Silence before and after the speech and pauses of more than two seconds are cut down to the
    fifth of a second next to the speech; an offset and steady noise are removed, the latter in part
    and where there is much (see `noise.py`), and the speech gets the loudness of somebody close to
    a microphone. Where nobody speaks, as in music, it is returned as it is.

    Args:
        audio: anything that `load_audio` reads; decoded audio at `sample_rate`.
        sample_rate: of the result, and the tasks want 24 kHz.

    Raises:
        AudioError: as `load_audio`.
    """
    wav = load_audio(audio, sample_rate)
    cutter = _Cutter(sample_rate, Cutting(merges=False))
    cuts = [cut for block in wav.split(BLOCK) for cut in cutter.push(block)]
    stretches = [
        (round(cut.start * sample_rate), round(cut.end * sample_rate))
        for cut in [*cuts, *cutter.finish()]
    ]
    if not stretches:
        return wav
    kept, pad = list[tuple[int, int]](), round(PAD * sample_rate)
    for start, end in stretches:
        if kept and start - (kept[-1][1] - pad) <= LONG_PAUSE * sample_rate:
            kept[-1] = kept[-1][0], end + pad
        else:
            kept.append((max(start - pad, 0), end + pad))
    wav, stretches = _kept(wav, kept, stretches)
    return _close(quieter_noise(_centred(wav, stretches), stretches), stretches)


def _centred(wav: Tensor, stretches: Sequence[tuple[int, int]]) -> Tensor:
    """Speech [n] without an offset; somebody speaks between these samples."""
    return wav - torch.cat([wav[start:end] for start, end in stretches]).mean()


def _close(wav: Tensor, stretches: Sequence[tuple[int, int]]) -> Tensor:
    """Speech [n] at the level of somebody near."""
    return levelled(wav, torch.cat([wav[start:end] for start, end in stretches]))


def _kept(
    wav: Tensor, kept: Sequence[tuple[int, int]], stretches: Sequence[tuple[int, int]]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The parts of a waveform that are kept, and where speech is in them."""
    parts, speech, length = list[Tensor](), list[tuple[int, int]](), 0
    for start, end in kept:
        part, moved = wav[start:end], length - start
        length += len(part)
        speech += [(a + moved, min(b + moved, length)) for a, b in stretches if start <= a < end]
        parts.append(part)
    return torch.cat(parts), speech


def levelled(wav: Tensor, speech: Tensor | None = None) -> Tensor:
    """A waveform [n] at the loudness of close speech, without an offset, its peak within bounds.

    speech: the part of it that is speech.
    """
    speech = wav if speech is None or not len(speech) else speech
    if not len(wav):
        return wav
    offset = speech.mean()
    loudness = float((speech - offset).square().mean().sqrt())
    peak = float((wav - offset).abs().max())
    return (wav - offset) * min(LOUDNESS / max(loudness, 1e-9), PEAK / max(peak, 1e-9), MOST_GAIN)
