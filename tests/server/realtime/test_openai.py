"""The GA dialect by the stock openai SDK; every event is read strictly by the SDK's models."""

from __future__ import annotations

import asyncio
import base64
import json
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import pytest
import torch
from speech import RATE, pcm, question, silence, turn

openai = pytest.importorskip("openai")

COUNT = "one two three four five six seven eight nine ten"
VAD = {"type": "server_vad", "silence_duration_ms": 400}


@cache
def event_models() -> dict[str, Any]:
    """The SDK's model of every server event, by its type."""
    from openai.types.realtime import RealtimeServerEvent

    union = typing.get_args(RealtimeServerEvent)[0]
    return {
        typing.get_args(model.model_fields["type"].annotation)[0]: model
        for model in typing.get_args(union)
    }


class Connection:
    """A session of the stock SDK, with all of its events."""

    def __init__(self, connection: Any) -> None:
        self.sdk, self.events, self.news = connection, list[dict[str, Any]](), asyncio.Event()
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        ids = set()
        while True:
            raw = await self.sdk.recv_bytes()
            event = json.loads(raw)
            event_models()[event["type"]].model_validate_json(raw, strict=True)
            assert event["event_id"] not in ids
            ids.add(event["event_id"])
            self.events.append(event)
            self.news.set()

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    async def until(self, kind: str, count: int = 1, seconds: float = 30) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while len(self.all(kind)) < count:
                if self.reader.done():
                    self.reader.result()
                self.news.clear()
                await self.news.wait()
        return self.all(kind)[count - 1]

    async def send(self, type: str, **fields: Any) -> None:
        await self.sdk.send({"type": type, **fields})

    async def update(self, **session: Any) -> dict[str, Any]:
        count = len(self.all("session.updated"))
        await self.send("session.update", session={"type": "realtime", **session})
        return (await self.until("session.updated", count + 1))["session"]

    async def detect(self, detection: Any, **more: Any) -> dict[str, Any]:
        return await self.update(audio={"input": {"turn_detection": detection, **more}})

    async def say(self, text: str, **fields: Any) -> None:
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content, **fields}
        await self.send("conversation.item.create", item=item)

    async def speak(self, data: bytes, piece: int = 4800, pace: float = 8.0) -> None:
        for at in range(0, len(data), piece):
            audio = base64.b64encode(data[at : at + piece]).decode()
            await self.send("input_audio_buffer.append", audio=audio)
            await asyncio.sleep(piece / 48000 / pace)

    async def error(self, count: int = 1) -> dict[str, Any]:
        return (await self.until("error", count))["error"]

    def audio(self) -> bytes:
        deltas = self.all("response.output_audio.delta")
        return b"".join(base64.b64decode(event["delta"], validate=True) for event in deltas)


@asynccontextmanager
async def connected(server: Any, **query: str) -> AsyncIterator[Connection]:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    async with client.realtime.connect(model="nano", extra_query=query) as sdk:
        connection = Connection(sdk)
        await connection.until("session.created")
        yield connection
        if connection.reader.done():
            connection.reader.result()
        connection.reader.cancel()
    await client.close()


def talk(server: Any, do: Callable[[Connection], Awaitable[None]], **query: str) -> None:
    async def run() -> None:
        async with connected(server, **query) as connection:
            await do(connection)

    asyncio.run(run())


def order(events: list[dict[str, Any]]) -> list[str]:
    """Types of events, one of several alike."""
    found: list[str] = []
    for event in events:
        if event["type"] not in found:
            found.append(event["type"])
    return found


SPOKEN = [
    "session.created",
    "session.updated",
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
    "response.created",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.done",
]


