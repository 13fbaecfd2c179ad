"""The inside of a talk: what was heard to the sample, interruption, the screen, recordings."""

from __future__ import annotations

import asyncio
import io
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from mimo_fast.talk import screen as screens
from mimo_fast.talk.echo import EchoCanceller
from mimo_fast.talk.files import Recorder, WavFile
from mimo_fast.talk.player import Player
from mimo_fast.talk.remote import ServerError, realtime_url
from mimo_fast.talk.screen import Screen
from mimo_fast.talk.talk import Talk

RATE = 24_000


def ramp(samples: int, start: int = 1) -> np.ndarray:
    return np.arange(start, start + samples, dtype=np.float32)


class Partner:
    """A partner that only notes what it is asked."""

    def __init__(self) -> None:
        self.asked = list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        async def note(*arguments: Any) -> None:
            self.asked.append((name, *arguments))

        return note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# The player


def test_parts_are_played_in_order_with_silence_after_them():
    player, out = Player(RATE), np.empty(5, np.float32)
    said = player.begin("a")
    said.push(ramp(3))
    said.push(ramp(4, 4))
    said.ended = True
    player.fill(out)
    assert [*out] == [1, 2, 3, 4, 5]
    assert player.busy
    player.fill(out)
    assert [*out] == [6, 7, 0, 0, 0]
    assert (said.taken, said.heard(), player.gaps, player.busy) == (7, 7, 0, False)


def test_the_next_reply_follows_at_once():
    player, out = Player(RATE), np.empty(4, np.float32)
    first, second = player.begin("a"), player.begin("b")
    first.push(ramp(2))
    first.ended = True
    second.push(ramp(2, 10))
    player.fill(out)
    assert [*out] == [1, 2, 10, 11]


def test_a_gap_is_counted_once_and_is_silence():
    player, out = Player(RATE), np.empty(4, np.float32)
    said = player.begin("a")
    player.fill(out)
    # It had not begun.
    assert player.gaps == 0
    said.push(ramp(2))
    for _ in range(3):
        player.fill(out)
    assert (player.gaps, [*out]) == (1, [0, 0, 0, 0])
    said.push(ramp(6, 3))
    player.fill(out)
    assert [*out] == [3, 4, 5, 6]
    player.fill(out)
    assert player.gaps == 2


def test_what_the_card_still_holds_was_not_heard():
    player, out = Player(RATE), np.empty(2400, np.float32)
    said = player.begin("a")
    said.push(ramp(10_000))
    player.fill(out, 0.05)
    assert said.taken == 2400
    assert said.first is not None
    # Of the block that is heard 50 ms later.
    assert said.heard(said.first - 0.01) == 0
    assert said.heard(said.first + 0.05) == pytest.approx(1200, abs=1)
    assert said.heard(said.first + 9) == 2400


def test_stopping_is_silence_and_says_what_was_left():
    player, out = Player(RATE), np.empty(4, np.float32)
    said = player.begin("a")
    said.push(ramp(10))
    player.fill(out)
    assert [(each.name, each.heard()) for each in player.stop()] == [("a", 4)]
    player.fill(out)
    assert not out.any()
    assert not player.busy


# A talk


def talk_of(act: Any, terminal: bool = False) -> tuple[Talk, Partner, str, str]:
    """Runs `act(talk, player)` in a talk -> it, its partner, standard output, standard error."""
    outs = (Terminal if terminal else io.StringIO)(), (Terminal if terminal else io.StringIO)()
    partner = Partner()

    async def run() -> Talk:
        player, screen = Player(RATE), Screen()
        talk = Talk(partner, player, screen)

        async def driver() -> None:
            await act(talk, player)
            talk.stop()

        await talk.run(driver)
        return talk

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outs
    try:
        talk = asyncio.run(run())
    finally:
        sys.stdout, sys.stderr = before
    return talk, partner, outs[0].getvalue(), outs[1].getvalue()


