"""The application: routes and what stands in front of them.

    Records -> Guard -> Bounds -> routes -> endpoints -> Service
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.models import model, models
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings


def create_app(service: Service, settings: Settings | None = None) -> Starlette:
    """The ASGI application of a service; `settings` defaults to `Settings()`.

    `app.state` has `service`, `settings` and `voices`.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield

    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/audio/speech", _entry("speech", "speech"), methods=["POST"]),
            WebSocketRoute("/v1/audio/speech/stream", _entry("speech", "speech_stream")),
            Route(
                "/v1/audio/transcriptions",
                _entry("transcriptions", "transcriptions"),
                methods=["POST"],
            ),
            Route("/v1/chat/completions", _entry("chat", "chat"), methods=["POST"]),
            WebSocketRoute("/v1/realtime", _entry("realtime", "realtime")),
        ],
        exception_handlers={
            HTTPException: _http_error,
            ApiError: _error,
            Exception: _error,
        },
        lifespan=lifespan,
    )
    app.state.service, app.state.settings, app.state.voices = service, settings, None
    return app


def _entry(module: str, name: str) -> Callable[..., Awaitable[Any]]:
    try:
        return getattr(import_module(f"mimo_fast.server.{module}"), name)
    except (ModuleNotFoundError, AttributeError):

        async def missing(connection: Any) -> Response:
            raise ApiError(f"this build has no {module}", 501, "not_implemented")

        return missing


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "not_found", 405: "method_not_allowed"}
    found = ApiError(str(error.detail), error.status_code, known.get(error.status_code))
    return await _error(request, found)


async def _error(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    return JSONResponse({"error": found.body()}, found.status, found.headers)
