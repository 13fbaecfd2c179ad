"""`POST /v1/realtime/client_secrets`: a key that a page or a phone may have."""

from __future__ import annotations

from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.server.checks import mapping, needed, one_of, refuse_unknown, whole
from mimo_fast.server.realtime.config import Kind
from mimo_fast.server.realtime.openai import new_config
from mimo_fast.server.requests import read_json

SECONDS, LEAST, MOST = 600, 10, 7200
"""How long a client secret lives: by default, at least, at most."""

KINDS: tuple[Kind, ...] = ("realtime", "transcription")


async def create_secret(request: Request) -> Response:
    """A client secret and the session that it opens."""
    state = request.app.state
    body = await read_json(request) if await request.body() else {}
    refuse_unknown(body, {"expires_after", "session"}, "")
    seconds = _seconds(body.get("expires_after"))
    given = body.get("session")
    session = {"type": "realtime"} if given is None else mapping(given, "session")
    type = needed(session, "type", "session.type")
    one_of(type, "session.type", KINDS)
    config = new_config(state, type)
    config.update(session)
    value = state.client_secrets.make(session, seconds)
    found = {"value": value, "expires_at": int(time()) + seconds, "session": config.values}
    return JSONResponse(found, headers={"Cache-Control": "no-store"})


def _seconds(given: Any) -> int:
    if given is None:
        return SECONDS
    value = mapping(given, "expires_after")
    refuse_unknown(value, {"anchor", "seconds"}, "expires_after")
    if value.get("anchor") is not None:
        one_of(value["anchor"], "expires_after.anchor", ("created_at",))
    if value.get("seconds") is None:
        return SECONDS
    return whole(value["seconds"], "expires_after.seconds", LEAST, MOST)
