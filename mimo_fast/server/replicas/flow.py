"""Flow control between a client and the application, which Ray's queues between them do not have.

client  ->  Front.receive  ->  Ray  ->  Back.receive  ->  application
            waits while `WINDOW` bytes are not read        says how many it has read (`READ`)

application  ->  Back.send  ->  Ray  ->  Front.send  ->  client
                 waits while `WINDOW` bytes are not sent   says how many it has sent (`SENT`)

What they tell each other are messages of their own types among those of ASGI, which Ray hands on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BEGUN = "mimo_fast.begun"
"""Type of a replica's first message: a request has reached it, and waits in no queue of Ray."""

READ = "mimo_fast.read"
"""Type of a replica's message on bytes that the application has taken."""

SENT = "mimo_fast.sent"
"""Type of a proxy's message on bytes that its connection has taken."""

WINDOW = 1 << 20
"""Bytes on their way beyond which the sender waits; one message may be larger."""

OVERHEAD = 64
"""Bytes that a message counts besides its content, so that empty ones are bounded too."""


def size_of(message: Mapping[str, Any]) -> int:
    """Bytes that a message counts."""
    text = message.get("text")
    content = message.get("bytes") or message.get("body") or b""
    return OVERHEAD + len(content) + (len(text.encode()) if text else 0)


class Window:
    """Bytes on their way to a reader."""

    def __init__(self) -> None:
        self._under_way, self._open = 0, False
        self._changed = asyncio.Event()

    async def room(self) -> None:
        """Waits until fewer than `WINDOW` bytes are on their way."""
        while self._under_way >= WINDOW and not self._open:
            self._changed.clear()
            await self._changed.wait()

    def sent(self, size: int) -> None:
        self._under_way += size

    def read(self, size: int) -> None:
        self._under_way -= size
        self._changed.set()

    def open(self) -> None:
        """Nobody needs to wait any more: the reader has gone."""
        self._open = True
        self._changed.set()


class Tally:
    """Counts bytes that were taken, and says when the sender is to hear of them."""

    def __init__(self) -> None:
        self._count = 0

    def take(self, size: int) -> int:
        """Bytes to report now, or 0."""
        self._count += size
        if self._count < WINDOW // 4:
            return 0
        count, self._count = self._count, 0
        return count


class Back:
    """Stands in a replica between Ray and the application; the other end of `Front`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        incoming, gone = asyncio.Queue[Message](), asyncio.Event()
        unsent, taken = Window(), Tally()
        last: Message | None = None

        async def read() -> None:
            """Tells the proxy's messages from the client's."""
            while True:
                message = await receive()
                if message["type"] == SENT:
                    unsent.read(message["size"])
                    continue
                incoming.put_nowait(message)
                if message["type"].endswith(".disconnect"):
                    gone.set()
                    unsent.open()
                    return

        async def receiving() -> Message:
            nonlocal last
            if last is None:
                message = await incoming.get()
                if message["type"].endswith(".disconnect"):
                    last = message
                elif count := taken.take(size_of(message)):
                    await send({"type": READ, "size": count})
                return message
            return last

        async def sending(message: Message) -> None:
            await unsent.room()
            if gone.is_set():
                # As uvicorn does: a WebSocket's endpoint is told, one of HTTP is not.
                if scope["type"] == "websocket":
                    raise OSError("the client has gone")
                return
            unsent.sent(size_of(message))
            await send(message)

        await send({"type": BEGUN})
        reading = asyncio.create_task(read())
        try:
            await self._app(scope, receiving, sending)
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await reading
