"""Realtime sessions over a WebSocket; `?intent=transcription` makes one that only listens."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from mimo_fast.server.checks import Json
from mimo_fast.server.errors import ApiError
from mimo_fast.server.models import find_model
from mimo_fast.server.realtime.config import TRANSCRIBERS, Kind
from mimo_fast.server.realtime.openai import Client


async def realtime(websocket: WebSocket) -> None:
    """The endpoint: `/v1/realtime`."""
    state = websocket.app.state
    secret = websocket.scope.get("client_secret")
    sessions: list[Json] = [] if secret is None else [secret.session]
    asked = websocket.query_params.get("intent")
    kind: Kind = "transcription" if asked == "transcription" else "realtime"
    if sessions:
        kind = sessions[0]["type"]
    model, service = websocket.query_params.get("model"), state.service
    try:
        if model is not None and not (kind == "transcription" and model in TRANSCRIBERS):
            service = find_model(service, model)
        client = Client(state, kind, sessions, service.name)
    except ApiError as error:
        await websocket.send_denial_response(JSONResponse({"error": error.body()}, error.status))
        return
    await websocket.accept()
    await _carry(websocket, client)


async def _carry(websocket: WebSocket, client: Client) -> None:
    """Carries events until the client leaves; then nothing of it is left."""
    writer = asyncio.create_task(_write(websocket, client))
    reader = asyncio.create_task(_read(websocket, client))
    try:
        await asyncio.wait([writer, reader], return_when=asyncio.FIRST_COMPLETED)
    finally:
        client.left = True
        for task in (writer, reader):
            task.cancel()
        await asyncio.shield(client.close())
        for task in (writer, reader):
            with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError, OSError):
                await task


async def _read(websocket: WebSocket, client: Client) -> None:
    await client.begin()
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        await client.ready()
        await client.handle(message.get("text"))


async def _write(websocket: WebSocket, client: Client) -> None:
    while True:
        while client.outbox:
            # Room is made once the event has gone.
            event = client.outbox.take()
            await websocket.send_text(event)
            client.make_room()
        client.news.clear()
        await client.news.wait()
