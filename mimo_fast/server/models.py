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
"""OpenAI's names, which stock clients send where nobody chose one; they mean the one model."""

STARTED = int(time())


def check_model(service: Service, name: object, param: str = "model") -> None:
    """Raises an `ApiError` of status 404 unless a name is the model's or an alias."""
    if not isinstance(name, str) or not name:
        raise ApiError(f"{param} must be the name of a model", 400, "invalid_type", param)
    if name != service.name and name not in ALIASES:
        raise ApiError(
            f"there is no model {name:.60}; this server has {service.name}",
            404,
            "model_not_found",
            param,
        )


def _described(service: Service) -> dict[str, object]:
    return {"id": service.name, "object": "model", "created": STARTED, "owned_by": "mimo-fast"}


async def models(request: Request) -> Response:
    found = [_described(request.app.state.service)]
    return JSONResponse({"object": "list", "data": found})


async def model(request: Request) -> Response:
    service = request.app.state.service
    check_model(service, request.path_params["name"])
    return JSONResponse(_described(service))
