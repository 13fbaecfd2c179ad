"""What a client of Wyoming sends, put together: recordings and texts that come in parts."""

from __future__ import annotations

import asyncio
import tempfile
import wave
from contextlib import suppress
from time import monotonic

from starlette.datastructures import UploadFile

from mimo_fast.server.checks import Json, refusal, whole
from mimo_fast.server.errors import ApiError
from mimo_fast.server.limits import ARRIVAL
from mimo_fast.server.speech import PATIENCE, Manner, Sentences

SPOOL = 1 << 20
"""Bytes of a recording that are held in memory."""

SAMPLES, CHANNELS, RATES = (1, 2, 3, 4), (1, 8), (4000, 192_000)
"""Widths of samples in bytes; channels and rates, from and to."""


class Form:
    """The form of raw samples.

    Raises:
        ApiError: it is none.
    """

    def __init__(self, data: Json) -> None:
        self.rate = whole(data.get("rate"), "rate", *RATES)
        self.channels = whole(data.get("channels"), "channels", *CHANNELS)
        self.width = whole(data.get("width"), "width", SAMPLES[0], SAMPLES[-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Recording:
    """What a client has sent so far, as a WAV that goes to the disk when it is long."""

    def __init__(self, form: Form, most: float) -> None:
        self._form, self._most, self._frames = form, most, 0
        self._late = monotonic() + most + ARRIVAL
        self._file = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115
        self._wave: wave.Wave_write = wave.open(self._file, "wb")  # noqa: SIM115
        self._wave.setparams((form.channels, form.width, form.rate, 0, "NONE", ""))

    @property
    def seconds(self) -> float:
        return self._frames / self._form.rate

    def check(self, form: Form) -> None:
        if form != self._form:
            raise refusal("a chunk is of another form than the one before it", "audio")

    def add(self, audio: bytes) -> None:
        size = self._form.width * self._form.channels
        if len(audio) % size:
            raise refusal(f"a chunk of {len(audio)} bytes has half a frame of {size}", "audio")
        if monotonic() > self._late:
            raise ApiError("the recording takes too long", 408, "timeout")
        self._frames += len(audio) // size
        if self.seconds > self._most:
            problem = f"the recording is longer than {self._most:g} s"
            raise ApiError(f"{problem}: raise --max-audio-seconds", 413, "recording_too_long")
        self._wave.writeframesraw(audio)

    def finish(self) -> UploadFile:
        self._wave.close()
        self._file.seek(0)
        return UploadFile(self._file)  # type: ignore[arg-type]

    def close(self) -> None:
        with suppress(ValueError, OSError):
            self._wave.close()
        self._file.close()


class Text:
    """A text that comes, in parts or at once, as sentences."""

    def __init__(self, manner: Manner, most: int, streams: bool) -> None:
        self.manner, self.streams = manner, streams
        self._most, self._characters = most, 0
        self._sentences, self._ready = Sentences(), asyncio.Queue[str | None]()

    def add(self, part: str) -> None:
        self._characters += len(part)
        if self._characters > self._most:
            problem = f"the text has more than {self._most} characters"
            raise refusal(problem, "text", "string_above_max_length")
        for sentence in self._sentences.push(part) if part else ():
            self._ready.put_nowait(sentence)

    def end(self) -> None:
        for sentence in self._sentences.finish():
            self._ready.put_nowait(sentence)
        self._ready.put_nowait(None)

    async def next(self) -> str | None:
        """The next sentence; None after the last.

        Raises:
            ApiError: no more of the text came for too long.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._ready.get()
        except TimeoutError:
            problem = f"no text came for {PATIENCE:.0f} s; end it with synthesize-stop"
            raise ApiError(problem, 408, "timeout") from None
