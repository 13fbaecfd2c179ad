"""What a request may cost before and while it runs: bytes, time, places.

body read whole, within bounds -> place -> endpoint, cancelled when its client leaves
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_fast.server.errors import ApiError, full
from mimo_fast.server.settings import Settings

ARRIVAL = 120.0
"""Seconds that a request's body may take."""

BODIES = 8
"""Bodies of the largest size that may be held at once."""

LINE = 8
"""Requests that may wait for each place."""

SESSION_WAIT = 1.0
"""Seconds that a session may wait for a place: one whose client has just gone is free by then."""

CALM = 0.5
"""Seconds without a message after which a session may be closed when the server stops."""

STILL = 3.0
"""The same while the model works: it may be on this session's reply."""


class Places:
    """A bounded number of holders; those who wait are served in order, each for a limited time.

    Attributes:
        taken, waiting: How many hold a place and wait for one.
    """

    def __init__(self, most: int, seconds: float, what: str) -> None:
        self.most, self.taken = most, 0
        self._seconds, self._what = seconds, what
        self._line = deque[asyncio.Future[None]]()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Holds a place; gives the seconds waited for it.

        Raises:
            ApiError: of status 429, none became free in time.
        """
        begun = monotonic()
        if self.taken >= self.most or self._line:
            await self._wait()
        else:
            self.taken += 1
        try:
            yield monotonic() - begun
        finally:
            self._free()

    async def _wait(self) -> None:
        if self._seconds <= 0 or len(self._line) >= self.most * LINE:
            raise self._full()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self._seconds):
                await turn
        except BaseException as error:
            if turn in self._line:
                self._line.remove(turn)
            elif turn.done() and not turn.cancelled():
                # It was given just then.
                self._free()
            if isinstance(error, TimeoutError):
                raise self._full() from None
            raise

    def _free(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                # The place changes hands.
                turn.set_result(None)
                return
        self.taken -= 1

    def _full(self) -> ApiError:
        return full(f"all {self.most} {self._what} are taken: try again later")


class Bounds:
    """Applies the limits of the settings to every request.

    Args:
        computing: paths of requests that take one of `requests`.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        requests: Places,
        sessions: Places,
        computing: frozenset[str],
    ) -> None:
        self._app, self._settings = app, settings
        self._requests, self._sessions, self._computing = requests, sessions, computing
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "websocket":
            _refuse_if_stopping(scope)
            async with self._sessions.place(), scope["app"].state.keeper.used():
                await Session(self._app, scope, receive, send).run()
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = deque[bytes]()
        size = 0
        try:
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                _check_encoding(scope)
                size = await self._read(scope, receive, body)
            computes = scope["path"] in self._computing and scope["method"] == "POST"
            await _attend(self._placed if computes else self._app, scope, body, receive, send)
        finally:
            self._held -= size

    async def _placed(self, scope: Scope, receive: Receive, send: Send) -> None:
        _refuse_if_stopping(scope)
        async with self._requests.place() as waited:
            scope["app"].state.metrics.waited(waited)
            async with scope["app"].state.keeper.used():
                await self._app(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, body: deque[bytes]) -> int:
        """Reads a body; its size, by which `_held` has grown."""
        most = self._settings.max_body_bytes
        size = 0
        too_large = ApiError(
            f"the request is larger than {most} bytes: send less, or raise --max-body-bytes",
            413,
            "request_too_large",
        )
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and (len(length) > 15 or int(length) > most):
            raise too_large
        try:
            async with asyncio.timeout(ARRIVAL):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    more = message.get("more_body", False)
                    part = message.get("body", b"")
                    if not part:
                        continue
                    size += len(part)
                    self._held += len(part)
                    if size > most:
                        raise too_large
                    if self._held > most * BODIES:
                        raise full("the server holds too many large requests: try again later")
                    body.append(part)
        except TimeoutError:
            self._held -= size
            raise ApiError(
                f"the request did not arrive within {ARRIVAL:.0f} s", 408, "request_timeout"
            ) from None
        except BaseException:
            self._held -= size
            raise
        return size


class ClientGone(Exception):
    """The client left before it had an answer."""


class Live(Protocol):
    """Somebody who talks to the server, and is told when it stops."""

    @property
    def calm(self) -> bool:
        """Whether nothing has been sent for a moment."""
        ...

    async def stop(self) -> None:
        """Ends it."""
        ...


class Session:
    """A WebSocket of an endpoint, which ends between two replies when the server stops."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app, self._scope, self._receive, self._send = app, scope, receive, send
        self._sent = monotonic()
        self._open = self._over = False

    async def run(self) -> None:
        live: set[Live] = self._scope["app"].state.live
        live.add(self)
        try:
            await self._app(self._scope, self._receive, self._sending)
        finally:
            live.discard(self)

    @property
    def calm(self) -> bool:
        """Whether nothing has been sent for a moment."""
        works = self._scope["app"].state.service.worker.streams > 0
        return monotonic() - self._sent > (STILL if works else CALM)

    async def stop(self) -> None:
        """Closes the WebSocket with 1012, "service restart"."""
        if self._over:
            return
        self._over = True
        if self._open:
            # The endpoint reads that it is closed.
            with suppress(Exception):
                reason = "the server is stopping"
                await self._send({"type": "websocket.close", "code": 1012, "reason": reason})

    async def _sending(self, message: Message) -> None:
        if self._over:
            return
        self._sent = monotonic()
        if message["type"] == "websocket.accept":
            self._open = True
        elif message["type"] == "websocket.close":
            self._over = True
        await self._send(message)


async def _attend(
    app: ASGIApp, scope: Scope, body: deque[bytes], receive: Receive, send: Send
) -> None:
    """Runs an endpoint on a body that was read; cancels it when its client leaves."""
    gone = asyncio.Event()
    complete = False
    begun = False

    async def receive_body() -> Message:
        nonlocal begun
        if body or not begun:
            begun = True
            part = body.popleft() if body else b""
            return {"type": "http.request", "body": part, "more_body": bool(body)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def sending(message: Message) -> None:
        nonlocal complete
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            complete = True
        await send(message)

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work = asyncio.ensure_future(app(scope, receive_body, sending))
    watch = asyncio.ensure_future(leave())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        gone.set()
        if not work.done() and not complete:
            work.cancel()
            await asyncio.wait({work})
            if work.cancelled() or work.exception() is not None:
                raise ClientGone
        await work
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


def _check_encoding(scope: Scope) -> None:
    headers = Headers(scope=scope)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            "requests are read as they are: send no Content-Encoding", 415, "unsupported_encoding"
        )
    if "content-length" in headers and "transfer-encoding" in headers:
        raise ApiError("a request has one length: Content-Length or Transfer-Encoding", 400)


def _refuse_if_stopping(scope: Scope) -> None:
    state: Any = scope["app"].state
    if state.stopping:
        headers = {"Retry-After": "5", "Connection": "close"}
        raise ApiError("the server is stopping", 503, "server_stopping", headers=headers)
