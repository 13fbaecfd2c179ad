"""A caller over WebRTC, for tests: aiortc with a microphone that says what it is given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import Any

import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from av import AudioFrame, AudioResampler
from servers import Answer, Running

RATE, FRAME = 24_000, 480
SDP = {"Content-Type": "application/sdp"}


class Microphone(MediaStreamTrack):
    """Silence, and what `say` is given, in real time."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._unsaid, self._frames, self._begun = b"", 0, 0.0

    def say(self, pcm: bytes) -> None:
        self._unsaid += pcm

    async def recv(self) -> AudioFrame:
        loop = asyncio.get_running_loop()
        self._begun = self._begun or loop.time()
        await asyncio.sleep(max(0.0, self._begun + self._frames * 0.02 - loop.time()))
        data, self._unsaid = self._unsaid[: 2 * FRAME], self._unsaid[2 * FRAME :]
        frame = AudioFrame(format="s16", layout="mono", samples=FRAME)
        frame.planes[0].update(data.ljust(2 * FRAME, b"\0"))
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        frame.pts = self._frames * FRAME
        self._frames += 1
        return frame


class Caller:
    """One call.

    Attributes:
        events: What came over the data channel.
        heard: 16-bit samples at 24 kHz, mono, in parts.
    """

    def __init__(self, server: Running, channel: str = "oai-events") -> None:
        self._server = server
        # Without a list aiortc would ask a public server.
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.microphone = Microphone()
        self.peer.addTrack(self.microphone)
        self.channel = self.peer.createDataChannel(channel)
        self.channel.on("message", self._arrived)
        self.channel.on("open", lambda: self._news.set())
        self.peer.on("track", self._hear)
        self.events, self.heard = list[dict[str, Any]](), list[np.ndarray]()
        self._news, self._listening = asyncio.Event(), list[asyncio.Task[None]]()
        self.location = ""

    async def offer(self) -> str:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return self.peer.localDescription.sdp

    async def call(self, body: bytes | None = None, **headers: str) -> Answer:
        """Calls; returns the server's answer, which is followed where it is one."""
        offer = body or (await self.offer()).encode()
        sent = SDP | {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await asyncio.to_thread(
            self._server.ask, "POST", "/v1/realtime/calls", offer, sent
        )
        if answer.status == 201:
            await self.follow(answer)
        return answer

    async def follow(self, answer: Answer) -> None:
        self.location = answer.headers["Location"]
        description = RTCSessionDescription(answer.body.decode(), "answer")
        await self.peer.setRemoteDescription(description)

    def _arrived(self, message: str) -> None:
        self.events.append(json.loads(message))
        self._news.set()

    def _hear(self, track: MediaStreamTrack) -> None:
        async def listen() -> None:
            resampler = AudioResampler("s16", "mono", RATE)
            while True:
                for frame in resampler.resample(await track.recv()):
                    self.heard.append(frame.to_ndarray()[0])

        self._listening.append(asyncio.ensure_future(listen()))

    def send(self, type: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": type, **fields}))

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    async def until(self, kind: str, count: int = 1, seconds: float = 60) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while len(self.all(kind)) < count:
                self._news.clear()
                await self._news.wait()
        return self.all(kind)[count - 1]

    async def closed(self, seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while self.channel.readyState != "closed":
                await asyncio.sleep(0.02)

    def waveform(self) -> np.ndarray:
        """float32 of what was heard."""
        return np.concatenate([np.zeros(0, np.int16), *self.heard]).astype(np.float32) / 32768

    async def leave(self) -> None:
        for task in self._listening:
            task.cancel()
        await self.peer.close()


@asynccontextmanager
async def caller(server: Running, **headers: str) -> AsyncIterator[Caller]:
    """A call that is connected, with its session."""
    found = Caller(server)
    try:
        answer = await found.call(**headers)
        assert answer.status == 201, answer.body
        await found.until("session.created")
        yield found
    finally:
        await found.leave()
