"""Every script in examples/ runs with nano, as its first lines say."""

import _thread
import json
import runpy
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ADAPTERS, KIT_PAIR

import mimo_fast
from mimo_fast.checkpoint.embedded import resolve_pair

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
WORDS = Path(__file__).parent / "words"
QUESTION = Path(mimo_fast.__file__).parent / "assets" / "question.wav"
RATE = 24000

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs an example with these arguments, as the command line does."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def nano() -> mimo_fast.MimoAudio:
    return mimo_fast.load()


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), dtype=np.float32)


def recording(path: Path) -> np.ndarray:
    return mimo_fast.load_audio(path, RATE).numpy()


def test_each_is_in_the_table_and_tested():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    for name in names:
        assert f"| [{name}]({name}) |" in table
        assert f'run("{name}"' in here
    assert table.count("| [") == len(names)


def test_upstreams_script(run, tmp_path, capsys):
    run("upstream_script.py", QUESTION, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "heard: what is three plus four" in said
    assert "answered: " in said
    for name in ("tts.wav", "slow.wav", "answer.wav"):
        assert 0.3 < len(recording(tmp_path / name)) / RATE < 10


class Card(SimpleNamespace):
    """`sounddevice` of a test: what was played, and a microphone that a test speaks into."""

    def __init__(self, microphone: Callable[["Card"], Any] | None = None) -> None:
        self.microphone, self.speaker, self.played = microphone, None, list[np.ndarray]()
        super().__init__(OutputStream=self._output, InputStream=self._input)

    def _output(self, samplerate: int, channels: int, dtype: str, callback: Any = None) -> Any:
        assert (samplerate, channels, dtype) == (RATE, 1, "float32")
        self.speaker = callback
        return self

    def _input(self, callback: Any, blocksize: int, **options: Any) -> Any:
        self.callback, self.blocksize = callback, blocksize
        threading.Thread(target=self.microphone, args=[self], daemon=True).start()
        return self

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, samples: np.ndarray) -> None:
        assert samples.shape == (len(samples), 1)
        assert samples.dtype == np.float32
        self.played.append(samples[:, 0].copy())

    def hear(self, samples: np.ndarray) -> None:
        """The microphone's driver, faster than real time."""
        for start in range(0, len(samples) - self.blocksize + 1, self.blocksize):
            self.callback(samples[start : start + self.blocksize, None], self.blocksize, None, None)

    def play(self, seconds: float) -> None:
        """The loudspeaker's driver."""
        out = np.full((int(seconds * RATE), 1), np.nan, dtype=np.float32)
        self.speaker(out, len(out), None, None)
        assert np.isfinite(out).all()
        self.played.append(out[:, 0])


def test_a_sound_card_gets_what_a_stream_gives(run, monkeypatch, capsys, nano):
    card = Card()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    run("sound_card.py", "seven forty two")
    heard = np.concatenate(card.played)
    assert "heard after" in capsys.readouterr().out
    assert nano.asr_sft(heard) == "seven forty two"
    assert len(card.played) > 3


def test_a_dialogue_answers_and_is_interrupted(run, monkeypatch, capsys):
    question, steps = recording(QUESTION), list[str]()

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        for _ in range(3000):
            if condition():
                steps.append(what)
                return
            time.sleep(0.01)

    def talk(card: Card) -> None:
        try:
            card.hear(np.concatenate([silence(0.5), question, silence(1)]))
            wait_for(lambda: card.speaker.__self__.busy, "answers")
            card.play(0.2)
            card.hear(question)
            wait_for(lambda: not card.speaker.__self__.busy, "is silent")
            card.hear(silence(1))
            wait_for(lambda: card.speaker.__self__.busy, "answers again")
        finally:
            _thread.interrupt_main()

    card = Card(talk)
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    run("voice_loop.py")
    assert steps == ["answers", "is silent", "answers again"]
    assert capsys.readouterr().out.count("[interrupted]") == 1
    assert np.abs(card.played[0]).max() > 0.01


def test_many_recordings(run, tmp_path, capsys):
    for name in ("thank_you", "six_five_zero", "what_is_your_name"):
        shutil.copyfile(WORDS / f"{name}.flac", tmp_path / f"{name}.flac")
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    with pytest.raises(SystemExit) as ended:
        run("transcribe_folder.py", tmp_path)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    rows = dict(line.split("\t") for line in printed.out.splitlines())
    assert {Path(path).stem: words for path, words in rows.items()} == {
        "six_five_zero": "six five zero",
        "thank_you": "thank you",
        "what_is_your_name": "what is your name",
    }
    assert "broken.wav: cannot decode" in printed.err


