"""`mimo-fast serve --ray` with two replicas of nano on this machine: `make ray`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from openai import OpenAI
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from mimo_fast.errors import ConfigError
from mimo_fast.server.replicas.cluster import check_resources
from mimo_fast.server.settings import Settings

ROOT = Path(__file__).parents[3]
RAY = ROOT / ".venv" / "ray"
KEY = "a-key-of-this-test"
SENTENCE = "what color is the sea"
START = 300.0
"""Seconds after which a cluster that does not begin is a failure; it takes about twenty."""

pytestmark = pytest.mark.skipif(not (RAY / "ray").is_dir(), reason="make ray installs it")


def environment() -> dict[str, str]:
    found = {name: text for name, text in os.environ.items() if not name.startswith("MIMO_FAST_")}
    paths = [str(RAY), str(ROOT), found.get("PYTHONPATH", "")]
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


class Cluster:
    """`mimo-fast serve --ray` as a process, and what it prints."""

    def __init__(self, folder: Path) -> None:
        voices = folder / "voices"
        voices.mkdir()
        command = [sys.executable, "-m", "mimo_fast", "serve", "--ray", "--replicas", "2"]
        command += ["--cpus-per-replica", "0.5", "--port", "0", "--streams", "2"]
        command += ["--voices", str(voices), "--allow-voice-upload", "--keep-alive", "1h"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment() | {"MIMO_FAST_API_KEY": KEY},
        )
        self.lines = list[str]()
        threading.Thread(target=self._read, daemon=True).start()
        self.until(lambda: any(line.startswith("hear it:") for line in self.lines), START)
        self.port = int(re.search(r"listening on http://127\.0\.0\.1:(\d+) ", self.text)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        # The head of a request that does not end.
        self.slow = socket.create_connection(("127.0.0.1", self.port))
        self.slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def until(self, true, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text[-4000:]
            time.sleep(0.1)

    def ask(self, path: str, body=None, method=None, **headers: str):
        """Status, headers and body of an answer."""
        asked = urllib.request.Request(f"{self.url}{path}", method=method)
        asked.add_header("Authorization", f"Bearer {KEY}")
        for name, value in headers.items():
            asked.add_header(name.replace("_", "-"), value)
        if body is not None:
            asked.data = json.dumps(body).encode()
            asked.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def session(self, **options):
        protocols = ["realtime", f"openai-insecure-api-key.{KEY}"]
        address = f"ws://127.0.0.1:{self.port}/v1/realtime?model=nano"
        found = connect(address, subprotocols=protocols, **options)
        assert json.loads(found.recv())["type"] == "session.created"
        return found

    def sessions(self) -> dict[str, float]:
        """Open sessions of each replica."""
        found = self.ask("/metrics")[2].decode()
        shown = re.findall(r'(?m)^mimo_fast_sessions\{replica="(\w+)"\} (\S+)$', found)
        return {name: float(count) for name, count in shown}

    def requests(self, path: str) -> dict[str, float]:
        """Answered requests of each replica."""
        found = self.ask("/metrics")[2].decode()
        line = rf'(?m)^mimo_fast_requests_total\{{replica="(\w+)",endpoint="{path}",.*\}} (\S+)$'
        return {name: float(count) for name, count in re.findall(line, found)}

    def processes(self) -> dict[str, int]:
        """The process of each replica that has begun."""
        begun = (json.loads(line) for line in self.lines if '"replica begun"' in line)
        return {line["replica"]: line["pid"] for line in begun}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    found = Cluster(tmp_path_factory.mktemp("ray"))
    yield found
    if found.process.poll() is None:
        found.process.send_signal(signal.SIGTERM)
        try:
            found.process.wait(60)
        finally:
            found.process.kill()


@pytest.fixture(scope="module")
def client(cluster):
    return OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY)


def test_both_replicas_speak_and_understand(cluster, client):
    said = "/v1/audio/speech"
    for _ in range(30):
        speech = client.audio.speech.create(
            model="nano", voice="alloy", input=SENTENCE, response_format="wav"
        )
        text = client.audio.transcriptions.create(model="nano", file=("a.wav", speech.read())).text
        assert re.sub(r"\W+", " ", text.lower()).strip() == SENTENCE
        answered = [cluster.requests(path) for path in (said, "/v1/audio/transcriptions")]
        if all(len(each) == 2 for each in answered):
            return
    pytest.fail(f"one replica did all: {answered}")


def test_who_may_use_it_is_judged_as_ever(cluster):
    assert cluster.ask("/health", Authorization="")[0] == 200
    assert json.loads(cluster.ask("/ready", Authorization="")[2])["status"] == "ready"
    assert cluster.ask("/v1/models", Authorization="Bearer wrong")[0] == 401
    assert cluster.ask("/v1/models", Host="evil.example")[0] == 421
    assert cluster.ask("/v1/models", Origin="https://evil.example")[0] == 403
    with pytest.raises(InvalidStatus) as refused:
        cluster.session(origin="https://evil.example")
    assert refused.value.response.status_code == 403
    with cluster.session(origin=cluster.url) as session:
        assert session.subprotocol == "realtime"
    found = cluster.ask("/nowhere")
    assert found[0] == 404
    assert json.loads(found[2])["error"]["code"] == "not_found"
    assert len(found[1].get_all("x-request-id")) == 1


def test_messages_have_the_servers_limits(cluster):
    """Ray's own proxy would close at 16 MiB."""
    with cluster.session(max_size=None) as session:
        session.send(json.dumps({"type": "conversation.item.create", "pad": "x" * (18 << 20)}))
        assert json.loads(session.recv())["error"]["param"] == "item"


