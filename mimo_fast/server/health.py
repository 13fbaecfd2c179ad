"""`/health`: the server lives. `/ready`: it can take work."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast import __version__
from mimo_fast.server.errors import ApiError

ANSWER = 10.0
"""Seconds within which the compute thread takes a call, if it works: far more than a step takes."""


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok", "version": __version__})


async def ready(request: Request) -> Response:
    state: Any = request.app.state
    if state.stopping:
        raise ApiError("the server is stopping", 503, "server_stopping")
    # All who ask meanwhile wait for one call.
    if state.probe is None or state.probe.done():
        state.probe = asyncio.ensure_future(state.service.worker.call(int))
        state.probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
    done, _ = await asyncio.wait({state.probe}, timeout=ANSWER)
    if not done or state.probe.cancelled() or state.probe.exception() is not None:
        message = "the compute thread does not answer: see the log, and start the server again"
        raise ApiError(message, 503, "not_ready")
    return JSONResponse(
        {
            "status": "ready",
            "model": state.service.name,
            "sessions": {"taken": state.sessions.taken, "most": state.sessions.most},
            "requests": {
                "taken": state.requests.taken,
                "most": state.requests.most,
                "waiting": state.requests.waiting,
            },
        }
    )
