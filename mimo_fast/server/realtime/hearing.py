"""What a client sends -> where somebody speaks, while it comes.

    bytes -> samples at 24 kHz -> level -> 16 kHz -> probability of speech, every 32 ms -> marks
                  └ kept: the turn in progress, else what may precede one

Everything here computes: `Hearing` is used in the thread of `listening`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from mimo_fast.audio.segments import LEAST, PAD, levelled
from mimo_fast.audio.voice_activity import FRAME, RATE, VoiceActivity
from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.sound import PCM, Decoder, Format, Resampler

listening = ThreadPoolExecutor(1, thread_name_prefix="mimo-fast listening")
"""One thread listens for all sessions: beside the compute thread, and a millisecond at a time."""

HYSTERESIS = 0.15
"""How far below the threshold speech goes on, as in Silero's own tools."""

PAUSE_MS = 160
"""Silence after which a turn is taken to be over until something else is heard; less where the
turn is over after twice as much."""

RESUMES = 2
"""Frames of speech in a row that end a pause."""

LOUD, FAINTEST, FALL = 0.5, 0.01, 0.5 ** (FRAME / RATE / 30)
"""Level of the loudest sound before the detector; what is fainter is not raised to it; and what is
left of a level a frame later: half of it in 30 s."""

LEAST_MS = 100
"""Audio that a client must have sent to commit it."""


@dataclass(frozen=True)
class Detection:
    """How turns are taken.

    Args:
        threshold: probability at which speech begins.
        prefix_ms: audio before it that belongs to the turn.
        silence_ms: silence that ends the turn.
    """

    threshold: float = 0.5
    prefix_ms: int = 300
    silence_ms: int = 500


class Change(Enum):
    """What is heard."""

    BEGAN = auto()
    PAUSED = auto()
    WENT_ON = auto()
    ENDED = auto()


@dataclass(frozen=True)
class Mark:
    """A change in what is heard.

    Attributes:
        at_ms: Audio since the session began: where the turn begins, with what precedes its speech;
            at its end, where it was declared over.
        speech: float32 [n] at 24 kHz, levelled: the turn so far, when it pauses or has ended.
        seconds: of the whole turn.
        voiced: whether speech was heard in it; a turn by hand is taken to have some.
    """

    change: Change
    at_ms: int
    speech: Tensor | None = None
    seconds: float = 0.0
    voiced: bool = True


class _Kept:
    """Samples of the last while, in the parts in which they came."""

    def __init__(self, origin: int) -> None:
        self._parts = deque[Tensor]()
        self.origin = self.end = origin

    def __len__(self) -> int:
        return self.end - self.origin

    def add(self, wav: Tensor) -> None:
        self._parts.append(wav)
        self.end += len(wav)

    def forget(self, before: int) -> None:
        """Drops parts that end before a sample."""
        while self._parts and self.origin + len(self._parts[0]) <= before:
            self.origin += len(self._parts.popleft())

    def take(self, first: int, end: int) -> Tensor:
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        wav = torch.cat([nothing, *self._parts])
        return wav[first - self.origin : end - self.origin]