def test_sessions_are_spread_and_stay(cluster):
    cluster.until(lambda: sum(cluster.sessions().values()) == 0)
    sessions = [cluster.session() for _ in range(8)]
    try:
        counts = cluster.sessions()
        assert sum(counts.values()) == 8
        assert len(counts) == 2
        assert min(counts.values()) >= 1
        for session in sessions:
            session.send(json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
            assert json.loads(session.recv())["type"] == "session.updated"
        assert cluster.sessions() == counts
    finally:
        for session in sessions:
            session.close()


def test_an_answer_is_known_to_both(cluster, client):
    """The next turn of a chat finds what another replica has said."""
    asked = {"model": "nano", "modalities": ["text", "audio"]}
    asked["audio"] = {"voice": "alloy", "format": "wav"}
    question = {"role": "user", "content": "good morning"}
    answer = client.chat.completions.create(**asked, messages=[question]).choices[0].message.audio
    earlier = {"role": "assistant", "audio": {"id": answer.id}}
    for _ in range(6):
        client.chat.completions.create(**asked, messages=[question, earlier, question])
    unknown = {"role": "assistant", "audio": {"id": f"audio_{'0' * 24}"}}
    with pytest.raises(Exception, match="audio"):
        client.chat.completions.create(**asked, messages=[question, unknown, question])


def test_a_voice_is_known_to_both(cluster):
    sample = ROOT / "mimo_fast" / "assets" / "question.wav"
    command = ["curl", "-sS", f"{cluster.url}/v1/audio/voices", "-F", "name=anna"]
    command += ["-H", f"Authorization: Bearer {KEY}", "-F", f"audio_sample=@{sample}"]
    command += ["-F", "consent=Anna agreed to this test"]
    added = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert added["id"] == "anna", added
    for _ in range(8):
        listed = json.loads(cluster.ask("/v1/audio/voices")[2])["data"]
        assert "anna" in [voice["id"] for voice in listed]


def test_models_are_freed_and_loaded_in_both(cluster, client):
    loaded = json.loads(cluster.ask("/api/ps")[2])["models"]
    assert {each["replica"] for each in loaded} == set(cluster.processes())
    assert json.loads(cluster.ask("/api/ps", method="DELETE")[2]) == {"models": []}
    speech = client.audio.speech.create(model="nano", voice="alloy", input=SENTENCE)
    assert len(speech.read()) > 1000
    assert len(json.loads(cluster.ask("/api/ps")[2])["models"]) == 1


def test_a_killed_replica_ends_its_sessions_alone(cluster):
    cluster.until(lambda: sum(cluster.sessions().values()) == 0)
    sessions = [cluster.session() for _ in range(8)]
    counts, processes = cluster.sessions(), cluster.processes()
    killed = next(iter(counts))
    os.kill(processes[killed], signal.SIGKILL)
    codes = Counter()
    for session in sessions:
        try:
            session.send(json.dumps({"type": "session.update", "session": {"type": "realtime"}}))
            while json.loads(session.recv(timeout=60))["type"] != "session.updated":
                pass
            codes["alive"] += 1
        except ConnectionClosed as closed:
            codes[closed.rcvd and (closed.rcvd.code, closed.rcvd.reason)] += 1
    told = (1012, "the replica of this session has ended: connect again")
    assert codes == {told: counts[killed], "alive": 8 - counts[killed]}
    with cluster.session() as session:
        assert session.close_code is None
    for session in sessions:
        session.close()
    # Another takes its place.
    cluster.until(lambda: len(cluster.processes()) == 3, START)


def test_the_head_of_a_request_has_its_time(cluster):
    cluster.slow.settimeout(60)
    assert cluster.slow.recv(100) == b""


def test_nothing_listens_to_other_machines(cluster):
    """Ray Serve's replicas would, by themselves."""
    mine = set[str]()
    for process in cluster.processes().values():
        with suppress(FileNotFoundError):
            for file in Path(f"/proc/{process}/fd").iterdir():
                with suppress(FileNotFoundError):
                    mine.add(os.readlink(file))
    listening = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    addresses = [
        row[1].partition(":")[0]
        for row in listening
        if row[3] == "0A" and f"socket:[{row[9]}]" in mine
    ]
    assert addresses
    assert not [each for each in addresses if not int(each, 16)]


def test_it_drains_and_ends(cluster):
    session = cluster.session()
    cluster.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed) as closed:
        session.recv(timeout=60)
    assert closed.value.rcvd.code == 1012
    assert closed.value.rcvd.reason == "the server is stopping"
    assert cluster.process.wait(120) == 0
    assert cluster.process.stdout.read() == ""
    assert cluster.lines[-1] == "stopped\n"
    assert "Traceback" not in cluster.text
    assert KEY not in cluster.text
    shown = [line for line in cluster.lines if line.startswith("{")]
    assert all(json.loads(line)["event"] for line in shown)
    for process in cluster.processes().values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


