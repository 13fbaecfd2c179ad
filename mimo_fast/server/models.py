"""`/v1/models`, and which names a request may give its model."""

from __future__ import annotations

from time import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.server.errors import ApiError
from mimo_fast.server.service import Service

ALIASES = frozenset(
    {
        *("gpt-realtime", "gpt-realtime-mini", "gpt-4o-realtime-preview"),
        *("gpt-audio", "gpt-audio-mini", "gpt-4o-audio-preview"),
        *("tts-1", "tts-1-hd", "gpt-4o-mini-tts"),
        *("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "gpt-realtime-whisper"),
    }
)
"""OpenAI's names, which stock clients send where nobody chose one; they mean the model itself."""

STARTED = int(time())


def find_model(service: Service, name: object, param: str = "model") -> Service:
    """The service of the model that a request names; an alias is what `service` is.

    Raises:
        ApiError: of status 404, there is no such model.
    """
    if not isinstance(name, str) or not name:
        raise ApiError(f"{param} must be the name of a model", 400, "invalid_type", param)
    if name in service.models:
        return service.called(name)
    if name in ALIASES:
        return service
    known = ", ".join(service.models)
    problem = f"there is no model {name:.60}; this server has {known}"
    raise ApiError(problem, 404, "model_not_found", param)


def _described(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": STARTED, "owned_by": "mimo-fast"}


async def models(request: Request) -> Response:
    found = [_described(name) for name in request.app.state.service.models]
    return JSONResponse({"object": "list", "data": found})


async def model(request: Request) -> Response:
    service = find_model(request.app.state.service, request.path_params["name"])
    return JSONResponse(_described(service.name))
