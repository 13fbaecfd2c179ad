"""The stock openai SDK, over HTTP and in realtime sessions: the right words both ways.

What is said is heard by a recogniser that is not the model's own.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
from helpers import slow_after
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI
from openai.types.realtime import RealtimeServerEvent
from servers import Running

import mimo_fast
from training.listen import recognise

RATE = 24000
WORDS = Path(__file__).parents[1] / "words"
COLOR, SEA = "what color is the sea", "the sea is blue"
MORNING, MORNING_TO_YOU = "good morning", "good morning to you"
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(RealtimeServerEvent)[0])
}


def client_of(server: Running, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def file_of(text: str) -> Path:
    return WORDS / f"{text.replace(' ', '_')}.flac"


def pcm_of(text: str) -> bytes:
    """16-bit samples of a recording."""
    wav = mimo_fast.load_audio(file_of(text), RATE)
    return (wav * 32767).to(torch.int16).numpy().tobytes()


def as_wav(data: bytes) -> str:
    out = io.BytesIO()
    soundfile.write(out, np.frombuffer(data, "<i2"), RATE, format="WAV")
    return base64.b64encode(out.getvalue()).decode()


def heard(data: bytes, tmp_path: Path | None = None, form: str = "pcm") -> str:
    """What the recogniser hears in bytes of one of the API's formats."""
    if form == "pcm":
        wav = torch.from_numpy(np.frombuffer(data, "<i2").copy()).float() / 32768
    else:
        assert tmp_path is not None
        file = tmp_path / f"heard.{form}"
        file.write_bytes(data)
        wav = mimo_fast.load_audio(file, RATE)
    return recognise(wav, RATE)


def test_the_model_has_its_name(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"


@pytest.mark.parametrize("form", slow_after(1, ["mp3", "wav", "flac", "pcm"]))
def test_speech_has_the_words_of_its_text(client, tmp_path, form):
    text, data = "the dog is big and black", b""
    asked = {"model": "nano", "voice": "coral", "input": text, "response_format": form}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        for part in answer.iter_bytes():
            data += part
    assert heard(data, tmp_path, form) == text


def test_a_transcript_has_the_words_of_its_recording(client):
    text = "please read the small yellow box"
    with file_of(text).open("rb") as file:
        found = client.audio.transcriptions.create(model="whisper-1", file=file)
    assert found.text == text


def test_a_transcript_is_streamed(client):
    text = "i have four good yellow things"
    with file_of(text).open("rb") as file:
        events = [*client.audio.transcriptions.create(model="nano", file=file, stream=True)]
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "".join(event.delta for event in events[:-1]) == text


def asked_by_voice(text: str) -> dict[str, Any]:
    audio = {"data": as_wav(pcm_of(text)), "format": "wav"}
    return {"role": "user", "content": [{"type": "input_audio", "input_audio": audio}]}


def test_a_chat_is_answered_by_voice(client):
    answer = client.chat.completions.create(
        model="nano",
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
        messages=[asked_by_voice(COLOR)],
    )
    (choice,) = answer.choices
    assert choice.message.audio.transcript == SEA
    assert heard(base64.b64decode(choice.message.audio.data)) == SEA


def test_a_chat_is_answered_in_text_as_it_is_made(client):
    parts = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": MORNING}], stream=True
    )
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == MORNING_TO_YOU


def test_errors_are_the_sdks_own(client, serve):
    with pytest.raises(NotFoundError) as missing:
        client.audio.speech.create(model="gpt-9", voice="alloy", input="hello")
    assert missing.value.code == "model_not_found"
    with pytest.raises(BadRequestError) as wrong:
        client.audio.speech.create(model="nano", voice="nobody", input="hello")
    assert wrong.value.param == "voice"
    with client_of(serve(api_key="secret"), "wrong") as stranger:
        with pytest.raises(AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"


class Talk:
    """A realtime session whose every event is read strictly, as the SDK's own models are."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def until(self, kind: str) -> dict[str, list[Any]]:
        """Events up to one of this kind, by their kinds."""
        found: dict[str, list[Any]] = {}
        while kind not in found:
            raw = self.connection.recv_bytes()
            event = self.connection.parse_event(raw)
            EVENTS[event.type].model_validate_json(raw, strict=True)
            assert event.type != "error", event
            found.setdefault(event.type, []).append(event)
        return found

    def hear(self, data: bytes) -> None:
        size = RATE // 10 * 2
        for at in range(0, len(data), size):
            audio = base64.b64encode(data[at : at + size]).decode()
            self.connection.input_audio_buffer.append(audio=audio)


@pytest.fixture
def talk(client: OpenAI) -> Iterator[Talk]:
    with client.realtime.connect(model="nano") as connection:
        talk = Talk(connection)
        talk.until("session.created")
        yield talk


def reply_of(events: dict[str, list[Any]]) -> tuple[str, str]:
    """What a reply says by its transcript, and what is heard of it."""
    (done,) = events["response.done"]
    assert done.response.status == "completed"
    (said,) = events["response.output_audio_transcript.done"]
    deltas = events["response.output_audio_transcript.delta"]
    assert "".join(event.delta for event in deltas) == said.transcript
    audio = [base64.b64decode(event.delta) for event in events["response.output_audio.delta"]]
    return said.transcript.strip(), heard(b"".join(audio))


def test_a_typed_turn_is_answered_by_voice(talk):
    content = [{"type": "input_text", "text": MORNING}]
    item = {"type": "message", "role": "user", "content": content}
    talk.connection.conversation.item.create(item=item)
    talk.connection.response.create()
    assert reply_of(talk.until("response.done")) == (MORNING_TO_YOU, MORNING_TO_YOU)


def test_a_spoken_turn_is_transcribed_and_answered(talk):
    hearing = {"transcription": {"model": "whisper-1"}}
    talk.connection.session.update(session={"type": "realtime", "audio": {"input": hearing}})
    talk.until("session.updated")
    talk.hear(bytes(RATE) + pcm_of(COLOR) + bytes(2 * RATE))
    events = talk.until("response.done")
    assert reply_of(events) == (SEA, SEA)
    kind = "conversation.item.input_audio_transcription.completed"
    if kind not in events:
        events = talk.until(kind)
    assert events[kind][0].transcript == COLOR


def test_turns_by_hand_and_answers_in_text(talk):
    talk.connection.session.update(
        session={
            "type": "realtime",
            "output_modalities": ["text"],
            "audio": {"input": {"turn_detection": None}},
        }
    )
    talk.until("session.updated")
    talk.hear(pcm_of("what is your name"))
    talk.connection.input_audio_buffer.commit()
    talk.connection.response.create()
    events = talk.until("response.done")
    assert events["response.output_text.done"][0].text == "my name is computer"
    assert "response.output_audio.delta" not in events


def test_a_session_that_only_listens(client):
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        talk = Talk(connection)
        talk.until("session.created")
        talk.hear(bytes(RATE) + pcm_of("thank you") + bytes(2 * RATE))
        kind = "conversation.item.input_audio_transcription.completed"
        events = talk.until(kind)
        assert events[kind][0].transcript == "thank you"
        assert not any(name.startswith("response.") for name in events)
