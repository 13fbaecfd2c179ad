"""`/v1/audio/conversions`: speech into speech by example."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import soundfile
from conversions import encoded, write_answers
from servers import Answer, Running

from mimo_fast import MimoAudio
from mimo_fast.errors import AudioError, ConfigError
from mimo_fast.server.examples import ExampleSets

PATH = "/v1/audio/conversions"
RATE = 24000

Part = tuple[str, str | bytes]


def form_of(parts: list[Part]) -> tuple[bytes, dict[str, str]]:
    boundary = uuid4().hex
    body = b""
    for name, value in parts:
        file = '; filename="a"' if isinstance(value, bytes) else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n"
    kind = f"multipart/form-data; boundary={boundary}"
    return body + f"--{boundary}--\r\n".encode(), {"Content-Type": kind}


def ask(server: Running, parts: list[Part]) -> Answer:
    return server.ask("POST", PATH, *form_of(parts))


def said(server: Running, text: str) -> bytes:
    body = {"model": "nano", "input": text, "response_format": "wav", "seed": 1}
    answer = server.ask("POST", "/v1/audio/speech", body)
    assert answer.status == 200
    return answer.body


@pytest.fixture(scope="module")
def request_(server: Running) -> list[Part]:
    """Two questions with their answers, and a third question."""
    parts: list[Part] = [("instruction", "Answer the question"), ("seed", "1")]
    for question, answer in (
        ("what is three plus four", "seven"),
        ("what day comes after friday", "saturday"),
    ):
        parts += [
            ("example_before[]", said(server, question)),
            ("example_after[]", said(server, answer)),
            ("example_text[]", answer),
        ]
    return [*parts, ("file", said(server, "what color is the sea"))]


def test_what_examples_show_is_done_with_the_recording(server: Running, request_: list[Part]):
    answer = ask(server, [*request_, ("response_format", "pcm"), ("stream_format", "sse")])
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    lines = answer.body.decode().split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    *parts, done = events
    assert done["type"] == "conversion.done"
    assert done["text"] == "the sea is blue"
    assert done["usage"]["output_tokens"] > 4
    deltas = [each["delta"] for each in parts if each["type"] == "conversion.text.delta"]
    assert "".join(deltas).strip() == done["text"]
    kinds = {each["type"] for each in parts}
    assert kinds == {"conversion.text.delta", "conversion.audio.delta"}
    audio = b"".join(base64.b64decode(each["audio"]) for each in parts if "audio" in each)
    samples = np.frombuffer(audio, "<i2")
    assert 0.5 * RATE < len(samples) < 4 * RATE
    assert np.abs(samples).max() > 1000
    # The same as a file, with the same seed.
    plain = ask(server, [*request_, ("response_format", "pcm")])
    assert plain.headers["Content-Type"] == "audio/pcm"
    assert plain.body == audio


def without(parts: list[Part], name: str) -> list[Part]:
    return [part for part in parts if part[0] != name]


def bare(parts: list[Part]) -> list[Part]:
    """Without examples."""
    return [part for part in parts if not part[0].startswith("example_")]


def silence() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(RATE), RATE, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (lambda parts: without(parts, "instruction"), "instruction"),
        (lambda parts: [*without(parts, "instruction"), ("instruction", " ")], "instruction"),
        (lambda parts: without(parts, "file"), "file"),
        (lambda parts: [*without(parts, "file"), ("file", "text")], "file"),
        (lambda parts: [*without(parts, "file"), ("file", b"no audio at all")], "file"),
        (lambda parts: without(parts, "example_text[]"), "example_before[]"),
        (lambda parts: [*parts, ("example_text[]", "more")], "example_before[]"),
        (
            lambda parts: [
                *without(parts, "example_text[]"),
                ("example_text[]", "seven"),
                ("example_text[]", " "),
            ],
            "example_text[1]",
        ),
        (lambda parts: [*parts, ("examples", "answers")], "examples"),
        (lambda parts: [*bare(parts), ("examples", "answers")], "examples"),
        (lambda parts: [*without(parts, "file"), ("file", silence())], "file"),
        (
            lambda parts: [
                *without(parts, "example_after[]"),
                *[("example_after[]", "no file")] * 2,
            ],
            "example_after[0]",
        ),
        (lambda parts: [*parts, ("response_format", "midi")], "response_format"),
        (lambda parts: [*parts, ("stream_format", "html")], "stream_format"),
        (lambda parts: [*without(parts, "seed"), ("seed", "soon")], "seed"),
        (lambda parts: [*parts, ("model", "another")], "model"),
    ],
)
def test_what_is_wrong_is_named(server: Running, request_: list[Part], change: Any, param: str):
    answer = ask(server, change(request_))
    assert answer.status == (404 if param == "model" else 400)
    assert answer.error["param"] == param


def test_it_takes_a_form(server: Running):
    answer = server.ask("POST", PATH, {"instruction": "Answer the question"})
    assert answer.status == 415
    assert answer.error["code"] == "unsupported_type"


def test_a_model_that_was_not_trained_for_it_says_so(serve, service, monkeypatch):
    server = serve()
    monkeypatch.setattr(service, "knows", lambda task, option=None: False)
    answer = server.ask("POST", PATH, *form_of([("instruction", "Answer")]))
    assert answer.status == 400
    assert "not trained" in answer.error["message"]


def test_a_client_that_leaves_frees_the_model(server: Running, request_: list[Part]):
    body, headers = form_of([*request_, ("stream_format", "sse")])
    worker = server.app.state.service.worker
    assert server.steps_after_leaving(PATH, body, headers, lambda: worker.streams > 0) < 40


def test_examples_that_come_again_are_not_encoded_again(server: Running, request_: list[Part]):
    model = server.app.state.service.model
    ask(server, request_)
    before = model.pipeline.counters
    with encoded(model.codec) as found:
        answer = ask(server, [*without(request_, "seed"), ("seed", "2")])
    assert answer.status == 200
    assert len(found) == 1
    after = model.pipeline.counters
    assert after["prefix_hits"] == before["prefix_hits"] + 1
    # What the two questions and the two answers have; the third question has fewer.
    assert after["prefix_groups"] - before["prefix_groups"] > 40


@pytest.fixture(scope="module")
def folder(service, tmp_path_factory) -> Path:
    return write_answers(service.model, tmp_path_factory.mktemp("sets") / "answers").parent


def test_a_set_is_listed_and_used(serve, folder: Path, request_: list[Part], monkeypatch):
    server = serve(examples=folder)
    (listed,) = server.get("/v1/audio/examples").json["data"]
    assert (listed["id"], listed["instruction"], listed["examples"]) == ("answers", "answer", 2)
    assert listed["consent"] is True
    assert str(folder) not in json.dumps(listed)
    assert server.get("/page/config").json["example_sets"] == [listed]
    recording = next(part for part in request_ if part[0] == "file")
    parts: list[Part] = [("examples", "answers"), recording, ("seed", "1")]
    parts += [("response_format", "pcm"), ("stream_format", "sse")]
    *_, done = ask(server, parts).body.decode().strip().split("\n\n")
    assert json.loads(done.removeprefix("data: "))["text"] == "the sea is blue"
    # An instruction of the request's own is in place of the set's.
    asked = list[str]()
    monkeypatch.setattr(
        MimoAudio, "converter", lambda _model, given, **_how: asked.append(given.instruction)
    )
    ask(server, [*parts, ("instruction", "voice")])
    ask(server, parts)
    assert asked == ["voice", "answer"]


@pytest.mark.parametrize(
    "name", ["Answers", "../answers", "answers/", "/etc", "", "a" * 9999, "\0"]
)
def test_no_other_name_is_found(folder: Path, name: str):
    assert ExampleSets(folder).find(name) is None


def test_without_a_folder_there_are_no_sets(server: Running):
    assert server.get("/v1/audio/examples").json["data"] == []
    assert server.get("/page/config").json["example_sets"] == []


def test_sets_that_cannot_be_offered_are_named(folder: Path, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    assert not [*ExampleSets(tmp_path)]
    shutil.copytree(folder / "answers", tmp_path / "an swers")
    with pytest.raises(ConfigError, match="an swers cannot be asked for"):
        ExampleSets(tmp_path)
    (tmp_path / "an swers").rename(tmp_path / "b")
    (tmp_path / "b" / "1-after.wav").unlink()
    with pytest.raises(AudioError, match="b: example 1: cannot read"):
        ExampleSets(tmp_path)


def test_sets_that_come_later_are_found(folder: Path, tmp_path: Path):
    sets = ExampleSets(tmp_path)
    shutil.copytree(folder / "answers", tmp_path / "later")
    assert [each.name for each in sets] == ["later"]
    found = sets.find("later")
    assert found is not None
    assert len(found.read().examples) == 2
