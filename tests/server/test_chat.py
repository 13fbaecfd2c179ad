"""`/v1/chat/completions` by the stock openai SDK."""

import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from servers import Running, until
from sounds import heard

import mimo_fast
from mimo_fast.server.chat import LEFT_OUT, Answers
from mimo_fast.server.errors import ApiError
from mimo_fast.server.messages import MOST_MESSAGES, Heard, Turns, read_messages
from mimo_fast.server.realtime.items import Reply
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings

RATE = 24000
QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"
BOTH = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
PCM = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
DAY = "what day comes after friday"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def recording(form: str = "wav") -> dict[str, Any]:
    data = QUESTION.read_bytes()
    if form != "wav":
        out = io.BytesIO()
        samples, rate = soundfile.read(QUESTION)
        soundfile.write(out, samples, rate, format=form.upper())
        data = out.getvalue()
    audio = {"data": base64.b64encode(data).decode(), "format": form}
    return {"type": "input_audio", "input_audio": audio}


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize("form", ["wav", "mp3"])
def test_a_spoken_question_is_answered_in_text(client: openai.OpenAI, form: str) -> None:
    got = client.chat.completions.create(model="nano", messages=asked(recording(form)), seed=1)
    (choice,) = got.choices
    assert choice.message.content == "seven"
    assert choice.message.audio is None
    assert choice.finish_reason == "stop"
    assert got.object == "chat.completion"
    usage = got.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.audio_tokens >= 10
    assert usage.completion_tokens_details.audio_tokens == 0


@pytest.mark.parametrize("form", ["wav", "mp3", "flac", "opus", "aac", "pcm16"])
def test_a_spoken_question_is_answered_aloud(client: openai.OpenAI, form: str) -> None:
    audio = {"voice": "alloy", "format": form}
    got = client.chat.completions.create(
        model="gpt-audio",
        messages=asked(recording()),
        modalities=["text", "audio"],
        audio=audio,
        seed=1,
    )
    message = got.choices[0].message
    assert message.content is None
    assert message.audio.transcript == "seven"
    assert message.audio.expires_at > time.time() + 3000
    samples = heard(base64.b64decode(message.audio.data, validate=True), form)
    assert 0.3 < len(samples) / RATE < 3
    assert float(np.sqrt(np.square(samples).mean())) > 0.005
    assert got.usage.completion_tokens_details.audio_tokens > 2


def test_a_typed_question_is_said_to_a_model_that_hears_alone(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "what is three plus four"}]
    got = client.chat.completions.create(model="nano", messages=messages, seed=3)
    assert got.choices[0].message.content == "seven"
    # It was heard, not read.
    assert got.usage.prompt_tokens_details.audio_tokens >= 8
    got = client.chat.completions.create(model="nano", messages=messages, seed=3, **BOTH)
    assert got.choices[0].message.audio.transcript == "seven"


def test_the_answer_is_heard_to_say_its_transcript(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": DAY}], seed=2, **BOTH
    )
    audio = got.choices[0].message.audio
    data = base64.b64decode(audio.data)
    found = client.audio.transcriptions.create(model="nano", file=("a.wav", data))
    assert found.text == audio.transcript == "saturday"


