"""Replies on their way to a client: begun, sent at their pace, and ended in one step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.logs import log, log_failure, said
from mimo_fast.server.realtime.items import Conversation, Item, Said
from mimo_fast.server.realtime.mind import Mind
from mimo_fast.server.realtime.responses import End, Reason, Response, Sound, sounds
from mimo_fast.server.realtime.wire import Wire
from mimo_fast.server.service import Service

ASIDES = 4
"""Replies beside the conversation that a session may have in progress."""


class Speaking:
    """The replies of one session: one in the conversation, some beside it.

    Args:
        name: of the session, for the log.
        began, ended: called with a reply that the client has been told of.
    """

    def __init__(
        self,
        service: Service,
        wire: Wire,
        conversation: Conversation,
        name: str,
        began: Callable[[Response], None],
        ended: Callable[[Response], None],
    ) -> None:
        self._service, self._wire, self._conversation = service, wire, conversation
        self._name, self._began, self._ended = name, began, ended
        self.active: Response | None = None
        self.asides = dict[str, Response]()
        self._tasks = set[asyncio.Task[Any]]()

    def check(self, aside: bool) -> None:
        """Raises ApiError where no other reply may begin."""
        if aside and len(self.asides) >= ASIDES:
            problem = f"{ASIDES} responses beside the conversation are in progress"
            raise ApiError(problem, code="too_many_responses")
        if not aside and self.active is not None:
            raise ApiError(
                f"the conversation has an active response already: {self.active.id}; wait for its "
                "end, or cancel it",
                code="conversation_already_has_active_response",
            )

    def find(self, response_id: str | None) -> Response:
        """A reply in progress; the one of the conversation where none is named.

        Raises:
            ApiError: there is none.
        """
        found = self.active
        if response_id is not None and (found is None or found.id != response_id):
            found = self.asides.get(response_id)
        if found is None:
            raise ApiError(
                "Cancellation failed: no active response found",
                code="response_cancel_not_active",
                param="response_id",
            )
        return found

    def open(self, response: Response, mind: Mind) -> None:
        """Begins to compute a reply."""
        ask, format = response.ask, response.manner.format
        response.item.reply = ask.reply
        response.stream = self._service.worker.stream(
            lambda: sounds(mind, ask, format), seconds=lambda sound: sound.ms / 1000
        )

    def let_out(self, response: Response) -> None:
        """Tells the client of a reply from here on."""
        if response.aside:
            self.asides[response.id] = response
        else:
            self.active = response
        self._began(response)
        self._wire.response_created(response)
        response.task = self.background(self._send(response))

    async def _send(self, response: Response) -> None:
        stream, failure = response.stream, None
        assert stream is not None
        try:
            async for sound in stream:
                if response.ended:
                    return
                if not sound.text and not sound.audio:
                    continue
                self._pass_on(response, sound)
                await self._wire.ready()
                if (due := response.due) > 0:
                    await asyncio.sleep(due)
                if response.ended:
                    return
        except Exception as error:
            failure = self.failure(error)
        if response.ended:
            return
        if failure is not None:
            response.error = failure
            self.end(response, "failed")
        elif response.ask.finish_reason in ("length", "context"):
            self.end(response, "incomplete", "max_output_tokens")
        else:
            self.end(response, "completed")

    def _pass_on(self, response: Response, sound: Sound) -> None:
        reply = response.ask.reply
        self._begin(response)
        if sound.text:
            reply.words.append((sound.text, reply.ms))
            content = response.item.contents[0]
            content.text = (content.text or "") + sound.text
        if sound.audio and response.first_audio is None:
            response.first_audio = perf_counter()
        reply.ms += sound.ms
        reply.sent_ms += sound.ms
        self._wire.said(response, sound.text, sound.audio)

    def _begin(self, response: Response) -> None:
        if response.begun:
            return
        response.begun, item = True, response.item
        item.status = "in_progress"
        item.contents = [Said("", spoken=response.manner.speaks)]
        before = None if response.aside else self._conversation.add(item)
        self._wire.response_begun(response, before)

    def end(self, response: Response, status: End, reason: Reason | None = None) -> None:
        """Ends a reply: the client hears no more of it, and the model lets go of it."""
        if status in ("completed", "incomplete"):
            self._begin(response)
        response.status, response.reason = status, reason
        response.item.status = "completed" if status == "completed" else "incomplete"
        if response.aside:
            self.asides.pop(response.id, None)
        else:
            self.active = None
        before = None if response.aside else self._before(response.item)
        self._wire.response_ended(response, before)
        self.release(response)
        self._note(response)
        self._ended(response)

    def _before(self, item: Item) -> str | None:
        ids = [each.id for each in self._conversation.items]
        place = ids.index(item.id) if item.id in ids else 0
        return ids[place - 1] if place else None

    def drop(self, response: Response) -> None:
        """Ends a reply that the client was not told of; the model forgets it."""
        response.ask.reply.dropped = True
        response.status = "cancelled"
        self.release(response)

    def release(self, response: Response) -> None:
        """Lets go of the model's row after the group in progress."""
        if response.stream is not None:
            self.background(response.stream.aclose())

    def _note(self, response: Response) -> None:
        # Interrupted replies are no measurement.
        latency: dict[str, Any] = {} if response.status == "cancelled" else response.latency
        log(
            "response",
            session=self._name,
            response=response.id,
            status=response.status,
            reason=response.reason,
            spoken_to=response.spoken_to,
            words=said(response.item.text),
            **latency,
        )

    def failure(self, error: Exception) -> ApiError:
        """An error as a client may see it; what nobody foresaw is logged."""
        found = as_api_error(error)
        if found.status >= 500:
            log_failure(error, session=self._name)
        return found

    def background(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """Something that `close` waits for."""

        async def run() -> None:
            try:
                await work
            except Exception as error:
                self.failure(error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Ends all that runs; returns when the model has let go of it."""
        for response in [*filter(None, [self.active]), *self.asides.values()]:
            response.status = "cancelled"
            self.release(response)
        while self._tasks:
            await asyncio.wait([*self._tasks])
