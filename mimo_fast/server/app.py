"""The application: routes and what stands in front of them.

Records -> CORS -> Errors -> Guard -> Bounds -> route -> endpoint -> Service
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.server.chat import chat
from mimo_fast.server.client_secrets import ClientSecrets
from mimo_fast.server.conversions import conversions
from mimo_fast.server.errors import ApiError
from mimo_fast.server.examples import ExampleSets, list_examples
from mimo_fast.server.health import health, ready
from mimo_fast.server.keeping import Keeper, free_model, list_loaded
from mimo_fast.server.limits import SESSION_WAIT, Bounds, Live, Places
from mimo_fast.server.metrics import Metrics, show_metrics, threads
from mimo_fast.server.models import model, models
from mimo_fast.server.page import page, page_config, static_files
from mimo_fast.server.realtime.calls import create_call, hang_up
from mimo_fast.server.realtime.client_secrets import create_secret
from mimo_fast.server.realtime.sockets import realtime
from mimo_fast.server.records import Errors, Records
from mimo_fast.server.security import Guard
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings
from mimo_fast.server.speech import speech, speech_stream
from mimo_fast.server.transcriptions import transcriptions
from mimo_fast.server.voices import Voices, add_voice, list_voices

COMPUTING = frozenset(
    {
        *("/v1/audio/speech", "/v1/audio/transcriptions", "/v1/audio/conversions"),
        *("/v1/chat/completions", "/v1/audio/voices"),
    }
)
"""Paths whose POST requests take one of the places for requests."""


def create_app(
    service: Service,
    settings: Settings | None = None,
    load: Callable[[], MimoAudio] | None = None,
) -> Starlette:
    """The ASGI application of a service.

    Args:
        settings: None for `Settings()`.
        load: loads the model again after `settings.keep_alive` has freed it.

    `app.state` has:
        service, settings: the arguments.
        voices, examples: `Voices` and `ExampleSets`.
        metrics: `Metrics`.
        keeper: `Keeper`.
        requests, sessions: `Places` of requests that compute and of WebSockets.
        live: the WebSockets that are open, and the WebRTC calls, which `calls` has by their ids.
        client_secrets: `ClientSecrets`.
        stopping: whether new work is refused.
        elsewhere: finds an earlier answer of a chat in other processes; None where there are none.
    """
    settings = settings or Settings()
    metrics = Metrics()
    requests = Places(settings.max_requests, settings.queue_seconds, "places for requests")
    waits = min(SESSION_WAIT, settings.queue_seconds)
    sessions = Places(settings.max_sessions, waits, "places for sessions")
    routes, secrets = _routes(), ClientSecrets()
    paths = frozenset(getattr(route, "path", "") for route in routes)
    front = [Middleware(Records, settings=settings, metrics=metrics, paths=paths)]
    if settings.allowed_origins:
        front.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "location"],
            )
        )
    front += [
        Middleware(Errors, metrics=metrics),
        Middleware(Guard, settings=settings, secrets=secrets),
        Middleware(
            Bounds, settings=settings, requests=requests, sessions=sessions, computing=COMPUTING
        ),
    ]
    app = Starlette(
        routes=routes, middleware=front, exception_handlers={HTTPException: _http_error}
    )
    # A path with one slash too many is no other path.
    app.router.redirect_slashes = False
    state = app.state
    state.service, state.settings, state.voices = service, settings, Voices(settings.voices)
    state.examples = ExampleSets(settings.examples)
    state.metrics, state.requests, state.sessions = metrics, requests, sessions
    state.keeper = Keeper(service, load if settings.keep_alive >= 0 else None, settings.keep_alive)
    state.calls, state.client_secrets = dict[str, Any](), secrets
    state.live, state.stopping, state.probe = set[Live](), False, None
    state.elsewhere = None
    service.worker.meter = metrics.speech
    _show(metrics, app)
    return app


def _routes() -> list[BaseRoute]:
    return [
        Route("/", page),
        Mount("/static", static_files),
        Route("/page/config", page_config),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", show_metrics),
        Route("/api/ps", list_loaded),
        Route("/api/ps", free_model, methods=["DELETE"]),
        Route("/v1/models", models),
        # Open WebUI asks for it.
        Route("/v1/audio/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/audio/voices", list_voices),
        Route("/v1/audio/voices", add_voice, methods=["POST"]),
        Route("/v1/audio/examples", list_examples),
        Route("/v1/audio/speech", speech, methods=["POST"]),
        WebSocketRoute("/v1/audio/speech/stream", speech_stream),
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/audio/conversions", conversions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        WebSocketRoute("/v1/realtime", realtime),
        Route("/v1/realtime/calls", create_call, methods=["POST"]),
        Route("/v1/realtime/calls/{id}/hangup", hang_up, methods=["POST"]),
        Route("/v1/realtime/client_secrets", create_secret, methods=["POST"]),
    ]


def _show(metrics: Metrics, app: Starlette) -> None:
    state = app.state
    metrics.show("sessions", "Sessions and speech streams open", lambda: state.sessions.taken)
    metrics.show("sessions_most", "Places for them", lambda: state.sessions.most)
    metrics.show("requests_running", "Requests that compute", lambda: state.requests.taken)
    metrics.show("requests_waiting", "Requests that wait", lambda: state.requests.waiting)
    metrics.show("streams", "Streams that the model works on", lambda: state.service.worker.streams)
    metrics.show("threads", "Threads of Python", threads)

    def engine(name: str) -> Callable[[], int]:
        return lambda: state.service.model.pipeline.counters[name]

    metrics.show("prompts", "Prompts that began without a cache", engine("prompts"))
    metrics.show("prefix_hits", "Of those that began as others had", engine("prefix_hits"))
    metrics.show("prefix_groups", "Groups that were not computed again", engine("prefix_groups"))
    metrics.show("prefix_bytes", "Held of beginnings of prompts", engine("prefix_bytes"))
    metrics.show("evictions", "Sequences moved to host memory", engine("evictions"))


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses, in the API's shape."""
    assert isinstance(error, HTTPException)
    known = {404: "not_found", 405: "method_not_allowed"}
    code = known.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    if error.status_code == 404:
        message += "; the endpoints are under /v1, see docs/server.md"
    request.app.state.metrics.failed(code)
    found = ApiError(message, error.status_code, code)
    return JSONResponse({"error": found.body()}, found.status, dict(error.headers or {}))
