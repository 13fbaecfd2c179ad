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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

from mimo_fast.runtime.transcription import context_seconds
from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.hearing import Change, Detection, Hearing, Mark, listening
from mimo_fast.server.realtime.items import Conversation, Item, Reply, Said, new_id
from mimo_fast.server.realtime.mind import Ask, Mind
from mimo_fast.server.realtime.responses import Manner, Reason, Response, ask_about
from mimo_fast.server.realtime.sound import Format
from mimo_fast.server.realtime.speaking import Speaking
from mimo_fast.server.realtime.wire import Wire
from mimo_fast.server.service import Service
from mimo_fast.server.worker import Priority, Stream

Result = TypeVar("Result")

EARLY = 20.0
"""Seconds of a turn that is answered before it is over; of longer ones too much would be encoded
again and again."""

MOST_WAVES = 60.0
"""Seconds of recordings that are kept as samples; of more of them only codes."""

MOST_UNHEARD = 2**18
"""Bytes that may wait to be listened to, 5 s of PCM; then no more is read from the client."""

TRANSCRIPTS = 8
"""Transcripts that a session may have in progress."""

MOST_TURN = 300.0
"""Seconds of a turn at most, less where the model's context holds less."""

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
        adapter: That transcripts are computed with; None for the model itself.
    """

    answers: bool = True
    interrupts: bool = True
    idle_ms: int | None = None
    transcribes: bool = False
    adapter: str | None = None


@dataclass
class Guess:
    """A reply that was begun before the turn is over."""

    said: Said
    response: Response


class Dialogue:
    """One session with one client.

    Args:
        longest: seconds of a turn.
        name: of the session, for the log.
        talks: whether it is ever to reply; else what was said is forgotten once transcribed.
    """

    def __init__(
        self, service: Service, wire: Wire, longest: float, name: str, talks: bool = True
    ) -> None:
        self._service, self._wire, self._talks = service, wire, talks
        self.conversation, self.manner, self.turns = Conversation(), Manner(), Turns()
        self._speaking = Speaking(service, wire, self.conversation, name, self._began, self._ended)
        self._background = self._speaking.background
        self._mind = Mind(service.model)
        self._hearing = Hearing(service.sample_rate, longest)
        self._turn_id, self._unheard = "", list[bytes]()
        self._ear: asyncio.Task[Any] | None = None
        self._guess: Guess | None = None
        self._interrupted: tuple[Response, float] | None = None
        self._transcripts = dict[str, Stream[str]]()
        self._idle: asyncio.TimerHandle | None = None
        self._owed = False
        self._closed = False

    async def hear(self, data: bytes) -> None:
        """More of the client's audio; what comes while some of it is listened to waits together."""
        if self._hearing.detection is None:
            await self.heard()
            await self._hear(data)
            return
        self._unheard.append(data)
        if self._ear is None or self._ear.done():
            self._ear = self._background(self._hear_on())
        if sum(map(len, self._unheard)) > MOST_UNHEARD:
            await self.heard()

    async def heard(self) -> None:
        """Returns when all audio so far has been listened to."""
        if self._ear is not None:
            await asyncio.wait([self._ear])

    async def _hear_on(self) -> None:
        while self._unheard:
            data = b"".join(self._unheard)
            self._unheard.clear()
            await self._hear(data)

    async def _hear(self, data: bytes) -> None:
        for mark in await self._listen(self._hearing.push, data):
            if not self._closed:
                self._follow(mark)
            if mark.change is Change.ENDED:
                await self._spare_memory()

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
        began = self._hearing.speaking
        mark = await self._listen(self._hearing.commit)
        self._forget_guess()
        self._commit(mark, self._turn_id if began else new_id("item"))
        await self._spare_memory()

    async def clear(self) -> None:
        """Forgets audio that belongs to no turn yet."""
        await self._listen(self._hearing.clear)
        self._forget_guess()

    async def add(self, item: Item, after: str | None = None) -> None:
        """Adds an item that the client has written; see `Conversation.add`."""
        before = self.conversation.add(item, after)
        self._forget_guess()
        self._wire.item_added(item, before)
        self._wire.item_done(item, before)
        self._make_room()
        await self._spare_memory()

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
        if played_ms > reply.sent_ms + AHEAD_MS:
            problem = f"the item has {reply.sent_ms:.0f} ms of audio, less than {played_ms:.0f} ms"
            raise ApiError(problem, code=code, param="audio_end_ms")
        self._forget_guess()
        if (active := self._speaking.active) is not None and active.item is item:
            self._speaking.end(active, "cancelled", "client_cancelled")
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
        self._speaking.check(aside)
        manner = manner or self.manner
        if not aside:
            self._forget_guess()
        ask = self._ask(manner) if items is None else ask_about(items, manner)
        response = Response(manner, ask, metadata, aside)
        # A reply to other items has a dialogue of its own with the model.
        own = Mind(self._service.model) if aside or items is not None else self._mind
        self._speaking.open(response, own)
        self._speaking.let_out(response)

    def cancel(self, response_id: str | None = None, reason: Reason = "client_cancelled") -> None:
        """Ends a reply; the one of the conversation where none is named.

        Raises:
            ApiError: there is no such reply in progress.
        """
        self._speaking.end(self._speaking.find(response_id), "cancelled", reason)

    async def close(self) -> None:
        """Ends all that runs; returns when the model has let go of it."""
        self._closed = True
        self._unheard.clear()
        self._stop_idling()
        self._forget_guess()
        for stream in self._transcripts.values():
            self._background(stream.aclose())
        await self._speaking.close()

    # What is heard

    async def _listen(self, function: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(listening, function, *arguments)

    def _follow(self, mark: Mark) -> None:
        if mark.change is Change.BEGAN:
            self._turn_id = new_id("item")
            self._stop_idling()
            self._wire.speech_started(self._turn_id, mark.at_ms)
            if self.turns.interrupts:
                self._interrupt()
        elif mark.change is Change.PAUSED:
            free = self._speaking.active is None and mark.seconds <= EARLY
            if self.turns.answers and free:
                self._begin_early(mark)
        elif mark.change is Change.WENT_ON:
            self._forget_guess()
        else:
            self._wire.speech_stopped(self._turn_id, mark.at_ms)
            self._commit(mark, self._turn_id)
            if self.turns.answers:
                self._answer_turn(spoken_to=True)

    def _interrupt(self) -> None:
        cut = self._wire.silence()
        active = self._speaking.active
        if active is not None:
            if not any(each is active for each, _ in cut):
                # Until the client says better.
                self._interrupted = active, active.played_ms
            self._speaking.end(active, "cancelled", "turn_detected")
        self.forget_unheard(cut)

    def forget_unheard(self, cut: Iterable[tuple[Response, float]]) -> None:
        """Cuts replies that have ended to the milliseconds of them that were heard."""
        for response, ms in cut:
            if response.begun and not response.aside:
                self._cut(response.item, response.ask.reply, ms)

    def _begin_early(self, mark: Mark) -> None:
        self._forget_guess()
        said = Said(spoken=True, seconds=mark.seconds, wav=mark.speech)
        item = Item(self._turn_id, "user", [said])
        response = Response(self.manner, self._ask(self.manner, item), spoken_to=True)
        self._speaking.open(response, self._mind)
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
            # A model hears words in silence.
            self._background(self._transcribe(item, said, wav if mark.voiced else None))
        self._make_room()

    def _answer_turn(self, spoken_to: bool) -> None:
        guess, self._guess = self._guess, None
        if self._speaking.active is not None:
            # The reply in progress was not to be interrupted.
            self._owed = True
            if guess is not None:
                self._speaking.drop(guess.response)
            return
        if guess is None:
            response = Response(self.manner, self._ask(self.manner), spoken_to=spoken_to)
            self._speaking.open(response, self._mind)
        else:
            response = guess.response
        response.turn_ended = perf_counter()
        self._speaking.let_out(response)

    def _forget_guess(self) -> None:
        guess, self._guess = self._guess, None
        if guess is not None:
            self._speaking.drop(guess.response)

    async def _transcribe(self, item: Item, said: Said, wav: Tensor | None) -> None:
        """Tells the words of a turn; without a waveform it has none."""
        if wav is None:
            said.text = ""
            self._wire.transcribed(item.id, "", said.seconds)
            return
        if len(self._transcripts) >= TRANSCRIPTS:
            error = ApiError("too many transcripts are in progress", code="rate_limit_exceeded")
            self._wire.not_transcribed(item.id, error)
            return
        text = ""
        try:
            how = said, wav, self.turns.adapter
            stream = self._service.worker.stream(
                lambda: self._mind.transcribe(*how), priority=Priority.BATCH
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
                self._wire.not_transcribed(item.id, self._speaking.failure(error))
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

    def _began(self, response: Response) -> None:
        if not response.aside:
            self._stop_idling()

    def _ended(self, response: Response) -> None:
        if response.aside or self._closed:
            return
        self._make_room()
        if response.status == "completed":
            self._idle_after(response)
        if self._owed:
            self._owed = False
            self._answer_turn(spoken_to=False)

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
        if self._speaking.active is not None or self._hearing.speaking or self._closed:
            return
        item, end = Item(new_id("item"), "user", [Said(spoken=True)]), self._hearing.ms
        self._wire.timed_out(item.id, min(start_ms, end), end)
        before = self.conversation.add(item)
        self._wire.committed(item.id, before)
        self._wire.item_added(item, before)
        self._wire.item_done(item, before)
        self._answer_turn(spoken_to=False)

    async def _spare_memory(self) -> None:
        """Encodes the oldest recordings, or forgets them where nobody will ask for them."""
        contents = [said for item in self.conversation.items for said in item.contents]
        waiting = [said for said in contents if said.wav is not None]
        for said in waiting:
            if not self._talks:
                said.wav = None
            elif sum(each.seconds for each in waiting if each.wav is not None) > MOST_WAVES:
                await self._service.worker.call(self._mind.encode, said)

    def _make_room(self) -> None:
        while (oldest := self.conversation.crowded()) is not None:
            self.conversation.remove(oldest.id)
            self._wire.item_deleted(oldest.id)


def longest_turn(service: Service) -> float:
    """Seconds of a turn that leave half of the model's context."""
    return min(MOST_TURN, context_seconds(service.model.pipeline) / 2)