class Hearing:
    """The audio that one client sends.

    Args:
        rate: of the samples kept.
        longest: seconds of a turn, after which it is over; more is refused in a turn by hand.
    """

    def __init__(self, rate: int, longest: float) -> None:
        self._rate, self._longest = rate, longest
        self._size = FRAME * rate // RATE
        self._samples = 0  # heard since the session began
        self.set_format(PCM)
        self.detection: Detection | None = None
        self.set_detection(Detection())

    def set_format(self, format: Format) -> None:
        self._decoder = Decoder(format, self._rate)

    def set_detection(self, detection: Detection | None) -> None:
        """Turns by this detection from here on; None for turns by hand, of all that comes."""
        if detection is None or self.detection is None:
            self.clear()
        self.detection = detection

    @property
    def ms(self) -> int:
        """Audio heard so far."""
        return self._ms(self._samples)

    @property
    def speaking(self) -> bool:
        return self._start is not None

    def clear(self) -> None:
        """Forgets the audio that belongs to no turn yet, and the turn in progress."""
        self._kept = _Kept(self._samples)
        self._frames = 0  # looked at since `_first`
        self._first = self._ended = self._samples
        self._activity, self._resampler = VoiceActivity(), Resampler(self._rate, RATE)
        self._level = FAINTEST
        self._rest = self._at_16k = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._end_turn()

    def _end_turn(self) -> None:
        self._start: int | None = None  # frame at which speech begins
        self._candidate: int | None = None
        self._voiced = self._quiet = self._streak = 0
        self._last = 0  # frame after the last one with speech
        self._paused = False

    def push(self, data: bytes) -> list[Mark]:
        """More of the client's audio -> what has changed.

        Raises:
            ApiError: a turn by hand is longer than may be; what was said before is kept.
        """
        wav = self._decoder.push(data)
        if self.detection is None and len(self._kept) + len(wav) > self._longest * self._rate:
            raise ApiError(
                f"the audio buffer holds {self._longest:.0f} s at most: commit or clear it",
                code="input_audio_buffer_full",
                param="audio",
            )
        self._samples += len(wav)
        self._kept.add(wav)
        if self.detection is None:
            return []
        marks = [*self._look(wav, self.detection)]
        self._forget(self.detection)
        return marks

    def commit(self) -> Mark:
        """Ends the turn here, whatever is heard.

        Raises:
            ApiError: there is less than 100 ms of audio.
        """
        # What is kept may reach into the turn before, which has its words already.
        between = max(self._kept.origin, self._ended)
        begin = self._begin() if self._start is not None else between
        wav = self._kept.take(begin, self._kept.end)
        ms = self._ms(len(wav))
        if ms < LEAST_MS:
            raise ApiError(
                f"the audio buffer is too small: {LEAST_MS} ms are needed, it has {ms} ms",
                code="input_audio_buffer_commit_empty",
            )
        voiced = self.detection is None or self._start is not None or self._candidate is not None
        mark = Mark(Change.ENDED, self.ms, levelled(wav), len(wav) / self._rate, voiced)
        self.clear()
        return mark

    def _look(self, wav: Tensor, detection: Detection) -> Iterator[Mark]:
        ends = max(detection.threshold - HYSTERESIS, 0.01)
        silence = self._in_frames(detection.silence_ms)
        pause = min(self._in_frames(PAUSE_MS), max(silence // 2, 1))
        longest = self._in_frames(1000 * self._longest)
        for chance in self._probabilities(wav):
            frame = self._frames
            self._frames += 1
            if self._start is None:
                if self._waits_for_speech(chance, frame, detection.threshold, ends):
                    yield Mark(Change.BEGAN, self._ms(self._begin()))
                continue
            self._streak = self._streak + 1 if chance >= ends else 0
            if self._streak and (not self._paused or self._streak >= RESUMES):
                if self._paused:
                    yield Mark(Change.WENT_ON, self._ms(self._sample(frame)))
                self._paused, self._quiet, self._last = False, 0, frame + 1
            else:
                self._quiet += 1
            if self._quiet >= silence or frame - self._start >= longest:
                yield self._mark(Change.ENDED)
                self._ended = self._sample(self._frames)
                self._end_turn()
            elif self._quiet >= pause and not self._paused:
                self._paused = True
                yield self._mark(Change.PAUSED)

    def _waits_for_speech(self, chance: float, frame: int, begins: float, ends: float) -> bool:
        """Whether speech has begun: some frames of it with no silence between them."""
        if chance < ends:
            self._candidate, self._voiced = None, 0
            return False
        if chance >= begins:
            self._candidate = frame if self._candidate is None else self._candidate
            self._voiced += 1
        if self._voiced < LEAST:
            return False
        self._start, self._quiet, self._last, self._streak = self._candidate, 0, frame + 1, 1
        return True

    def _mark(self, change: Change) -> Mark:
        """The turn so far: what the model hears depends on its speech alone."""
        assert self._start is not None
        pad = round(PAD * self._rate)
        speech = self._sample(self._start), self._sample(self._last)
        first = max(speech[0] - pad, self._kept.origin)
        last = min(speech[1] + self._pause_samples(), self._samples)
        heard = self._kept.take(first, last)
        spoken = heard[speech[0] - first : speech[1] - first]
        end = self._sample(self._frames)
        seconds = (end - self._begin()) / self._rate
        return Mark(change, self._ms(end), levelled(heard, spoken), seconds)

    def _pause_samples(self) -> int:
        assert self.detection is not None
        return min(PAUSE_MS, self.detection.silence_ms // 2) * self._rate // 1000

    def _begin(self) -> int:
        """Sample at which the turn begins, with what precedes its speech."""
        assert self._start is not None
        assert self.detection is not None
        prefix = self.detection.prefix_ms * self._rate // 1000
        return max(self._sample(self._start) - prefix, self._kept.origin)

    def _probabilities(self, wav: Tensor) -> list[float]:
        self._rest = torch.cat((self._rest, wav))
        frames = len(self._rest) // self._size
        if not frames:
            return []
        whole, self._rest = self._rest[: frames * self._size], self._rest[frames * self._size :]
        gains = torch.empty(frames, 1, dtype=torch.float32, device="cpu")
        for i, peak in enumerate(whole.view(frames, -1).abs().amax(1).tolist()):
            self._level = max(self._level * FALL, peak, FAINTEST)
            gains[i] = LOUD / self._level
        loud = (whole.view(frames, -1) * gains).flatten()
        self._at_16k = torch.cat((self._at_16k, self._resampler.push(loud)))
        complete = len(self._at_16k) // FRAME * FRAME
        ready, self._at_16k = self._at_16k[:complete], self._at_16k[complete:].clone()
        odds: list[float] = self._activity.push(ready).tolist()
        return odds

    def _forget(self, detection: Detection) -> None:
        """Drops what no turn will hold."""
        first = self._sample(self._frames) if self._candidate is None else None
        if self._start is not None or first is None:
            found = self._start if self._start is not None else self._candidate
            assert found is not None
            first = self._sample(found)
        prefix = max(detection.prefix_ms, round(1000 * PAD)) + 200
        self._kept.forget(first - prefix * self._rate // 1000)

    def _in_frames(self, ms: float) -> int:
        return max(1, round(ms * RATE / 1000 / FRAME))

    def _sample(self, frame: int) -> int:
        return self._first + frame * self._size

    def _ms(self, samples: int) -> int:
        return samples * 1000 // self._rate
