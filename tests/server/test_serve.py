"""`mimo-fast serve`: options, what it prints, how it ends."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import fields

import pytest
import websockets
from servers import until
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from mimo_fast.cli.common import load_model, load_options
from mimo_fast.cli.main import main
from mimo_fast.cli.parser import build_parser
from mimo_fast.cli.server_options import settings_of
from mimo_fast.errors import ConfigError
from mimo_fast.server import limits, protocols
from mimo_fast.server.settings import Settings, option_of, read_bytes, read_time, variable_of

SPEECH = "/v1/audio/speech"


def parsed(*arguments):
    return settings_of(build_parser().parse_args(["serve", *arguments]))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in os.environ:
        if name.startswith("MIMO_FAST_"):
            monkeypatch.delenv(name)


VALUES = {
    "host": ("::1", "::1"),
    "port": ("9000", 9000),
    "api_key": ("secret", "secret"),
    "max_sessions": ("3", 3),
    "max_requests": ("3", 3),
    "queue_seconds": ("1.5", 1.5),
    "max_connections": ("100", 100),
    "max_rate": ("2.5", 2.5),
    "max_body_bytes": ("2M", 2 << 20),
    "max_message_bytes": ("512k", 512 << 10),
    "max_audio_seconds": ("60", 60.0),
    "max_text_chars": ("100", 100),
    "max_choices": ("1", 1),
    "max_load": ("0.9", 0.9),
    "max_parked_bytes": ("64M", 64 << 20),
    "allow_voice_upload": ("1", True),
    "mark": ("1", True),
    "allowed_origins": (
        "https://a.example, https://b.example",
        ("https://a.example", "https://b.example"),
    ),
    "allowed_hosts": ("a.example", ("a.example",)),
    "ice_servers": (
        "stun:a.example, stun:b.example:3478",
        ({"urls": ["stun:a.example"]}, {"urls": ["stun:b.example:3478"]}),
    ),
    "self_signed": ("1", True),
    "log_words": ("yes", True),
    "log_level": ("error", "error"),
    "keep_alive": ("5m", 300.0),
    "drain_seconds": ("1", 1.0),
    "wyoming": ("tcp://127.0.0.1:10300", "tcp://127.0.0.1:10300"),
    "wyoming_clients": ("192.168.1.20, 10.0.0.0/8", ("192.168.1.20", "10.0.0.0/8")),
    "ray": ("1", True),
    "ray_address": ("auto", "auto"),
    "replicas": ("2", 2),
    "min_replicas": ("2", 2),
    "max_replicas": ("3", 3),
    "target_ongoing": ("4.5", 4.5),
    "cpus_per_replica": ("0.5", 0.5),
    "gpus_per_replica": ("0.25", 0.25),
}
"""A text of each option and what it means."""


def test_defaults_are_those_of_the_settings():
    assert parsed() == Settings()


def test_every_option_is_also_a_variable(monkeypatch, tmp_path):
    folder, file = tmp_path / "voices", tmp_path / "file"
    folder.mkdir()
    file.touch()
    values = VALUES | {
        "voices": (str(folder), folder),
        "examples": (str(folder), folder),
        "ssl_certfile": (str(file), file),
        "ssl_keyfile": (str(file), file),
    }
    assert set(values) == {each.name for each in fields(Settings)}
    check_options(monkeypatch, {name: each for name, each in values.items() if name != "ray"})
    # Wyoming is of one process.
    check_options(monkeypatch, {name: each for name, each in values.items() if name != "wyoming"})


def check_options(monkeypatch, values):
    wanted = Settings(**{name: value for name, (_, value) in values.items()})
    for name, (text, _) in values.items():
        monkeypatch.setenv(variable_of(name), text)
    assert parsed() == wanted
    for name in values:
        monkeypatch.delenv(variable_of(name))
    options = list[str]()
    for name, (text, value) in values.items():
        options += [option_of(name)] if value is True else [option_of(name), text]
    assert parsed(*options) == wanted


def test_the_models_options_are_variables_too(monkeypatch):
    texts = {"STREAMS": "3", "SERVED_NAME": "mine", "QUANTIZATION": "int4", "OFFLINE": "1"}
    texts |= {"OFFLOAD": "text_embeddings, codec_encoder", "MAX_SEQ_LEN": "512", "DEVICE": "cpu"}
    for name, text in texts.items():
        monkeypatch.setenv(f"MIMO_FAST_{name}", text)
    args = build_parser().parse_args(["serve", "--quantization", "int8"])
    assert (args.streams, args.served_name, args.quantization) == (3, "mine", "int8")
    assert (args.offline, args.max_seq_len, args.device) == (True, 512, "cpu")
    assert args.offload == ["text_embeddings", "codec_encoder"]
    # They are the server's alone.
    assert build_parser().parse_args(["info"]).device is None
    monkeypatch.setenv("MIMO_FAST_QUANTIZATION", "int3")
    with pytest.raises(ConfigError, match="MIMO_FAST_QUANTIZATION must be one of int8"):
        parsed()


def test_an_option_counts_more_than_its_variable(monkeypatch):
    monkeypatch.setenv("MIMO_FAST_PORT", "9000")
    monkeypatch.setenv("MIMO_FAST_LOG_WORDS", "1")
    assert parsed("--port", "9001", "--no-log-words") == Settings(port=9001)


def test_the_help_names_every_option_and_hides_the_key(monkeypatch, capsys):
    monkeypatch.setenv("MIMO_FAST_API_KEY", "very-secret")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    shown = capsys.readouterr().out
    for each in fields(Settings):
        assert option_of(each.name) in shown
    assert "very-secret" not in shown


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("STREAMS", "many"),
        ("PORT", "eighty"),
        ("MAX_BODY_BYTES", "2X"),
        ("KEEP_ALIVE", "soon"),
        ("MAX_RATE", ""),
    ],
)
def test_a_variable_that_means_nothing_is_bad_usage(monkeypatch, capsys, variable, text):
    monkeypatch.setenv(f"MIMO_FAST_{variable}", text)
    if not text:
        assert parsed() == Settings()
        return
    with pytest.raises(SystemExit) as ended:
        parsed()
    assert ended.value.code == 2
    assert f"MIMO_FAST_{variable} must be" in capsys.readouterr().err
    # Other commands do not look at it.
    build_parser().parse_args(["info"])


def test_a_flag_in_the_environment_is_yes_or_no(monkeypatch):
    monkeypatch.setenv("MIMO_FAST_LOG_WORDS", "perhaps")
    with pytest.raises(ConfigError, match="MIMO_FAST_LOG_WORDS"):
        parsed()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"port": 70000}, "--port must be at most 65535"),
        ({"max_sessions": 0}, "--max-sessions must be at least 1"),
        ({"max_rate": float("nan")}, "--max-rate must be a finite"),
        ({"queue_seconds": float("inf")}, "--queue-seconds must be a finite"),
        ({"log_level": "loud"}, "--log-level must be one of"),
        ({"allow_voice_upload": True}, "--voices DIR"),
        ({"ice_servers": ({"urls": "http://a.example"},)}, "--ice-servers: http://a.example is"),
        ({"ice_servers": ({},)}, "--ice-servers: None is not like stun:"),
        ({"ice_servers": ({"urls": ["turn:a.example"]},)}, "needs a name and a password"),
        ({"ice_servers": ({"urls": "stun:a", "url": ""},)}, "--ice-servers: there is no field url"),
    ],
)
def test_values_out_of_range_are_refused(options, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        Settings(**options)


def test_ice_servers_are_json_or_addresses(monkeypatch, capsys):
    turn = {"urls": "turn:a.example?transport=udp", "username": "u", "credential": "p,q"}
    for given in (turn, [turn]):
        assert parsed("--ice-servers", json.dumps(given)) == Settings(ice_servers=(turn,))
    monkeypatch.setenv("MIMO_FAST_ICE_SERVERS", json.dumps([turn]))
    assert parsed() == Settings(ice_servers=(turn,))
    for wrong in ("[", "[1]", "{"):
        with pytest.raises(SystemExit):
            parsed("--ice-servers", wrong)
        assert "must be JSON, or addresses with commas" in capsys.readouterr().err


def test_files_that_are_missing_are_named(tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(ConfigError, match="--voices: there is no folder"):
        Settings(voices=missing)
    with pytest.raises(ConfigError, match="--examples: there is no folder"):
        Settings(examples=missing)
    with pytest.raises(ConfigError, match="both"):
        Settings(ssl_certfile=missing)
    with pytest.raises(ConfigError, match="--ssl-certfile: there is no file"):
        Settings(ssl_certfile=missing, ssl_keyfile=missing)


def test_sizes_and_times():
    assert [read_bytes(text) for text in ("12", "2k", "3M", "1G")] == [12, 2048, 3 << 20, 1 << 30]
    assert [read_time(text) for text in ("0", "-1", "90s", "5m", "1.5h")] == [0, -1, 90, 300, 5400]


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"port {port}" in error
    assert "--port" in error


def test_an_address_that_is_not_ours_is_one_line(capsys):
    assert main(["serve", "--host", "192.0.2.1", "--port", "0", "--api-key", "key"]) == 1
    assert main(["serve", "--host", "no.such.invalid", "--api-key", "key"]) == 1
    assert capsys.readouterr().err.count("\n") == 2


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mimo_fast.server.app", raising=False)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["serve", "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert "of which starlette is missing" in error
    assert "mimo-fast[server]" in error


def test_a_missing_package_of_forms_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    assert main(["serve", "--port", "0"]) == 1
    assert "python_multipart" in capsys.readouterr().err


def test_a_server_without_a_key_for_others_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--host", "0.0.0.0"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "MIMO_FAST_API_KEY" in error


def test_a_file_that_is_no_certificate_is_named(tmp_path, capsys):
    file = tmp_path / "cert.pem"
    file.write_text("nothing")
    options = ["--port", "0", "--ssl-certfile", str(file), "--ssl-keyfile", str(file)]
    assert main(["serve", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no certificate in PEM form" in error


def test_a_client_that_does_not_read_holds_nothing_up(serve, monkeypatch):
    # Else it is given up after a minute, which this test would not wait for.
    monkeypatch.setattr(protocols, "STALL", 600.0)

    async def endpoint(websocket):
        await websocket.accept()
        while True:
            await websocket.send_text("x" * 100_000)

    server = serve([WebSocketRoute("/test", endpoint)], drain_seconds=0.5)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        lines = ["GET /test HTTP/1.1", "Host: 127.0.0.1", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
        client.sendall("\r\n".join(lines).encode())
        assert b"101" in client.recv(100)
        held = server.server.server_state.connections
        until(lambda: any(each.transport.get_write_buffer_size() for each in held))
        server.stop()
    assert not server.app.state.live


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the certificate")
def test_https(serve, tmp_path):
    """The command of docs/server.md makes what it serves."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=voice.local"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    options = {"ssl_certfile": certificate, "ssl_keyfile": key}
    server = serve([WebSocketRoute("/test", greet)], **options)
    assert server.url.startswith("https://")
    trusting = ssl.create_default_context(cafile=certificate)
    trusting.check_hostname = False
    with urllib.request.urlopen(f"{server.url}/health", context=trusting) as health:
        assert json.load(health)["status"] == "ok"
    address = f"wss://127.0.0.1:{server.port}/test"

    async def greeted(origin):
        # Not by the client with a thread for reading: Python 3.11 does not lock a connection of TLS
        # between two threads, and one handshake in some hundreds hangs.
        async with websockets.connect(address, ssl=trusting, origin=origin) as client:
            return await client.recv()

    # Its own page is one of https.
    assert asyncio.run(greeted(server.url)) == "hello"
    with pytest.raises(InvalidStatus):
        asyncio.run(greeted(server.url.replace("https", "http")))


