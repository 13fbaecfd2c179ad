"""Frees the model of a server that nobody uses, and loads it again for whoever comes next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.server.errors import ApiError
from mimo_fast.server.logs import log
from mimo_fast.server.service import Service


class Keeper:
    """Knows who uses the model; `seconds` after the last of them it is freed.

    Args:
        load: loads the model again; None keeps it for ever, whatever `seconds` says.
        seconds: negative for ever.

    Attributes:
        loaded: Whether there is a model at present.
        users: How many use it.
    """

    def __init__(
        self, service: Service, load: Callable[[], MimoAudio] | None, seconds: float
    ) -> None:
        self._service, self._load, self._seconds = service, load, seconds
        self._timer: asyncio.TimerHandle | None = None
        self._freeing: asyncio.Task[None] | None = None
        self._until: datetime | None = None
        self.users, self.loaded = 0, True

    @property
    def frees(self) -> bool:
        """Whether it ever frees the model."""
        return self._load is not None

    @property
    def until(self) -> datetime | None:
        """When the model will be freed, as it looks now."""
        return self._until

    @asynccontextmanager
    async def used(self) -> AsyncIterator[None]:
        """Holds the model, which is loaded first where it was freed."""
        self.users += 1
        self._cancel()
        try:
            if self._load is not None:
                # Behind a call that frees it, where one waits.
                await self._service.worker.call(self._ensure)
            yield
        finally:
            self.users -= 1
            if not self.users and self._load is not None and self._seconds >= 0:
                self._until = datetime.now(UTC) + timedelta(seconds=self._seconds)
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._seconds, self._begin_to_free)

    async def free(self) -> None:
        """Frees the model, if nobody uses it when that is its turn."""
        self._cancel()
        await self._service.worker.call(self._free)

    def _begin_to_free(self) -> None:
        self._freeing = asyncio.ensure_future(self.free())
        # A server that stops frees all there is.
        self._freeing.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _cancel(self) -> None:
        self._until = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ensure(self) -> None:
        """In the compute thread."""
        if not self.loaded:
            assert self._load is not None
            self._service.model = self._load()
            self.loaded = True
            log("model loaded")

    def _free(self) -> None:
        """In the compute thread."""
        if self.loaded and not self.users:
            self._service.model.close()
            self.loaded = False
            log("model freed")


def described(state: Any) -> dict[str, Any] | None:
    """The model in memory of an application's state, its users and until when; None for none."""
    if not state.keeper.loaded:
        return None
    until = state.keeper.until
    return {
        "name": state.service.name,
        "model": state.service.name,
        "users": state.keeper.users,
        "expires_at": None if until is None else until.isoformat(timespec="seconds"),
    }


def model_is_kept() -> ApiError:
    message = "this server keeps its model: start it with --keep-alive, such as 5m"
    return ApiError(message, 403, "model_is_kept")


def model_in_use() -> ApiError:
    return ApiError("the model is in use: try again later", 409, "model_in_use")


async def list_loaded(request: Request) -> Response:
    """`GET /api/ps`: models in memory, and until when."""
    found = described(request.app.state)
    return JSONResponse({"models": [found] if found else []})


async def free_model(request: Request) -> Response:
    """`DELETE /api/ps`: frees the model now; the next request loads it again."""
    keeper = request.app.state.keeper
    if not keeper.frees:
        raise model_is_kept()
    if keeper.users:
        raise model_in_use()
    await keeper.free()
    return JSONResponse({"models": []})
