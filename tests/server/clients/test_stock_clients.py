"""What stock clients see of the server: Pipecat and LiveKit Agents, in the versions of
.ci/clients.txt and an environment of their own (`make clients`).

The scripts beside this file run there and say what the clients made of the server.
Their words are judged here, what is heard by a recogniser that is not the model's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers import Running, start

import mimo_fast
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings
from mimo_fast.server.worker import Stream, Worker
from training.listen import recognise

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv" / "clients" / "bin" / "python"
CASES = {
    "livekit_cases.py": (
        "typed",
        "spoken",
        "barge_in",
        "interrupted",
        "agent",
        "speech",
        "transcript",
    ),
    "pipecat_cases.py": (
        "conversation",
        "interruption",
        "local_turns",
        "speech",
        "transcript",
        "realtime_transcript",
    ),
}
EXAMPLES = ("pipecat", "livekit")
"""Of docs/server.md."""

AT_ONCE = 2
"""Clients that run at the same time: they talk in real time, and so need their share of a core."""

RATE = 24000
LONG = "i live in the city near the river"
WHOLE = 2.0
"""Seconds that it takes at least to say that."""

LIMIT = 900
"""Seconds after which a client is stopped; a minute is usual."""

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="run `make clients`")


class SlowWorker(Worker):
    """Computes speech no faster than it is heard, so that a reply can be interrupted."""

    def stream(
        self,
        begin: Callable[[], Iterator[Any]],
        *arguments: Any,
        seconds: Callable[[Any], float] = lambda _: 0.0,
        **options: Any,
    ) -> Stream[Any]:
        def slowed() -> Iterator[Any]:
            items = begin()
            try:
                for item in items:
                    if item is not None:
                        time.sleep(seconds(item))
                    yield item
            finally:
                items.close()

        return super().stream(slowed, *arguments, seconds=seconds, **options)


@dataclass
class Report:
    error: str | None
    seen: dict[str, Any]


Reports = dict[tuple[str, str], Report]


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    service = Service(mimo_fast.load(max_batch=4), "nano", worker=SlowWorker())
    settings = Settings(port=0, drain_seconds=2.0)
    running = start(create_app(service, settings), settings)
    yield running
    running.stop()
    service.close()


@dataclass
class Heard:
    """What the clients report, and the sound of the page's examples."""

    reports: Reports
    folder: Path


@pytest.fixture(scope="module")
def everything(server: Running, slow: Running, tmp_path_factory: pytest.TempPathFactory) -> Heard:
    """All clients."""
    folder = tmp_path_factory.mktemp("heard")
    commands: dict[str, list[Any]] = {
        script: [HERE / script, server.url, slow.url, folder] for script in CASES
    }
    for name in EXAMPLES:
        example = folder / f"{name}.py"
        example.write_text(example_of(name, server), encoding="utf-8")
        commands[name] = [HERE / "page_example.py", example, folder / f"page_{name}.wav"]
    with ThreadPoolExecutor(AT_ONCE) as running:
        printed = dict(zip(commands, running.map(output_of, commands.values()), strict=True))
    reports: Reports = {}
    for script in CASES:
        for line in printed[script].splitlines():
            report = json.loads(line)
            reports[script, report["case"]] = Report(report["error"], report["seen"])
    return Heard(reports, folder)


