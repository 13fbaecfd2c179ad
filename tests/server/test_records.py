"""Ids, errors as answers, metrics, and a log without the users' words."""

import asyncio
import gc
import io
import json
import logging
import re
import socket
import sys
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mimo_fast.errors import AudioError, BusyError, PromptError
from mimo_fast.server import health
from mimo_fast.server.errors import ApiError, full
from mimo_fast.server.logs import LOGGER, JsonLines, log, said, set_up_logs
from mimo_fast.server.metrics import Metrics

SPEECH = "/v1/audio/speech"
SECRET = "the user's own words"


@pytest.fixture
def lines(monkeypatch):
    """What the server logs meanwhile, as objects."""
    stream = io.StringIO()
    before = logging.root.handlers, logging.root.level, LOGGER.level
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    set_up_logs("debug", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.root.handlers = before[0]
    logging.root.setLevel(before[1])
    LOGGER.setLevel(before[2])


def metrics(server):
    """Sample name and labels -> value."""
    text = server.get("/metrics").body.decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.items())] = sample.value
    return found


def raising(error):
    async def endpoint(request):
        raise error

    return Route(SPEECH, endpoint, methods=["POST"])


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ApiError("no", 404, "gone", "voice"), 404, "gone"),
        (full("full", 3), 429, "rate_limit_exceeded"),
        (AudioError("bad audio"), 400, "invalid_audio"),
        (PromptError("too long"), 400, "context_length_exceeded"),
        (BusyError("busy"), 429, "rate_limit_exceeded"),
        (KeyError(SECRET), 500, "internal_error"),
        (RecursionError(SECRET), 500, "internal_error"),
    ],
)
def test_errors_are_answers(serve, lines, error, status, code):
    server = serve([raising(error)])
    answer = server.ask("POST", SPEECH, {})
    assert answer.status == status
    assert answer.error["code"] == code
    assert answer.headers["x-request-id"].startswith("req_")
    assert SECRET.encode() not in answer.body
    assert b"Traceback" not in answer.body
    # The server goes on, and its log tells where it was, not what was said.
    assert server.ask("POST", SPEECH, {}).status == status
    failures = [line for line in lines() if line["event"] == "error"]
    assert len(failures) == (2 if status == 500 else 0)
    assert SECRET not in json.dumps(lines())
    if failures:
        assert failures[0]["request"] == answer.headers["x-request-id"]
        assert any("test_records.py" in where for where in failures[0]["where"])
    assert metrics(server)["mimo_fast_errors_total", ("code", code)] == 2


def test_words_are_logged_when_asked_for(serve, lines):
    server = serve([raising(KeyError(SECRET))], log_words=True)
    server.ask("POST", SPEECH, {})
    assert SECRET in json.dumps(lines())


def test_a_websockets_errors(serve, lines):
    async def before(websocket):
        raise ApiError("no", 404, "model_not_found")

    async def after(websocket):
        await websocket.accept()
        raise KeyError(SECRET)

    async def crowded(websocket):
        await websocket.accept()
        raise full("later")

    routes = [WebSocketRoute(f"/{each.__name__}", each) for each in (before, after, crowded)]
    server = serve(routes)
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{server.port}/before")
    assert refused.value.response.status_code == 404
    assert json.loads(refused.value.response.body)["error"]["code"] == "model_not_found"
    for path, code in (("after", 1011), ("crowded", 1013)):
        with connect(f"ws://127.0.0.1:{server.port}/{path}") as client:
            with pytest.raises(ConnectionClosed) as closed:
                client.recv(timeout=5)
            assert closed.value.rcvd.code == code
            assert SECRET not in closed.value.rcvd.reason
    assert SECRET not in json.dumps(lines())


