"""`mimo-fast talk` and `tts --play`: recordings in place of devices, and what a card may do."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from servers import start

import mimo_fast
from mimo_fast.audio.resample import resample
from mimo_fast.checkpoint.embedded import QUESTION
from mimo_fast.cli.main import main
from mimo_fast.server.app import create_app
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings
from mimo_fast.talk import card as sounds

ROOT = Path(__file__).parents[2]
RATE = 24_000


class PortAudioError(Exception):
    """As sounddevice has it: a text and PortAudio's number."""


class Stream:
    """A stream of a test's sound card, whose driver is a thread at five times real time."""

    def __init__(self, card: Card, callback: Any, finished_callback: Any, **options: Any) -> None:
        self.options, self._callback, self._finished = options, callback, finished_callback
        self._card, self._open, self._thread = card, threading.Event(), None
        self.aborted, self.latency = False, 0.01
        if card.fault is not None:
            raise card.fault
        if options["samplerate"] not in card.rates:
            raise PortAudioError("Invalid sample rate", -9997)

    def _drive(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while self._open.is_set():
            self._drive()
            time.sleep(self.options["blocksize"] / self.options["samplerate"] / 5)
        self._finished()

    def abort(self) -> None:
        self.aborted = True
        self._open.clear()

    def __enter__(self) -> Stream:
        self._open.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._thread.join()


class Speaker(Stream):
    def _drive(self) -> None:
        out = np.full((self.options["blocksize"], 1), np.nan, np.float32)
        now = time.monotonic()
        timing = SimpleNamespace(currentTime=now, outputBufferDacTime=now + 0.01)
        self._callback(out, len(out), timing, None)
        self._card.played.append(out[:, 0].copy())
        self._card.after_play(self)


class Microphone(Stream):
    def _drive(self) -> None:
        if self._card.unplugged:
            self._open.clear()
            return
        data = np.zeros((self.options["blocksize"], 1), np.float32)
        self._callback(data, len(data), None, None)


class Card(SimpleNamespace):
    """`sounddevice` of a test."""

    def __init__(self) -> None:
        super().__init__(PortAudioError=PortAudioError, default=SimpleNamespace(device=[0, 1]))
        self.found = [device("Webcam", 1, 0), device("Headset", 1, 2), device("Headset 2", 0, 2)]
        self.rates, self.fault, self.unplugged = {RATE}, None, False
        self.played, self.streams = list[np.ndarray](), list[Stream]()
        self.after_play: Callable[[Speaker], None] = lambda stream: None

    def query_devices(self, device: int | None = None, kind: str | None = None) -> Any:
        if kind is None:
            return [dict(each) for each in self.found]
        return self.found[0 if device is None else device]

    def OutputStream(self, **options: Any) -> Stream:
        self.streams.append(Speaker(self, **options))
        return self.streams[-1]

    def InputStream(self, **options: Any) -> Stream:
        self.streams.append(Microphone(self, **options))
        return self.streams[-1]


def device(name: str, inputs: int, outputs: int) -> dict[str, Any]:
    channels = {"max_input_channels": inputs, "max_output_channels": outputs}
    return {"name": name, "default_samplerate": 48_000.0} | channels


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    found = Card()
    monkeypatch.setitem(sys.modules, "sounddevice", found)
    return found


@pytest.fixture(scope="module")
def nano() -> Iterator[Any]:
    with mimo_fast.load() as model:
        yield model


def error(capsys: Any, *arguments: object, code: int = 1) -> str:
    """The one line of a command that fails."""
    given = [str(each) for each in arguments]
    if code == 2:
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert ended.value.code == 2
    else:
        assert main(given) == code
    said = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in said)
    return said[-1]


def channels(path: Path) -> np.ndarray:
    found, rate = soundfile.read(path, dtype="float32", always_2d=True)
    assert rate == RATE
    return found.T


def words(model: Any, wav: np.ndarray) -> str:
    return " ".join(model.transcribe(torch.from_numpy(wav.copy())).text.split())


STATES = ["[listening]", "[you speak]", "[speaking]", "[listening]"]


