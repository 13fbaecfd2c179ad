"""A server of nano for tests: `serve(...)` starts one on a free port, in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from servers import Running, Serve, start

import mimo_fast
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Nano and its compute thread, which all servers of the tests share."""
    service = Service(mimo_fast.load(max_batch=4), "nano")
    yield service
    service.close()


@pytest.fixture
def serve(service: Service) -> Iterator[Serve]:
    """Starts a server with these settings; it is stopped after the test.

    `routes` are further ones, which stand behind everything that the server's own stand behind.
    """
    started: list[Running] = []

    def serving(routes: Any = (), **options: Any) -> Running:
        settings = Settings(**({"port": 0, "drain_seconds": 2.0} | options))
        app = create_app(service, settings)
        app.router.routes[:0] = routes
        started.append(start(app, settings))
        return started[-1]

    yield serving
    for each in started:
        each.stop()


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[Running]:
    """A server with default settings, shared by a module's tests."""
    settings = Settings(port=0, drain_seconds=2.0)
    running = start(create_app(service, settings), settings)
    yield running
    running.stop()
