"""`/v1/audio/speech`, and texts that come in parts: `/v1/audio/speech/stream`.

text -> Service.speech -> samples -> speed, encoder -> bytes or server-sent events
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect
from torch import Tensor

from mimo_fast.json_files import shown
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.speech import Joiner
from mimo_fast.server.audio import FASTEST, FORMS, SLOWEST
from mimo_fast.server.checks import Json, boolean, number, one_of, refusal
from mimo_fast.server.checks import text as checked_text
from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.models import find_model
from mimo_fast.server.requests import (
    SSE,
    Streamed,
    as_events,
    begun,
    find_voice,
    parse_object,
    read_json,
    read_seed,
    said_text,
    usage_of,
)
from mimo_fast.server.service import Service
from mimo_fast.server.worker import Stream
from mimo_fast.text.sentences import ALWAYS, CLOSERS, split_sentences
from mimo_fast.text.spelling import spell

PATIENCE = 60.0
"""Seconds that a text may pause."""

MOST_INSTRUCTIONS = 4096
"""Characters of a style."""


@dataclass(frozen=True)
class Manner:
    """How something is to be said.

    Args:
        voice: a recording of the voice; None for the model's own.
        form: a key of `FORMS`.
        seed: of all draws; None draws one.
    """

    voice: Path | None
    instructions: str | None
    form: str
    speed: float
    seed: int | None


def read_manner(connection: HTTPConnection, body: Json, form: str) -> Manner:
    """Voice, instructions, response_format, speed and seed of a request.

    Raises:
        ApiError: one of them is wrong, or nothing that this model can do.
    """
    service: Service = connection.app.state.service
    instructions = body.get("instructions")
    if instructions is not None:
        instructions = checked_text(instructions, "instructions", MOST_INSTRUCTIONS).strip()
        service.check_style(instructions)
    form = one_of(body.get("response_format") or form, "response_format", FORMS)
    speed = body.get("speed")
    speed = 1.0 if speed is None else number(speed, "speed", SLOWEST, FASTEST)
    seed = read_seed(body)
    voice = find_voice(connection, body.get("voice"))
    return Manner(voice, instructions or None, form, speed, seed)


async def speech(request: Request) -> Response:
    """A text said, in one of six forms or as events."""
    state, body = request.app.state, await read_json(request)
    service: Service = find_model(state.service, body.get("model", state.service.name))
    text = said_text(body, "input", state.settings.max_text_chars)
    service.check_words(text)
    manner = read_manner(request, body, "mp3")
    as_sse = (
        one_of(body.get("stream_format") or "audio", "stream_format", ("audio", "sse")) == "sse"
    )
    words = len(service.model.tokenizer.encode_as_text(text))
    stream = service.speech(text, manner.instructions, manner.voice, manner.seed)
    said = Said()
    try:
        parts = await begun(_encoded(service, stream, manner, said))
    except BaseException:
        stream.cancel()
        raise
    if not as_sse:
        return Streamed(parts, FORMS[manner.form].media, stream.cancel)

    async def events() -> AsyncGenerator[Json, None]:
        async for part in parts:
            data = base64.b64encode(part).decode()
            yield {"type": "speech.audio.delta", "audio": data}
        yield {"type": "speech.audio.done", "usage": usage_of(words, said.groups)}

    return Streamed(as_events(events()), SSE, stream.cancel)


@dataclass
class Said:
    """What came of a stream: its groups, and its audio where that is kept."""

    groups: int = 0
    audio: list[Tensor] | None = None


async def _samples(
    stream: Stream[Chunk], said: Said, joiner: Joiner | None = None
) -> AsyncGenerator[Tensor, None]:
    async for chunk in stream:
        said.groups = chunk.timing.groups
        if said.audio is not None:
            said.audio.append(chunk.audio)
        yield chunk.audio if joiner is None else joiner.push(chunk.audio)
    if joiner is not None:
        yield joiner.end(last=False)


async def _encoded(
    service: Service,
    stream: Stream[Chunk],
    manner: Manner,
    said: Said,
    joiner: Joiner | None = None,
) -> AsyncGenerator[bytes, None]:
    samples = _samples(stream, said, joiner)
    how = manner.form, service.sample_rate, manner.speed, service.marked
    parts = service.threads.encode(samples, *how)
    try:
        async for part in parts:
            yield part
    finally:
        stream.cancel()


_CERTAIN = frozenset("!?" + ALWAYS)

LONGEST = 600
"""Characters after which a sentence that does not end is said, up to its last space."""


class Sentences:
    """Text in parts, which may split words -> sentences, each as soon as its end is certain."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[str]:
        """More text -> the sentences that it ends."""
        self._text += text
        *whole, last = split_sentences(self._text)
        if whole and not self._is_certain(whole[-1], last):
            last = whole.pop() + last
        *begun, self._text = _cut(last)
        return [part for sentence in whole for part in _cut(sentence)] + begun

    def _is_certain(self, sentence: str, following: str) -> bool:
        """Whether nothing that may still come joins the two.

        The word after a full stop decides what the stop ends, and must be whole for that.
        """
        mark = sentence.rstrip().rstrip(CLOSERS)[-1:]
        return mark in _CERTAIN or re.match(r"\s*\S+\s", following) is not None

    def finish(self) -> list[str]:
        """What is left."""
        rest, self._text = self._text, ""
        if not rest.strip():
            return []
        return [part for sentence in split_sentences(rest) for part in _cut(sentence)]