def check_talk(capsys: Any, nano: Any, folder: Path, *more: str) -> None:
    answer, both = folder / "answer.wav", folder / "both.wav"
    files = ["--input", str(QUESTION), "--output", str(answer), "--save", str(both)]
    assert main(["talk", *files, *more]) == 0
    told = capsys.readouterr()
    you, reply = told.out.splitlines()
    assert you == "you:   what is three plus four"
    assert reply.startswith("reply: seven (")
    assert reply.endswith(" ms)")
    states = [line for line in told.err.splitlines() if line.startswith("[")]
    # A reply that is begun before the turn is over leaves no time to think.
    assert [each for each in states if each != "[thinking]"] == STATES
    last = told.err.splitlines()[-1]
    assert last.startswith("1 turn, first audio ")
    assert last.endswith(f"; wrote {both}, {answer}")
    left, right = channels(both)
    assert words(nano, left) == "what is three plus four"
    assert words(nano, right) == words(nano, channels(answer)[0]) == "seven"


@pytest.mark.slow
def test_a_recording_is_answered(capsys, nano, tmp_path):
    check_talk(capsys, nano, tmp_path)


@pytest.mark.slow
def test_a_server_answers_too(capsys, nano, tmp_path):
    service = Service(mimo_fast.load(max_batch=3), "nano")
    settings = Settings(port=0, api_key="secret")
    server = start(create_app(service, settings), settings)
    try:
        url = f"127.0.0.1:{server.port}"
        check_talk(capsys, nano, tmp_path, "--server", url, "--api-key", "secret")
        wrong = ["talk", "--server", url, "--input", QUESTION, "--output", tmp_path / "a.wav"]
        assert "the server's key with --api-key" in error(capsys, *wrong, "--api-key", "no")
        assert "voice" in error(capsys, *wrong, "--api-key", "secret", "--voice", "nobody")
    finally:
        server.stop()
        service.close()
    assert "start one with mimo-fast serve" in error(capsys, *wrong, "--api-key", "secret")


