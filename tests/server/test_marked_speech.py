"""`serve --mark`: whatever is said over the network carries a watermark, at any speed."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from servers import Serve
from sounds import heard

import mimo_fast
from mimo_fast.audio.files import load_audio
from mimo_fast.marking.marks import Marks
from mimo_fast.marking.watermark import find_watermark
from mimo_fast.server.audio import Encoder
from mimo_fast.server.realtime.items import Item, Said
from mimo_fast.server.realtime.mind import Mind
from mimo_fast.server.realtime.responses import Manner, ask_about, sounds
from mimo_fast.server.realtime.sound import FORMATS
from mimo_fast.server.service import Service

RATE = 24000
TEXT = "three hundred and twelve plus five"
QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"


@pytest.fixture
def marking(service: Service) -> Iterator[Service]:
    service.model.marks = Marks()
    yield service
    service.model.marks = None


def confidence(samples: np.ndarray | torch.Tensor) -> float:
    return find_watermark(torch.as_tensor(samples).float(), RATE).confidence


@pytest.mark.parametrize(
    ("form", "speed"), [("wav", 1), ("pcm", 1.25), ("mp3", 1), ("opus", 1), ("flac", 0.8)]
)
def test_speech_is_marked(marking: Service, serve: Serve, form: str, speed: float) -> None:
    server = serve()
    body = {"model": "nano", "input": TEXT, "seed": 1, "response_format": form, "speed": speed}
    said = heard(server.ask("POST", "/v1/audio/speech", body).body, form)
    assert confidence(said) > 0.95
    marking.model.marks = None
    other = heard(server.ask("POST", "/v1/audio/speech", body).body, form)
    assert confidence(other) < 0.1
    assert len(other) == len(said)


def test_answers_of_chats_are_marked(marking: Service, serve: Serve) -> None:
    recording = {"data": base64.b64encode(QUESTION.read_bytes()).decode(), "format": "wav"}
    asked = [{"type": "input_audio", "input_audio": recording}]
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": asked}],
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "seed": 1,
    }
    answer = json.loads(serve().ask("POST", "/v1/chat/completions", body).body)
    data = base64.b64decode(answer["choices"][0]["message"]["audio"]["data"])
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert confidence(samples) > 0.95


def test_realtime_replies_are_marked(marking: Service) -> None:
    mind = Mind(marking.model)
    wav = load_audio(QUESTION, RATE)
    spoken = Item("u", "user", [Said(spoken=True, seconds=len(wav) / RATE, wav=wav)])
    ask = ask_about([spoken], Manner())
    said = list(sounds(mind, ask, FORMATS["audio/pcm"]))
    samples = np.frombuffer(b"".join(each.audio for each in said), "<i2") / 2**15
    assert abs(len(samples) / RATE - sum(each.ms for each in said) / 1000) < 0.01
    assert confidence(samples) > 0.95


@pytest.mark.parametrize("form", ["pcm", "wav", "mp3"])
def test_a_sound_shorter_than_the_delay_is_whole(form: str) -> None:
    wav = torch.sin(torch.arange(1000) * 0.1) / 2
    plain, marked = Encoder(form, RATE), Encoder(form, RATE, mark=True)
    sizes = [
        len(heard(b"".join([encoder.push(wav), *encoder.finish()]), form))
        for encoder in (plain, marked)
    ]
    assert sizes[0] == sizes[1] > 0
