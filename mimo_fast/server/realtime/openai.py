"""OpenAI's Realtime protocol in its GA form, over whatever carries its events.

    carrier -> Client.handle -> Dialogue -> Wire (here `Client`) -> Outbox -> carrier

The carriers are a WebSocket (sockets.py) and a WebRTC call (peer.py). A wrong event is answered by
an `error` event with its `event_id`, and the session goes on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from mimo_fast.audio.segments import levelled
from mimo_fast.server.checks import Json, mapping, needed, refusal, text, whole
from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.json_values import parse_json
from mimo_fast.server.logs import log_failure
from mimo_fast.server.realtime.config import Config, Kind, check_response
from mimo_fast.server.realtime.dialogue import Dialogue, longest_turn
from mimo_fast.server.realtime.events import (
    Outbox,
    error_json,
    item_json,
    part_json,
    read_item,
    response_json,
)
from mimo_fast.server.realtime.hearing import listening
from mimo_fast.server.realtime.items import Item, new_id
from mimo_fast.server.realtime.responses import Manner, Response
from mimo_fast.server.realtime.sound import Decoder, Format

MOST_WAITING = 64
"""Events that may wait for a slow reader; then replies pause, and no more is read from it."""

LARGE = 2**16
"""Characters of a message that are not parsed in the event loop."""

MOST_APPENDED = 15 * 2**20
"""Bytes of audio in one event, as the API has it."""

LONGEST_ID = 512


class Client:
    """One session; implements `Wire`. Whatever carries its events feeds `handle` and empties it.

    Args:
        state: of the application.
        sessions: updates of its settings.
        model: its name; None for the application's own.

    Attributes:
        handlers: What is done with a client's events, by their types.
        outbox: Events for the client; `news` is set when there are some.
        left: Whether the client has gone.

    Raises:
        ApiError: a value of them is wrong.
    """

    def __init__(
        self, state: Any, kind: Kind, sessions: Iterable[Json] = (), model: str | None = None
    ) -> None:
        self._state, self._service = state, state.service
        self._longest: int = state.settings.max_text_chars
        self.config = new_config(state, kind, model)
        for session in sessions:
            self.config.update(session)
        self._conversation = new_id("conv")
        self.outbox, self.news, self._room = Outbox(), asyncio.Event(), asyncio.Event()
        self.left = False
        self._seconds = min(state.settings.max_audio_seconds, longest_turn(self._service))
        talks = kind == "realtime"
        self.dialogue = Dialogue(self._service, self, self._seconds, self.config.id, talks)
        self._apply()
        self.handlers: dict[str, Callable[[Json], Awaitable[None]]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear_input,
        }
        if talks:
            self.handlers |= {
                "conversation.item.create": self._create_item,
                "conversation.item.retrieve": self._retrieve,
                "conversation.item.delete": self._delete,
                "conversation.item.truncate": self._truncate,
                "response.create": self._respond,
                "response.cancel": self._cancel,
            }

    async def begin(self) -> None:
        """Tells the client what its session is."""
        self.put("session.created", session=self.config.values)
        await self.dialogue.set_hearing(self.heard_format, self.config.detection)

    @property
    def heard_format(self) -> Format:
        """In which the client's audio comes."""
        return self.config.input_format

    def manner(self, response: Json | None = None) -> Manner:
        """How a reply is made; see `Config.manner`."""
        return self.config.manner(response)

    async def close(self) -> None:
        """Ends all of it; nothing of it is left then."""
        self.left = True
        self._room.set()
        await self.dialogue.close()

    def make_room(self) -> None:
        """Lets replies go on where few events wait."""
        if len(self.outbox) < MOST_WAITING:
            self._room.set()

    def put(self, type: str, **fields: Any) -> None:
        self.outbox.put(type, **fields)
        self.news.set()

    async def ready(self) -> None:
        while len(self.outbox) >= MOST_WAITING and not self.left:
            self._room.clear()
            await self._room.wait()

    async def handle(self, message: str | None) -> None:
        """Does what an event says; None for a message that is no text."""
        event_id = None
        try:
            event = await self._parsed(message)
            given = event.get("event_id")
            event_id = text(given, "event_id", LONGEST_ID) if given is not None else None
            kind = needed(event, "type")
            handler = self.handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                known = ", ".join(self.handlers)
                given = kind[:80] if isinstance(kind, str) else type(kind).__name__
                problem = f"there is no event of the type {given!r}; there are {known}"
                raise refusal(problem, "type")
            if kind != "input_audio_buffer.append":
                await self.dialogue.heard()
            await handler(event)
        except Exception as error:
            found = as_api_error(error)
            if found.status >= 500:
                log_failure(error, session=self.config.id)
            fields = error_json(found, event_id)
            self.put(**fields)

    async def _parsed(self, data: str | None) -> Json:
        if data is None:
            raise refusal("events are JSON in text messages, not binary ones", "event")
        try:
            if len(data) > LARGE:
                loop = asyncio.get_running_loop()
                event = await loop.run_in_executor(listening, parse_json, data)
            else:
                event = parse_json(data)
        except ValueError as error:
            problem = f"the message cannot be read: {error}"
            raise ApiError(problem[:200], code="invalid_json", param="event") from None
        return mapping(event, "event")

    # What the client asks for

    def _apply(self) -> None:
        talks = self.config.kind == "realtime"
        manner = self.manner() if talks else self.dialogue.manner
        self.dialogue.set_manner(manner, self.config.turns)

    async def _update(self, event: Json) -> None:
        before = self.heard_format
        self.config.update(needed(event, "session"))
        self._apply()
        format = self.heard_format
        changed = format if format is not before else None
        await self.dialogue.set_hearing(changed, self.config.detection)
        self.put("session.updated", session=self.config.values)

    async def _append(self, event: Json) -> None:
        audio = needed(event, "audio")
        if not isinstance(audio, str):
            raise refusal("audio must be base64", "audio", "invalid_type")
        if len(audio) > MOST_APPENDED * 4 / 3 + 4:
            problem = f"audio has more than {MOST_APPENDED >> 20} MiB: append it in parts"
            raise refusal(problem, "audio", "string_above_max_length")
        await self.dialogue.hear(_bytes(audio, "audio"))

    async def _commit(self, event: Json) -> None:
        await self.dialogue.commit()

    async def _clear_input(self, event: Json) -> None:
        await self.dialogue.clear()
        self.put("input_audio_buffer.cleared")

    async def _create_item(self, event: Json) -> None:
        item = await self._item(needed(event, "item"), "item")
        after = event.get("previous_item_id")
        after = None if after is None else text(after, "previous_item_id", LONGEST_ID)
        await self.dialogue.add(item, after)

    async def _item(self, given: Any, param: str) -> Item:
        item, sounds = read_item(given, self._longest, param)
        loop = asyncio.get_running_loop()
        for said, sound in zip(item.contents, sounds, strict=False):
            if sound is None:
                continue
            data = _bytes(sound, f"{param}.content.audio")
            format, rate = self.config.input_format, self._service.sample_rate
            seconds = len(data) / format.width / format.rate
            if seconds > self._seconds:
                problem = f"the audio has {seconds:.0f} s, {self._seconds:.0f} s are the most"
                raise refusal(problem, f"{param}.content.audio")
            said.wav = await loop.run_in_executor(listening, _decoded, data, format, rate)
            said.seconds = seconds
        return item

    async def _retrieve(self, event: Json) -> None:
        item = self.dialogue.conversation.get(self._id(event))
        self.put("conversation.item.retrieved", item=item_json(item))

    async def _delete(self, event: Json) -> None:
        self.dialogue.delete(self._id(event))

    async def _truncate(self, event: Json) -> None:
        item_id = self._id(event)
        index = whole(needed(event, "content_index"), "content_index", 0, 0)
        end = whole(needed(event, "audio_end_ms"), "audio_end_ms", 0, 2**40)
        self.dialogue.truncate(item_id, end)
        fields = {"item_id": item_id, "content_index": index, "audio_end_ms": end}
        self.put("conversation.item.truncated", **fields)

    def _id(self, event: Json) -> str:
        return text(needed(event, "item_id"), "item_id", LONGEST_ID)

    async def _respond(self, event: Json) -> None:
        given = check_response(event.get("response"))
        manner = self.manner(given)
        aside = given.get("conversation") == "none"
        items = given.get("input")
        found = None if items is None else [await self._input(each) for each in items]
        seconds = sum(said.seconds for item in found or [] for said in item.contents)
        if seconds > self._seconds:
            problem = f"response.input has {seconds:.0f} s of audio, {self._seconds:.0f} s at most"
            raise refusal(problem, "response.input")
        await self.dialogue.respond(manner, given.get("metadata") or None, found, aside)

    async def _input(self, given: Any) -> Item:
        value = mapping(given, "response.input")
        if value.get("type") == "item_reference":
            return self.dialogue.conversation.get(text(needed(value, "id"), "id", LONGEST_ID))
        return await self._item(value, "response.input")

    async def _cancel(self, event: Json) -> None:
        id = event.get("response_id")
        self.dialogue.cancel(None if id is None else text(id, "response_id", LONGEST_ID))

    # What the client is told

    def speech_started(self, item_id: str, at_ms: int) -> None:
        self.put("input_audio_buffer.speech_started", item_id=item_id, audio_start_ms=at_ms)

    def speech_stopped(self, item_id: str, at_ms: int) -> None:
        self.put("input_audio_buffer.speech_stopped", item_id=item_id, audio_end_ms=at_ms)

    def timed_out(self, item_id: str, start_ms: int, end_ms: int) -> None:
        times = {"audio_start_ms": start_ms, "audio_end_ms": end_ms}
        self.put("input_audio_buffer.timeout_triggered", item_id=item_id, **times)

    def committed(self, item_id: str, before: str | None) -> None:
        self.put("input_audio_buffer.committed", item_id=item_id, previous_item_id=before)

    def item_added(self, item: Item, before: str | None) -> None:
        item_ = item_json(item)
        self.put("conversation.item.added", item=item_, previous_item_id=before)

    def item_done(self, item: Item, before: str | None) -> None:
        item_ = item_json(item)
        self.put("conversation.item.done", item=item_, previous_item_id=before)

    def item_deleted(self, item_id: str) -> None:
        self.put("conversation.item.deleted", item_id=item_id)

    def response_created(self, response: Response) -> None:
        self.put("response.created", response=response_json(response, self._conversation))

    def response_begun(self, response: Response, before: str | None) -> None:
        item = item_json(response.item) | {"content": []}
        place = {"response_id": response.id, "output_index": 0}
        self.put("response.output_item.added", item=item, **place)
        if not response.aside:
            self.put("conversation.item.added", item=item, previous_item_id=before)
        part = part_json(response.item.contents[0])
        self.put("response.content_part.added", part=part, **self._place(response))

    def said(self, response: Response, text: str, audio: bytes) -> None:
        place = self._place(response)
        if text:
            self.put(f"response.{self._words(response)}.delta", delta=text, **place)
        if audio:
            self.play(response, audio)

    def play(self, response: Response, audio: bytes) -> None:
        """More of a reply's audio."""
        delta = base64.b64encode(audio).decode()
        self.put("response.output_audio.delta", delta=delta, **self._place(response))

    def silence(self) -> list[tuple[Response, float]]:
        # The client plays, and says how much it has played.
        return []

    def response_ended(self, response: Response, before: str | None) -> None:
        place = self._place(response)
        if response.begun:
            content = response.item.contents[0]
            if response.manner.speaks:
                self.put("response.output_audio.done", **place)
            field = "transcript" if response.manner.speaks else "text"
            said = {field: content.text or ""}
            self.put(f"response.{self._words(response)}.done", **said, **place)
            self.put("response.content_part.done", part=part_json(content), **place)
            item = item_json(response.item)
            if not response.aside:
                self.put("conversation.item.done", item=item, previous_item_id=before)
            of = {"response_id": response.id, "output_index": 0}
            self.put("response.output_item.done", item=item, **of)
        self.put("response.done", response=response_json(response, self._conversation))
        if response.spoken_to and response.status == "completed" and response.first_audio:
            self._state.metrics.turn(response.first_audio - response.turn_ended)

    def _words(self, response: Response) -> str:
        return "output_audio_transcript" if response.manner.speaks else "output_text"

    def _place(self, response: Response) -> Json:
        return {
            "response_id": response.id,
            "item_id": response.item.id,
            "output_index": 0,
            "content_index": 0,
        }

    def transcribing(self, item_id: str, text: str) -> None:
        kind = "conversation.item.input_audio_transcription.delta"
        self.put(kind, item_id=item_id, content_index=0, delta=text)

    def transcribed(self, item_id: str, text: str, seconds: float) -> None:
        kind = "conversation.item.input_audio_transcription.completed"
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        self.put(kind, item_id=item_id, content_index=0, transcript=text, usage=usage)

    def not_transcribed(self, item_id: str, error: ApiError) -> None:
        kind = "conversation.item.input_audio_transcription.failed"
        self.put(kind, item_id=item_id, content_index=0, error=error.body())


def new_config(state: Any, kind: Kind, model: str | None = None) -> Config:
    """The default settings of a session of an application, with the model of this name.

    Raises:
        ApiError: the model cannot answer, and a session of this kind does.
    """
    if kind == "realtime":
        state.service.check_converses()

    def find(name: str) -> Path | None:
        voice = state.voices.find(name)
        if voice is None:
            raise KeyError(name)
        path: Path | None = voice.path
        return path

    service, longest = state.service, state.settings.max_text_chars
    return Config(kind, new_id("sess"), model or service.name, service.models, find, longest)


def _bytes(audio: str, param: str) -> bytes:
    try:
        return base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):
        raise refusal(f"{param} is no base64", param, "invalid_base64") from None


def _decoded(data: bytes, format: Format, rate: int) -> torch.Tensor:
    return levelled(Decoder(format, rate).push(data, ended=True))
