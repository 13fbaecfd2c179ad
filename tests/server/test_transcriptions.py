"""`/v1/audio/transcriptions` by the stock openai SDK."""

import asyncio
import io
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch
from helpers import KIT, KIT_PAIR
from servers import Running, start

import mimo_fast
from mimo_fast.audio.segments import Piece
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings
from mimo_fast.server.transcriptions import _number, language_of

RATE = 24000
QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"
WORDS = "what is three plus four"


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def question() -> np.ndarray:
    return soundfile.read(QUESTION, dtype="float32")[0]


def encoded(samples: np.ndarray, rate: int = RATE, form: str = "WAV") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form)
    return out.getvalue()


def several(count: int, pause: float = 1.0) -> np.ndarray:
    """The question so many times, with pauses."""
    silence = np.zeros(round(pause * RATE), np.float32)
    return np.concatenate([part for _ in range(count) for part in (question(), silence)])


def test_the_words_of_a_recording(client: openai.OpenAI) -> None:
    with QUESTION.open("rb") as file:
        found = client.audio.transcriptions.create(model="nano", file=file)
    assert found.text == WORDS
    assert found.usage is not None
    assert found.usage.type == "tokens"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    # Ten patches of 160 ms and more, and five words and more.
    assert found.usage.input_tokens > 10
    assert found.usage.output_tokens >= 5


def test_every_form(client: openai.OpenAI) -> None:
    file = ("a.wav", encoded(several(3)))
    create = client.audio.transcriptions.create
    three = " ".join([WORDS] * 3)
    assert create(model="nano", file=file, response_format="text") == f"{three}\n"
    verbose = create(model="nano", file=file, response_format="verbose_json", language="en")
    assert verbose.text == three
    assert verbose.language == "english"
    assert verbose.duration == pytest.approx(len(several(3)) / RATE, abs=0.01)
    assert [segment.text for segment in verbose.segments] == [WORDS] * 3
    period = len(question()) / RATE + 1.0
    for i, segment in enumerate(verbose.segments):
        assert segment.id == i
        assert i * period <= segment.start < segment.end <= i * period + period - 0.9
        # A figure that nothing measures is none.
        assert segment.avg_logprob is None
    srt = create(model="nano", file=file, response_format="srt")
    cues = re.findall(r"(\d+)\n(\S+) --> (\S+)\n(.*)\n", srt)
    assert [cue[0] for cue in cues] == ["1", "2", "3"]
    assert [cue[3] for cue in cues] == [WORDS] * 3
    assert re.fullmatch(r"00:00:0\d,\d{3}", cues[0][1])
    vtt = create(model="nano", file=file, response_format="vtt")
    assert vtt.startswith("WEBVTT\n\n00:00:0")
    assert vtt.count(WORDS) == 3


def test_words_come_as_they_are_found(client: openai.OpenAI) -> None:
    file = ("a.wav", encoded(several(3)))
    stream = client.audio.transcriptions.create(model="nano", file=file, stream=True)
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    *deltas, done = list(stream)
    assert all(event.type == "transcript.text.delta" for event in deltas)
    assert len(deltas) >= 15
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == " ".join([WORDS] * 3)
    assert done.usage.total_tokens > 0


def test_the_transcript_is_that_of_the_library(client: openai.OpenAI, service: Service) -> None:
    """Cut, levelled and worded in the same way; a row does not depend on its neighbours."""
    wav = several(4, pause=0.4)
    there = service.model.transcribe(torch.from_numpy(wav), seed=7)
    here = client.audio.transcriptions.create(
        model="nano",
        file=("a.wav", encoded(wav)),
        response_format="verbose_json",
        extra_body={"seed": 7},
    )
    assert here.text == there.text
    assert [(s.start, s.end, s.text) for s in here.segments] == [
        (round(s.start, 3), round(s.end, 3), s.text) for s in there.segments
    ]


@pytest.mark.parametrize(("form", "rate"), [("FLAC", 16000), ("MP3", 44100), ("OGG", 48000)])
def test_other_kinds_and_rates(client: openai.OpenAI, form: str, rate: int) -> None:
    wav = mimo_fast.load_audio(str(QUESTION), rate).numpy()
    # The name says nothing.
    found = client.audio.transcriptions.create(
        model="nano", file=("a.bin", encoded(wav, rate, form))
    )
    assert found.text == WORDS