async def look() -> None:
    """Until the talk has looked twice."""
    await asyncio.sleep(0.06)


async def interrupted(talk: Talk, player: Player) -> None:
    nothing, out = np.zeros(0, np.float32), np.empty(1200, np.float32)
    talk.turn_began()
    talk.turn_ended()
    assert talk.state == "thinking"
    talk.user_said("u", "what is three plus four", True)
    talk.reply_began("r")
    # A model writes ahead of what it says.
    talk.reply_said("r", "the sea is blue", nothing)
    for _ in range(12):
        talk.reply_said("r", "", ramp(2400))
    for _ in range(13):
        player.fill(out)
    await look()
    assert talk.state == "speaking"
    talk.turn_began()
    assert talk.state == "you speak"
    # What still comes of it is not heard.
    talk.reply_said("r", " and deep", ramp(2400))
    talk.reply_ended("r", None)
    player.fill(out)
    assert not out.any()
    await look()


def test_an_interruption_is_known_to_the_sample_and_shows_what_was_heard():
    talk, partner, out, _ = talk_of(interrupted)
    assert partner.asked == [("truncate", "r", 650.0)]
    assert talk.interruptions == 1
    assert len(talk.latencies) == 1
    assert out.splitlines()[0] == "you:   what is three plus four"
    assert out.splitlines()[1].startswith("reply: the sea [interrupted] (")


def test_what_was_heard_to_its_end_is_not_cut():
    async def act(talk: Talk, player: Player) -> None:
        talk.turn_ended()
        talk.reply_began("r")
        talk.reply_said("r", "seven", ramp(100))
        talk.reply_ended("r", None)
        player.fill(np.empty(480, np.float32))
        talk.turn_began()
        await look()

    talk, partner, *_ = talk_of(act)
    assert partner.asked == []
    assert talk.interruptions == 0


def test_a_reply_is_shown_after_the_words_it_answers():
    async def act(talk: Talk, player: Player) -> None:
        talk.turn_ended()
        talk.reply_began("r")
        talk.reply_said("r", "seven", ramp(100))
        player.fill(np.empty(50, np.float32))
        talk.reply_ended("r", None)
        player.fill(np.empty(50, np.float32))
        await look()
        talk.user_said("u", "three plus ", False)
        talk.user_said("u", "four", False)
        talk.user_said("u", "three plus four", True)
        await look()

    *_, out, _ = talk_of(act)
    assert [line.split(" (")[0] for line in out.splitlines()] == [
        "you:   three plus four",
        "reply: seven",
    ]


def test_words_that_never_become_known_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(screens, "LATE", 0.0)

    async def act(talk: Talk, player: Player) -> None:
        talk.turn_ended()
        talk.reply_began("r")
        talk.reply_said("r", "seven", ramp(100))
        talk.reply_ended("r", None)
        player.fill(np.empty(480, np.float32))
        await look()
        await look()
        talk.user_said("u", "three", True)

    *_, out, err = talk_of(act)
    assert out.startswith("you:   ...\nreply: seven (")
    assert "you said: three" in err


def test_words_cannot_command_the_terminal():
    async def act(talk: Talk, player: Player) -> None:
        talk.turn_ended()
        talk.user_said("u", "a\x1b[2Jb\r\nc", True)
        await look()

    *_, out, _ = talk_of(act)
    assert out == "you:   a [2Jb c\n"


def test_a_terminal_shows_the_state_where_no_line_is_in_progress():
    *_, err = talk_of(interrupted, terminal=True)
    assert f"{screens.ERASE}[thinking]" in err or f"{screens.ERASE}[you speak]" in err
    assert err.endswith(screens.ERASE)


def test_a_failure_is_told_and_the_talk_goes_on():
    async def act(talk: Talk, player: Player) -> None:
        talk.turn_ended()
        talk.reply_ended(None, "out of memory")
        assert talk.state == "listening"
        await look()

    *_, err = talk_of(act)
    assert "the reply failed: out of memory" in err