def test_a_folder_without_recordings(run, tmp_path):
    with pytest.raises(SystemExit, match="holds no recordings"):
        run("transcribe_folder.py", tmp_path)


def test_speech_to_speech(run, tmp_path, capsys):
    pair = [WORDS / "thank_you.flac", WORDS / "thank_you.flac", "thank you"]
    target = tmp_path / "converted.wav"
    run("convert_voice.py", "--example", *pair, WORDS / "six_five_zero.flac", "-o", target)
    assert capsys.readouterr().out.strip()
    assert len(recording(target)) > 0.1 * RATE


def test_quantizing(run, tmp_path, capsys):
    run("quantize.py", "nano", tmp_path / "small", "--format", "int8")
    source = resolve_pair("nano", "nano")[0]
    before, after = (
        sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6
        for folder in (source, tmp_path / "small")
    )
    assert after < 0.7 * before
    printed = capsys.readouterr().out
    assert f"{before:.1f} MB -> {after:.1f} MB" in printed
    assert printed.count("real-time factor") == 2


def test_an_adapter(run, tmp_path, capsys):
    adapter, merged = ADAPTERS / "qkvo", tmp_path / "merged"
    run("adapters.py", KIT_PAIR[0], adapter, "--codec", KIT_PAIR[1], "--target", merged)
    said = capsys.readouterr().out
    assert f"wrote {merged}: 24 tensors are changed" in said
    options = {"adapters": {"mine": adapter}, "merge_adapters": False}
    asked = {"input_text": "What is three plus four?", "seed": 0, "max_new_tokens": 64}
    with mimo_fast.load(*KIT_PAIR, **options) as model:
        plain, tuned = (model.text_dialogue_sft(**asked, adapter=each) for each in (None, "mine"))
    assert said.startswith(f"as it is: {plain}\ntuned: {tuned}\n")
    assert plain != tuned
    with mimo_fast.load(merged, KIT_PAIR[1]) as model:
        assert model.text_dialogue_sft(**asked) not in ("", plain)


def ask(url: str, data: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    request = urllib.request.Request(url, data, {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.slow
def test_an_http_endpoint(run, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn")
    asked = list[str]()

    def serve(app: Any, host: str, port: int) -> None:
        assert host == "127.0.0.1"
        server = uvicorn.Server(uvicorn.Config(app, host=host, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            questions(f"http://{host}:{port}")
        finally:
            server.should_exit = True
            thread.join()

    def questions(url: str) -> None:
        def said(text: str) -> bytes:
            status, wav = ask(f"{url}/speech", json.dumps({"text": text}).encode())
            assert status == 200
            return wav

        texts = ["seven forty two", "thank you", "the dog is big and black"]
        with ThreadPoolExecutor(3) as callers:
            for text, wav in zip(texts, callers.map(said, texts), strict=True):
                status, answer = ask(f"{url}/transcript", wav, "audio/wav")
                assert (status, json.loads(answer)["text"]) == (200, text)
                asked.append(text)
        assert ask(f"{url}/speech", b'{"text": ""}')[0] == 422
        assert ask(f"{url}/transcript", b"no audio", "audio/wav")[0] == 422
        assert ask(f"{url}/transcript", bytes(21 * 2**20), "audio/wav")[0] == 413

    monkeypatch.setattr(uvicorn, "run", serve)
    run("http_endpoint.py", "--port", 0)
    assert len(asked) == 3


def test_a_client_of_the_server(run, nano, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    from servers import start

    from mimo_fast.server.app import create_app
    from mimo_fast.server.service import Service
    from mimo_fast.server.settings import Settings

    service, settings = Service(mimo_fast.load(), "nano"), Settings(port=0, api_key="secret")
    running = start(create_app(service, settings), settings)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    card, answer = Card(), tmp_path / "answer.wav"
    card.play = lambda samples, rate, blocking: card.played.append(samples)
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    try:
        run("realtime_client.py", "-o", answer, "--url", running.url)
    finally:
        running.stop()
        service.close()
    printed = capsys.readouterr().out
    assert "you:    what is three plus four\n" in printed
    assert "answer: seven\n" in printed
    assert nano.asr_sft(answer) == "seven"
    assert len(card.played) == 1
    assert len(card.played[0]) == len(recording(answer))