def output_of(command: list[Any]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": LIMIT, "env": environment}
    done = subprocess.run([PYTHON, *command], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def example_of(name: str, server: Running) -> str:
    """An example of docs/server.md as it stands, but for the port."""
    page = (HERE.parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^```python\n((?:.*\n)*?)^```$", page)
    (code,) = [block for block in blocks if f"from {name}" in block]
    assert "127.0.0.1:8000" in code
    return code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


@pytest.fixture(scope="module")
def reports(everything: Heard) -> Reports:
    return everything.reports


Seen = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def livekit(reports: Reports) -> Seen:
    return lambda case: seen(reports, "livekit_cases.py", case)


@pytest.fixture(scope="module")
def pipecat(reports: Reports) -> Seen:
    return lambda case: seen(reports, "pipecat_cases.py", case)


def seen(reports: Reports, script: str, case: str) -> dict[str, Any]:
    """What the client saw; it is an error if anything went wrong there."""
    report = reports[script, case]
    assert report.error is None, report.error
    return report.seen


def heard(path: str | Path) -> str:
    """What an independent recogniser hears in a file."""
    return recognise(mimo_fast.load_audio(path, RATE), RATE)


def test_no_case_is_left_out(reports):
    wanted = {(script, case) for script, cases in CASES.items() for case in cases}
    assert reports.keys() == wanted


def test_pipecat_has_a_conversation(pipecat):
    talk = pipecat("conversation")
    assert talk["greeting"] == "good morning to you"
    assert heard(talk["greeting_wav"]) == "good morning to you"
    assert talk["transcript"] == "what color is the sea"
    assert talk["answer"] == "the sea is blue"
    assert heard(talk["answer_wav"]) == "the sea is blue"
    assert talk["user"] == ["good morning", "what color is the sea"]
    assert talk["assistant"] == ["good morning to you", "the sea is blue"]


def test_pipecat_interrupts(pipecat):
    talk = pipecat("interruption")
    assert 0 < talk["seconds"] < WHOLE
    assert talk["answer"] == "eleven"
    assert heard(talk["answer_wav"]) == "eleven"


def test_pipecat_finds_turns_itself(pipecat):
    talk = pipecat("local_turns")
    assert talk["answer"] == "you are welcome"
    assert heard(talk["answer_wav"]) == "you are welcome"


def test_pipecat_says_texts(pipecat):
    assert heard(pipecat("speech")["wav"]) == "the dog is big and black"


def test_pipecat_transcribes(pipecat):
    assert pipecat("transcript")["text"] == "please read the small yellow box"
    assert pipecat("realtime_transcript")["text"] == "i want no milk and rice"


def test_livekit_has_typed_turns(livekit):
    talk = livekit("typed")
    assert talk["turn_detection"] == "semantic_vad"
    assert talk["answer"] == "eleven"
    assert heard(talk["answer_wav"]) == "eleven"
    assert talk["context"] == [["user", "what is nine plus two"], ["assistant", "eleven"]]


def test_livekit_has_spoken_turns(livekit):
    talk = livekit("spoken")
    assert talk["order"] == ["input_speech_started", "input_speech_stopped", "generation_created"]
    assert talk["transcript"] == "what color is the sea"
    assert talk["answer"] == "the sea is blue"
    assert heard(talk["answer_wav"]) == "the sea is blue"
    assert talk["context"] == [["user", "what color is the sea"], ["assistant", "the sea is blue"]]


def test_livekit_is_interrupted_by_the_user(livekit):
    talk = livekit("barge_in")
    assert talk["status"] == ["cancelled", "turn_detected"]
    assert 0 < talk["seconds"] < WHOLE
    assert talk["cut"] == [True, 100]
    assert talk["answer"] == "eleven"
    assert heard(talk["answer_wav"]) == "eleven"


def test_livekit_is_interrupted_by_the_program(livekit):
    talk = livekit("interrupted")
    assert talk["status"] == ["cancelled", "client_cancelled"]
    assert talk["deleted"]
    first, second = talk["seconds"]
    assert 0 < first < WHOLE <= second
    assert talk["answer"] == LONG


def test_livekits_agent_is_interrupted_and_answers(livekit):
    talk = livekit("agent")
    assert talk["interrupted"]
    said = [text for role, text in talk["history"] if role == "assistant"]
    # What was heard of the first reply, and all of the second.
    assert len(said) == 2
    assert LONG.startswith(said[0])
    assert said[0] != LONG
    assert said[1] == "the sea is blue"
    asked = [text for role, text in talk["history"] if role == "user"]
    assert asked == ["where do you live", "what color is the sea"]
    assert heard(talk["answer_wav"]) == "the sea is blue"


def test_livekit_says_texts(livekit):
    assert heard(livekit("speech")["wav"]) == "the dog is big and black"


def test_livekit_transcribes(livekit):
    talk = livekit("transcript")
    assert talk["text"] == "please read the small yellow box"
    assert talk["streamed"] == "i want no milk and rice"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_pages_example_answers(everything, name):
    assert heard(everything.folder / f"page_{name}.wav") == "the sea is blue"