def test_a_partner_that_goes_ends_the_talk():
    async def act(talk: Talk, player: Player) -> None:
        talk.gone(ServerError("it has gone"))
        await asyncio.sleep(60)

    with pytest.raises(ServerError, match="it has gone"):
        talk_of(act)


# Echo


class Module:
    """LiveKit's processing module of a test: takes 1000 off each sample, and notes its calls."""

    made: ClassVar[list[Module]] = []

    def __init__(self, **options: bool) -> None:
        assert options["echo_cancellation"]
        self.calls = list[tuple[str, int]]()
        self.made.append(self)

    def process_reverse_stream(self, frame: Any) -> None:
        self.calls.append(("far", int(np.frombuffer(frame.data, np.int16)[0])))

    def set_stream_delay_ms(self, ms: int) -> None:
        self.calls.append(("delay", ms))

    def process_stream(self, frame: Any) -> None:
        samples = np.frombuffer(frame.data, np.int16).copy()
        assert len(samples) == 240
        frame.data[:] = (samples - 1000).tobytes()
        self.calls.append(("near", int(samples[0])))


def test_an_echo_canceller_gets_what_is_played_before_what_is_heard(monkeypatch):
    def frame(data: bytearray, rate: int, channels: int, samples: int) -> SimpleNamespace:
        assert (rate, channels, samples) == (RATE, 1, 240)
        return SimpleNamespace(data=data)

    apm = SimpleNamespace(AudioProcessingModule=Module)
    monkeypatch.setitem(sys.modules, "livekit", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "livekit.rtc", SimpleNamespace(AudioFrame=frame))
    monkeypatch.setitem(sys.modules, "livekit.rtc.apm", apm)
    echo, player = EchoCanceller(RATE, 0.04), Player(RATE, keeps_far=True)
    player.begin("a").push(np.full(480, 0.25, np.float32))
    player.fill(np.empty(480, np.float32))
    half = np.full(300, 0.5, np.float32)
    first, second = echo.clean(half, player), echo.clean(half, player)
    # What does not make a frame waits.
    assert (len(first), len(second)) == (240, 240)
    assert (first == (16384 - 1000) / 32768).all()
    near = [("delay", 40), ("near", 16384)]
    assert Module.made[-1].calls == [("far", 8192), ("far", 8192), *near, *near]


# Files


def test_a_recorded_talk_has_both_sides_in_step(tmp_path):
    recorder = Recorder(tmp_path / "a.wav", RATE)
    recorder.add(0, [np.full(30_000, 0.5, np.float32)])
    recorder.add(1, [np.full(10_000, 0.25, np.float32)])
    # One side that is late by more than 5 s is silence so far.
    recorder.add(0, [np.full(6 * RATE, 0.5, np.float32)])
    recorder.close()
    found, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert found.shape == (30_000 + 6 * RATE, 2)
    assert (found[:, 0] == 0.5).all()
    assert (found[:10_000, 1] == 0.25).all()
    assert not found[10_000:, 1].any()


def test_a_file_is_whole_while_it_is_written(tmp_path):
    file = WavFile(tmp_path / "a.wav", 8000, 1)
    file.write(np.full((20_000, 1), 0.5, np.float32))
    assert len(soundfile.read(tmp_path / "a.wav")[0]) == 20_000
    file.close()


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("127.0.0.1:8000", "ws://127.0.0.1:8000/v1/realtime"),
        ("http://a.example/", "ws://a.example/v1/realtime"),
        ("https://a.example/v1", "wss://a.example/v1/realtime"),
        ("wss://a.example/x/v1/realtime", "wss://a.example/x/v1/realtime"),
    ],
)
def test_the_address_of_a_server(url, wanted):
    assert realtime_url(url) == wanted


@pytest.mark.parametrize("url", ["ftp://a.example", "http://", ""])
def test_what_is_no_address(url):
    with pytest.raises(ServerError, match="is no address"):
        realtime_url(url)