def test_it_streams_as_it_is_made(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="nano",
        messages=asked(recording()),
        stream=True,
        stream_options={"include_usage": True},
        seed=1,
        **PCM,
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    *body, usage = chunks
    assert not usage.choices
    assert usage.usage.completion_tokens > 3
    assert all(chunk.usage is None for chunk in body)
    assert [chunk.choices[0].finish_reason for chunk in body][-1] == "stop"
    audio = [chunk.choices[0].delta.audio for chunk in body if chunk.choices[0].delta.audio]
    # `expires_at` is in the last, which has nothing else.
    assert audio[-1].expires_at > time.time()
    assert not audio[-1].data
    assert all(part.expires_at is None for part in audio[:-1])
    assert len({part.id for part in audio}) == 1
    assert "".join(part.transcript or "" for part in audio) == "seven"
    data = [base64.b64decode(part.data, validate=True) for part in audio if part.data]
    assert len(data) > 2
    assert all(len(part) % 2 == 0 for part in data)
    whole = client.chat.completions.create(model="nano", messages=asked(recording()), seed=1, **PCM)
    assert base64.b64decode(whole.choices[0].message.audio.data) == b"".join(data)


def test_text_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="nano", messages=asked(recording()), stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "seven"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_events_end_as_openais_do(server: Running) -> None:
    answer = server.ask(
        "POST", "/v1/chat/completions", {"messages": asked(recording()), "stream": True}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")


def test_an_earlier_answer_is_named_by_its_id(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    first = create(model="nano", messages=asked(recording()), seed=1, **BOTH)
    audio_id = first.choices[0].message.audio.id
    turns = [
        *asked(recording()),
        {"role": "assistant", "audio": {"id": audio_id}},
        {"role": "user", "content": DAY},
    ]
    second = create(model="nano", messages=turns, seed=2, **BOTH)
    assert second.choices[0].message.audio.transcript == "saturday"
    turns[1] = {"role": "assistant", "audio": {"id": "audio_of_nobody"}}
    with pytest.raises(openai.NotFoundError) as refused:
        create(model="nano", messages=turns, **BOTH)
    assert refused.value.code == "audio_not_found"
    assert refused.value.param == "messages[1].audio.id"


def test_several_answers(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    got = create(model="nano", messages=asked(recording()), n=3, seed=1, **PCM)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    assert len({choice.message.audio.id for choice in got.choices}) == 3
    stream = create(model="nano", messages=asked(recording()), n=2, seed=1, stream=True)
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {0: "seven", 1: "seven"}
    assert ends == {0: "stop", 1: "stop"}


def test_a_limit_ends_it_and_says_so(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        got = client.chat.completions.create(
            model="nano", messages=asked(recording()), extra_body={name: 2}, **PCM
        )
        assert got.choices[0].finish_reason == "length"
        assert got.usage.completion_tokens <= 2
    got = client.chat.completions.create(
        model="nano", messages=asked(recording()), max_tokens=10**12
    )
    assert got.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_temperature_is_heard(client: openai.OpenAI) -> None:
    def answer(seed: int, temperature: float | None = None) -> str:
        options = {} if temperature is None else {"temperature": temperature}
        # What it has no answer for, so that it is not sure of one.
        messages = [{"role": "user", "content": "tell a long story"}]
        create = client.chat.completions.create
        got = create(model="nano", messages=messages, seed=seed, **options)
        return got.choices[0].message.content

    assert answer(5, 1.5) == answer(5, 1.5)
    assert len({answer(seed, 2.0) for seed in range(4)}) > 1


def test_what_it_has_no_place_for_is_named(server: Running) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello"},
        *asked(recording()),
    ]
    answer = server.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert answer.status == 200
    assert answer.headers[LEFT_OUT] == "instructions, earlier turns"
    answer = server.ask("POST", "/v1/chat/completions", {"messages": asked(recording())})
    assert answer.headers[LEFT_OUT] is None


TOO_LONG = base64.b64encode(b"RIFF").decode()
AUDIO = "messages[0].content[0].input_audio"


def with_audio(data: Any, form: str = "wav") -> list[dict[str, Any]]:
    return asked({"type": "input_audio", "input_audio": {"data": data, "format": form}})


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 1000}, 400, "messages"),
        ({"messages": ["hello"]}, 400, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a " * 9000}]}, 400, None),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages"),
        ({"messages": asked({"type": "image_url"})}, 400, "messages[0].content[0].type"),
        ({"messages": asked(*[recording()] * 33)}, 400, "messages"),
        ({"messages": with_audio("!!")}, 400, f"{AUDIO}.data"),
        ({"messages": with_audio("file:///etc/passwd")}, 400, f"{AUDIO}.data"),
        ({"messages": with_audio(None)}, 400, f"{AUDIO}.data"),
        ({"messages": with_audio(5)}, 400, f"{AUDIO}.data"),
        ({"messages": with_audio(base64.b64encode(b"no sound" * 99).decode())}, 400, None),
        ({"messages": with_audio("AAAA", "exe")}, 400, f"{AUDIO}.format"),
        ({"model": "other"}, 404, "model"),
        ({"modalities": ["smell"]}, 400, "modalities"),
        ({"modalities": ["text", "audio"]}, 400, "audio"),
        (BOTH | {"audio": {"voice": "nobody"}}, 400, "audio.voice"),
        (BOTH | {"audio": {"voice": "alloy", "format": "midi"}}, 400, "audio.format"),
        ({"n": 0}, 400, "n"),
        ({"n": 10**9}, 400, "n"),
        ({"n": "many"}, 400, "n"),
        ({"temperature": 9}, 400, "temperature"),
        ({"top_p": 9}, 400, "top_p"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "all"}, 400, "max_tokens"),
        ({"seed": "x"}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"stop": ["x"]}, 400, "stop"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    server: Running, change: dict, status: int, param: str | None
) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": "hello"}]} | change
    answer = server.ask("POST", "/v1/chat/completions", body)
    assert answer.status == status
    assert param is None or answer.error["param"] == param
    assert answer.error["code"]


