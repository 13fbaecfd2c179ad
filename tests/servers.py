"""Servers that run in a thread of a test's process, and one-off clients of them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette

from mimo_fast.server.serving import Beside, Server, listen, url_of
from mimo_fast.server.settings import Settings

START = 20.0
"""Seconds until a server that does not answer is a failure."""


@dataclass(frozen=True)
class Answer:
    """What came back from a request."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, whose shape is checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]
        return error


@dataclass(frozen=True)
class Running:
    """A server that listens on `url`."""

    url: str
    app: Starlette
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    @property
    def realtime(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime?model=nano"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, sent)
            got = connection.getresponse()
            return Answer(got.status, got.headers, got.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("GET", path, headers=named)

    def steps_after_leaving(
        self, path: str, body: bytes | str, headers: dict[str, str], begun: Callable[[], bool]
    ) -> int:
        """Leaves a POST request once it has begun -> steps of the model until it is let go of."""
        service = self.app.state.service
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", path, body, headers)
        until(begun)
        steps = service.worker.steps
        connection.sock.shutdown(2)
        connection.close()
        until(lambda: service.worker.streams == 0, 30.0)
        assert not service.model.engine._requests
        return service.worker.steps - steps

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not stop"


Serve = Callable[..., Running]
"""Starts a server with these settings."""


def start(app: Starlette, settings: Settings, beside: Beside | None = None) -> Running:
    """Serves an application in a thread; returns once it listens."""
    bound = listen(settings)
    listening = threading.Event()
    server = Server(app, settings, listening.set, beside)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    assert listening.wait(START), "the server did not start"
    return Running(url_of(bound, settings), app, server, thread)


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for a condition."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it did not happen"
        time.sleep(0.01)
