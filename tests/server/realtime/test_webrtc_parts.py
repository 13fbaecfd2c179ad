"""Parts of WebRTC calls: the paced track, offers, gaps in what a caller sends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from av import AudioFrame

from mimo_fast.server.realtime import peer as peers
from mimo_fast.server.realtime.items import Item
from mimo_fast.server.realtime.mind import Ask
from mimo_fast.server.realtime.offers import without_local_names
from mimo_fast.server.realtime.responses import Manner, Response
from mimo_fast.server.realtime.speaker import LATE, Speaker

RATE, SIZE = 24_000, 960
"""Samples a second, and bytes of a frame of 20 ms."""


def response() -> Response:
    return Response(Manner(), Ask([], (), None, None, True, None))


class Log:
    """A speaker, and what it said of its replies."""

    def __init__(self) -> None:
        self.told = list[tuple[str, Response]]()
        self.speaker = Speaker(
            RATE,
            lambda response: self.told.append(("started", response)),
            lambda response: self.told.append(("stopped", response)),
        )

    async def frames(self, count: int) -> list[bytes]:
        return [bytes((await self.speaker.recv()).planes[0])[:SIZE] for _ in range(count)]


class Clock:
    """Time that passes while something sleeps."""

    def __init__(self, monkeypatch: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.now, self.slept = 1000.0, list[float]()
        monkeypatch.setattr(loop, "time", lambda: self.now)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds


def test_frames_come_every_20_ms_and_a_stall_makes_no_burst(monkeypatch):
    async def work() -> None:
        clock, log = Clock(monkeypatch, asyncio.get_running_loop()), Log()
        await log.frames(5)
        assert clock.slept == [0.02] * 4
        # A short delay is made up for.
        clock.now += 0.05
        await log.frames(4)
        assert clock.now == pytest.approx(1000 + 8 * 0.02)
        clock.now += LATE + 1
        before = len(clock.slept)
        await log.frames(5)
        assert clock.slept[before:] == [0.02] * 4

    asyncio.run(work())


def test_replies_are_played_in_order_with_silence_where_there_is_nothing(monkeypatch):
    async def work() -> None:
        Clock(monkeypatch, asyncio.get_running_loop())
        log, first, second = Log(), response(), response()
        assert await log.frames(2) == [bytes(SIZE)] * 2
        log.speaker.push(first, b"\1" * (SIZE + 100))
        log.speaker.push(second, b"\2" * SIZE)
        # The end of the first is still being made: the second waits.
        assert await log.frames(2) == [b"\1" * SIZE, bytes(SIZE)]
        log.speaker.push(first, b"\1" * 100)
        first.status = "completed"
        assert await log.frames(2) == [(b"\1" * 200).ljust(SIZE, b"\0"), b"\2" * SIZE]
        assert log.told == [("started", first), ("stopped", first), ("started", second)]
        assert log.speaker.playing
        second.status = "completed"
        assert await log.frames(1) == [bytes(SIZE)]
        assert log.told[3:] == [("stopped", second)]
        assert not log.speaker.playing

    asyncio.run(work())


def test_what_was_played_is_counted_in_frames_that_were_sent(monkeypatch):
    async def work() -> None:
        Clock(monkeypatch, asyncio.get_running_loop())
        log, first, second = Log(), response(), response()
        log.speaker.push(first, b"\1" * (10 * SIZE))
        log.speaker.push(second, b"\2" * (10 * SIZE))
        await log.frames(3)
        assert log.speaker.clear() == [(first, 60.0), (second, 0.0)]
        assert await log.frames(1) == [bytes(SIZE)]
        assert log.speaker.clear() == []

    asyncio.run(work())


def test_names_that_only_a_local_network_resolves_are_left_out():
    host = "a=candidate:1 1 udp 2122260223 192.0.2.7 50000 typ host"
    hidden = "a=candidate:2 1 udp 2122260223 3f0e-77.local 50001 typ host generation 0"
    lines = ["v=0", host, hidden, "a=end-of-candidates", "a=mid:0"]
    found = without_local_names("\r\n".join(lines) + "\r\n")
    assert found == "\r\n".join(["v=0", host, "a=mid:0"]) + "\r\n"
    many = "\r\n".join(["v=0"] + [host] * 100)
    assert without_local_names(many).count("a=candidate") == 32


class Track:
    """Frames of 20 ms at given times, then nothing."""

    def __init__(self, starts: list[int]) -> None:
        self._starts = starts

    async def recv(self) -> AudioFrame:
        if not self._starts:
            await asyncio.Event().wait()
        frame = AudioFrame.from_ndarray(np.ones((1, 1920), np.int16), "s16", "stereo")
        frame.sample_rate, frame.pts = 48_000, self._starts.pop(0)
        return frame


def taken(monkeypatch: Any, starts: list[int], quiet: int = 0) -> list[bytes]:
    """What a call takes from a track, until silence took the place of packets so many times."""
    parts = list[bytes]()

    async def work() -> None:
        call: Any = object.__new__(peers.Call)
        enough = asyncio.Event()

        def hear(data: bytes) -> None:
            parts.append(data)
            if sum(not any(part) for part in parts) >= quiet and not track._starts:
                enough.set()

        call._hear, track = hear, Track(starts)
        task = asyncio.create_task(call._take(track))
        await enough.wait()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())
    return parts


def test_missing_packets_are_silence(monkeypatch):
    # 20 ms are missing after the second, and then far more than is filled.
    parts = taken(monkeypatch, [0, 960, 2880, 480_000], quiet=2)
    assert [len(part) // 4 for part in parts] == [960, 960, 960, 960, 9600, 960]
    assert [any(part) for part in parts] == [True, True, False, True, False, True]


def test_a_caller_that_goes_quiet_is_heard_as_silence(monkeypatch):
    monkeypatch.setattr(peers, "GAP", 0.02)
    parts = taken(monkeypatch, [0], quiet=3)
    assert [any(part) for part in parts[:4]] == [True, False, False, False]
    assert len(parts[1]) == 960 * 4


def test_audio_that_nobody_listens_to_is_bounded(monkeypatch):
    call: Any = object.__new__(peers.Call)
    call._heard, call._heard_bytes = peers.deque(), 0
    call._sound = SimpleNamespace(set=lambda: None)
    monkeypatch.setattr(peers, "BEHIND", 10)
    for i in range(5):
        call._hear(bytes([i]) * 4)
    assert list(call._heard) == [b"\3" * 4, b"\4" * 4]
    assert call._heard_bytes == 8


def test_items_that_wait_are_known():
    log, first = Log(), response()
    assert log.speaker.items == []
    log.speaker.push(first, bytes(10))
    assert [type(item) for item in log.speaker.items] == [Item]