def test_silence_is_no_words(client: openai.OpenAI) -> None:
    file = ("a.wav", encoded(np.zeros(3 * RATE, np.float32)))
    create = client.audio.transcriptions.create
    assert create(model="nano", file=file).text == ""
    verbose = create(model="nano", file=file, response_format="verbose_json")
    assert (verbose.text, verbose.segments, verbose.duration) == ("", [], 3.0)
    assert create(model="nano", file=file, response_format="vtt") == "WEBVTT\n"


def test_what_clients_add_does_no_harm(client: openai.OpenAI) -> None:
    found = client.audio.transcriptions.create(
        model="whisper-1",
        file=("a.wav", encoded(question())),
        language="en",
        prompt="Arithmetic.",
        temperature=0.0,
        timestamp_granularities=["segment"],
        response_format="verbose_json",
        extra_body={"hotwords": "seven"},
    )
    assert found.text == WORDS


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"file": ("a.wav", b"")}, 400, None),
        ({"file": ("a.wav", b"no sound at all" * 99)}, 400, None),
        ({"file": ("a.wav", encoded(np.zeros(0, np.float32)))}, 400, None),
        ({"model": "other"}, 404, "model"),
        ({"response_format": "docx"}, 400, "response_format"),
        ({"temperature": 7.0}, 400, "temperature"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"extra_body": {"temperature": "warm"}}, 400, "temperature"),
        ({"language": "xx"}, 400, "language"),
        ({"language": "zh"}, 400, "language"),
        ({"timestamp_granularities": ["word"]}, 400, "timestamp_granularities[]"),
        ({"timestamp_granularities": ["letter"]}, 400, "timestamp_granularities[]"),
        ({"extra_body": {"stream": "maybe"}}, 400, "stream"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    client: openai.OpenAI, change: dict, status: int, param: str | None
) -> None:
    request = {"model": "nano", "file": ("a.wav", encoded(question()))} | change
    with pytest.raises(openai.APIStatusError) as refused:
        client.audio.transcriptions.create(**request)
    assert refused.value.status_code == status
    assert refused.value.param == param


def test_a_recording_that_is_too_long_is_refused_while_it_is_read(serve) -> None:
    running = serve(max_audio_seconds=5.0)
    for stream in ("false", "true"):
        answer = running.ask("POST", "/v1/audio/transcriptions", *form(several(4), stream=stream))
        assert answer.status == 400
        assert "--max-audio-seconds" in answer.error["message"]
    assert running.ask("POST", "/v1/audio/transcriptions", *form(several(1))).status == 200


def form(samples: np.ndarray, **fields: str) -> tuple[bytes, dict[str, str]]:
    """A form with a file, and its headers."""
    parts = [f'; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(b'; name="file"; filename="a.wav"\r\n\r\n' + encoded(samples))
    body = b"".join(b"--b\r\nContent-Disposition: form-data" + part + b"\r\n" for part in parts)
    return body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "application/json", 415),
        (b"--x\r\n", "multipart/form-data", 400),
        (b"--b\r\nnonsense", "multipart/form-data; boundary=b", 400),
        (b"--b--\r\n", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
    ],
)
def test_what_is_no_form_is_refused(server: Running, body: bytes, kind: str, status: int) -> None:
    answer = server.ask("POST", "/v1/audio/transcriptions", body, {"Content-Type": kind})
    assert answer.status == status
    assert answer.error["message"]


@pytest.mark.parametrize("stream", ["true", "false"])
def test_whoever_leaves_frees_the_model(server: Running, service: Service, stream: str) -> None:
    body, headers = form(several(30), stream=stream)
    steps = server.steps_after_leaving(
        "/v1/audio/transcriptions", body, headers, lambda: service.worker.streams > 0
    )
    # Thirty recordings are 600 groups and more.
    assert steps < 150


