"""Bounds on what a client may cost, and what becomes of clients that leave."""

import asyncio
import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from servers import until
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mimo_fast.server import limits, protocols
from mimo_fast.server.errors import ApiError
from mimo_fast.server.limits import Places

SPEECH = "/v1/audio/speech"


def sent(port, data, seconds=5.0):
    """What comes back for bytes on a bare connection, until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), seconds) as client:
        client.sendall(data)
        found = b""
        try:
            while part := client.recv(65536):
                found += part
        except ConnectionResetError:
            pass
        return found


def head(*lines, method="POST", path=SPEECH):
    first = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    return (first + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode()


async def size(request):
    return JSONResponse({"size": len(await request.body())})


SIZE = Route(SPEECH, size, methods=["POST"])


class Endless:
    """An endpoint that sends for ever, and notes that it was ended."""

    def __init__(self, part=b"x", every=0.01):
        self.part, self.every = part, every
        self.running = self.ended = 0

    async def __call__(self, request):
        return StreamingResponse(self.parts())

    async def parts(self):
        self.running += 1
        try:
            while True:
                yield self.part
                await asyncio.sleep(self.every)
        finally:
            self.running -= 1
            self.ended += 1

    @property
    def route(self):
        async def endpoint(request):
            return await self(request)

        return Route(SPEECH, endpoint, methods=["POST"])


def test_a_body_is_bounded_whatever_it_says(serve):
    server = serve([SIZE], max_body_bytes=4096)
    assert server.ask("POST", SPEECH, b"a" * 4096).json == {"size": 4096}
    answer = server.ask("POST", SPEECH, b"a" * 4097)
    assert answer.status == 413
    assert "--max-body-bytes" in answer.error["message"]
    assert server.ask("POST", SPEECH, b"a" * 5_000_000).status == 413
    chunk = b"400\r\n" + b"a" * 0x400 + b"\r\n"
    for count, status in ((4, b"200"), (5, b"413")):
        body = chunk * count + b"0\r\n\r\n"
        got = sent(server.port, head("Transfer-Encoding: chunked") + body)
        assert got.split()[1] == status
    got = sent(server.port, head("Content-Length: " + "9" * 400))
    assert got.split()[1] in (b"400", b"413")


def test_all_bodies_together_are_bounded(serve, monkeypatch):
    monkeypatch.setattr(limits, "BODIES", 2)
    server = serve([SIZE], max_body_bytes=100_000)
    held = []
    for _ in range(2):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(head("Content-Length: 100000") + b"a" * 99_000)
        held.append(client)
    time.sleep(0.3)
    answer = server.ask("POST", SPEECH, b"a" * 50_000)
    assert answer.status == 429
    for client in held:
        client.close()
    until(lambda: server.ask("POST", SPEECH, b"a" * 50_000).status == 200)


def test_a_body_must_arrive(serve, monkeypatch):
    monkeypatch.setattr(limits, "ARRIVAL", 0.3)
    server = serve([SIZE])
    got = sent(server.port, head("Content-Length: 5000") + b"{")
    assert got.split()[1] == b"408"
    assert server.ask("POST", SPEECH, b"{}").status == 200


def test_a_head_must_arrive(serve, monkeypatch):
    monkeypatch.setattr(protocols, "HEAD", 0.3)
    server = serve([SIZE])
    for beginning in (b"", b"POST /v1/aud", b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: "):
        assert sent(server.port, beginning) == b""
    # A body may take longer.
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head("Content-Length: 2"))
        time.sleep(0.5)
        client.sendall(b"{}")
        assert client.recv(65536).split()[1] == b"200"


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity"])
def test_compressed_bodies_are_refused(server, encoding):
    answer = server.ask("POST", SPEECH, b"x", {"Content-Encoding": encoding})
    assert answer.status == 415
    assert answer.error["code"] == "unsupported_encoding"


def test_a_request_with_two_lengths_is_refused(server):
    lines = ("Content-Length: 4", "Transfer-Encoding: chunked")
    got = sent(server.port, head(*lines) + b"0\r\n\r\nGET /v1/models HTTP/1.1\r\n\r\n")
    assert got.split()[1] == b"400"
    assert got.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff garbage\r\n\r\n",
        head("Content-Length: -5"),
        head("Content-Length: 4", "Content-Length: 40") + b"abcd",
        head("Transfer-Encoding: chunked") + b"ZZZ\r\nabc\r\n",
        head("X-Big: " + "a" * 500_000, method="GET", path="/v1/models"),
        head(method="GET", path="/v1/models?x=" + "a" * 200_000),
    ],
    ids=["garbage", "negative", "two lengths", "bad chunk", "long header", "long address"],
)
def test_what_is_not_http_is_refused(server, data):
    got = sent(server.port, data)
    assert got == b"" or 400 <= int(got.split()[1]) < 500
    assert server.get("/v1/models").status == 200


def test_a_refused_body_is_read_only_so_far(serve, monkeypatch):
    monkeypatch.setattr(protocols, "DISCARDED", 1 << 20)
    server = serve([SIZE], max_body_bytes=4096)
    with socket.create_connection(("127.0.0.1", server.port), 10) as client:
        client.sendall(head("Content-Length: 999999999"))
        # It ends with a reset or a broken pipe.
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(b"a" * (50 << 20))


def test_a_full_server_says_so(serve):
    endless = Endless()
    server = serve([endless.route], max_requests=1, queue_seconds=0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head("Content-Length: 2") + b"{}")
        assert client.recv(1000)
        answer = server.ask("POST", SPEECH, b"{}")
        assert answer.status == 429
        assert answer.error["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        # What does not compute needs no place.
        assert server.get("/v1/models").status == 200
        assert server.get("/ready").json["requests"] == {"taken": 1, "most": 1, "waiting": 0}
    until(lambda: server.app.state.requests.taken == 0)
    assert endless.ended == 1


def test_who_waits_is_served_in_time(serve):
    async def slow(request):
        await asyncio.sleep(0.3)
        return JSONResponse({})

    server = serve([Route(SPEECH, slow, methods=["POST"])], max_requests=1, queue_seconds=5)
    answers = []
    askers = [
        threading.Thread(target=lambda: answers.append(server.ask("POST", SPEECH, b"{}").status))
        for _ in range(3)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert answers == [200] * 3


def test_a_request_whose_client_leaves_is_ended(serve):
    states = []

    async def thinking(request):
        states.append("began")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            states.append("cancelled")
            raise
        return JSONResponse({})

    server = serve([Route(SPEECH, thinking, methods=["POST"])], max_requests=1)
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head("Content-Length: 2") + b"{}")
    until(lambda: states == ["began"])
    client.close()
    until(lambda: server.app.state.requests.taken == 0)
    assert states == ["began", "cancelled"]


def test_who_leaves_the_line_is_forgotten(serve):
    endless = Endless()
    server = serve([endless.route], max_requests=1, queue_seconds=30)
    first = socket.create_connection(("127.0.0.1", server.port))
    first.sendall(head("Content-Length: 2") + b"{}")
    assert first.recv(1000)
    waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    for client in waiting:
        client.sendall(head("Content-Length: 2") + b"{}")
    requests = server.app.state.requests
    until(lambda: requests.waiting == 3)
    for client in waiting:
        client.close()
    until(lambda: requests.waiting == 0)
    first.close()
    until(lambda: requests.taken == 0)
    assert endless.ended == 1


def test_a_reader_that_stands_still_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(protocols, "STALL", 0.5)
    endless = Endless(b"x" * 100_000, 0.0)
    server = serve([endless.route])
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head("Content-Length: 2") + b"{}")
        until(lambda: endless.running == 1)
        until(lambda: endless.ended == 1, 10)
    until(lambda: server.app.state.requests.taken == 0)


def test_connections_are_bounded(serve):
    server = serve(max_connections=4)
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    time.sleep(0.2)
    assert sent(server.port, head(method="GET", path="/health")) == b""
    for client in clients:
        client.close()
    until(lambda: sent(server.port, head(method="GET", path="/health")) != b"")


async def echo(websocket):
    await websocket.accept()
    while True:
        await websocket.send_text(await websocket.receive_text())


ECHO = WebSocketRoute("/test", echo)


def test_sessions_are_bounded_and_freed_by_who_vanishes(serve):
    server = serve([ECHO], max_sessions=2, queue_seconds=0.2)
    address = f"ws://127.0.0.1:{server.port}/test"
    first, second = connect(address), connect(address)
    with pytest.raises(InvalidStatus) as refused:
        connect(address)
    assert refused.value.response.status_code == 429
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert json.loads(refused.value.response.body)["error"]["code"] == "rate_limit_exceeded"
    # Vanishes without a word.
    first.socket.shutdown(socket.SHUT_RDWR)
    until(lambda: server.app.state.sessions.taken == 1)
    with connect(address) as third:
        third.send("hello")
        assert third.recv() == "hello"
    second.close()
    until(lambda: server.app.state.sessions.taken == 0)


def test_a_session_waits_for_one_that_just_ended(serve):
    server = serve([ECHO], max_sessions=1)
    address = f"ws://127.0.0.1:{server.port}/test"
    first = connect(address)
    threading.Timer(0.2, first.close).start()
    with connect(address) as second:
        second.send("hello")
        assert second.recv() == "hello"


def test_messages_are_bounded(serve):
    server = serve([ECHO], max_message_bytes=4096)
    address = f"ws://127.0.0.1:{server.port}/test"
    with connect(address) as client:
        client.send("a" * 4096)
        assert client.recv() == "a" * 4096
        client.send("a" * 4097)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
    assert closed.value.rcvd.code == 1009
    with connect(address) as client:
        # In fragments, none of which is too long.
        with suppress(ConnectionClosed):
            client.send("a" * 1024 for _ in range(100_000))
        with pytest.raises(ConnectionClosed) as closed:
            client.recv()
        # Who still writes when the server closes may lose its last frame to a reset.
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    until(lambda: server.app.state.sessions.taken == 0)


def test_places_go_round_in_order():
    async def scenario():
        places = Places(2, 5.0, "places")
        order = []

        async def holder(name, seconds):
            async with places.place():
                order.append(name)
                await asyncio.sleep(seconds)

        tasks = [asyncio.create_task(holder(name, 0.05)) for name in range(6)]
        await asyncio.sleep(0.01)
        assert (places.taken, places.waiting) == (2, 4)
        # One who waits goes away, and one just when a place is given to it.
        tasks[3].cancel()
        tasks[0].cancel()
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (places.taken, places.waiting) == (0, 0)
        assert order[:2] == [0, 1]
        assert order[-2:] == [4, 5]

    asyncio.run(scenario())


def test_the_line_is_bounded():
    async def scenario():
        places = Places(1, 5.0, "places")
        async with places.place():
            tasks = [asyncio.create_task(places.place().__aenter__()) for _ in range(limits.LINE)]
            await asyncio.sleep(0.01)
            with pytest.raises(ApiError) as full:
                async with places.place():
                    pass
            assert full.value.status == 429
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (places.taken, places.waiting) == (0, 0)

    asyncio.run(scenario())
