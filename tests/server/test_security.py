"""Who is let in: keys, names, pages, rates."""

import itertools

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from mimo_fast.errors import ConfigError
from mimo_fast.server import security
from mimo_fast.server.security import Rates
from mimo_fast.server.settings import Settings

KEY = "a-long-key-of-tests"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}

PATHS = (
    *(("GET", path) for path in ("/v1/models", "/v1/models/nano", "/v1/audio/voices", "/metrics")),
    *(("GET", path) for path in ("//v1/models", "/v1/../v1/models", "/V1/models", "/docs")),
    *(("GET", path) for path in ("//health", "/health/", "/ready/x", "/static", "/x/static/")),
    *(("POST", f"/v1/{path}") for path in ("audio/speech", "audio/transcriptions")),
    *(("POST", f"/v1/{path}") for path in ("chat/completions", "audio/voices")),
    ("POST", "/v1/no/such"),
)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "server.example", ""])
def test_other_addresses_need_a_key(host):
    with pytest.raises(ConfigError, match="MIMO_FAST_API_KEY"):
        Settings(host=host)
    assert Settings(host=host, api_key=KEY).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_this_machine_needs_none(host):
    assert Settings(host=host).api_key is None


@pytest.mark.parametrize("key", ["", "with space", 'quote"', "a,b", "schlüssel", "line\n"])
def test_keys_are_what_a_header_and_a_subprotocol_carry(key):
    with pytest.raises(ConfigError, match="printable ASCII"):
        Settings(api_key=key)


def test_every_path_but_those_named_needs_the_key(serve):
    server = serve(api_key=KEY)
    for method, path in PATHS:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            answer = server.ask(method, path, headers=headers)
            assert answer.status == 401, path
            assert answer.error["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/ready"):
        assert server.get(path).status == 200
    assert server.ask("GET", "/v1/models", headers=WITH_KEY).status == 200
    assert server.ask("GET", "/metrics", headers=WITH_KEY).status == 200


@pytest.mark.parametrize("path", ["/v1/realtime", "/v1/audio/speech/stream", "/v1/no/such"])
def test_a_websocket_is_refused_before_it_is_accepted(serve, path):
    server = serve(api_key=KEY)
    address = f"ws://127.0.0.1:{server.port}{path}"
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer " + "k" * 5000},
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, additional_headers=headers)
        assert refused.value.response.status_code == 401
    # A key in the address would end up in logs.
    with pytest.raises(InvalidStatus):
        connect(f"{address}?api_key={KEY}&key={KEY}")


def test_a_browser_sends_its_key_as_a_subprotocol(serve):
    from starlette.routing import WebSocketRoute

    async def endpoint(websocket):
        await websocket.accept()
        await websocket.send_text("in")
        await websocket.close()

    server = serve([WebSocketRoute("/test", endpoint)], api_key=KEY)
    address = f"ws://127.0.0.1:{server.port}/test"
    protocols = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
    with connect(address, subprotocols=protocols) as client:
        assert client.subprotocol == "realtime"
        assert client.recv() == "in"
    with pytest.raises(InvalidStatus):
        connect(address, subprotocols=["realtime", "openai-insecure-api-key.wrong"])


def test_keys_are_compared_in_constant_time(serve, monkeypatch):
    compared = []
    honest = security.hmac.compare_digest

    def compare(first, second):
        compared.append((first, second))
        return honest(first, second)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    server = serve(api_key=KEY)
    for key in ("x", "x" * 500, "ümlaut", KEY):
        header = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        server.ask("GET", "/v1/models", headers=header)
    assert len(compared) == 4
    assert {len(each) for pair in compared for each in pair} == {32}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b:c"])
def test_names_of_others_are_refused(server, host):
    answer = server.get("/v1/models", Host=host)
    assert answer.status in (400, 421)
    if answer.status == 421:
        assert "--allowed-hosts" in answer.error["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000"])
def test_names_of_this_machine_are_known(server, host):
    assert server.get("/v1/models", Host=host).status == 200


def test_more_names_can_be_allowed(serve):
    server = serve(allowed_hosts=("voice.example",))
    assert server.get("/v1/models", Host="Voice.Example:443").status == 200
    assert server.get("/v1/models", Host="127.0.0.1").status == 200
    assert server.get("/v1/models", Host="other.example").status == 421


ORIGINS = ("https://evil.example", "null", "http://127.0.0.1.evil.example", "https://127.0.0.1")


def test_pages_of_others_are_refused(server):
    for origin in (*ORIGINS, f"https://127.0.0.1:{server.port}", f"http://localhost:{server.port}"):
        answer = server.get("/v1/models", Origin=origin)
        assert answer.status == 403, origin
        assert "--allowed-origins" in answer.error["message"]
        assert "access-control-allow-origin" not in answer.headers
        with pytest.raises(InvalidStatus) as refused:
            connect(server.realtime, origin=origin)
        assert refused.value.response.status_code == 403
    own = f"http://127.0.0.1:{server.port}"
    assert server.get("/v1/models", Origin=own).status == 200


def test_other_pages_can_be_allowed(serve):
    page = "https://app.example"
    server = serve(allowed_origins=(page,))
    answer = server.get("/v1/models", Origin=page)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == page
    assert server.get("/v1/models", Origin="https://app.example.evil").status == 403
    asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
    allowed = server.ask("OPTIONS", "/v1/audio/speech", headers=asked)
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == page
    refused = server.get("/v1/no/such", Origin=page)
    assert refused.headers["access-control-allow-origin"] == page


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/page", "ftp://a"])
def test_an_origin_is_scheme_and_host(origin):
    with pytest.raises(ConfigError, match=r"https://app\.example"):
        Settings(allowed_origins=(origin,))


def test_a_rate_is_held(serve):
    # One in ten seconds.
    server = serve(max_rate=0.1)
    answers = [server.get("/v1/models") for _ in range(3)]
    assert answers[0].status == 200
    refused = answers[-1]
    assert refused.status == 429
    assert refused.error["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    # Whoever looks after the server is not locked out of it.
    assert server.get("/health").status == 200


def test_addresses_have_rates_of_their_own(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(security, "monotonic", lambda: next(now) * 0.0)
    rates = Rates(2.0)
    assert [rates.wait("a") > 0 for _ in range(11)] == [False] * 10 + [True]
    assert rates.wait("b") == 0
    for other in range(security.ADDRESSES + 10):
        rates.wait(str(other))
    assert len(rates._buckets) == security.ADDRESSES


def test_a_bucket_fills_with_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(security, "monotonic", lambda: now[0])
    rates = Rates(2.0)
    while not rates.wait("a"):
        pass
    assert rates.wait("a") == pytest.approx(0.5)
    now[0] += 0.5
    assert rates.wait("a") == 0
