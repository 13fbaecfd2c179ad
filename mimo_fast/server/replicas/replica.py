"""What runs in a replica: the application, what replicas ask each other, draining."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import ray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from ray import serve
from ray.serve._private import replica as ray_replica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.server.app import create_app
from mimo_fast.server.chat import Answers, Kept
from mimo_fast.server.errors import ApiError
from mimo_fast.server.keeping import described, model_in_use, model_is_kept
from mimo_fast.server.logs import log, set_up_logs
from mimo_fast.server.memory import Trimmer
from mimo_fast.server.metrics import merged
from mimo_fast.server.replicas.flow import Back
from mimo_fast.server.service import Service
from mimo_fast.server.serving import drain
from mimo_fast.server.settings import Settings

ASKING = 5.0
"""Seconds that other replicas have to answer one."""

PROBE = 30.0
"""Seconds without an answer of the compute thread after which Ray replaces a replica."""


class Replica:
    """A model and its server without a socket, in a process that Ray starts.

    Args:
        load: loads the model.
        make: makes its service of it.
    """

    def __init__(
        self,
        load: Callable[[], MimoAudio],
        make: Callable[[MimoAudio], Service],
        settings: Settings,
    ) -> None:
        set_up_logs(settings.log_level)
        bind_to_node()
        self._settings, self._load = settings, load
        self._tag = serve.get_replica_context().replica_tag
        self._service = make(load())
        self._app: Starlette | None = None
        self._draining: asyncio.Task[None] | None = None
        log("replica begun", replica=self._tag, pid=os.getpid())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        # The address is the proxy's; what it implies is for the application to judge.
        self._app = app = create_app(self._service, self._settings, self._load)
        state = app.state
        state.answers, state.elsewhere = Answers(), self._find_answers
        state.voices.shared = True
        app.router.routes[:0] = [
            Route("/metrics", self._show_metrics),
            Route("/api/ps", self._list_loaded),
            Route("/api/ps", self._free_models, methods=["DELETE"]),
        ]
        worker = self._service.worker
        self._trimming = asyncio.create_task(Trimmer(lambda: worker.streams > 0).run())
        before_draining(self._begin_to_drain)
        gc.collect()
        gc.freeze()
        return Back(app)

    async def check_health(self) -> None:
        """Ray replaces a replica whose compute thread does not answer."""
        async with asyncio.timeout(PROBE):
            await self._service.worker.call(int)

    # What the process of `mimo-fast serve` and other replicas call.

    async def stop(self, seconds: float) -> None:
        """Refuses new work and ends what runs, within so long."""
        assert self._app is not None
        if self._draining is None:
            self._draining = asyncio.create_task(drain(self._app, seconds))
        await self._draining

    async def metrics(self) -> tuple[str, str]:
        """The replica and its metrics."""
        assert self._app is not None
        return self._tag, generate_latest(self._app.state.metrics.registry).decode()

    async def loaded(self) -> dict[str, Any] | None:
        """Its model in memory, as /api/ps has it."""
        assert self._app is not None
        found = described(self._app.state)
        return found and {**found, "replica": self._tag}

    async def free(self) -> None:
        """Frees its model where nobody uses it."""
        assert self._app is not None
        if not self._app.state.keeper.users:
            await self._app.state.keeper.free()

    async def answers(self, audio_ids: list[str]) -> dict[str, Kept]:
        """Earlier answers of chats that this replica has given."""
        assert self._app is not None
        found = {each: self._app.state.answers.kept(each) for each in audio_ids}
        return {each: kept for each, kept in found.items() if kept is not None}

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What every replica answers, this one included.

        Raises:
            ApiError: of status 503, not all of them do.
        """
        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            return list(await handle.broadcast(method, *arguments).results_async(timeout_s=ASKING))
        except Exception as error:
            problem = "a replica does not answer: try again later"
            raise ApiError(problem, 503, "replica_lost") from error

    async def _find_answers(self, audio_ids: list[str]) -> dict[str, Kept]:
        found = await self._all("answers", audio_ids)
        return {audio_id: kept for each in found for audio_id, kept in each.items()}

    async def _show_metrics(self, _request: Request) -> Response:
        text = merged(await self._all("metrics"))
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _list_loaded(self, _request: Request) -> Response:
        return JSONResponse({"models": [each for each in await self._all("loaded") if each]})

    async def _free_models(self, request: Request) -> Response:
        if not request.app.state.keeper.frees:
            raise model_is_kept()
        if any(each["users"] for each in await self._all("loaded") if each):
            raise model_in_use()
        await self._all("free")
        return JSONResponse({"models": [each for each in await self._all("loaded") if each]})

    async def _begin_to_drain(self) -> None:
        await self.stop(self._settings.drain_seconds)

    async def __del__(self) -> None:
        self._trimming.cancel()
        self._service.close()


def deployment(
    load: Callable[[], MimoAudio],
    make: Callable[[MimoAudio], Service],
    settings: Settings,
    gpus: float,
) -> serve.Application:
    """What Ray Serve is to run.

    gpus: of each replica.
    """
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas:
        first = min(max(settings.replicas, settings.min_replicas), settings.max_replicas)
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.min_replicas,
                "initial_replicas": first,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing,
            }
        }
    made = serve.deployment(serve.ingress()(Replica)).options(
        name="mimo-fast",
        # Sessions and requests that a replica takes; what is more waits in the proxy.
        max_ongoing_requests=settings.max_sessions + settings.max_requests,
        graceful_shutdown_timeout_s=settings.drain_seconds + 5,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_timeout_s=PROBE + 10,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": gpus},
        logging_config={"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False},
        **scaling,
    )
    # Its paths are not files of every node's: a certificate is the proxies' alone.
    inner = replace(settings, ssl_certfile=None, ssl_keyfile=None)
    return made.bind(load, make, inner)


def bind_to_node() -> None:
    """Keeps the port by which replicas call each other on the address that Ray itself has.

    Ray binds it to all of the machine's, where strangers would reach it.
    """
    plain, address = ray_replica.add_port_to_grpc_server, ray.util.get_node_ip_address()

    def bound(server: Any, wanted: str) -> int:
        return int(plain(server, wanted.replace("[::]", address)))

    ray_replica.add_port_to_grpc_server = bound


def before_draining(begin: Callable[[], Awaitable[None]]) -> None:
    """Calls a coroutine of this event loop when Ray begins to stop this process's replica.

    Ray waits until all requests have ended and tells nobody, but a session ends only when it is
    told to.
    """
    loop = asyncio.get_running_loop()
    plain = ray_replica.Replica._drain_ongoing_requests

    async def draining(self: Any, *arguments: Any, **named: Any) -> None:
        asyncio.run_coroutine_threadsafe(begin(), loop)  # type: ignore[arg-type]
        await plain(self, *arguments, **named)

    ray_replica.Replica._drain_ongoing_requests = draining