CONFIGURED = """
import json
NAMES = ("min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests")
from functools import partial
from mimo_fast.server.replicas.replica import deployment
from mimo_fast.server.settings import Settings
scaled = {"replicas": 5, "min_replicas": 2, "max_replicas": 4, "target_ongoing": 6.0}
for options in ({"replicas": 3}, scaled):
    settings = Settings(drain_seconds=7.0, **options)
    made = deployment(print, print, settings, 0.25)._bound_deployment
    config = made._deployment_config
    scaling = config.autoscaling_config
    print(json.dumps({
        "replicas": config.num_replicas,
        "scaling": scaling and {name: getattr(scaling, name) for name in NAMES},
        "ongoing": config.max_ongoing_requests,
        "grace": config.graceful_shutdown_timeout_s,
        "gpus": made.ray_actor_options["num_gpus"],
        "cpus": made.ray_actor_options["num_cpus"],
    }))
"""


def test_replicas_are_configured_as_asked():
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fixed, scaled = map(json.loads, done.stdout.splitlines())
    assert fixed == {
        "replicas": 3,
        "scaling": None,
        "ongoing": 24,
        "grace": 12.0,
        "gpus": 0.25,
        "cpus": 1.0,
    }
    assert scaled["scaling"] == {
        "min_replicas": 2,
        "initial_replicas": 4,
        "max_replicas": 4,
        "target_ongoing_requests": 6.0,
    }


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path):
    command = [sys.executable, "-m", "mimo_fast", "serve", "--ray", "--port", "0"]
    command += ["--ray-address", "127.0.0.1:1"]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=START
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mimo-fast: error: --ray-address 127.0.0.1:1")
    assert "Traceback" not in done.stderr


class Small:
    """What is asked of Ray about a machine of two CPUs."""

    def get_actor(self, *_names, **_options):
        raise ValueError

    def cluster_resources(self):
        return {"CPU": 2.0}


@pytest.mark.parametrize(
    ("options", "gpus", "problem"),
    [
        ({"replicas": 3}, 0.0, r"3 replicas with 1 CPUs each need 3; .* has 2: lower --cpus-per"),
        ({"replicas": 2}, 0.5, r"0\.5 GPUs each need 1; this machine has 0: lower --gpus-per"),
        ({"replicas": 1, "max_replicas": 4, "cpus_per_replica": 0.5}, 0.0, None),
        ({"replicas": 9, "ray_address": "auto"}, 0.0, None),
    ],
)
def test_what_a_machine_lacks_is_named(options, gpus, problem):
    settings = Settings(**options)
    if problem is None:
        check_resources(Small(), settings, gpus)
        return
    with pytest.raises(ConfigError, match=problem):
        check_resources(Small(), settings, gpus)
