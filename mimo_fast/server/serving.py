"""Listening, and stopping without cutting anybody off."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.server.limits import Live
from mimo_fast.server.logs import log
from mimo_fast.server.memory import Trimmer
from mimo_fast.server.protocols import WebSocket, http_protocol
from mimo_fast.server.settings import Settings

PROMPT = 2.0
"""Seconds that Ctrl-C leaves to what runs."""

KEEP_ALIVE = 30
"""Seconds that an idle HTTP connection is kept."""

PING = 20.0
"""Seconds between pings of a WebSocket, and those that a client has to answer one."""

TELLING = 0.5
"""Seconds that it may take to tell sessions that the server stops."""

BACKLOG = 512


def listen(settings: Settings) -> socket.socket:
    """A socket that is bound to the settings' address, before a model is loaded.

    Raises:
        MimoFastError: the address cannot be had.
    """
    fix = "give another --port (0 takes a free one)"
    return bind(settings.host.strip("[]"), settings.port, "--host", fix)


def bind(host: str, port: int, option: str, fix: str) -> socket.socket:
    """A socket that listens, for `option`.

    Raises:
        MimoFastError: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MimoFastError(f"{option} {host}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Another server on this port is found now; connections wait until this one is ready.
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise MimoFastError(
            f"cannot listen on port {port} of {host} ({error.strerror}): stop what does, or {fix}"
        ) from error
    return bound


class Beside(Protocol):
    """What is served beside HTTP, in the same event loop."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...


def check_certificate(settings: Settings) -> None:
    """Finds out before a model is loaded whether https can be served.

    Raises:
        ConfigError: the files are no certificate and its key.
    """
    if settings.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Nobody would see that it asks for a password.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=str)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--ssl-certfile {settings.ssl_certfile} is no certificate in PEM form, or "
            f"--ssl-keyfile {settings.ssl_keyfile} is not its key, without a password"
        ) from error


def url_of(bound: socket.socket, settings: Settings) -> str:
    """Where a client on this machine reaches a server."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


async def stop_sessions(sessions: Iterable[Live]) -> None:
    """Tells sessions to go, all at once; one that does not read is left after a moment."""
    telling = [asyncio.create_task(session.stop()) for session in [*sessions]]
    if telling:
        await asyncio.wait(telling, timeout=TELLING)


async def drain(app: Starlette, seconds: float, hurried: Callable[[], bool] = bool) -> None:
    """Refuses new work, waits for what runs, closes sessions between their replies.

    Args:
        seconds: after which what still runs is left.
        hurried: whether to leave it at once.
    """
    state = app.state
    state.stopping = True
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    log("stopping", requests=state.requests.taken, sessions=len(state.live))
    while (state.requests.taken or state.live) and loop.time() < end and not hurried():
        await stop_sessions(session for session in state.live if session.calm)
        await asyncio.sleep(0.05)
    await stop_sessions(state.live)


class Server(uvicorn.Server):
    """uvicorn's server, which lets requests and replies end before it stops.

    Args:
        app: the application of `create_app`.
        ready: called once it answers.
        beside: served as long as it is.
    """

    def __init__(
        self,
        app: Starlette,
        settings: Settings,
        ready: Callable[[], None] | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._app, self._ready, self._beside = app, ready, beside
        self._patience = settings.drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(settings.max_connections),
                ws=WebSocket,
                ws_max_size=settings.max_message_bytes,
                ws_ping_interval=PING,
                ws_ping_timeout=PING,
                # Audio in base64 gains little, and compressing it would keep the event loop busy.
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=1,
                ssl_certfile=settings.ssl_certfile,
                ssl_keyfile=settings.ssl_keyfile,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        worker = self._app.state.service.worker
        self._trimming = asyncio.create_task(Trimmer(lambda: worker.streams > 0).run())
        if self.started and self._beside is not None:
            await self._beside.start()
        if self.started and self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await drain(self._app, self._patience, lambda: self.force_exit)
        if self._beside is not None:
            await self._beside.close()
        for connection in [*self.server_state.connections]:
            # One that does not read would be waited for.
            transport = connection.transport
            # One of https that is closed has no buffer left to ask for.
            if not transport.is_closing() and transport.get_write_buffer_size():
                transport.abort()
        self._trimming.cancel()
        await super().shutdown(sockets)
        log("stopped")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first Ctrl-C leaves a moment, SIGTERM as long as the settings say, a second none."""
        if sig == signal.SIGINT and not self.should_exit:
            self._patience = min(self._patience, PROMPT)
        elif self.should_exit:
            self.force_exit = True
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while it serves, and takes them as answered: stopping is no error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {each: signal.signal(each, self.handle_exit) for each in handled}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
