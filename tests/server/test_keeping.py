"""A model that nobody uses is freed, and loaded again for whoever comes next."""

import asyncio
from types import SimpleNamespace

import pytest
from servers import start, until
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from websockets.sync.client import connect

from mimo_fast.server.app import create_app
from mimo_fast.server.keeping import Keeper
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings

SPEECH = "/v1/audio/speech"


class Model:
    """Stands for a model that can be closed."""

    lm, adapters = SimpleNamespace(config=None), ()

    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


@pytest.fixture
def loads():
    return []


@pytest.fixture
def running(loads, tmp_path):
    """A server whose model is freed after a fifth of a second."""

    async def speech(request):
        assert not request.app.state.service.model.closed
        await asyncio.sleep(0.1)
        return JSONResponse({})

    async def session(websocket):
        await websocket.accept()
        await websocket.receive_text()
        assert not websocket.app.state.service.model.closed
        await websocket.send_text("alive")

    def load():
        loads.append(Model())
        return loads[-1]

    service = Service(load(), "nano")
    settings = Settings(port=0, keep_alive=0.2, drain_seconds=0.5)
    app = create_app(service, settings, load)
    routes = [Route(SPEECH, speech, methods=["POST"]), WebSocketRoute("/test", session)]
    app.router.routes[:0] = routes
    running = start(app, settings)
    yield running
    running.stop()
    service.close()


def test_it_is_freed_and_loaded_again(running, loads):
    keeper = running.app.state.keeper
    assert running.ask("POST", SPEECH, {}).status == 200
    shown = running.get("/api/ps").json["models"]
    assert [each["name"] for each in shown] == ["nano"]
    assert shown[0]["expires_at"] is not None
    until(lambda: not keeper.loaded)
    assert loads[0].closed
    assert running.get("/api/ps").json == {"models": []}
    assert running.get("/ready").status == 200
    assert len(loads) == 1
    assert running.ask("POST", SPEECH, {}).status == 200
    assert len(loads) == 2
    assert not loads[1].closed


def test_a_session_keeps_it(running, loads):
    with connect(f"ws://127.0.0.1:{running.port}/test") as client:
        until(lambda: running.app.state.keeper.users == 1)
        assert running.ask("DELETE", "/api/ps").status == 409
        with pytest.raises(AssertionError):
            until(lambda: loads[0].closed, 0.6)
        client.send("hello")
        assert client.recv() == "alive"
    until(lambda: loads[0].closed)


def test_it_is_freed_on_demand(running, loads):
    assert running.ask("DELETE", "/api/ps").json == {"models": []}
    assert loads[0].closed
    assert running.ask("POST", SPEECH, {}).status == 200


def test_by_default_it_is_kept(server):
    assert server.get("/api/ps").json["models"][0]["expires_at"] is None
    answer = server.ask("DELETE", "/api/ps")
    assert answer.status == 403
    assert "--keep-alive" in answer.error["message"]


def test_who_comes_while_it_is_freed_waits(loads):
    async def scenario():
        def load():
            loads.append(Model())
            return loads[-1]

        service = Service(load(), "nano")
        keeper = Keeper(service, load, 0.0)

        async def use():
            async with keeper.used():
                assert not service.model.closed
                await asyncio.sleep(0)
                assert not service.model.closed

        for _ in range(200):
            await asyncio.gather(use(), use())
        await asyncio.sleep(0.1)
        assert not keeper.loaded
        await asyncio.to_thread(service.close)

    asyncio.run(scenario())
    assert all(model.closed for model in loads)