@pytest.mark.parametrize(("count", "seconds"), [(1, 600), (4, 100)])
def test_recordings_beyond_the_context_are_refused(
    server: Running, service: Service, count: int, seconds: int
) -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(RATE * seconds, np.float32), RATE, format="FLAC")
    data = base64.b64encode(out.getvalue()).decode()
    messages = asked(*with_audio(data, "flac")[0]["content"] * count)
    answer = server.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert answer.status == 400
    assert "context" in answer.error["message"]
    assert service.worker.streams == 0


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_frees_the_model(server: Running, service: Service, stream: bool) -> None:
    # Many words to be said to the model before it can answer.
    text = "what is three plus four. " * 40
    body = {"messages": [{"role": "user", "content": text}], "stream": stream, **PCM}
    sent = json.dumps(body), {"Content-Type": "application/json"}
    steps = server.steps_after_leaving(
        "/v1/chat/completions", *sent, lambda: service.worker.streams == 1
    )
    # Forty questions are 400 groups and more.
    assert steps < 70


def turns_of(service: Service, messages: list[dict], found: Heard | None = None) -> Turns:
    return asyncio.run(read_messages(service, Settings(), messages, lambda _: found))


def test_messages_become_turns(service: Service) -> None:
    kept = Heard(Reply(), "seven")
    turns = turns_of(
        service,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "three"},
            *asked(recording()),
            {"role": "assistant", "audio": {"id": "audio_1"}},
            *asked({"type": "text", "text": "Answer in words."}, recording("flac")),
        ],
        kept,
    )
    assert turns.instructions == "Be brief.\nBe kind.\nAnswer in words."
    (first, _, three), (second, reply, seven) = turns.before
    assert [said.text for said in first] == ["one", "two"]
    assert three == "three"
    assert second[0].spoken
    assert (reply, seven) == (kept.reply, "seven")
    (said,) = turns.said
    assert said.spoken
    assert said.text is None
    assert said.seconds == pytest.approx(soundfile.info(QUESTION).duration, abs=0.01)
    assert len(said.wav) == round(said.seconds * RATE)


def test_the_texts_of_all_messages_are_bounded_together(service: Service) -> None:
    most = Settings().max_text_chars // 4
    messages = [{"role": "user", "content": "a " * (most // 2)}] * 5
    with pytest.raises(ApiError, match="are the most"):
        turns_of(service, messages)
    many = [{"type": "text", "text": "a"}] * 60
    messages = [{"role": "user", "content": many}] * (MOST_MESSAGES // 60 + 1)
    with pytest.raises(ApiError, match="parts"):
        turns_of(service, messages)


def test_earlier_answers_are_few_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("mimo_fast.server.chat.time", lambda: now[0])
    answers, heard = Answers(), Heard(Reply(), "seven")
    for number in range(Answers.MOST + 10):
        answers.keep(f"audio_{number}", 2000, heard)
    assert answers.find("audio_9") is None
    assert answers.find("audio_10") is heard
    assert len(answers._kept) == Answers.MOST
    now[0] = 2001.0
    assert answers.find("audio_10") is None
    answers.keep("audio_new", 3000, heard)
    assert list(answers._kept) == ["audio_new"]


def test_a_model_that_fails_in_its_stream_says_so(
    server: Running, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first words there is no status left; the SDK raises what the event says."""

    def answer(self: Any, ask: Any) -> Iterator[Any]:
        yield SimpleNamespace(text="one ", audio=None)
        yield SimpleNamespace(text="two", audio=None)
        raise ValueError("the inside")

    monkeypatch.setattr("mimo_fast.server.chat.Mind.answer", answer)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        messages = [{"role": "user", "content": "hello"}]
        stream = client.chat.completions.create(model="nano", messages=messages, stream=True)
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert "inside" not in str(failed.value)
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="nano", messages=messages)
        assert "inside" not in str(failed.value)
    until(lambda: service.worker.streams == 0)
