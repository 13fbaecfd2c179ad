"""`serve --adapter NAME=DIR`: each adapter is a model of its own name, at every endpoint.

The stock openai SDK asks; what it gets is what the library gives with that adapter and seed.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import AUDIO, KIT_PAIR, THREE, watch
from openai import NotFoundError, OpenAI
from servers import Running, start
from test_conversions import form_of
from test_wyoming import answers, question, tell
from wyoming.asr import Transcribe, Transcript
from wyoming.client import AsyncClient
from wyoming.info import Describe, Info

import mimo_fast
from mimo_fast.audio.segments import levelled
from mimo_fast.server.app import create_app
from mimo_fast.server.errors import ApiError
from mimo_fast.server.models import ALIASES, find_model
from mimo_fast.server.realtime.items import Said
from mimo_fast.server.realtime.mind import Ask, Mind
from mimo_fast.server.realtime.openai import Client
from mimo_fast.server.realtime.responses import ask_about
from mimo_fast.server.service import Service
from mimo_fast.server.serving import bind
from mimo_fast.server.settings import Settings
from mimo_fast.server.wyoming import Wyoming

CONTEXT = 80
"""Groups: random weights talk on until it is full."""

CHOICES = {"kit": None, **{f"kit:{name}": name for name in THREE}}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    options: dict[str, Any] = {"adapters": THREE, "merge_adapters": False, "max_seq_len": CONTEXT}
    service = Service(mimo_fast.load(*KIT_PAIR, device="cpu", max_batch=4, **options), "kit")
    yield service
    service.close()


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[Running]:
    settings = Settings(port=0, drain_seconds=2.0)
    running = start(create_app(service, settings), settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60}
    with OpenAI(base_url=f"{server.url}/v1", **options) as client:
        yield client


def expected(service: Service, adapter: str | None) -> bytes:
    """What `/v1/audio/speech` says with an adapter, 16-bit samples."""
    chunks = service.model.stream("tts", "hello", seed=7, split=True, adapter=adapter)
    wav = torch.cat([chunk.audio for chunk in chunks])
    return (wav.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()


def close(one: bytes, other: bytes) -> bool:
    """Whether samples are equal but for how they are rounded."""
    a, b = (np.frombuffer(each, "<i2").astype(int) for each in (one, other))
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def test_the_list_has_the_model_and_each_adapter(client, service):
    assert [model.id for model in client.models.list()] == [*CHOICES]
    for name in CHOICES:
        assert client.models.retrieve(name).id == name
    assert client.models.retrieve("tts-1").id == "kit"
    assert dict(service.models) == CHOICES


@pytest.mark.parametrize("ask", ["speech", "transcription", "chat", "model"])
def test_a_wrong_name_is_answered_by_all_of_them(client, ask):
    call = {
        "speech": lambda: client.audio.speech.create(model="kit:qkv", voice="alloy", input="a"),
        "transcription": lambda: client.audio.transcriptions.create(
            model="kit:qkv", file=Path(AUDIO)
        ),
        "chat": lambda: client.chat.completions.create(
            model="kit:qkv", messages=[{"role": "user", "content": "a"}]
        ),
        "model": lambda: client.models.retrieve("kit:qkv"),
    }[ask]
    with pytest.raises(NotFoundError) as missing:
        call()
    assert missing.value.code == "model_not_found"
    listed = ", ".join(CHOICES)
    assert f"there is no model kit:qkv; this server has {listed}" in missing.value.message


def test_speech_is_that_of_the_adapter(client, service):
    said = set()
    for name, adapter in CHOICES.items():
        options: dict[str, Any] = {"response_format": "pcm", "extra_body": {"seed": 7}}
        got = client.audio.speech.create(model=name, voice="alloy", input="hello", **options)
        assert close(got.content, expected(service, adapter)), name
        said.add(got.content)
    alias = client.audio.speech.create(model="tts-1", voice="alloy", input="hello", **options)
    assert alias.content in said
    assert len(said) == len(CHOICES)


def test_transcripts_are_those_of_the_adapter(client, service):
    texts = {}
    for name, adapter in CHOICES.items():
        found = client.audio.transcriptions.create(
            model=name, file=Path(AUDIO), extra_body={"seed": 3}
        )
        wanted = service.model.transcribe(str(AUDIO), seed=3, adapter=adapter)
        assert found.text == wanted.text, name
        texts[name] = found.text
    assert len({*texts.values()}) > 1


def test_chats_are_answered_with_the_adapter_and_say_so(client, service):
    answers = {}
    for name, adapter in CHOICES.items():
        got = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "hello"}], seed=5, max_tokens=12
        )
        assert got.model == name
        wanted = service.model.text_dialogue_sft(
            "hello", seed=5, max_new_tokens=12, adapter=adapter
        )
        answers[name] = got.choices[0].message.content
        assert answers[name] == wanted.strip(), name
    assert len({*answers.values()}) == len(CHOICES)


def test_a_chat_is_answered_by_voice_with_the_adapter(client):
    audio = {"data": base64.b64encode(AUDIO.read_bytes()).decode(), "format": "wav"}
    message = {"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}
    said = {}
    for name in CHOICES:
        got = client.chat.completions.create(
            model=name,
            modalities=["text", "audio"],
            audio={"voice": "alloy", "format": "pcm16"},
            messages=[message],
            seed=5,
            max_tokens=12,
        )
        said[name] = got.choices[0].message.audio.transcript
    assert len({*said.values()}) == len(CHOICES)


def test_conversions_are_done_by_the_adapter(server, service):
    parts: list[tuple[str, str | bytes]] = [
        ("instruction", "again"),
        ("seed", "4"),
        ("response_format", "pcm"),
        ("file", AUDIO.read_bytes()),
    ]
    wav = levelled(mimo_fast.load_audio(AUDIO, 24000))[: 3 * 24000]
    assert len(wav) / 24000 < 30
    said = set()
    for name in CHOICES:
        answer = server.ask("POST", "/v1/audio/conversions", *form_of([*parts, ("model", name)]))
        assert answer.status == 200, answer.body
        said.add(answer.body)
    assert len(said) == len(CHOICES)
    wrong = server.ask("POST", "/v1/audio/conversions", *form_of([*parts, ("model", "other")]))
    assert wrong.status == 404
    assert "this server has kit, kit:qkvo" in wrong.error["message"]


class TestRealtime:
    """The settings of a session choose, when it begins and later."""

    @pytest.fixture
    def state(self, server: Running) -> Any:
        return server.app.state

    def adapters(self, client: Client) -> tuple[str | None, str | None]:
        """Of replies, and of transcripts."""
        manner, turns = client.manner(), client.config.turns
        assert ask_about([], manner).adapter == manner.adapter
        return manner.adapter, turns.adapter

    def run(self, state: Any, work: Any, **options: Any) -> Any:
        async def inside() -> Any:
            client = Client(state, "realtime", **options)
            try:
                return await work(client)
            finally:
                await client.close()

        return asyncio.run(inside())

    def test_by_the_address(self, state):
        async def work(client: Client) -> Any:
            return client.config.values["model"], self.adapters(client)

        assert self.run(state, work) == ("kit", (None, None))
        assert self.run(state, work, model="kit:qkvo") == ("kit:qkvo", ("qkvo", "qkvo"))

    def test_by_an_update(self, state):
        async def work(client: Client) -> Any:
            seen = []
            for model in ("kit:dora_rslora", "gpt-realtime", None, "kit", "kit:qkvo"):
                client.config.update({"type": "realtime", "model": model})
                seen.append((client.config.values["model"], self.adapters(client)[0]))
            with pytest.raises(ApiError) as wrong:
                client.config.update({"type": "realtime", "model": "kit:other"})
            assert "'kit', 'kit:qkvo'" in wrong.value.message
            return seen

        # OpenAI's names, which stock clients send, leave the model that the address has named.
        kept = ("kit:all_linear_saved", "all_linear_saved")
        chosen = [("kit:dora_rslora", "dora_rslora"), kept, kept, ("kit", None)]
        found = self.run(state, work, model="kit:all_linear_saved")
        assert found == [*chosen, ("kit:qkvo", "qkvo")]

    def test_transcripts_by_a_name_of_their_own(self, state):
        async def work(client: Client) -> Any:
            seen = []
            for model in ("whisper-1", "kit", "kit:dora_rslora"):
                hearing = {"transcription": {"model": model}}
                client.config.update({"type": "realtime", "audio": {"input": hearing}})
                seen.append(self.adapters(client)[1])
            return seen

        assert self.run(state, work, model="kit:qkvo") == ["qkvo", None, "dora_rslora"]

    def test_what_is_typed_is_answered_with_it(self, client, monkeypatch):
        """Over the wire, before and after the model of the session is changed."""
        seen = list[str | None]()
        watch(monkeypatch, Mind, "answer", before=lambda mind, ask: seen.append(ask.adapter))
        for chosen in CHOICES:
            with client.realtime.connect(model=chosen) as connection:
                for model in (None, "kit:qkvo"):
                    self.ask(connection, model)
        assert seen == [each for chosen in CHOICES.values() for each in (chosen, "qkvo")]

    def ask(self, connection: Any, model: str | None) -> None:
        """A typed turn, after a change of the model; its answer is a token."""
        session: dict[str, Any] = {"type": "realtime", "output_modalities": ["text"]}
        session |= {"max_output_tokens": 1} | ({"model": model} if model else {})
        connection.session.update(session=session)
        content = [{"type": "input_text", "text": "hello"}]
        item = {"type": "message", "role": "user", "content": content}
        connection.conversation.item.create(item=item)
        connection.response.create()
        for event in connection:
            assert event.type != "error", event
            if event.type == "response.done":
                assert event.response.status == "incomplete"
                return


def test_home_assistant_may_name_one(service):
    app, bound = create_app(service, Settings(port=0)), bind("127.0.0.1", 0, "--wyoming", "")
    running = start(app, Settings(port=0), Wyoming(app, bound))
    form = {"rate": 24000, "width": 2, "channels": 1}
    wav = mimo_fast.load_audio(AUDIO, 24000)[:24000].numpy()
    recording = question(form, (wav * 32767).round().astype("<i2").tobytes(), 1 << 16)
    heard = list[str | None]()

    async def ask() -> tuple[list[str], dict[str, Any]]:
        async with AsyncClient.from_uri(f"tcp://127.0.0.1:{bound.getsockname()[1]}") as client:
            await tell(client, Describe())
            info = Info.from_event((await answers(client, Info))[-1])
            for name in (None, "kit:qkvo", "whisper-1"):
                # In one wording: others may be longer than the context.
                await tell(client, Transcribe(name=name, language="en"), *recording)
                await answers(client, Transcript)
            await tell(client, Transcribe(name="kit:qkv"))
            while (event := await client.read_event()) is None or event.type != "error":
                pass
            return [model.name for model in info.asr[0].models], event.data

    def words(self: Service, *given: Any) -> Any:
        heard.append(self.adapter)
        return plain(self, *given)

    plain = Service.words
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Service, "words", words)
            names, refused = asyncio.run(ask())
    finally:
        running.stop()
    assert names == [*CHOICES]
    assert [*dict.fromkeys(heard)] == [None, "qkvo"]
    assert heard[-1] is None
    assert "this server has kit, kit:qkvo" in refused["text"]


def test_a_dialogue_goes_on_with_another_adapter(service):
    """As if all that was said before had been said with it."""
    wav = mimo_fast.load_audio(AUDIO, 24000)[:24000]
    options: dict[str, Any] = {"most": 4, "seed": 3}

    def answer(mind: Mind, before: list[Any], adapter: str | None) -> Ask:
        ask = Ask(before, (Said(spoken=True, wav=wav),), adapter=adapter, **options)
        for _ in mind.answer(ask):
            pass
        return ask

    mind = Mind(service.model)
    first = answer(mind, [], None)
    turns = [(first.said, first.reply, "")]
    replies = []
    for adapter in ("qkvo", None):
        second = [answer(each, turns, adapter) for each in (mind, Mind(service.model))]
        ids = [each.reply.exchange.reply for each in second]
        assert torch.equal(*ids)
        replies.append(ids[0])
    assert not torch.equal(*replies)


def test_names_stay_while_the_model_is_freed():
    options: dict[str, Any] = {"adapters": THREE, "merge_adapters": False}
    service = Service(mimo_fast.load(*KIT_PAIR, device="cpu", **options), "kit")
    service.model.close()
    try:
        for name, adapter in CHOICES.items():
            found = find_model(service, name)
            assert (found.name, found.adapter, found.config) == (name, adapter, service.config)
    finally:
        service.close()


def test_one_adapter_for_all_is_the_model_itself():
    """As `serve --adapter DIR` has it beside quantized weights."""
    options: dict[str, Any] = {"adapters": {"qkvo": THREE["qkvo"]}, "merge_adapters": False}
    service = Service(mimo_fast.load(*KIT_PAIR, **options), "kit", adapter="qkvo")
    try:
        assert dict(service.models) == {"kit": "qkvo"}
        for name in ("kit", *ALIASES):
            assert find_model(service, name) is service
        with pytest.raises(ApiError, match="this server has kit"):
            find_model(service, "kit:qkvo")
    finally:
        service.close()