def _cut(sentence: str) -> list[str]:
    """A sentence in parts of at most `LONGEST` characters."""
    parts = list[str]()
    while len(sentence) > LONGEST:
        end = sentence.rfind(" ", 0, LONGEST) + 1 or LONGEST
        parts.append(sentence[:end])
        sentence = sentence[end:]
    return [*parts, sentence]


class Narrator:
    """Says sentences one after the other, in one voice; wires share it.

    A model that clones voices says the later ones in the voice of the first, as the pieces of one
    text.
    """

    def __init__(self, service: Service, manner: Manner) -> None:
        self._service, self._manner = service, manner
        self._joiner = Joiner(service.sample_rate)
        self._first: Tensor | None = None

    def says(self, sentence: str) -> bool:
        """Whether there is anything to say in it."""
        words = self._service.model.tokenizer.trained_words
        return any(map(str.isalnum, sentence)) and (not words or bool(spell(sentence)))

    async def say(self, sentence: str) -> AsyncGenerator[bytes, None]:
        """A sentence in parts, encoded, with the pause before it."""
        service, manner = self._service, self._manner
        said = Said(audio=[] if self._keeps_voice else None)
        voice: Path | Tensor | None = manner.voice if self._first is None else self._first
        stream = service.speech(sentence.strip(), manner.instructions, voice, manner.seed)
        async with stream:
            async for part in _encoded(service, stream, manner, said, self._joiner):
                yield part
        if said.audio:
            self._first = torch.cat(said.audio)

    @property
    def _keeps_voice(self) -> bool:
        clones = self._service.knows("tts_sft", "prompt_speech")
        return clones and self._first is None and self._manner.voice is None


async def speech_stream(websocket: WebSocket) -> None:
    """A text that comes in parts is said sentence by sentence, while it comes.

    From the client: `session.config` (optional, first), `input.text`, `input.done`. To it, for each
    sentence: `audio.start`, binary frames, `audio.done`; at last `session.done`. The messages are
    vLLM-Omni's.
    """
    await websocket.accept()
    session = _SpeechSession(websocket)
    try:
        await session.run()
    except WebSocketDisconnect:
        return
    except Exception as error:
        found = as_api_error(error)
        with suppress(RuntimeError, WebSocketDisconnect):
            body = found.body()
            await websocket.send_json({"type": "error", "message": found.message, "error": body})
            await websocket.close(1011 if found.status >= 500 else 1008, found.message[:100])
        if found.status >= 500:
            raise


