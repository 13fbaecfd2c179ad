"""What runs in Ray's HTTP proxies: the limits of our own server, and answers in the API's shape.

uvicorn with our protocols -> Front -> Ray's proxy -> a replica

Ray's proxy starts uvicorn with its defaults, reads whatever a client sends into a queue, lets
requests wait for ever, and leaves a WebSocket whose replica died without a close code.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_fast.server.answers import refuse
from mimo_fast.server.errors import ApiError, full
from mimo_fast.server.protocols import WebSocket, http_protocol
from mimo_fast.server.replicas.flow import BEGUN, READ, SENT, Tally, Window, size_of
from mimo_fast.server.serving import KEEP_ALIVE, PING
from mimo_fast.server.settings import Settings

VARIABLE = "MIMO_FAST_PROXY"
"""Environment variable of a proxy with its bounds, as JSON."""

CALLBACK = "mimo_fast.server.replicas.proxy.middlewares"
"""What Ray calls in a proxy before it starts uvicorn."""

ORDERS = frozenset(
    {
        *(b"x-request-id", b"x-request-timeout-seconds", b"x-request-disconnect-disabled"),
        *(b"serve-multiplexed-model-id", b"serve-session-id", b"x-session-id"),
    }
)
"""Headers by which Ray would take orders of a client."""

RESTART = 1012
"""Close code of a session whose replica ended: "service restart"; the client may connect again."""

LOST = "the replica of this session has ended: connect again"


@dataclass(frozen=True)
class ProxyBounds:
    """What a proxy knows of the settings."""

    max_connections: int
    max_message_bytes: int
    queue_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> ProxyBounds:
        return cls(settings.max_connections, settings.max_message_bytes, settings.queue_seconds)

    def variables(self) -> dict[str, str]:
        """Environment of the proxies."""
        return {
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
            VARIABLE: json.dumps(asdict(self)),
        }


def middlewares() -> list[Middleware]:
    """What stands in front of Ray's proxy in this process."""
    bounds = ProxyBounds(**json.loads(os.environ[VARIABLE]))
    bound_uvicorn(bounds)
    return [Middleware(Front, bounds=bounds)]


def bound_uvicorn(bounds: ProxyBounds) -> None:
    """Gives this process's uvicorn servers the protocols and limits of `Server`.

    Ray has no options for them.
    """
    plain = uvicorn.Config

    class Config(plain):  # type: ignore[misc, valid-type]
        def __init__(self, app: Any, **options: Any) -> None:
            ours: dict[str, Any] = {
                "http": http_protocol(bounds.max_connections),
                "ws": WebSocket,
                "ws_max_size": bounds.max_message_bytes,
                "ws_ping_interval": PING,
                "ws_ping_timeout": PING,
                "ws_per_message_deflate": False,
                "server_header": False,
                "timeout_keep_alive": KEEP_ALIVE,
            }
            super().__init__(app, **(options | ours))

    uvicorn.Config = Config  # type: ignore[misc, assignment]


class Front:
    """Stands between uvicorn and Ray's proxy."""

    def __init__(self, app: ASGIApp, bounds: ProxyBounds) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        headers = [pair for pair in scope["headers"] if pair[0].replace(b"_", b"-") not in ORDERS]
        exchange = Exchange(self._app, {**scope, "headers": headers}, receive, send)
        await exchange.run(self._bounds.queue_seconds)


class Exchange:
    """One request or WebSocket on its way through Ray."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._is_socket = scope["type"] == "websocket"
        self._incoming = asyncio.Queue[Message]()
        self._unread, self._taken = Window(), Tally()
        self._begun = asyncio.Event()
        self._started = self._complete = False
        self._refused = 0

    async def run(self, wait: float) -> None:
        """Until it is answered.

        Args:
            wait: seconds that it may take to reach a replica.
        """
        reading = asyncio.create_task(self._read())
        working = asyncio.ensure_future(self._app(self._scope, self._give, self._take))
        waiting = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait(
                {working, waiting, reading}, timeout=wait, return_when=asyncio.FIRST_COMPLETED
            )
            if not (self._begun.is_set() or working.done() or reading.done()):
                await self._fail(full("all replicas are full, or none is ready: try again later"))
                # To Ray it looks like a client that left.
                self._incoming.put_nowait(self._gone())
            await working
            await self._finish()
        finally:
            for task in (reading, working, waiting):
                task.cancel()
            await asyncio.gather(reading, working, waiting, return_exceptions=True)

    async def _read(self) -> None:
        """Takes the client's messages as fast as the application reads them."""
        while True:
            await self._unread.room()
            message = await self._receive()
            self._unread.sent(size_of(message))
            self._incoming.put_nowait(message)
            if message["type"].endswith(".disconnect"):
                self._complete = True
                return

    async def _give(self) -> Message:
        return await self._incoming.get()

    async def _take(self, message: Message) -> None:
        kind = message["type"]
        if kind == BEGUN:
            self._begun.set()
        elif kind == READ:
            self._unread.read(message["size"])
        elif not self._begun.is_set():
            # Ray's own answer: plain text, and one of HTTP to a WebSocket too.
            self._refused = message.get("status", self._refused)
        elif not self._complete:
            await self._pass_on(message)
            if count := self._taken.take(size_of(message)):
                self._incoming.put_nowait({"type": SENT, "size": count})

    async def _pass_on(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.start", "websocket.http.response.start"):
            message = {**message, "headers": _once(message.get("headers", []))}
        self._started = True
        if kind == "websocket.close" or (
            kind.endswith("response.body") and not message.get("more_body", False)
        ):
            self._complete = True
        try:
            await self._send(message)
        except Exception as error:
            # uvicorn's way to say that the client of a WebSocket has gone.
            if type(error).__name__ != "ClientDisconnected":
                raise
            self._complete = True

    async def _finish(self) -> None:
        """Ends what Ray has left without an end."""
        if self._complete:
            return
        if not self._started:
            if self._refused in (429, 503) or not self._begun.is_set():
                problem = "no replica is ready: try again later"
            else:
                problem = "the replica of this request has ended: try again"
            headers = {"Retry-After": "1"}
            await self._fail(ApiError(problem, 503, "replica_lost", headers=headers))
        elif self._is_socket:
            with suppress(Exception):
                await self._send({"type": "websocket.close", "code": RESTART, "reason": LOST})
        # An answer that has begun breaks off: only its missing end can tell.

    async def _fail(self, error: ApiError) -> None:
        self._complete = True
        with suppress(Exception):
            await refuse(self._scope, self._receive, self._send, error)

    def _gone(self) -> Message:
        if self._is_socket:
            return {"type": "websocket.disconnect", "code": 1006}
        return {"type": "http.disconnect"}


def _once(headers: list[Any]) -> list[Any]:
    """Headers with one request id: the replica's, which its log has, not Ray's behind it."""
    found, seen = [], False
    for name, value in headers:
        is_id = bytes(name).lower() == b"x-request-id"
        if not (is_id and seen):
            found.append((name, value))
        seen = seen or is_id
    return found