def test_pieces_are_rows_of_one_batch(
    server: Running, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, headers = form(several(12))
    at_once, make = list[int](), service.worker.stream

    def counted(*arguments: Any, **named: Any) -> Any:
        made = make(*arguments, **named)
        at_once.append(service.worker.streams)
        return made

    monkeypatch.setattr(service.worker, "stream", counted)
    assert server.ask("POST", "/v1/audio/transcriptions", body, headers).status == 200
    assert len(at_once) == 12
    # At most as many as the model has rows: the rest is not read yet.
    assert max(at_once) <= service.model.setup.max_batch


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(serve, service: Service) -> None:
    """Of a recording what is held is a piece or two, however long a silence is."""
    running = serve(max_audio_seconds=3600.0, max_body_bytes=200 << 20)
    silence = np.zeros(RATE * 1500, np.float32)
    long = np.concatenate([question(), silence, question(), np.zeros(RATE, np.float32)])
    data = encoded(long, form="FLAC")
    assert len(data) < 1 << 20
    peak = list[int]()
    pages = Path("/proc/self/statm")

    def resident() -> int:
        return int(pages.read_text().split()[1]) * 4096

    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0) as client:
        create = client.audio.transcriptions.create
        create(model="nano", file=("a.flac", encoded(several(2), form="FLAC")))
        before, stop = resident(), threading.Event()

        def watch() -> None:
            while not stop.is_set():
                peak.append(resident())
                time.sleep(0.01)

        del long, silence
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            found = create(model="nano", file=("a.flac", data), response_format="verbose_json")
        finally:
            stop.set()
            watching.join()
    assert found.text == f"{WORDS} {WORDS}"
    assert found.segments[1].start == pytest.approx(1500 + len(question()) / RATE, abs=1)
    # 1500 s are 144 MB of float32.
    assert max(peak) - before < 100 << 20


def test_the_request_is_in_the_language(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its wording, as nano has no tags."""
    assert language_of(service, "en-US") == language_of(service, "English") == "en"
    assert language_of(service, "") is None
    asked: list[Any] = []

    def refuse(_pipeline: Any, _piece: Any, **how: Any) -> Any:
        asked.append(how)
        raise LookupError

    monkeypatch.setattr("mimo_fast.server.service.start_piece", refuse)

    async def transcribe(language: str | None) -> None:
        with pytest.raises(LookupError):
            await anext(aiter(service.words(Piece(0.0, 1.0, torch.zeros(9)), 1, language)))

    for language in (None, "en", "zh"):
        asyncio.run(transcribe(language))
    assert ["template" in each for each in asked] == [False, True, True]
    assert asked[1]["template"].isascii()
    assert not asked[2]["template"].isascii()
    assert not any("language" in each for each in asked)


@pytest.fixture(scope="module")
def tagged() -> Iterator[Running]:
    """A server of MiMo-V2.5-ASR's kit."""
    model = mimo_fast.load(KIT / "asr" / "lm", KIT_PAIR[1], device="cpu", dtype="float32")
    service, settings = Service(model, "MiMo-V2.5-ASR"), Settings(port=0, drain_seconds=2.0)
    running = start(create_app(service, settings), settings)
    yield running
    running.stop()
    service.close()


def test_a_language_is_the_models_tag(tagged: Running) -> None:
    file, model = ("a.wav", encoded(question())), tagged.app.state.service.model
    limits = {"seed": 5}
    with openai.OpenAI(base_url=f"{tagged.url}/v1", api_key="x", max_retries=0) as client:
        create = client.audio.transcriptions.create
        for language in ("en", "zh", None):
            given = {} if language is None else {"language": language}
            found = create(model="MiMo-V2.5-ASR", file=file, extra_body=limits, **given)
            wav = torch.from_numpy(soundfile.read(io.BytesIO(file[1]), dtype="float32")[0])
            assert found.text == model.transcribe(wav, language=language, **limits).text
        with pytest.raises(openai.BadRequestError, match="klingon"):
            create(model="MiMo-V2.5-ASR", file=file, language="klingon")
        with pytest.raises(openai.BadRequestError, match="does asr_sft alone, not tts_sft"):
            client.audio.speech.create(model="MiMo-V2.5-ASR", voice="default", input="Hello.")
        with pytest.raises(openai.BadRequestError, match="does asr_sft alone, not "):
            client.chat.completions.create(
                model="MiMo-V2.5-ASR", messages=[{"role": "user", "content": "Hello."}]
            )


def test_numbers_of_a_form() -> None:
    assert (_number("0.5"), _number("1"), _number(" .5 ")) == (0.5, 1, 0.5)
    for text in ("nan", "1e5", "inf", "", "0x1", "1_0", "9" * 100):
        assert _number(text) == text
