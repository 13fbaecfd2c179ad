"""WebRTC calls: `POST /v1/realtime/calls`, `POST /v1/realtime/calls/{id}/hangup`.

aiortc, which carries them, is imported when the first one comes.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mimo_fast.server.checks import Json, mapping, one_of, refusal
from mimo_fast.server.errors import ApiError
from mimo_fast.server.models import find_model
from mimo_fast.server.realtime.config import Kind
from mimo_fast.server.requests import content_type, parse_object

MOST_SDP = 2**16
"""Bytes of an offer: those of browsers have some thousands."""

MOST_FORM = 2**20
"""Bytes of a form with an offer and a session."""

SDP, FORM = "application/sdp", "multipart/form-data"
KINDS: tuple[Kind, ...] = ("realtime", "transcription")


async def create_call(request: Request) -> Response:
    """Answers an offer."""
    state = request.app.state
    if state.stopping:
        raise ApiError("the server is stopping", 503, "server_stopping")
    offer, session = await _read(request)
    model, service = request.query_params.get("model"), state.service
    if model is not None:
        service = find_model(service, model)
    secret = request.scope.get("client_secret")
    sessions = [each for each in (None if secret is None else secret.session, session) if each]
    kind = _kind(sessions)
    peers = await _peers()
    call = peers.Call(state, kind, sessions, secret, service.name)
    answer = await call.answer(offer)
    headers = {"Location": f"/v1/realtime/calls/{call.id}"}
    return Response(answer, 201, headers, SDP)


async def hang_up(request: Request) -> Response:
    """Ends a call; a client secret ends only those that it has made."""
    call = request.app.state.calls.get(request.path_params["id"])
    secret = request.scope.get("client_secret")
    if call is None or (secret is not None and call.secret is not secret):
        raise ApiError("there is no such call, or it has ended", 404, "call_not_found")
    await call.hang_up()
    return Response(status_code=200)


async def _peers() -> Any:
    """The module of calls.

    Raises:
        ApiError: of status 501, its packages are not there.
    """
    try:
        # Beside the event loop: it takes a second.
        return await asyncio.to_thread(importlib.import_module, "mimo_fast.server.realtime.peer")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mimo_fast"):
            raise
        message = (
            f"WebRTC needs more packages, of which {error.name} is missing: install them with "
            "pip install 'mimo-fast[webrtc]', or use the WebSocket /v1/realtime"
        )
        raise ApiError(message, 501, "webrtc_not_installed") from None


async def _read(request: Request) -> tuple[str, Json | None]:
    """The offer of a request, and the session that comes with it."""
    kind, body = content_type(request), await request.body()
    if kind == SDP:
        return _offer(body), None
    if kind != FORM:
        problem = f"the body is {kind or 'of no type'}; send an offer as {SDP}, or {FORM} with"
        raise ApiError(f"{problem} sdp and session", 415, "unsupported_type")
    if len(body) > MOST_FORM:
        raise ApiError(f"the form is larger than {MOST_FORM} bytes", 413, "request_too_large")
    try:
        async with request.form(max_files=2, max_fields=8, max_part_size=MOST_FORM) as form:
            parts = {name: await _part(value) for name, value in form.items()}
    except HTTPException as error:
        raise ApiError(f"the form cannot be read: {error.detail}", 400, "invalid_form") from None
    if "sdp" not in parts:
        raise refusal("sdp is missing", "sdp", "missing_required_parameter")
    session = parts.get("session")
    return _offer(parts["sdp"]), None if session is None else parse_object(session)


async def _part(value: UploadFile | str) -> bytes:
    return await value.read() if isinstance(value, UploadFile) else value.encode()


def _offer(body: bytes) -> str:
    if len(body) > MOST_SDP:
        problem = f"the offer is larger than {MOST_SDP} bytes"
        raise ApiError(problem, 413, "request_too_large", "sdp")
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise refusal("the offer is no text in UTF-8", "sdp", "invalid_sdp") from None


def _kind(sessions: list[Json]) -> Kind:
    found: Kind = "realtime"
    for session in sessions:
        type = mapping(session, "session").get("type", found)
        one_of(type, "session.type", KINDS)
        session["type"] = found = type
    return found
