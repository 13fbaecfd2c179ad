"""Replies as the track of a WebRTC call, at the pace at which they are played.

push -> waiting audio -> a frame every 20 ms, silence where nothing waits -> Opus (aiortc)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from aiortc import MediaStreamTrack
from aiortc.mediastreams import MediaStreamError
from av import AudioFrame

from mimo_fast.server.realtime.items import Item
from mimo_fast.server.realtime.responses import Response

FRAME_MS = 20

LATE = 0.2
"""Seconds of delay after which time that was missed is not made up for, which would be a burst."""


@dataclass
class _Playing:
    """A reply of which some waits to be played.

    Attributes:
        rest: Bytes of the last frame, which more may follow.
        frames: That were sent.
    """

    response: Response
    audio: deque[bytes] = field(default_factory=deque)
    rest: bytearray = field(default_factory=bytearray)
    frames: int = 0

    @property
    def ms(self) -> float:
        return float(self.frames * FRAME_MS)


class Speaker(MediaStreamTrack):
    """What the caller hears.

    Args:
        rate: of the samples pushed, mono, 16 bits.
        started, stopped: called when the first of a reply is sent, and when all of it was.
    """

    kind = "audio"

    def __init__(
        self,
        rate: int,
        started: Callable[[Response], None],
        stopped: Callable[[Response], None],
    ) -> None:
        super().__init__()
        self._rate, self._started, self._stopped = rate, started, stopped
        self._samples = rate * FRAME_MS // 1000
        self._silence = bytes(2 * self._samples)
        self._replies = deque[_Playing]()
        self._begun: float | None = None
        self._sent = 0  # frames, silence among them

    def push(self, response: Response, audio: bytes) -> None:
        """More of a reply."""
        playing = next((each for each in self._replies if each.response is response), None)
        if playing is None:
            playing = _Playing(response)
            self._replies.append(playing)
        size = len(self._silence)
        playing.rest += audio
        whole = len(playing.rest) - len(playing.rest) % size
        for at in range(0, whole, size):
            playing.audio.append(bytes(playing.rest[at : at + size]))
        del playing.rest[:whole]

    @property
    def playing(self) -> bool:
        """Whether something waits to be played, or more of it is being made."""
        return bool(self._replies)

    @property
    def items(self) -> list[Item]:
        """Items of which some waits."""
        return [each.response.item for each in self._replies]

    def clear(self) -> list[tuple[Response, float]]:
        """Drops what waits; the replies that it was of, and milliseconds of each that were sent."""
        dropped = [(each.response, each.ms) for each in self._replies]
        self._replies.clear()
        return dropped

    async def recv(self) -> AudioFrame:
        """The next frame, when it is its time."""
        loop = asyncio.get_running_loop()
        if self._begun is None:
            self._begun = loop.time()
        early = self._begun + self._sent * FRAME_MS / 1000 - loop.time()
        if early > 0:
            await asyncio.sleep(early)
        elif early < -LATE:
            self._begun -= early
        if self.readyState != "live":
            raise MediaStreamError
        frame = AudioFrame(format="s16", layout="mono", samples=self._samples)
        frame.planes[0].update(self._next())
        frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
        frame.pts = self._sent * self._samples
        self._sent += 1
        return frame

    def _next(self) -> bytes:
        self._leave_ended()
        if not self._replies:
            return self._silence
        playing = self._replies[0]
        if playing.audio:
            audio = playing.audio.popleft()
        elif playing.rest and playing.response.ended:
            audio = bytes(playing.rest).ljust(len(self._silence), b"\0")
            playing.rest.clear()
        else:
            # More of it is being made.
            return self._silence
        playing.frames += 1
        if playing.frames == 1:
            self._started(playing.response)
        return audio

    def _leave_ended(self) -> None:
        while self._replies:
            playing = self._replies[0]
            if playing.audio or playing.rest or not playing.response.ended:
                return
            self._replies.popleft()
            self._stopped(playing.response)