@pytest.mark.slow
def test_turns_by_hand_are_those_of_the_keys(tmp_path):
    """A line of standard input is a key; the turn is what was said between two."""
    command = [sys.executable, "-m", "mimo_fast", "talk", "--push", "--input", str(QUESTION)]
    command += ["--output", str(tmp_path / "answer.wav")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        process.stdin.write("\n")
        process.stdin.flush()
        while "[you speak]" not in (line := process.stderr.readline()):
            assert line
        time.sleep(soundfile.info(QUESTION).duration + 0.5)
        out, _ = process.communicate("\n", timeout=120)
    assert process.returncode == 0
    assert out.startswith("you:   what is three plus four\nreply: seven (")


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_terminal_is_as_before(tmp_path):
    import termios

    outer, inner = pty.openpty()
    before = termios.tcgetattr(inner)
    # A recording of silence, which would go on for ten minutes.
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, np.zeros(600 * 8000, np.int16), 8000)
    command = [sys.executable, "-m", "mimo_fast", "talk", "--input", str(silence)]
    command += ["--output", str(tmp_path / "answer.wav")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    told = ""
    with subprocess.Popen(command, text=True, stdin=inner, env=environment, **pipes) as process:
        while "[listening]" not in (line := process.stderr.readline()):
            assert line, told
            told += line
        assert not termios.tcgetattr(inner)[3] & termios.ICANON
        os.write(outer, b" ")
        assert "[muted: press space]" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert told.splitlines()[-1].startswith("0 turns; wrote ")
    assert termios.tcgetattr(inner) == before
    os.close(inner)
    os.close(outer)


# The sound card


def test_devices_are_listed_and_found(capsys, card):
    assert main(["talk", "--list-devices"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "  0  Webcam  (default microphone)"
    assert listed[1] == "  1  Headset  (default speaker, microphone)"
    assert "give its number" in error(capsys, "talk", "--device-out", "head")
    assert "no microphone has 'nose'" in error(capsys, "talk", "--device-in", "nose")
    assert "device 2 is no microphone" in error(capsys, "talk", "--device-in", "2")
    card.found = []
    assert "no microphone that PortAudio finds: plug one in" in error(capsys, "talk")
    assert "no speaker" in error(capsys, "tts", "seven", "--play")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (PortAudioError("Device unavailable", -9985), "in use by another program"),
        (PortAudioError("Permission denied", -9999), "may not be used (Permission denied): let"),
        (PortAudioError("Unanticipated host error", -9999), "choose another with --device-out"),
        (PortAudioError("Invalid device", -9996), "plug one in"),
        (ValueError("No default output device"), "plug one in"),
    ],
)
def test_a_card_that_cannot_be_used_names_the_fix(capsys, card, fault, told):
    card.fault = fault
    assert told in error(capsys, "tts", "seven", "--play")


def test_without_the_package_or_its_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert "pip install 'mimo-fast[talk]'" in error(capsys, "talk")
    monkeypatch.delitem(sys.modules, "sounddevice")

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "sounddevice":
                raise OSError("PortAudio library not found")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert "apt-get install libportaudio2" in error(capsys, "talk")


def test_echo_cancellation_needs_its_package(capsys, card, monkeypatch):
    monkeypatch.setitem(sys.modules, "livekit", None)
    assert "pip install 'mimo-fast[echo]'" in error(capsys, "talk", "--echo-cancel")


def test_a_microphone_that_is_unplugged_ends_the_talk(capsys, card, tmp_path):
    card.unplugged = True
    told = error(capsys, "talk", "--output", tmp_path / "a.wav")
    assert "the microphone has gone: plug it in again" in told


@pytest.mark.parametrize(
    "options",
    [
        ["--input", "{question}", "--device-in", "1"],
        ["--output", "a.wav", "--device-out", "1"],
        ["--output", "a.mp3"],
        ["--save", "a.flac"],
        ["--input", "{question}", "--echo-cancel"],
        ["--input", "-"],
        ["--output", "b.wav", "--save", "b.wav"],
        ["--input", "{question}", "--save", "{question}"],
    ],
)
def test_options_that_contradict_each_other(capsys, card, options):
    given = [each.format(question=QUESTION) for each in options]
    assert "error" in error(capsys, "talk", *given, code=2)


# tts --play


def test_a_text_is_heard_while_it_is_made(capsys, card, tmp_path):
    file = tmp_path / "said.wav"
    arguments = ["tts", "seven forty two", "--play", "-o", str(file), "--seed", "1"]
    assert main([*arguments, "--device-out", "headset"]) == 0
    assert "wrote" in capsys.readouterr().err
    (stream,) = card.streams
    assert stream.options["device"] == 1
    heard, said = np.concatenate(card.played), channels(file)[0]
    # Where the driver was faster than the model there is silence; not a sample is lost or repeated.
    heard = heard[heard != 0]
    assert len(heard) == len(said)
    np.testing.assert_allclose(heard, said, atol=1 / 32768)


def test_a_card_of_another_rate_hears_and_plays_the_same(card):
    card.rates = {48_000}
    wave = np.sin(np.arange(24_000) / 10).astype(np.float32)
    taken, heard = iter(wave.reshape(-1, 480)), list[np.ndarray]()

    def fill(out: np.ndarray, lead: float) -> None:
        out[:] = next(taken)

    def called(stream: Stream, data: np.ndarray) -> np.ndarray:
        stream._callback(data, len(data), None, None)
        return data[:, 0]

    sounds.Output(RATE, fill)
    sounds.Input(RATE, heard.append)
    speaker, microphone = card.streams
    assert speaker.options["blocksize"] == microphone.options["blocksize"] == 960
    played = [called(speaker, np.empty((960, 1), np.float32)) for _ in range(48)]
    wanted = resample(torch.from_numpy(wave), RATE, 48_000).numpy()
    played = np.concatenate(played)
    np.testing.assert_allclose(played, wanted[: len(played)], atol=1e-5)
    for at in range(0, len(played), 960):
        called(microphone, played[at : at + 960, None])
    got = np.concatenate(heard)[:22_000]
    np.testing.assert_allclose(got[100:], wave[100 : len(got)], atol=1e-2)


def test_ctrl_c_silences_it_at_once(capsys, card):
    def interrupt(stream: Speaker) -> None:
        if len(card.played) == 5:
            signal.raise_signal(signal.SIGINT)

    # The handler runs in the main thread.
    card.after_play = interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["tts", "what color is the sea", "--play"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert card.streams[0].aborted
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]


def test_what_play_goes_with(capsys, card, tmp_path):
    assert "give -o FILE, --play, or both" in error(capsys, "tts", "seven", code=2)
    assert "--play does not go with -o -" in error(capsys, "tts", "a", "--play", "-o", "-", code=2)
    told = error(capsys, "tts", "seven", "--device-out", "1", "-o", tmp_path / "a.wav", code=2)
    assert "--device-out goes with --play" in told