class _SpeechSession:
    """One text that comes in parts."""

    def __init__(self, websocket: WebSocket) -> None:
        self._socket, self._service = websocket, websocket.app.state.service
        self._most = websocket.app.state.settings.max_text_chars
        self._manner = read_manner(websocket, {}, "pcm")
        self._whole = False
        self._sentences = asyncio.Queue[str | None]()
        self._index = 0

    async def run(self) -> None:
        """Reads and speaks until the text has ended, or the client has gone."""
        speaking = asyncio.create_task(self._speak())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait({speaking, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in (reading, speaking):
                if task.done():
                    task.result()
        finally:
            for task in (reading, speaking):
                task.cancel()
            await asyncio.gather(reading, speaking, return_exceptions=True)

    async def _read(self) -> None:
        """Reads to the end of the connection: that a client has gone is known while it is heard."""
        sentences, characters, begun, done = Sentences(), 0, False, False
        while True:
            try:
                async with asyncio.timeout(None if done else PATIENCE):
                    message = _message(await self._socket.receive())
            except TimeoutError:
                problem = f"nothing came for {PATIENCE:.0f} s; send input.done at the end of a text"
                raise ApiError(problem, 408, "timeout") from None
            kind = message.get("type")
            if done:
                raise refusal(f"{shown(kind)} came after input.done", "type")
            if kind == "session.config" and not begun:
                self._configure(message)
            elif kind == "input.text":
                text = checked_text(message.get("text"), "text", self._most)
                characters += len(text)
                if characters > self._most:
                    problem = f"the text has more than {self._most} characters"
                    raise refusal(problem, "text", "string_above_max_length")
                for sentence in sentences.push(text) if text else ():
                    self._sentences.put_nowait(sentence)
            elif kind == "input.done":
                for sentence in sentences.finish():
                    self._sentences.put_nowait(sentence)
                self._sentences.put_nowait(None)
                done = True
            else:
                known = "input.text or input.done"
                first = "" if begun else ", and session.config before them"
                raise refusal(f"a message of type {shown(kind)}; send {known}{first}", "type")
            begun = True
            # What has been sent already comes without a wait; others have their turn.
            await asyncio.sleep(0)

    def _configure(self, message: Json) -> None:
        name = message.get("model", self._service.name)
        self._service = find_model(self._service, name)
        self._manner = read_manner(self._socket, message, "pcm")
        self._whole = not boolean(message.get("stream_audio", True), "stream_audio")

    async def _speak(self) -> None:
        narrator = None
        while (sentence := await self._sentences.get()) is not None:
            # Its manner is known once there is text.
            narrator = narrator or Narrator(self._service, self._manner)
            if narrator.says(sentence):
                await self._say(sentence, narrator)
        await self._socket.send_json({"type": "session.done", "total_sentences": self._index})
        await self._socket.close()

    async def _say(self, sentence: str, narrator: Narrator) -> None:
        socket, service, manner = self._socket, self._service, self._manner
        index, size, frames = self._index, 0, list[bytes]()
        self._index += 1
        start = {"type": "audio.start", "sentence_index": index, "sentence_text": sentence.strip()}
        await socket.send_json(start | {"format": manner.form, "sample_rate": service.sample_rate})
        async with aclosing(narrator.say(sentence)) as parts:
            async for part in parts:
                size += len(part)
                if self._whole:
                    frames.append(part)
                else:
                    await socket.send_bytes(part)
        if frames:
            await socket.send_bytes(b"".join(frames))
        done: dict[str, Any] = {"type": "audio.done", "sentence_index": index}
        await socket.send_json(done | {"total_bytes": size, "error": False})


def _message(message: Any) -> Json:
    """A client's message of JSON.

    Raises:
        WebSocketDisconnect: it has gone.
    """
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code") or 1005, message.get("reason"))
    if message.get("text") is None:
        raise ApiError("messages are texts of JSON, not bytes", 400, "invalid_type")
    return parse_object(message["text"])