async def greet(websocket):
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


class Process:
    """`mimo-fast serve` as a process."""

    def __init__(self, *options, **variables):
        command = [sys.executable, "-m", "mimo_fast", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        )
        self.lines = []
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("hear it:"):
                break
        shown = re.search(r"listening on (http://127\.0\.0\.1:\d+) ", "".join(self.lines))
        assert shown is not None, self.lines
        self.url = shown[1]

    def end(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def test_sigterm_ends_what_is_still_loading(monkeypatch, capsys):
    """The first process of a container has no default for it."""

    def loading(*_arguments, **_options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("mimo_fast.cli.serve.load_model", loading)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--port", "0"])
    assert ended.value.code == 0
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_begins_and_ends_cleanly(number):
    with Process(MIMO_FAST_API_KEY="from-the-environment") as started:
        with urllib.request.urlopen(f"{started.url}/health") as health:
            assert json.load(health)["status"] == "ok"
        asked = urllib.request.Request(f"{started.url}/v1/models")
        asked.add_header("Authorization", "Bearer from-the-environment")
        with urllib.request.urlopen(asked) as models:
            assert json.load(models)["data"][0]["id"] == "nano"
        code, out, err = started.end(number)
    assert code == 0
    assert out == ""
    assert "from-the-environment" not in "".join(started.lines) + err
    *logged, last = err.splitlines()
    assert last == "stopped"
    assert [json.loads(line)["event"] for line in logged][-2:] == ["stopping", "stopped"]
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_curl_line_works_as_it_stands(tmp_path):
    with Process() as started:
        line = started.lines[-1].removeprefix("hear it:").strip()
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, timeout=60)
        assert started.end(signal.SIGINT)[0] == 0
    assert (tmp_path / "speech.mp3").stat().st_size > 1000
    assert (tmp_path / "speech.mp3").read_bytes()[:3] in (b"ID3", b"\xff\xfb\x94", b"\xff\xf3\x84")


def test_what_runs_is_ended_before_the_server_is(serve):
    async def endpoint(request):
        async def parts():
            for _ in range(5):
                yield b"part"
                await asyncio.sleep(0.1)

        return StreamingResponse(parts())

    server = serve([Route(SPEECH, endpoint, methods=["POST"])], drain_seconds=10.0)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(server.ask("POST", SPEECH, b"{}")))
    asker.start()
    while not server.app.state.requests.taken:
        time.sleep(0.01)
    server.stop()
    asker.join()
    assert answers[0].body == b"part" * 5


