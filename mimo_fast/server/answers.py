"""Answers that come before any endpoint: refusals over HTTP and of a WebSocket's handshake."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mimo_fast.server.errors import ApiError


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Sends an error in the API's shape; a WebSocket is refused in its handshake."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get(
        "extensions", {}
    ):
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
        return
    response = JSONResponse({"error": error.body()}, error.status, error.headers)
    await response(scope, receive, send)
