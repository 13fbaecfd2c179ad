"""The outermost layer: an id, a line of log and the metrics of every request; errors as answers."""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_fast.server.answers import refuse
from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.limits import ClientGone
from mimo_fast.server.logs import log, log_failure, request_id, words_wanted
from mimo_fast.server.metrics import Metrics
from mimo_fast.server.settings import Settings

LEFT = 499
"""Status in logs and metrics where the client left before the answer was complete."""

QUIET = frozenset({"/health", "/ready", "/metrics"})
"""Paths that are asked for all the time; their lines are of level debug."""


class Records:
    """Gives every request an id, which its answer and its line of the log have, and counts it.

    Args:
        paths: endpoints that metrics tell apart; any other path is "other".
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        identity = f"req_{uuid4().hex}"
        request_id.set(identity)
        words_wanted.set(self._settings.log_words)
        begun, status = perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            kind = message["type"]
            if kind in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = identity
            elif kind == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientGone:
            status = LEFT
        except asyncio.CancelledError:
            status = status or LEFT
            raise
        finally:
            seconds = perf_counter() - begun
            path = scope["path"]
            known = path if path in self._paths else "other"
            self._metrics.answered(known, status, seconds)
            log(
                "request" if scope["type"] == "http" else "session",
                logging.DEBUG if path in QUIET else logging.INFO,
                method=scope.get("method"),
                path=path[:100],
                status=status,
                seconds=round(seconds, 3),
                client=scope["client"][0] if scope.get("client") else None,
            )


class Errors:
    """Makes answers of the errors of all layers below, and of the endpoints."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = ended = False

        async def sending(message: Message) -> None:
            nonlocal begun, ended
            begun = True
            ended = message["type"] == "websocket.close"
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientGone:
            raise
        except Exception as error:
            if _is_left(error):
                raise ClientGone from None
            found = as_api_error(error)
            self._metrics.failed(found.code)
            if found.status >= 500 and not isinstance(error, ApiError):
                log_failure(error, path=scope["path"][:100])
            if not begun:
                await refuse(scope, receive, send, found)
            elif scope["type"] == "websocket" and not ended:
                code = 1013 if found.status == 429 else 1011 if found.status >= 500 else 1008
                await send({"type": "websocket.close", "code": code, "reason": found.message[:100]})
            elif scope["type"] == "http":
                # The answer has begun: only its missing end can tell.
                raise Unfinished from error


class Unfinished(Exception):
    """An answer broke off."""


def _is_left(error: Exception) -> bool:
    """Whether it only says that the client of a WebSocket or of an answer has gone."""
    return type(error).__name__ in ("ClientDisconnected", "ClientDisconnect", "WebSocketDisconnect")