def test_a_spoken_turn(server):
    async def do(talk: Connection) -> None:
        await talk.detect(VAD)
        await talk.speak(turn())
        done = (await talk.until("response.done"))["response"]
        assert order(talk.events) == SPOKEN
        assert done["status"] == "completed"
        (item,) = done["output"]
        assert item["content"] == [{"type": "output_audio", "transcript": "seven"}]
        user, reply = talk.all("conversation.item.added")
        assert user["item"]["id"] == talk.events[2]["item_id"]
        assert reply["previous_item_id"] == user["item"]["id"]
        assert reply["item"]["id"] == item["id"]
        usage = done["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["output_tokens"] == done["latency"]["groups"]
        assert len(talk.audio()) > RATE // 2

    talk(server, do)


def test_a_typed_turn_in_voice_and_in_text(server):
    async def do(talk: Connection) -> None:
        await talk.detect(None)
        await talk.say("What is three plus four?", id="mine")
        assert (await talk.until("conversation.item.done"))["item"]["id"] == "mine"
        await talk.send("response.create", response={"metadata": {"a": "b"}})
        done = (await talk.until("response.done"))["response"]
        assert done["metadata"] == {"a": "b"}
        assert done["output"][0]["content"][0]["transcript"] == "seven"
        heard = len(talk.audio())
        assert heard
        await talk.send("response.create", response={"output_modalities": ["text"]})
        done = (await talk.until("response.done", 2))["response"]
        assert done["output"][0]["content"] == [{"type": "output_text", "text": "seven"}]
        assert len(talk.audio()) == heard

    talk(server, do)


def test_settings_merge_and_what_is_wrong_changes_nothing(server):
    async def do(talk: Connection) -> None:
        await talk.update(instructions="Be brief.", audio={"output": {"voice": "marin"}})
        tool = {"type": "function", "name": "clock", "parameters": {"type": "object"}}
        before = await talk.update(tools=[tool], audio={"input": {"turn_detection": None}})
        assert before["instructions"] == "Be brief."
        assert before["audio"]["output"]["voice"] == "marin"
        assert before["audio"]["input"]["turn_detection"] is None
        wrong: list[tuple[str, dict[str, Any]]] = [
            ("session.audio.input.format.rate", {"audio": {"input": {"format": PCM16}}}),
            ("session.audio.output.voice", {"audio": {"output": {"voice": "../x"}}}),
            ("session.output_modalities", {"output_modalities": ["text", "audio"]}),
            ("session.audio.output.speed", {"audio": {"output": {"speed": 1.2}}}),
            ("session.tool_choice", {"tool_choice": "required"}),
            ("session.tools", {"tools": [tool | {"parameters": {"a": "b" * 300_000}}]}),
            ("session.tools[0].type", {"tools": [{"type": "mcp"}]}),
            ("session.max_output_tokens", {"max_output_tokens": 0}),
            ("session.prompt", {"prompt": {"id": "x"}}),
            ("session.include", {"include": ["item.input_audio_transcription.logprobs"]}),
            ("session.nothing", {"nothing": 1}),
            ("session.type", {"type": "transcription"}),
            ("session.audio.input.turn_detection.threshold", vad(threshold=7)),
            ("session.audio.input.turn_detection.idle_timeout_ms", vad(idle_timeout_ms=1)),
            ("session.audio.input.transcription.model", {"audio": {"input": NO_MODEL}}),
        ]
        for i, (param, session) in enumerate(wrong):
            given = {"type": "realtime", "instructions": "x"} | session
            await talk.send("session.update", event_id=f"e{i}", session=given)
            error = await talk.error(i + 1)
            assert (error["param"], error["event_id"]) == (param, f"e{i}")
            assert error["message"]
        assert await talk.update() == before

    talk(server, do)


PCM16 = {"type": "audio/pcm", "rate": 16000}
NO_MODEL = {"transcription": {"model": "parrot"}}


def vad(**options: Any) -> dict[str, Any]:
    return {"audio": {"input": {"turn_detection": {"type": "server_vad", **options}}}}


@pytest.mark.slow
def test_semantic_vad_waits_as_long_as_it_says(server):
    async def do(talk: Connection) -> None:
        echoed = await talk.detect({"type": "semantic_vad", "eagerness": "high"})
        assert echoed["audio"]["input"]["turn_detection"]["eagerness"] == "high"
        await talk.speak(turn(300, 3000), pace=16.0)
        stopped = await talk.until("input_audio_buffer.speech_stopped")
        end = 300 + len(question()) * 1000 // RATE
        assert end + 1500 <= stopped["audio_end_ms"] <= end + 2300
        await talk.until("response.done")

    talk(server, do)


@pytest.mark.parametrize("events", [0, 1])
def test_wrong_events_are_answered_and_the_session_goes_on(server, events):
    wrong = [
        ('{"type": "no.such", "event_id": "e"}', "type", "e"),
        ('{"event_id": "e"}', "type", "e"),
        ('{"type": "session.update", "session": NaN}', "event", None),
        ('["a"]', "event", None),
        ('{"type": "session.update", "session": ' + "[" * 900 + "]" * 900 + "}", "event", None),
        ('{"type": ', "event", None),
        ('{"type": "input_audio_buffer.append", "audio": "!"}', "audio", None),
        ('{"type": "conversation.item.delete", "event_id": "e"}', "item_id", "e"),
        ('{"type": "response.create", "response": {"input": 5}}', "response.input", None),
        ('{"type": "conversation.item.create", "item": {"type": "x"}}', "item.type", None),
    ]

    async def do(talk: Connection) -> None:
        for i, (event, param, id) in enumerate(wrong[events::2]):
            await talk.sdk.send_raw(event)
            error = await talk.error(i + 1)
            assert (error["param"], error["event_id"]) == (param, id)
        assert await talk.update(instructions="Go on.")

    talk(server, do)


@pytest.mark.slow
def test_cancel_and_truncate(server):
    async def do(talk: Connection) -> None:
        await talk.detect(None)
        await talk.send("response.cancel", event_id="idle")
        error = await talk.error()
        assert (error["code"], error["event_id"]) == ("response_cancel_not_active", "idle")
        await talk.say(COUNT)
        await talk.send("response.create")
        await talk.send("response.cancel")
        done = (await talk.until("response.done"))["response"]
        assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
        await talk.say("hello")
        await talk.send("response.create")
        done = (await talk.until("response.done", 2))["response"]
        (item,) = done["output"]
        assert item["content"][0]["transcript"]
        await talk.send(
            "conversation.item.truncate", item_id=item["id"], content_index=0, audio_end_ms=20
        )
        await talk.until("conversation.item.truncated")
        await talk.send("conversation.item.retrieve", item_id=item["id"])
        kept = (await talk.until("conversation.item.retrieved"))["item"]
        assert kept["content"] == [{"type": "output_audio", "transcript": ""}]
        await talk.send("conversation.item.delete", item_id=item["id"])
        await talk.until("conversation.item.deleted")
        await talk.send("conversation.item.retrieve", item_id=item["id"])
        assert (await talk.error(2))["code"] == "item_retrieve_invalid_item_id"

    talk(server, do)


@pytest.mark.slow
def test_beside_the_conversation(server):
    async def do(talk: Connection) -> None:
        await talk.detect(None)
        await talk.say("What is three plus four?", id="mine")
        await talk.until("conversation.item.done")
        aside = {"conversation": "none", "output_modalities": ["text"], "metadata": {"n": "1"}}
        reference = [{"type": "item_reference", "id": "mine"}]
        await talk.send("response.create", response=aside | {"input": reference})
        done = (await talk.until("response.done"))["response"]
        assert done["conversation_id"] is None
        assert done["metadata"] == {"n": "1"}
        assert done["output"][0]["content"][0]["text"] == "seven"
        assert len(talk.all("conversation.item.added")) == 1
        await talk.send("conversation.item.retrieve", item_id=done["output"][0]["id"])
        assert (await talk.error())["code"] == "item_retrieve_invalid_item_id"

    talk(server, do)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephones(server, name):
    from mimo_fast.server.realtime.sound import FORMATS, Encoder

    async def do(talk: Connection) -> None:
        format = {"type": name}
        audio = {"input": {"format": format, "turn_detection": VAD}, "output": {"format": format}}
        session = await talk.update(audio=audio)
        assert session["audio"]["output"]["format"] == format
        wav = torch.cat((silence(300), question(), silence(800)))
        await talk.speak(Encoder(FORMATS[name], RATE).push(wav, ended=True), 800)
        done = (await talk.until("response.done"))["response"]
        assert done["output"][0]["content"][0]["transcript"] == "seven"
        assert 0.5 < len(talk.audio()) / 8000 < 2

    talk(server, do)


@pytest.mark.slow
def test_transcripts(server):
    async def do(talk: Connection) -> None:
        detection = VAD | {"create_response": False}
        await talk.detect(detection, transcription={"model": "gpt-4o-mini-transcribe"})
        await talk.speak(turn())
        kind = "conversation.item.input_audio_transcription"
        completed = await talk.until(f"{kind}.completed")
        assert completed["transcript"] == "what is three plus four"
        assert completed["usage"]["type"] == "duration"
        deltas = [event["delta"] for event in talk.all(f"{kind}.delta")]
        assert "".join(deltas) == completed["transcript"]
        assert not talk.all("response.created")

    talk(server, do)


def test_a_session_that_only_listens(server):
    async def do(talk: Connection) -> None:
        assert talk.events[0]["session"]["type"] == "transcription"
        session = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        await talk.send("session.update", session=session)
        await talk.until("session.updated")
        audio = base64.b64encode(pcm(question())).decode()
        await talk.send("input_audio_buffer.append", audio=audio)
        await talk.send("input_audio_buffer.commit")
        kind = "conversation.item.input_audio_transcription.completed"
        assert (await talk.until(kind))["transcript"] == "what is three plus four"
        await talk.send("response.create")
        assert (await talk.error())["param"] == "type"

    talk(server, do, intent="transcription")


def test_an_unknown_model_is_refused_in_the_handshake(server):
    import websockets

    async def run() -> None:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(server.realtime.replace("nano", "parrot"))
        assert caught.value.response.status_code == 404
        assert json.loads(caught.value.response.body)["error"]["code"] == "model_not_found"

    asyncio.run(run())


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_let_go_of_when_it_leaves(server, service):
    """Its replies wait for it, and for nobody once it is gone."""
    import websockets

    def aside(text: str) -> str:
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "content": content}
        response = {"conversation": "none", "input": [item]}
        return json.dumps({"type": "response.create", "response": response})

    async def run() -> None:
        socket = await websockets.connect(server.realtime, max_queue=1, max_size=None)
        text = "x" * 16000
        content = [{"type": "input_text", "text": text}]
        item = {"type": "message", "role": "user", "id": "big", "content": content}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        for _ in range(4):
            await socket.send(aside("hello"))
        retrieve = json.dumps({"type": "conversation.item.retrieve", "item_id": "big"})
        try:
            async with asyncio.timeout(2):
                for _ in range(3000):
                    await socket.send(retrieve)
        except TimeoutError:
            pass
        socket.transport.abort()

    def sessions() -> int:
        found = server.get("/metrics").body.decode()
        line = next(line for line in found.splitlines() if line.startswith("mimo_fast_sessions "))
        return int(float(line.split()[1]))

    asyncio.run(run())

    async def wait() -> None:
        async with asyncio.timeout(20):
            while sessions() or service.worker.streams:
                await asyncio.sleep(0.05)

    asyncio.run(wait())
