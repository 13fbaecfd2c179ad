"""The core of a realtime session, which knows no wire: turns, speculation, barge-in, items.

    audio -> Hearing -> BEGAN:   a reply that is heard is interrupted
                        PAUSED:  the reply to what was said so far is begun, and kept back
                        WENT_ON: that is dropped, and the model forgets it
                        ENDED:   the turn becomes an item, and the reply is let out

Everything here runs in the event loop and computes nothing: listening has its thread, the model
that of `Service.worker`. A dialect implements `Wire` and calls `Dialogue`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, TypeVar

from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.realtime.hearing import Change, Detection, Hearing, Mark, listening
from mimo_fast.server.realtime.items import Conversation, Item, Reply, Said, new_id
from mimo_fast.server.realtime.mind import Ask, Mind
from mimo_fast.server.realtime.responses import (
    End,
    Manner,
    Reason,
    Response,
    Sound,
    ask_about,
    sounds,
)
from mimo_fast.server.realtime.sound import Format
from mimo_fast.server.service import Service
from mimo_fast.server.worker import Priority, Stream

log = logging.getLogger("mimo_fast.server.realtime")

Result = TypeVar("Result")

ASIDES, TRANSCRIPTS = 4, 8
"""Replies beside the conversation, and transcripts, that a session may have in progress."""

AHEAD_MS = 200.0
"""Audio that a client may think it has heard beyond what was sent: rounding and clocks."""


@dataclass(frozen=True)
class Turns:
    """What a session does by itself.

    Attributes:
        answers: A turn that is over is answered.
        interrupts: Speech interrupts the reply.
        idle_ms: Silence after a reply that is answered too; None for never.
        transcribes: What the user said is transcribed.
    """

    answers: bool = True
    interrupts: bool = True
    idle_ms: int | None = None
    transcribes: bool = False


class Wire(Protocol):
    """What a dialect tells its client. Nothing may wait but `ready`."""

    async def ready(self) -> None:
        """Returns when the client has read most of what it was sent."""
        ...

    def speech_started(self, item_id: str, at_ms: int) -> None: ...
    def speech_stopped(self, item_id: str, at_ms: int) -> None: ...
    def timed_out(self, item_id: str, start_ms: int, end_ms: int) -> None: ...
    def committed(self, item_id: str, before: str | None) -> None: ...
    def item_added(self, item: Item, before: str | None) -> None: ...
    def item_done(self, item: Item, before: str | None) -> None: ...
    def item_deleted(self, item_id: str) -> None: ...
    def response_created(self, response: Response) -> None: ...
    def response_begun(self, response: Response, before: str | None) -> None: ...
    def said(self, response: Response, text: str, audio: bytes) -> None: ...
    def response_ended(self, response: Response, before: str | None) -> None: ...
    def transcribing(self, item_id: str, text: str) -> None: ...
    def transcribed(self, item_id: str, text: str, seconds: float) -> None: ...
    def not_transcribed(self, item_id: str, error: ApiError) -> None: ...


@dataclass
class Guess:
    """A reply that was begun before the turn is over."""

    said: Said
    response: Response


class Dialogue:
    """One session with one client.

    Args:
        longest: seconds of a turn.
        words: whether what was said may be logged.
    """

    def __init__(
        self, service: Service, wire: Wire, longest: float, name: str, words: bool = False
    ) -> None:
        self._service, self._wire, self._name, self._words = service, wire, name, words
        self.conversation, self.manner, self.turns = Conversation(), Manner(), Turns()
        self._mind = Mind(service.model)
        self._hearing = Hearing(service.sample_rate, longest)
        self._turn_id = ""
        self._guess: Guess | None = None
        self._active: Response | None = None
        self._asides = dict[str, Response]()
        self._interrupted: tuple[Response, float] | None = None
        self._transcripts = dict[str, Stream[str]]()
        self._idle: asyncio.TimerHandle | None = None
        self._owed = False
        self._closed = False
        self._tasks = set[asyncio.Task[Any]]()

    async def hear(self, data: bytes) -> None:
        """More of the client's audio."""
        for mark in await self._listen(self._hearing.push, data):
            self._follow(mark)

    async def set_hearing(self, format: Format | None, detection: Detection | None) -> None:
        """How audio comes (None: as before) and how turns are taken; None for turns by hand."""
        if format is not None:
            await self._listen(self._hearing.set_format, format)
        await self._listen(self._hearing.set_detection, detection)
        if detection is None:
            self._stop_idling()
        self._forget_guess()

    def set_manner(self, manner: Manner, turns: Turns) -> None:
        """How replies are made from here on, and what the session does by itself."""
        if manner != self.manner:
            self._forget_guess()
        self.manner, self.turns = manner, turns

    async def commit(self) -> None:
        """Ends the user's turn by hand; nothing answers it before `respond`."""
        mark = await self._listen(self._hearing.commit)
        self._forget_guess()
        self._commit(mark, new_id("item"))

    async def clear(self) -> None:
        """Forgets audio that belongs to no turn yet."""
        await self._listen(self._hearing.clear)
        self._forget_guess()

    def add(self, item: Item, after: str | None = None) -> None:
        """Adds an item that the client has written; see `Conversation.add`."""
        before = self.conversation.add(item, after)
        self._forget_guess()
        self._wire.item_added(item, before)
        self._wire.item_done(item, before)
        self._make_room()

    def delete(self, item_id: str) -> None:
        self.conversation.remove(item_id)
        self._forget_guess()
        self._wire.item_deleted(item_id)

    def truncate(self, item_id: str, played_ms: float) -> None:
        """Drops what was not heard of a reply: its words, and what the model remembers.

        Raises:
            ApiError: there is no such reply, or it is not so long.
        """
        item = self.conversation.get(item_id, "truncate")
        reply, code = item.reply, "item_truncate_invalid"
        if reply is None or not any(content.spoken for content in item.contents):
            raise ApiError("only replies with audio can be cut", code=code, param="item_id")
        if played_ms > reply.ms + AHEAD_MS:
            problem = f"the item has {reply.ms:.0f} ms of audio, less than {played_ms:.0f} ms"
            raise ApiError(problem, code=code, param="audio_end_ms")
        self._forget_guess()
        self._cut(item, reply, played_ms)

    async def respond(
        self,
        manner: Manner | None = None,
        metadata: dict[str, str] | None = None,
        items: list[Item] | None = None,
        aside: bool = False,
    ) -> None:
        """Answers the conversation, or these items in its place.

        Args:
            aside: the reply is not part of the conversation, and may run beside another.

        Raises:
            ApiError: a reply is in progress, or too many asides are.
        """
        if aside and len(self._asides) >= ASIDES:
            problem = f"{ASIDES} responses beside the conversation are in progress"
            raise ApiError(problem, code="too_many_responses")
        if not aside and self._active is not None:
            raise ApiError(
                f"the conversation has an active response already: {self._active.id}; wait for its "
                "end, or cancel it",
                code="conversation_already_has_active_response",
            )
        manner = manner or self.manner
        if not aside:
            self._forget_guess()
        ask = self._ask(manner) if items is None else ask_about(items, manner)
        response = Response(manner, ask, metadata, aside)
        # A reply to other items has a dialogue of its own with the model.
        own = Mind(self._service.model) if aside or items is not None else self._mind
        self._open(response, own)
        self._let_out(response)

    def cancel(self, response_id: str | None = None, reason: Reason = "client_cancelled") -> None:
        """Ends a reply; the one of the conversation where none is named.

        Raises:
            ApiError: there is no such reply in progress.
        """
        found = self._active
        if response_id is not None and (found is None or found.id != response_id):
            found = self._asides.get(response_id)
        if found is None:
            raise ApiError(
                "Cancellation failed: no active response found",
                code="response_cancel_not_active",
                param="response_id",
            )
        self._end(found, "cancelled", reason)

    async def close(self) -> None:
        """Ends all that runs; returns when the model has let go of it."""
        self._closed = True
        self._stop_idling()
        self._forget_guess()
        for response in [*filter(None, [self._active]), *self._asides.values()]:
            response.status = "cancelled"
            self._release(response)
        for stream in self._transcripts.values():
            self._background(stream.aclose())
        while self._tasks:
            await asyncio.wait([*self._tasks])

    # What is heard

    async def _listen(self, function: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(listening, function, *arguments)

    def _follow(self, mark: Mark) -> None:
        if mark.change is Change.BEGAN:
            self._turn_id = new_id("item")
            self._stop_idling()
            self._wire.speech_started(self._turn_id, mark.at_ms)
            if self.turns.interrupts and self._active is not None:
                self._interrupted = self._active, self._active.played_ms
                self._end(self._active, "cancelled", "turn_detected")
        elif mark.change is Change.PAUSED:
            if self.turns.answers and self._active is None:
                self._begin_early(mark)
        elif mark.change is Change.WENT_ON:
            self._forget_guess()
        else:
            self._wire.speech_stopped(self._turn_id, mark.at_ms)
            self._commit(mark, self._turn_id)
            if self.turns.answers:
                self._answer_turn()

    def _begin_early(self, mark: Mark) -> None:
        self._forget_guess()
        said = Said(spoken=True, seconds=mark.seconds, wav=mark.speech)
        item = Item(self._turn_id, "user", [said])
        response = Response(self.manner, self._ask(self.manner, item), spoken_to=True)
        self._open(response, self._mind)
        self._guess = Guess(said, response)

    def _commit(self, mark: Mark, item_id: str) -> None:
        guess, wav = self._guess, mark.speech
        if guess is not None:
            guess.said.seconds, said = mark.seconds, guess.said
        else:
            said = Said(spoken=True, seconds=mark.seconds, wav=wav)
        item = Item(item_id, "user", [said])
        before = self.conversation.add(item)
        self._wire.committed(item_id, before)
        self._wire.item_added(item, before)
        self._wire.item_done(item, before)
        if self.turns.transcribes and wav is not None:
            self._background(self._transcribe(item, said, wav))
        self._make_room()

    def _answer_turn(self) -> None:
        guess, self._guess = self._guess, None
        if self._active is not None:
            # The reply in progress was not to be interrupted.
            self._owed = True
            if guess is not None:
                self._drop(guess)
            return
        if guess is None:
            response = Response(self.manner, self._ask(self.manner), spoken_to=True)
            self._open(response, self._mind)
        else:
            response = guess.response
        response.turn_ended = perf_counter()
        self._let_out(response)

    def _forget_guess(self) -> None:
        guess, self._guess = self._guess, None
        if guess is not None:
            self._drop(guess)

    def _drop(self, guess: Guess) -> None:
        guess.response.ask.reply.dropped = True
        guess.response.status = "cancelled"
        self._release(guess.response)

    async def _transcribe(self, item: Item, said: Said, wav: Any) -> None:
        if len(self._transcripts) >= TRANSCRIPTS:
            error = ApiError("too many transcripts are in progress", code="rate_limit_exceeded")
            self._wire.not_transcribed(item.id, error)
            return
        text = ""
        try:
            stream = self._service.worker.stream(
                lambda: self._mind.transcribe(said, wav), priority=Priority.BATCH
            )
            self._transcripts[item.id] = stream
            async with stream:
                async for piece in stream:
                    new = piece if text else piece.lstrip()
                    text += new
                    if new and not self._closed:
                        self._wire.transcribing(item.id, new)
                        await self._wire.ready()
        except Exception as error:
            if not self._closed:
                self._wire.not_transcribed(item.id, self._failure(error))
            return
        finally:
            self._transcripts.pop(item.id, None)
        if not self._closed:
            said.text = text
            self._wire.transcribed(item.id, text, said.seconds)

    # Replies

    def _ask(self, manner: Manner, item: Item | None = None) -> Ask:
        """The conversation, with what was heard of a reply that was interrupted."""
        if self._interrupted is not None:
            interrupted, played_ms = self._interrupted
            if interrupted.begun:
                self._cut(interrupted.item, interrupted.ask.reply, played_ms)
            self._interrupted = None
        items = [*self.conversation.items, *([] if item is None else [item])]
        return ask_about(items, manner)

    def _cut(self, item: Item, reply: Reply, played_ms: float) -> None:
        if self._interrupted is not None and self._interrupted[0].item is item:
            # The client knows better what it has played.
            self._interrupted = None
        if played_ms >= reply.ms:
            return
        item.contents[0].text = text = reply.heard_by(played_ms)
        reply.words, reply.ms = [(text, 0.0)] if text else [], played_ms
        self._background(self._service.worker.call(self._mind.cut, reply, played_ms))

    def _open(self, response: Response, mind: Mind) -> None:
        """Begins to compute a reply."""
        ask, format = response.ask, response.manner.format
        response.item.reply = ask.reply
        response.stream = self._service.worker.stream(
            lambda: sounds(mind, ask, format), seconds=lambda sound: sound.ms / 1000
        )

    def _let_out(self, response: Response) -> None:
        """Tells the client of a reply from here on."""
        if response.aside:
            self._asides[response.id] = response
        else:
            self._active = response
            self._stop_idling()
        self._wire.response_created(response)
        response.task = self._background(self._send(response))

    async def _send(self, response: Response) -> None:
        stream, failure = response.stream, None
        assert stream is not None
        try:
            async for sound in stream:
                if response.ended:
                    return
                self._pass_on(response, sound)
                await self._wire.ready()
                if (due := response.due) > 0:
                    await asyncio.sleep(due)
                if response.ended:
                    return
        except Exception as error:
            failure = self._failure(error)
        if response.ended:
            return
        if failure is not None:
            response.error = failure
            self._end(response, "failed")
        elif response.ask.finish_reason in ("length", "context"):
            self._end(response, "incomplete", "max_output_tokens")
        else:
            self._end(response, "completed")

    def _pass_on(self, response: Response, sound: Sound) -> None:
        reply = response.ask.reply
        if not sound.text and not sound.audio:
            return
        self._begin(response)
        if sound.text:
            reply.words.append((sound.text, reply.ms))
            content = response.item.contents[0]
            content.text = (content.text or "") + sound.text
        if sound.audio and response.first_audio is None:
            response.first_audio = perf_counter()
        reply.ms += sound.ms
        self._wire.said(response, sound.text, sound.audio)

    def _begin(self, response: Response) -> None:
        if response.begun:
            return
        response.begun, item = True, response.item
        item.status = "in_progress"
        item.contents = [Said("", spoken=response.manner.speaks)]
        before = None if response.aside else self.conversation.add(item)
        self._wire.response_begun(response, before)

    def _end(self, response: Response, status: End, reason: Reason | None = None) -> None:
        if status in ("completed", "incomplete"):
            self._begin(response)
        response.status, response.reason = status, reason
        response.item.status = "completed" if status == "completed" else "incomplete"
        before = None
        if response.aside:
            self._asides.pop(response.id, None)
        else:
            self._active = None
            before = self._before(response.item)
        self._wire.response_ended(response, before)
        self._release(response)
        self._note(response)
        if status == "completed" and not response.aside:
            self._idle_after(response)
        self._make_room()
        if self._owed and not response.aside and not self._closed:
            self._owed = False
            self._answer_turn()

    def _before(self, item: Item) -> str | None:
        ids = [each.id for each in self.conversation.items]
        place = ids.index(item.id) if item.id in ids else 0
        return ids[place - 1] if place else None

    def _release(self, response: Response) -> None:
        """Lets go of the model's row after the group in progress."""
        if response.stream is not None:
            self._background(response.stream.aclose())

    def _note(self, response: Response) -> None:
        latency = {name: each for name, each in response.latency.items() if each is not None}
        said = response.item.text if self._words else ""
        log.info(
            "response",
            extra={
                "session": self._name,
                "response": response.id,
                "status": response.status,
                "spoken_to": response.spoken_to,
                **({} if response.status == "cancelled" else latency),
                **({"words": said} if said else {}),
            },
        )

    # Silence

    def _idle_after(self, response: Response) -> None:
        """Waits for the user once the reply has been played."""
        idle = self.turns.idle_ms
        if idle is None or self._hearing.detection is None or self._closed:
            return
        # As the API has it: from the end of the response, for as long as its audio takes.
        left = response.ask.reply.ms
        start = self._hearing.ms + round(left)
        loop = asyncio.get_running_loop()
        self._idle = loop.call_later((left + idle) / 1000, self._time_out, start)

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None

    def _time_out(self, start_ms: int) -> None:
        self._idle = None
        if self._active is not None or self._hearing.speaking or self._closed:
            return
        item, end = Item(new_id("item"), "user", [Said(spoken=True)]), self._hearing.ms
        self._wire.timed_out(item.id, min(start_ms, end), end)
        before = self.conversation.add(item)
        self._wire.committed(item.id, before)
        self._wire.item_added(item, before)
        self._wire.item_done(item, before)
        self._answer_turn()

    # Bookkeeping

    def _make_room(self) -> None:
        while (oldest := self.conversation.crowded()) is not None:
            self.conversation.remove(oldest.id)
            self._wire.item_deleted(oldest.id)

    def _failure(self, error: Exception) -> ApiError:
        found = as_api_error(error)
        if found.status >= 500:
            log.error("response failed", exc_info=error, extra={"session": self._name})
        return found

    def _background(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._failure(error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