def test_an_answer_that_breaks_off_has_no_end(serve, lines):
    async def endpoint(request):
        async def parts():
            yield b"part"
            raise KeyError(SECRET)

        return StreamingResponse(parts())

    server = serve([Route(SPEECH, endpoint, methods=["POST"])])
    with socket.create_connection(("127.0.0.1", server.port), 5) as client:
        client.sendall(f"POST {SPEECH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        got = b""
        while part := client.recv(65536):
            got += part
    assert b"part" in got
    # The last chunk of a whole answer.
    assert not got.endswith(b"0\r\n\r\n")
    assert SECRET not in json.dumps(lines())
    assert server.app.state.requests.taken == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/no/such", 404, "not_found"),
        ("DELETE", SPEECH, 405, "method_not_allowed"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "model_not_found"),
        ("GET", "/v1/models/x%0d%0aX-Evil:%201", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_what_there_is_not(server, method, path, status, code):
    answer = server.ask(method, path)
    assert answer.status == status
    assert answer.error["code"] == code
    assert "x-evil" not in answer.headers


def test_models(server):
    page = server.get("/v1/models").json
    assert [model["id"] for model in page["data"]] == ["nano"]
    assert server.get("/v1/audio/models").json == page
    assert server.get("/v1/models/nano").json == page["data"][0]
    # A name that stock clients send.
    assert server.get("/v1/models/tts-1").json == page["data"][0]


def test_requests_are_counted_and_logged(serve, lines):
    async def endpoint(request):
        return JSONResponse({})

    server = serve([Route(SPEECH, endpoint, methods=["POST"])])
    answer = server.ask("POST", f"{SPEECH}?words={SECRET.replace(' ', '+')}", {"input": SECRET})
    server.get(f"/v1/{'x' * 1000}")
    found = metrics(server)
    count = "mimo_fast_requests_total"
    assert found[count, ("endpoint", SPEECH), ("status", "200")] == 1
    # Paths that do not exist are one, or anybody could fill the memory with them.
    assert found[count, ("endpoint", "other"), ("status", "404")] == 1
    assert found["mimo_fast_queue_seconds_count",] == 1
    assert found["process_resident_memory_bytes",] > 10**7
    assert found["mimo_fast_requests_running",] == 0
    entry = next(line for line in lines() if line.get("path") == SPEECH)
    assert entry["request"] == answer.headers["x-request-id"]
    assert entry["status"] == 200
    assert entry["method"] == "POST"
    assert entry["client"] == "127.0.0.1"
    assert SECRET not in json.dumps(lines())
    assert max(len(line.get("path", "")) for line in lines()) <= 100


def test_who_left_is_counted_as_that(serve):
    async def endpoint(request):
        await asyncio.sleep(60)

    server = serve([Route(SPEECH, endpoint, methods=["POST"])])
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"POST {SPEECH} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    time.sleep(0.3)
    client.close()
    name = ("mimo_fast_requests_total", ("endpoint", SPEECH), ("status", "499"))
    for _ in range(50):
        if metrics(server).get(name) == 1:
            break
        time.sleep(0.05)
    assert metrics(server)[name] == 1


def test_a_compute_thread_that_hangs_is_not_ready(serve, service, monkeypatch):
    monkeypatch.setattr(health, "ANSWER", 0.2)
    server = serve()
    assert server.get("/ready").json["status"] == "ready"
    loop_free = []

    def hang():
        while not loop_free:
            time.sleep(0.01)

    with service.worker._changed:
        service.worker._calls.append(hang)
        service.worker._changed.notify()
    answer = server.get("/ready")
    assert answer.status == 503
    assert answer.error["code"] == "not_ready"
    # It lives, as far as a supervisor is concerned that only asks for that.
    assert server.get("/health").status == 200
    loop_free.append(True)
    assert server.get("/ready").status == 200


def test_speech_is_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mimo_fast.server.metrics.perf_counter", lambda: now[0])
    found = Metrics()

    def value(name):
        return found.registry.get_sample_value(f"mimo_fast_{name}")

    meter = found.speech()
    now[0] = 0.25
    meter.heard(0.5)
    now[0] = 0.5
    meter.heard(0.5)
    # Both have played by 1.25: this comes 0.25 too late.
    now[0] = 1.5
    meter.heard(0.5)
    # This, too, but its reader has not even read the last.
    now[0] = 9.0
    meter.heard(0.5, hungry=False)
    meter.ended()
    assert value("first_audio_seconds_sum") == 0.25
    assert value("chunk_gap_seconds_count") == 3
    assert value("chunk_gap_seconds_sum") == 0.25
    assert value("audio_seconds_total") == 2.0
    assert value("real_time_factor_sum") == 4.5
    # One that said nothing has no factor.
    found.speech().ended()
    assert value("real_time_factor_count") == 1


def test_lines_of_the_log_are_json(lines):
    log("event", number=1, missing=None, odd="\x1b[2J\n\u2028")
    LOGGER.warning("plain %s", "text")
    log("words", text=said(SECRET))
    first, second, third = lines()
    assert first["event"] == "event"
    assert first["number"] == 1
    assert first["level"] == "info"
    assert "missing" not in first
    assert re.match(r"\d{4}-\d\d-\d\dT", first["time"])
    assert second["event"] == "plain text"
    assert third["text"] == len(SECRET)


def fail():
    raise KeyError(SECRET)


def test_an_exceptions_message_is_not_logged():
    try:
        fail()
    except KeyError:
        record = logging.LogRecord("uvicorn.error", 40, "", 0, "failed", (), sys.exc_info())
    line = json.loads(JsonLines().format(record))
    assert line["error"] == "KeyError"
    assert line["where"][-1].endswith(" fail")
    assert SECRET not in str(line)


class TestErrorsThatNobodyWasGiven:
    """Each is one line of the log, which says where it arose, and not what the user said."""

    def check(self, lines, **fields):
        (line,) = [each for each in lines() if each["level"] == "error"]
        assert line["error"] == "KeyError"
        assert line["where"][-1].endswith(" fail")
        assert line.items() >= fields.items()
        assert SECRET not in str(line)

    def test_of_a_task(self, lines):
        async def scenario():
            async def failing():
                fail()

            task = asyncio.create_task(failing())
            await asyncio.sleep(0.01)
            del task
            gc.collect()

        asyncio.run(scenario())
        self.check(lines, logger="asyncio", event="Task exception was never retrieved")

    def test_of_a_thread(self, lines):
        thread = threading.Thread(target=fail, name="a thread")
        thread.start()
        thread.join()
        self.check(lines, thread="a thread")

    def test_of_what_is_thrown_away(self, lines):
        class Thrown:
            def __del__(self):
                fail()

        Thrown()
        gc.collect()
        self.check(lines)


def test_streams_for_listeners_are_measured(serve, service):
    server = serve()

    async def scenario():
        async with service.speech("good morning") as stream:
            return [chunk async for chunk in stream]

    spoken = sum(len(chunk.audio) for chunk in asyncio.run(scenario())) / service.sample_rate
    found = metrics(server)
    assert found["mimo_fast_audio_seconds_total",] == pytest.approx(spoken)
    assert found["mimo_fast_first_audio_seconds_count",] == 1
    assert found["mimo_fast_real_time_factor_count",] == 1
