"""Between a proxy and a replica: flow control, close codes, refusals; Ray is unbounded queues."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from servers import until
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mimo_fast.server.metrics import merged
from mimo_fast.server.replicas.flow import WINDOW, Back, Tally, Window, size_of
from mimo_fast.server.replicas.proxy import Front, ProxyBounds

BOUNDS = ProxyBounds(max_connections=16, max_message_bytes=8 << 20, queue_seconds=0.5)
MESSAGE = "x" * 100_000


class Ray:
    """What lies between the two: it takes whatever comes, as fast as it comes.

    Attributes:
        taken: bytes that it has taken of the client.
        upwards, downwards: bytes that it holds for the replica and for the client.
        most: the largest number of each.
    """

    def __init__(self, app):
        self.app, self.tasks = Back(app), []
        self.taken = self.upwards = self.downwards = 0
        self.most = [0, 0]
        self.full = self.refuses = False

    def _held(self):
        self.most = [
            max(pair) for pair in zip(self.most, (self.upwards, self.downwards), strict=True)
        ]

    async def __call__(self, scope, receive, send):
        if self.refuses:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"no replica"})
            return
        up, down = asyncio.Queue(), asyncio.Queue()

        async def reading():
            while True:
                message = await receive()
                self.taken += size_of(message)
                self.upwards += size_of(message)
                self._held()
                up.put_nowait(message)
                if message["type"].endswith(".disconnect"):
                    return

        async def giving():
            message = await up.get()
            self.upwards -= size_of(message)
            return message

        async def taking(message):
            self.downwards += size_of(message)
            self._held()
            down.put_nowait(message)

        async def working():
            try:
                await self.app(dict(scope), giving, taking)
            finally:
                down.put_nowait(None)

        watch = asyncio.create_task(reading())
        if self.full:
            # Until the client leaves, as it seems.
            await watch
            return
        work = asyncio.create_task(working())
        self.tasks.append(work)
        try:
            while (message := await down.get()) is not None:
                self.downwards -= size_of(message)
                await send(message)
        finally:
            watch.cancel()
            work.cancel()

    def kill(self):
        for task in self.tasks:
            task.get_loop().call_soon_threadsafe(task.cancel)


async def echo(socket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)


async def deaf(socket):
    await socket.accept()
    await socket.app.state.listen.wait()
    count = 0
    async for _ in socket.iter_text():
        count += 1
        await socket.send_text(str(count))


async def talker(socket):
    await socket.accept()
    for index in range(400):
        socket.app.state.said = index
        await socket.send_text(MESSAGE)
    await socket.close(4001, "said")


async def stream(request):
    async def parts():
        for index in range(400):
            request.app.state.said = index
            yield MESSAGE.encode()

    return StreamingResponse(parts())


async def half(request):
    async def parts():
        yield b"half"
        await asyncio.sleep(60)

    return StreamingResponse(parts())


async def body(request):
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def ray(serve):
    """A server whose application is behind `Front`, `Ray` and `Back`."""
    routes = [WebSocketRoute(f"/{each.__name__}", each) for each in (echo, deaf, talker)]
    routes += [Route("/stream", stream), Route("/half", half)]
    routes += [Route("/body", body, methods=["POST"])]
    inner = Starlette(routes=routes)
    inner.state.listen = asyncio.Event()
    made = Ray(inner)
    made.inner = inner
    front = Front(made, BOUNDS)
    server = serve()
    plain = server.app.middleware_stack

    async def app(scope, receive, send):
        await (front if scope["path"][1:] in NAMES else plain)(scope, receive, send)

    server.app.middleware_stack = app
    made.server = server
    return made


NAMES = ("echo", "deaf", "talker", "stream", "half", "body")


def address(ray, name):
    return f"ws://127.0.0.1:{ray.server.port}/{name}"


def test_a_window_waits_for_its_reader():
    async def run():
        window = Window()
        await window.room()
        window.sent(WINDOW)
        waiting = asyncio.create_task(window.room())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        window.read(1)
        await asyncio.wait_for(waiting, 5)
        window.sent(WINDOW)
        window.open()
        await asyncio.wait_for(window.room(), 5)

    asyncio.run(run())


def test_a_tally_says_in_time_what_was_read():
    tally, reported = Tally(), 0
    for _ in range(1000):
        reported += tally.take(5000)
    # What is not reported is less than the window, or a sender would wait for ever.
    assert 0 <= 1000 * 5000 - reported < WINDOW // 4


def test_messages_go_both_ways(ray):
    with connect(address(ray, "echo")) as client:
        for index in range(200):
            client.send(f"{index}{MESSAGE}")
            assert client.recv() == f"{index}{MESSAGE}"
    assert max(ray.most) < 2 * WINDOW


def test_who_is_not_heard_is_not_taken_in(ray):
    """What a client sends waits in the client where the application does not read."""
    with connect(address(ray, "deaf")) as client:
        sent = []

        def send():
            for _ in range(200):
                client.send(MESSAGE)
                sent.append(1)

        sending = threading.Thread(target=send)
        sending.start()
        until(lambda: ray.taken >= WINDOW)
        time.sleep(0.5)
        assert len(sent) < 200
        assert ray.taken < WINDOW + 2 * len(MESSAGE)
        # It is all read in the end.
        loop = ray.tasks[0].get_loop()
        loop.call_soon_threadsafe(ray.inner.state.listen.set)
        assert [int(client.recv()) for _ in range(200)] == [*range(1, 201)]
        sending.join()


def test_who_does_not_read_is_sent_no_more(ray):
    with connect(address(ray, "talker"), max_queue=1) as client:
        until(lambda: ray.downwards >= WINDOW // 2)
        time.sleep(0.5)
        assert ray.inner.state.said < 300
        assert ray.most[1] < WINDOW + 2 * len(MESSAGE)
        heard = []
        with pytest.raises(ConnectionClosed) as closed:
            heard.extend(iter(client.recv, None))
        assert heard == [MESSAGE] * 400
        assert closed.value.rcvd.code == 4001


def test_an_answer_waits_for_its_reader(ray):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", ray.server.port, timeout=60)
    connection.request("GET", "/stream")
    answer = connection.getresponse()
    time.sleep(0.5)
    assert ray.most[1] < WINDOW + 2 * len(MESSAGE)
    assert len(answer.read()) == 400 * len(MESSAGE)
    connection.close()


def test_a_body_larger_than_the_window_arrives(ray):
    assert ray.server.ask("POST", "/body", b"x" * (4 * WINDOW)).body == str(4 * WINDOW).encode()
    assert ray.most[0] < 2 * WINDOW


def test_a_session_whose_replica_ends_is_told_to_connect_again(ray):
    with connect(address(ray, "echo")) as client:
        client.send("here")
        client.recv()
        ray.kill()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=30)
    assert closed.value.rcvd.code == 1012
    assert "connect again" in closed.value.rcvd.reason
    with connect(address(ray, "echo")) as client:
        client.send("here")
        assert client.recv() == "here"


def test_an_answer_whose_replica_ends_breaks_off(ray):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", ray.server.port, timeout=30)
    connection.request("GET", "/half")
    answer = connection.getresponse()
    assert answer.read(4) == b"half"
    ray.kill()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    connection.close()


@pytest.mark.parametrize("state", ["full", "refuses"])
def test_where_no_replica_takes_it_a_client_is_told_when_to_try_again(ray, state):
    setattr(ray, state, True)
    status = 429 if state == "full" else 503
    answer = ray.server.ask("POST", "/body", b"x")
    assert answer.status == status
    assert answer.headers["retry-after"] == "1"
    assert "replica" in answer.error["message"]
    with pytest.raises(InvalidStatus) as refused:
        connect(address(ray, "echo"))
    assert refused.value.response.status_code == status


def test_headers_by_which_ray_takes_orders_are_not_a_clients(ray):
    seen = []

    async def show(scope, receive, send):
        seen.extend(name for name, _ in scope["headers"])
        await ray(scope, receive, send)

    app = Front(show, BOUNDS)
    ray.server.app.middleware_stack = app
    orders = {
        "x-request-id": "mine",
        "x-request-disconnect-disabled": "?1",
        "X-Request-Timeout-Seconds": "0.01",
        "serve_multiplexed_model_id": "a",
        "Accept": "text/plain",
    }
    assert ray.server.ask("POST", "/body", b"xx", orders).body == b"2"
    assert b"accept" in seen
    assert not [name for name in seen if name.startswith((b"x-request", b"serve"))]


def test_metrics_of_replicas_are_told_apart():
    one = '# HELP a_total Of a.\n# TYPE a_total counter\na_total{code="x"} 2.0\na_total 1.0\n'
    other = one + "# HELP b Of b.\n# TYPE b gauge\nb 3.5\n"
    assert merged([("r1", one), ("r2", other)]) == (
        "# HELP a_total Of a.\n# TYPE a_total counter\n"
        'a_total{replica="r1",code="x"} 2.0\na_total{replica="r1"} 1.0\n'
        'a_total{replica="r2",code="x"} 2.0\na_total{replica="r2"} 1.0\n'
        '# HELP b Of b.\n# TYPE b gauge\nb{replica="r2"} 3.5\n'
    )
