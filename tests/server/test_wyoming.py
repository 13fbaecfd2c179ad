"""`--wyoming`: the stock client of Home Assistant's protocol, and clients that mean no good."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from servers import Running, start, until
from wyoming.asr import Transcribe, Transcript, TranscriptChunk
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)

import mimo_fast
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.errors import ConfigError, MimoFastError
from mimo_fast.server import wyoming as served
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.serving import bind
from mimo_fast.server.settings import Settings

RATE = 16_000


@dataclass(frozen=True)
class Home:
    """A server with Wyoming at `uri`."""

    running: Running
    uri: str
    port: int

    @property
    def state(self) -> Any:
        return self.running.app.state

    def raw(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.settimeout(30)
        return connection


@pytest.fixture
def serve_home(service: Service) -> Iterator[Callable[..., Home]]:
    started = list[Running]()

    def serving(**options: Any) -> Home:
        address = "tcp://127.0.0.1:0"
        settings = Settings(**({"port": 0, "drain_seconds": 2.0, "wyoming": address} | options))
        app, bound = create_app(service, settings), bind("127.0.0.1", 0, "--wyoming", "")
        started.append(start(app, settings, served.Wyoming(app, bound)))
        port = bound.getsockname()[1]
        return Home(started[-1], f"tcp://127.0.0.1:{port}", port)

    yield serving
    for each in started:
        each.stop()


@pytest.fixture
def home(serve_home: Callable[..., Home]) -> Home:
    return serve_home()


def samples(path: str, rate: int = RATE) -> bytes:
    wav = mimo_fast.load_audio(path, rate).numpy()
    return (wav * 32767).round().astype("<i2").tobytes()


async def tell(client: AsyncClient, *events: Any) -> None:
    for event in events:
        await client.write_event(event if isinstance(event, Event) else event.event())


async def answers(client: AsyncClient, last: Any) -> list[Event]:
    """Events up to one of this kind."""
    found = list[Event]()
    async with asyncio.timeout(60):
        while not (found and last.is_type(found[-1].type)):
            event = await client.read_event()
            assert event is not None, [each.type for each in found]
            assert event.type != "error", event.data
            found.append(event)
    return found


def sound(events: list[Event]) -> torch.Tensor:
    chunks = [AudioChunk.from_event(each) for each in events if AudioChunk.is_type(each.type)]
    assert {(each.rate, each.width, each.channels) for each in chunks} == {(24_000, 2, 1)}
    data = b"".join(each.audio for each in chunks)
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.float32) / 32768)


def question(form: dict[str, int], data: bytes, part: int = 2048) -> list[Any]:
    pieces = [data[at : at + part] for at in range(0, len(data), part)]
    chunks = [AudioChunk(**form, audio=piece) for piece in pieces]
    return [AudioStart(**form), *chunks, AudioStop()]


FORM = {"rate": RATE, "width": 2, "channels": 1}


def test_it_says_what_it_can(home):
    async def ask() -> tuple[Info, Pong]:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, Describe(), Ping("here"))
            info = Info.from_event((await answers(client, Info))[-1])
            return info, Pong.from_event((await answers(client, Pong))[-1])

    info, pong = asyncio.run(ask())
    (heard,), (said,) = info.asr, info.tts
    assert (heard.supports_transcript_streaming, said.supports_synthesize_streaming) == (True, True)
    assert [(model.name, model.languages) for model in heard.models] == [("nano", ["en"])]
    assert [(voice.name, voice.languages) for voice in said.voices] == [("default", ["en"])]
    assert pong.text == "here"


def test_the_stock_client_transcribes_while_words_come(home):
    async def ask() -> list[Event]:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, Transcribe(language="en"), *question(FORM, samples(QUESTION)))
            found = await answers(client, Transcript)
            return [*found, *(await answers(client, served.TranscriptStop))]

    events = asyncio.run(ask())
    kinds = [event.type for event in events]
    assert kinds[0] == "transcript-start"
    assert kinds[-2:] == ["transcript", "transcript-stop"]
    parts = [TranscriptChunk.from_event(each).text for each in events if each.type == kinds[1]]
    assert kinds[1] == "transcript-chunk"
    assert len(parts) > 1
    assert "".join(parts) == Transcript.from_event(events[-2]).text == "what is three plus four"
    until(lambda: home.state.sessions.taken == 0)


def test_recordings_of_other_forms_are_understood(home):
    mono = np.frombuffer(samples(QUESTION, 48_000), "<i2")
    data = np.stack([mono, mono], axis=1).astype("<i4") << 16
    form = {"rate": 48_000, "width": 4, "channels": 2}

    async def ask() -> str:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, *question(form, data.astype("<i4").tobytes(), 16_384))
            return Transcript.from_event((await answers(client, Transcript))[-1]).text

    assert asyncio.run(ask()) == "what is three plus four"


def test_a_text_is_said_and_heard_again(home, service):
    async def ask() -> list[Event]:
        async with AsyncClient.from_uri(home.uri) as client:
            voice = SynthesizeVoice(name="default")
            await tell(client, Synthesize("what color is the sea", voice))
            return await answers(client, AudioStop)

    events = asyncio.run(ask())
    assert events[0].type == "audio-start"
    assert service.model.asr_sft(sound(events)) == "what color is the sea"


def test_requests_follow_one_another_on_a_connection(home):
    async def ask() -> tuple[list[int], str, str]:
        async with AsyncClient.from_uri(home.uri) as client:
            sizes = list[int]()
            for _ in range(3):
                await tell(client, Synthesize("seven"))
                sizes.append(len(sound(await answers(client, AudioStop))))
            await tell(client, *question(FORM, samples(QUESTION)))
            said = Transcript.from_event((await answers(client, Transcript))[-1]).text
            # A second one at the same time is not taken.
            await tell(client, SynthesizeStart(), SynthesizeStart())
            async with asyncio.timeout(30):
                while (event := await client.read_event()).type != "error":
                    pass
            return sizes, said, event.data["code"]

    sizes, said, code = asyncio.run(ask())
    assert min(sizes) > 4800
    assert said == "what is three plus four"
    assert code == "busy"
    until(lambda: home.state.sessions.taken == home.state.requests.taken == 0)


def test_a_text_is_said_before_it_ends(home, service):
    async def ask() -> list[Event]:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, SynthesizeStart(), *map(SynthesizeChunk, ["what co", "lor is the "]))
            await tell(client, *map(SynthesizeChunk, ["sea? ", "come here "]))
            # The rest comes only once this is heard.
            first = await answers(client, AudioChunk)
            whole = "what color is the sea? come here on monday"
            rest = [SynthesizeChunk("on monday"), Synthesize(whole), SynthesizeStop()]
            await tell(client, *rest)
            return [*first, *(await answers(client, SynthesizeStopped))]

    events = asyncio.run(ask())
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-2:]) == ("audio-start", ["audio-stop", "synthesize-stopped"])
    assert kinds.count("audio-start") == 1
    words = service.model.transcribe(sound(events)).text.split()
    assert words == ["what", "color", "is", "the", "sea", "come", "here", "on", "monday"]
    until(lambda: home.state.sessions.taken == 0)


def problem(home: Home, *lines: Any) -> str:
    """What a connection that sends these is told before it is closed."""
    with home.raw() as connection:
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            connection.sendall(data)
        with connection.makefile("rb") as file:
            head = json.loads(file.readline())
            assert head["type"] == "error"
            told = json.loads(file.read(head["data_length"]))
            # What was not read any more resets it.
            with suppress(ConnectionError):
                assert file.read() == b""
            return str(told["code"])


START = {"type": "audio-start", "data": FORM}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"GET / HTTP/1.1\r\n", "invalid_event"),
        (b"\xff\xfe\n", "invalid_event"),
        (b"[]\n", "invalid_event"),
        (b"{}\n", "invalid_event"),
        (b"[" * 60_000 + b"\n", "invalid_event"),
        (b" " * 200_000, "invalid_event"),
        ({"type": "ping", "data": []} | {"data": [1]}, "invalid_type"),
        ({"type": "audio-chunk", "payload_length": 10**15}, "invalid_event"),
        ({"type": "audio-chunk", "payload_length": -5}, "invalid_event"),
        ({"type": "audio-chunk", "payload_length": "5"}, "invalid_event"),
        ({"type": "audio-chunk", "payload_length": True}, "invalid_event"),
        ({"type": "audio-chunk", "payload_length": 1.5}, "invalid_event"),
        ({"type": "describe", "data_length": 10**9}, "invalid_event"),
        ({"type": "describe", "data_length": -1}, "invalid_event"),
    ],
)
def test_what_is_no_event_ends_the_connection(home, line, code):
    assert problem(home, line) == code
    assert home.running.get("/ready").status == 200


async def refused(home: Home, *events: Event) -> tuple[str, bool]:
    """The code of the error that some events are answered by; whether the client may go on."""
    async with AsyncClient.from_uri(home.uri) as client:
        await tell(client, *events)
        async with asyncio.timeout(30):
            event = await client.read_event()
            assert event is not None
            assert event.type == "error"
            await tell(client, Describe())
            goes_on = await client.read_event()
        return event.data["code"], goes_on is not None and Info.is_type(goes_on.type)


@pytest.mark.parametrize(
    "events",
    [
        [Event("audio-start", {"rate": 0, "width": 2, "channels": 1})],
        [Event("audio-start", {"rate": 16000.5, "width": 2, "channels": 1})],
        [Event("audio-start", {"rate": 16000, "width": 9, "channels": 1})],
        [Event("audio-start", {})],
        [AudioStart(**FORM).event(), Event("audio-chunk", FORM, b"abc")],
        [AudioStart(**FORM).event(), Event("audio-chunk", FORM | {"rate": 8000}, b"ab")],
        [Event("transcribe", {"language": "de"})],
        [Event("synthesize", {"text": 5})],
        [Event("synthesize", {"text": "seven", "voice": {"name": "nobody"}})],
        [Event("synthesize", {"text": "seven", "voice": 7})],
        [Event("synthesize-start"), Event("synthesize-chunk", {"text": None})],
    ],
)
def test_a_request_that_is_wrong_is_refused_and_the_client_goes_on(home, events):
    code, goes_on = asyncio.run(refused(home, *events))
    assert code
    if events[0].type != "synthesize-start":
        assert goes_on
    until(lambda: home.state.sessions.taken == home.state.requests.taken == 0)


def test_recordings_and_texts_are_bounded(serve_home):
    home = serve_home(max_audio_seconds=1, max_text_chars=40)
    second = AudioChunk(**FORM, audio=bytes(2 * RATE)).event()
    long = asyncio.run(refused(home, AudioStart(**FORM).event(), second, second))
    assert long == ("recording_too_long", True)
    text = Event("synthesize", {"text": "seven " * 20})
    assert asyncio.run(refused(home, text))[0] == "string_above_max_length"
    until(lambda: home.state.sessions.taken == 0)


def test_a_client_that_vanishes_frees_its_slot(home, service):
    for events in (
        [START, {"type": "audio-chunk", "data": FORM, "payload_length": 1000}],
        [{"type": "synthesize-start"}, {"type": "synthesize-chunk", "data": {"text": "seven. a "}}],
        [{"type": "synthesize", "data": {"text": "what color is the sea"}}],
    ):
        connection = home.raw()
        for event in events:
            connection.sendall(json.dumps(event).encode() + b"\n")
        until(lambda: home.state.sessions.taken + home.state.requests.taken == 1)
        connection.close()
        until(lambda: home.state.sessions.taken + home.state.requests.taken == 0)
        until(lambda: service.worker.streams == 0)


def test_a_silent_client_is_not_waited_for(serve_home, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.3)
    home = serve_home()
    assert problem(home, START) == "timeout"
    assert problem(home, b"") == "timeout"
    until(lambda: home.state.sessions.taken == 0)


def test_a_full_server_says_so(serve_home):
    home = serve_home(max_sessions=1, queue_seconds=0.1)
    with home.raw() as other:
        other.sendall(json.dumps(START).encode() + b"\n")
        until(lambda: home.state.sessions.taken == 1)
        code, goes_on = asyncio.run(refused(home, AudioStart(**FORM).event()))
    assert (code, goes_on) == ("rate_limit_exceeded", True)


def test_a_flood_is_ended(serve_home):
    home = serve_home(max_rate=1)
    with home.raw() as connection:
        connection.sendall(b'{"type": "nothing"}\n' * 20)
        with connection.makefile("rb") as file:
            assert json.loads(file.readline())["type"] == "error"
            assert b"rate_limit_exceeded" in file.read()


def test_it_stops_with_the_server(home):
    with home.raw() as idle, home.raw() as hearing:
        hearing.sendall(json.dumps(START).encode() + b"\n")
        until(lambda: home.state.sessions.taken == 1)
        home.running.stop()
        for connection in (idle, hearing):
            assert connection.recv(1000) == b""


def test_a_model_that_was_freed_comes_back():
    service = Service(mimo_fast.load(max_batch=2), "nano")
    settings = Settings(port=0, keep_alive=0.0, wyoming="tcp://127.0.0.1:0")
    app = create_app(service, settings, lambda: mimo_fast.load(max_batch=2))
    bound = bind("127.0.0.1", 0, "--wyoming", "")
    running = start(app, settings, served.Wyoming(app, bound))

    async def ask() -> list[Event]:
        async with AsyncClient.from_uri(f"tcp://127.0.0.1:{bound.getsockname()[1]}") as client:
            await tell(client, Transcribe(language="en"), Describe())
            await answers(client, Info)
            await tell(client, Synthesize("seven", SynthesizeVoice(name="default")))
            return await answers(client, AudioStop)

    try:
        for _ in range(2):
            assert len(sound(asyncio.run(ask()))) > 4800
            until(lambda: not app.state.keeper.loaded)
    finally:
        running.stop()
        service.close()


@pytest.mark.slow
def test_the_command_serves_both_and_ends():
    with bind("127.0.0.1", 0, "--wyoming", "") as free:
        uri = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mimo_fast", "serve", "--port", "0", "--wyoming", uri]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": environment}

    async def ask() -> Info:
        async with AsyncClient.from_uri(uri) as client:
            await tell(client, Describe())
            return Info.from_event((await answers(client, Info))[-1])

    with subprocess.Popen(command, **options) as process:
        while "Home Assistant: Wyoming Protocol" not in (line := process.stderr.readline()):
            assert line
        assert asyncio.run(ask()).asr
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert told.splitlines()[-1] == "stopped"


def test_who_may_use_it():
    with pytest.raises(ConfigError, match="name those that may use it with --wyoming-clients"):
        Settings(wyoming="tcp://0.0.0.0:10300")
    Settings(wyoming="tcp://0.0.0.0:10300", wyoming_clients=("192.168.1.0/24",))
    with pytest.raises(ConfigError, match=r"is not like 192\.168\.1\.20"):
        Settings(wyoming_clients=("home",))
    for wrong in ("10300", "tcp://127.0.0.1", "http://127.0.0.1:1", "tcp://127.0.0.1:99999"):
        with pytest.raises(ConfigError, match=r"is not like tcp://127\.0\.0\.1:10300"):
            Settings(wyoming=wrong)


@pytest.mark.parametrize(
    ("peer", "may"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:192.168.1.7", True),
        ("192.168.1.7", True),
        ("192.168.2.7", False),
        ("", False),
    ],
)
def test_other_addresses_are_not_answered(service, peer, may):
    settings = Settings(wyoming="tcp://0.0.0.0:1", wyoming_clients=("192.168.1.0/24",))
    bound = bind("127.0.0.1", 0, "--wyoming", "")
    with bound:
        assert served.Wyoming(create_app(service, settings), bound)._may(peer) is may


def test_a_port_that_is_taken_is_named():
    with bind("127.0.0.1", 0, "--wyoming", "") as bound:
        port = bound.getsockname()[1]
        with pytest.raises(MimoFastError, match="give --wyoming another port"):
            bind("127.0.0.1", port, "--wyoming", "give --wyoming another port")
