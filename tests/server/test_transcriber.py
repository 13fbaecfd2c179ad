"""A server of a model that transcribes alone, MiMo-V2.5-ASR: what it offers, does and refuses."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import KIT
from servers import Running, start
from test_wyoming import FORM, RATE, Home, answers, question, samples, tell
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wyoming.asr import Transcribe, Transcript, TranscriptChunk
from wyoming.client import AsyncClient
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.tts import Synthesize

import mimo_fast
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.server import wyoming as served
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.serving import bind
from mimo_fast.server.settings import Settings

ALONE = "MiMo-V2.5-ASR does asr_sft alone, not "


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    pair = KIT / "asr" / "lm", KIT / "checkpoint" / "codec"
    service = Service(mimo_fast.load(*pair, device="cpu", dtype="float32"), "asr")
    settings = Settings(port=0, drain_seconds=2.0, wyoming="tcp://127.0.0.1:0")
    app, bound = create_app(service, settings), bind("127.0.0.1", 0, "--wyoming", "")
    running, port = start(app, settings, served.Wyoming(app, bound)), bound.getsockname()[1]
    yield Home(running, f"tcp://127.0.0.1:{port}", port)
    running.stop()
    service.close()


@pytest.fixture
def server(home: Home) -> Running:
    return home.running


def test_it_offers_no_voices_and_no_conversation(server):
    assert server.get("/v1/audio/voices").json["data"] == []
    config = json.loads(server.get("/page/config").body)
    assert [name for name, known in config["knows"].items() if known] == ["transcribe"]


@pytest.mark.parametrize(
    ("path", "body", "task"),
    [
        ("/v1/audio/speech", {"input": "hello", "voice": "default"}, "tts_sft"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hello"}]},
            "speech2text_dialogue_sft",
        ),
    ],
)
def test_other_tasks_are_refused(server, path, body, task):
    answer = server.ask("POST", path, {"model": "asr"} | body)
    assert (answer.status, answer.error["code"]) == (400, "unsupported_value")
    assert answer.error["message"] == f"{ALONE}{task}: load MiMo-Audio for it"


def test_a_conversation_is_refused_before_it_begins(server):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{server.port}/v1/realtime?model=asr")
    error = json.loads(refused.value.response.body)["error"]
    assert (error["code"], error["param"]) == ("unsupported_value", "session.type")
    assert error["message"].startswith(ALONE)
    assert error["message"].endswith("or connect with ?intent=transcription")
    secret = server.ask("POST", "/v1/realtime/client_secrets", {"session": {"type": "realtime"}})
    assert (secret.status, secret.error["code"]) == (400, "unsupported_value")


def test_a_realtime_session_transcribes(server):
    pcm = base64.b64encode(samples(QUESTION, 24_000)).decode()
    url = f"ws://127.0.0.1:{server.port}/v1/realtime?intent=transcription"
    parts, done = list[str](), dict[str, Any]()
    with connect(url) as session:
        assert json.loads(session.recv(10))["session"]["type"] == "transcription"
        detection = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        session.send(json.dumps({"type": "session.update", "session": detection}))
        session.send(json.dumps({"type": "input_audio_buffer.append", "audio": pcm}))
        session.send(json.dumps({"type": "input_audio_buffer.commit"}))
        while not done:
            event = json.loads(session.recv(60))
            assert event["type"] != "error", event
            if event["type"].endswith("input_audio_transcription.delta"):
                parts.append(event["delta"])
            if event["type"].endswith("input_audio_transcription.completed"):
                done = event
    assert done["transcript"] == "".join(parts) != ""


def test_home_assistants_client_transcribes_in_a_language(home):
    asked = list[str | None]()
    model = home.state.service.model
    tags = type(model.lm.config.architecture).tag_of

    def tag_of(architecture: Any, language: str | None) -> str:
        asked.append(language)
        return tags(architecture, language)

    async def ask() -> tuple[Info, list[Event]]:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, Describe())
            info = Info.from_event((await answers(client, Info))[-1])
            await tell(client, Transcribe(language="zh"), *question(FORM, samples(QUESTION, RATE)))
            return info, await answers(client, Transcript)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.lm.config.architecture), "tag_of", tag_of)
        info, events = asyncio.run(ask())
    assert set(asked) == {"zh"}
    assert [each.languages for each in info.asr[0].models] == [["en", "zh"]]
    assert info.tts == []
    parts = [TranscriptChunk.from_event(each).text for each in events if "chunk" in each.type]
    assert "".join(parts) == Transcript.from_event(events[-1]).text != ""


def test_home_assistant_is_told_that_it_says_nothing(home):
    async def ask() -> Event | None:
        async with AsyncClient.from_uri(home.uri) as client:
            await tell(client, Synthesize("hello"))
            return await client.read_event()

    event = asyncio.run(ask())
    assert (event.type, event.data["code"]) == ("error", "unsupported_value")
    assert event.data["text"].startswith(ALONE)
