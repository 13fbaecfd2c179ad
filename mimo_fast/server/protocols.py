"""uvicorn's protocols with bounds on what happens before and beside a request."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

HEAD = 15.0
"""Seconds that the head of a request may take from its first byte, or from connecting."""

STALL = 60.0
"""Seconds without reading after which a client that is being answered is given up."""

READ = 1 << 14
"""Bytes taken from a connection at a time, so that one that sends tiny frames delays nobody."""

DISCARDED = 128 << 20
"""Bytes of a body that are read and dropped after it was refused, so that the client sees why."""


def read_little(transport: asyncio.BaseTransport) -> None:
    """Bounds what is read at a time, where the event loop's transport has a bound."""
    if hasattr(transport, "max_size"):
        transport.max_size = READ


class Http(H11Protocol):
    """HTTP/1.1; a class of the server's own settings, see `http_protocol`."""

    max_connections = 512

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        read_little(transport)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._dropped = 0
        if len(self.connections) > self.max_connections:
            # Not even a refusal is read by a flood.
            transport.abort()  # type: ignore[attr-defined]
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self._head is None:
                self._await_head()
        else:
            self._stop_head()
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self._dropped += len(data)
            if self._dropped > DISCARDED:
                self.transport.abort()
        else:
            self._dropped = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _await_head(self) -> None:
        self._head = self.loop.call_later(HEAD, self.transport.abort)

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class WebSocket(WebSocketsSansIOProtocol):
    """WebSockets whose clients are given up when they neither read nor answer pings."""

    _stall: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_stall()
        super().connection_lost(exc)

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        refused = message["type"] == "websocket.http.response.body"
        if refused and not message.get("more_body", False):
            # A handshake that was refused is complete, too; else it would be logged as an error.
            self.handshake_complete = True

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        # Closing would wait for a client that does not read.
        self.transport.abort()

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def http_protocol(most: int) -> type[Http]:
    """The class of HTTP connections of a server that takes so many."""
    attributes: dict[str, Any] = {"max_connections": most}
    return type("Http", (Http,), attributes)