def test_sessions_end_between_replies(serve, monkeypatch):
    """One that is being spoken to hears the end, one that only listens is told to go."""
    monkeypatch.setattr(limits, "CALM", 1.5)

    async def endpoint(websocket):
        await websocket.accept()
        count = int(await websocket.receive_text())
        for _ in range(count):
            await websocket.send_text("sound")
            await asyncio.sleep(0.1)
        while True:
            await websocket.receive_text()

    server = serve([WebSocketRoute("/test", endpoint)], drain_seconds=10.0)
    address = f"ws://127.0.0.1:{server.port}/test"
    with connect(address) as idle, connect(address) as busy:
        idle.send("0")
        busy.send("30")
        busy.recv()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=30)
        assert closed.value.rcvd.code == 1012
        heard = []
        with pytest.raises(ConnectionClosedError) as closed:
            heard.extend(busy)
        assert closed.value.rcvd.code == 1012
        assert len(heard) == 29
        stopping.join()


def test_new_work_is_refused_while_it_stops(serve):
    server = serve()
    server.app.state.stopping = True
    for answer in (server.get("/ready"), server.ask("POST", SPEECH, {})):
        assert answer.status == 503
        assert answer.error["code"] == "server_stopping"
    assert server.get("/health").status == 200


def test_patience_has_an_end(serve):
    async def endpoint(websocket):
        await websocket.accept()
        while True:
            await websocket.send_text("sound")
            await asyncio.sleep(0.05)

    server = serve([WebSocketRoute("/test", endpoint)], drain_seconds=0.5)
    with connect(f"ws://127.0.0.1:{server.port}/test") as client:
        client.recv()
        server.stop()
        with pytest.raises(ConnectionClosedError) as closed:
            list(client)
    assert closed.value.rcvd.code == 1012


def test_home_assistants_protocol_needs_its_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wyoming", None)
    monkeypatch.delitem(sys.modules, "mimo_fast.server.wyoming", raising=False)
    for name in [each for each in sys.modules if each.startswith("wyoming.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "--port", "0", "--wyoming", "tcp://127.0.0.1:0"]) == 1
    assert "pip install 'mimo-fast[wyoming]'" in capsys.readouterr().err


def test_what_a_server_takes_on_is_the_engines(monkeypatch):
    """The bounds of the options are those of the model that is loaded."""
    args = build_parser().parse_args(
        ["serve", "--max-load", "0.75", "--max-parked-bytes", "64M", "--streams", "2"]
    )
    with load_model(args, max_batch=args.streams) as model:
        bounds = model.pipeline.engine.bounds
        assert (bounds.load, bounds.parked) == (0.75, 64 << 20)
    unbounded = load_options(build_parser().parse_args(["serve"]))
    assert unbounded["max_load"] is unbounded["max_parked_bytes"] is None
