"""Client secrets: what they open, for how long, and what a server remembers of them."""

from __future__ import annotations

import asyncio
import json
from time import time
from typing import Any

import openai
import pytest
from callers import Caller
from servers import Running
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mimo_fast.server import client_secrets
from mimo_fast.server.client_secrets import ClientSecrets
from mimo_fast.server.errors import ApiError

KEY = "the-key-of-the-server"
PATH = "/v1/realtime/client_secrets"
BRIEF = {"type": "realtime", "instructions": "Be brief.", "output_modalities": ["text"]}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def keyed(serve: Any) -> Running:
    return serve(api_key=KEY)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def made(server: Running, **body: Any) -> dict[str, Any]:
    answer = server.ask("POST", PATH, body, bearer(KEY))
    assert answer.status == 200, answer.body
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json


def created(server: Running, secret: str, how: str = "protocol", query: str = "") -> Any:
    """The session that a WebSocket with this secret gets."""
    options: dict[str, Any] = {"additional_headers": bearer(secret)}
    if how == "protocol":
        options = {"subprotocols": ["realtime", f"openai-insecure-api-key.{secret}"]}
    with connect(f"ws://127.0.0.1:{server.port}/v1/realtime{query}", **options) as socket:
        return json.loads(socket.recv())["session"]


def test_the_sdk_makes_one_and_a_session_with_it(keyed: Running) -> None:
    async def work() -> None:
        client = openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0)
        before = time()
        secret = await client.realtime.client_secrets.create(
            expires_after={"anchor": "created_at", "seconds": 60}, session=BRIEF
        )
        await client.close()
        assert secret.value.startswith("ek_")
        assert before + 59 <= secret.expires_at <= time() + 60
        assert (secret.session.type, secret.session.instructions) == ("realtime", "Be brief.")
        type(secret).model_validate_json(secret.model_dump_json(), strict=True)
        for how in ("protocol", "header"):
            found = await asyncio.to_thread(created, keyed, secret.value, how)
            assert found["instructions"] == "Be brief."
            assert found["output_modalities"] == ["text"]
        # It makes calls too, with its settings, and ends those alone.
        call = Caller(keyed)
        answer = await call.call(**bearer(secret.value))
        assert answer.status == 201
        session = (await call.until("session.created"))["session"]
        assert session["instructions"] == "Be brief."
        other = made(keyed)["value"]
        path = f"{call.location}/hangup"

        def hang_up(key: str) -> int:
            return keyed.ask("POST", path, headers=bearer(key)).status

        assert await asyncio.to_thread(hang_up, other) == 404
        assert await asyncio.to_thread(hang_up, secret.value) == 200
        await call.closed()
        await call.leave()

    asyncio.run(work())


def test_it_opens_nothing_else(keyed: Running) -> None:
    secret = made(keyed)["value"]
    paths = ["/v1/models", "/metrics", "/api/ps", "/v1/audio/voices", "/v1/realtimes"]
    for method, path in [*(("GET", path) for path in paths), ("POST", PATH)]:
        answer = keyed.ask(method, path, {} if method == "POST" else None, bearer(secret))
        assert answer.status == 403, path
        assert answer.error["code"] == "client_secret_scope"
    address = f"ws://127.0.0.1:{keyed.port}/v1/audio/speech/stream"
    with pytest.raises(InvalidStatus) as refused:
        connect(address, additional_headers=bearer(secret))
    assert refused.value.response.status_code == 403


def test_it_expires_and_wrong_ones_are_refused(serve: Any) -> None:
    for options in ({"api_key": KEY}, {}):
        server, clock = serve(**options), Clock()
        # Where no key is needed a secret still stands for its settings.
        server.app.state.client_secrets._clock = clock
        secret = made(server, expires_after={"anchor": "created_at", "seconds": 10})["value"]
        clock.now += 9.9
        assert created(server, secret)["type"] == "realtime"
        clock.now += 0.1
        for wrong in (secret, "ek_", "ek_wrong", secret[:-1] + "\u00e9"):
            headers = {"Authorization": f"Bearer {wrong}".encode()}
            answer = server.ask("POST", "/v1/realtime/calls", b"v=0\r\n", headers)
            assert answer.status == 401
            assert answer.error["code"] == "invalid_api_key"
            assert "expired" in answer.error["message"]
        with pytest.raises(InvalidStatus) as refused:
            created(server, secret)
        assert refused.value.response.status_code == 401


def test_a_transcription_session(keyed: Running) -> None:
    session = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
    secret = made(keyed, session=session)
    assert secret["session"]["type"] == "transcription"
    found = created(keyed, secret["value"], query="?model=whisper-1")
    assert (found["type"], found["audio"]["input"]["turn_detection"]) == ("transcription", None)


def test_no_body_gives_a_session_with_defaults(keyed: Running) -> None:
    answer = keyed.ask("POST", PATH, headers=bearer(KEY))
    assert answer.status == 200
    assert answer.json["session"]["audio"]["input"]["turn_detection"]["type"] == "server_vad"
    assert 590 < answer.json["expires_at"] - time() <= 600


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"expires_after": {"seconds": 9}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 7201}}, "expires_after.seconds"),
        ({"expires_after": {"seconds": 60.5}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now"}}, "expires_after.anchor"),
        ({"expires_after": 60}, "expires_after"),
        ({"expires": 60}, "expires"),
        ({"session": {}}, "session.type"),
        ({"session": {"type": "video"}}, "session.type"),
        ({"session": {"type": "realtime", "loud": True}}, "session.loud"),
    ],
)
def test_wrong_requests_are_refused(keyed: Running, body: Any, param: str) -> None:
    answer = keyed.ask("POST", PATH, body, bearer(KEY))
    assert answer.status == 400
    assert answer.error["param"] == param
    assert len(keyed.app.state.client_secrets) == 0


def test_they_are_bounded_and_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr(client_secrets, "MOST", 3)
    clock = Clock()
    store = ClientSecrets(clock)
    values = [store.make({"type": "realtime"}, seconds) for seconds in (10, 20, 30)]
    assert len({*values}) == 3
    # Only digests are kept.
    assert not any(value.encode() in digest for value in values for digest in store._known)
    with pytest.raises(ApiError, match="too many client secrets") as full:
        store.make({"type": "realtime"}, 10)
    assert (full.value.status, full.value.headers["Retry-After"]) == (429, "10")
    clock.now += 10
    assert [store.find(value) is not None for value in values] == [False, True, True]
    store.make({"type": "realtime"}, 10)
    assert len(store) == 3
    monkeypatch.setattr(client_secrets, "MOST_BYTES", 100)
    clock.now += 100
    with pytest.raises(ApiError, match="settings of a session are too large"):
        store.make({"instructions": "long " * 20}, 10)
