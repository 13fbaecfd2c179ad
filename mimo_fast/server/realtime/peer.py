"""WebRTC calls by aiortc: the dialect's events over a data channel, audio over tracks.

    track -> Opus decoded in a thread -> Hearing     Speaker -> encoded in a thread -> track
    channel `oai-events` -> Client.handle            Outbox -> channel

A call holds a place for sessions until it ends: hung up, closed or lost by the caller, never
connected, or the server stops.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.exceptions import InvalidStateError
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack

from mimo_fast.server.checks import Json
from mimo_fast.server.client_secrets import ClientSecret
from mimo_fast.server.errors import ApiError
from mimo_fast.server.limits import CALM, STILL
from mimo_fast.server.logs import log, log_failure
from mimo_fast.server.realtime.config import Kind
from mimo_fast.server.realtime.items import new_id
from mimo_fast.server.realtime.offers import CHANNEL, OPUS, check_offer, without_local_names
from mimo_fast.server.realtime.openai import Client
from mimo_fast.server.realtime.responses import Manner, Response
from mimo_fast.server.realtime.sound import PCM, Format
from mimo_fast.server.realtime.speaker import Speaker

TRACK = Format("audio/opus", 48_000, 4, channels=2)
"""Opus as aiortc decodes it."""

GATHER = 10.0
"""Seconds that finding this machine's addresses may take: ICE servers are asked for theirs."""

CONNECT = 20.0
"""Seconds from the answer until a call must have connected and opened its data channel."""

STALL = 60.0
"""Seconds for which a caller may read nothing."""

GAP = 0.2
"""Seconds without audio after which silence takes its place, so that a turn ends where a caller's
packets do; and the longest gap between packets that is filled."""

BEHIND = 10 * TRACK.rate * TRACK.width
"""Bytes of audio that may wait to be listened to; the oldest go."""

MOST_BUFFERED = 2**18
"""Bytes of events that aiortc may hold; then they wait, and replies with them."""

MOST_EVENTS, MOST_EVENT_BYTES = 256, 4 * 2**20
"""Events of a caller that may wait: the channel has no flow control, so more of them end a call."""

MOST_CHANNELS = 4


class Talk(Client):
    """The session of a call: as `Client`, but that the server plays its replies itself."""

    def __init__(
        self, state: Any, kind: Kind, sessions: list[Json], model: str | None = None
    ) -> None:
        super().__init__(state, kind, sessions, model)
        self.speaker = Speaker(PCM.rate, self._started, self._stopped)
        del self.handlers["input_audio_buffer.append"]
        if kind == "realtime":
            self.handlers["output_audio_buffer.clear"] = self._clear_output

    @property
    def heard_format(self) -> Format:
        return TRACK

    def manner(self, response: Json | None = None) -> Manner:
        # What the session says of formats is for wires that carry bytes.
        return replace(super().manner(response), format=PCM)

    def play(self, response: Response, audio: bytes) -> None:
        self.speaker.push(response, audio)

    def silence(self) -> list[tuple[Response, float]]:
        cut = self._drop()
        for response, ms in cut:
            if response.begun and not response.aside:
                fields = {"item_id": response.item.id, "content_index": 0}
                self.put("conversation.item.truncated", **fields, audio_end_ms=round(ms))
        return cut

    def _drop(self) -> list[tuple[Response, float]]:
        cut = self.speaker.clear()
        for response, ms in cut:
            if ms:
                self.put("output_audio_buffer.cleared", response_id=response.id)
        return cut

    async def _clear_output(self, event: Json) -> None:
        cut = self.silence()
        for response, _ in cut:
            if not response.ended:
                self.dialogue.cancel(response.id)
        self.dialogue.forget_unheard(cut)

    async def _truncate(self, event: Json) -> None:
        await super()._truncate(event)
        if any(item.id == event["item_id"] for item in self.speaker.items):
            self._drop()

    def _started(self, response: Response) -> None:
        self.put("output_audio_buffer.started", response_id=response.id)

    def _stopped(self, response: Response) -> None:
        self.put("output_audio_buffer.stopped", response_id=response.id)


class Call:
    """One call.

    Args:
        state: of the application.
        sessions: updates of the session's settings.
        secret: by which it was made; None for the server's key.
        model: its name; None for the application's own.
    """

    def __init__(
        self,
        state: Any,
        kind: Kind,
        sessions: list[Json],
        secret: ClientSecret | None,
        model: str | None = None,
    ) -> None:
        self._state, self._kind, self._sessions, self.secret = state, kind, sessions, secret
        self._model = model
        self.id = new_id("rtc")
        self._answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._over, self._reason = asyncio.Event(), ""
        self._tasks = list[asyncio.Task[None]]()
        self._inbox, self._inbox_bytes, self._mail = deque[Any](), 0, asyncio.Event()
        self._heard, self._heard_bytes, self._sound = deque[bytes](), 0, asyncio.Event()
        self._channel: RTCDataChannel | None = None
        self._channels, self._sent = 0, monotonic()

    async def answer(self, offer: str) -> str:
        """The answer to an offer, in SDP; the call goes on by itself.

        Raises:
            ApiError: the offer or a setting is wrong, or the server is full.
        """
        check_offer(offer)
        self._task = asyncio.create_task(self._run(offer))
        try:
            return await asyncio.shield(self._answered)
        except asyncio.CancelledError:
            self._end("the caller left")
            raise

    async def hang_up(self) -> None:
        """Ends the call; returns when nothing of it is left."""
        self._end("hung up")
        await asyncio.wait([self._task])

    @property
    def calm(self) -> bool:
        """Whether nothing has been sent or played for a moment."""
        works = self._state.service.worker.streams > 0
        playing = self._talk.speaker.playing
        return not playing and monotonic() - self._sent > (STILL if works else CALM)

    async def stop(self) -> None:
        """Ends it as the server stops."""
        self._end("the server is stopping")
        await asyncio.wait([self._task])

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._over.set()

    async def _run(self, offer: str) -> None:
        try:
            async with self._state.sessions.place(), self._state.keeper.used():
                self._talk = Talk(self._state, self._kind, self._sessions, self._model)
                await self._hold(offer)
        except Exception as error:
            if self._answered.done():
                log_failure(error, call=self.id)
            else:
                self._answered.set_exception(error)
                # Nobody may be left to see it.
                self._answered.exception()
        finally:
            self._answered.cancel()

    async def _hold(self, offer: str) -> None:
        """Answers, and returns when the call is over and nothing of it is left."""
        servers = [RTCIceServer(**each) for each in self._state.settings.ice_servers]
        # Without a list aiortc would ask a public server.
        self._peer = peer = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        begun = monotonic()
        timer: asyncio.TimerHandle | None = None
        self._state.calls[self.id] = self
        self._state.live.add(self)
        try:
            answer = await self._negotiate(offer)
            if not self._answered.done():
                self._answered.set_result(answer)
            timer = asyncio.get_running_loop().call_later(CONNECT, self._check_connected)
            await self._over.wait()
        finally:
            if timer is not None:
                timer.cancel()
            self._state.calls.pop(self.id, None)
            await asyncio.shield(self._close(peer))
            self._state.live.discard(self)
            seconds = round(monotonic() - begun, 3)
            session = self._talk.config.id
            log("call", call=self.id, session=session, seconds=seconds, ended=self._reason)

    async def _negotiate(self, offer: str) -> str:
        peer = self._peer
        peer.on("connectionstatechange", self._state_changed)
        peer.on("datachannel", self._channel_opened)
        peer.on("track", self._track_found)
        description = RTCSessionDescription(without_local_names(offer), "offer")
        try:
            async with asyncio.timeout(GATHER):
                peer.addTransceiver(self._talk.speaker).setCodecPreferences(OPUS)
                await peer.setRemoteDescription(description)
                await peer.setLocalDescription(await peer.createAnswer())
        except TimeoutError:
            problem = "the ICE servers did not answer: see --ice-servers"
            raise ApiError(problem, 504, "ice_servers_silent") from None
        except (ValueError, InvalidStateError) as error:
            problem = f"the offer cannot be answered: {error}"
            raise ApiError(problem[:200], 400, "invalid_sdp", "sdp") from None
        answer: str = peer.localDescription.sdp
        if "a=candidate:" not in answer:
            raise ApiError(
                "this machine has no network address that a call could use: use the WebSocket "
                "/v1/realtime",
                503,
                "no_address",
            )
        return answer

    def _check_connected(self) -> None:
        if self._channel is None or self._peer.connectionState != "connected":
            self._end("never connected")

    async def _close(self, peer: RTCPeerConnection) -> None:
        for task in self._tasks:
            task.cancel()
        await self._talk.close()
        with suppress(Exception):
            async with asyncio.timeout(5):
                await peer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Any) -> None:
        """Something that runs as long as the call; its failure ends it."""

        async def run() -> None:
            try:
                await work
            except (InvalidStateError, MediaStreamError):
                self._end("closed by the caller")
            except Exception as error:
                log_failure(error, call=self.id)
                self._end("an error of the server")

        self._tasks.append(asyncio.create_task(run()))

    # The connection

    def _state_changed(self) -> None:
        state = self._peer.connectionState
        if state == "failed":
            self._end("lost")
        elif state == "closed":
            self._end("closed by the caller")

    def _channel_opened(self, channel: RTCDataChannel) -> None:
        self._channels += 1
        if self._channels > MOST_CHANNELS:
            self._end("too many data channels")
        elif channel.label != CHANNEL or self._channel is not None:
            channel.close()
        else:
            self._channel = channel
            channel.on("message", self._arrived)
            channel.on("close", lambda: self._end("closed by the caller"))
            self._begin(self._write(channel))
            self._begin(self._read())

    def _arrived(self, message: str | bytes) -> None:
        self._inbox.append(message)
        self._inbox_bytes += len(message)
        self._mail.set()
        if len(self._inbox) > MOST_EVENTS or self._inbox_bytes > MOST_EVENT_BYTES:
            self._end("too many events at once")

    async def _read(self) -> None:
        await self._talk.begin()
        while True:
            while self._inbox:
                message = self._inbox.popleft()
                self._inbox_bytes -= len(message)
                await self._talk.ready()
                await self._talk.handle(message if isinstance(message, str) else None)
            self._mail.clear()
            await self._mail.wait()

    async def _write(self, channel: RTCDataChannel) -> None:
        talk, low = self._talk, asyncio.Event()
        channel.bufferedAmountLowThreshold = MOST_BUFFERED // 2
        channel.on("bufferedamountlow", low.set)
        while True:
            while talk.outbox:
                if channel.bufferedAmount > MOST_BUFFERED:
                    low.clear()
                    try:
                        async with asyncio.timeout(STALL):
                            await low.wait()
                    except TimeoutError:
                        self._end("the caller does not read")
                        return
                event = talk.outbox.take()
                try:
                    channel.send(event)
                except ValueError:
                    problem = "an event is larger than the caller takes; retrieve less at once"
                    error = ApiError(problem, code="event_too_large").body()
                    talk.put("error", error=error | {"event_id": None})
                self._sent = monotonic()
                talk.make_room()
            talk.news.clear()
            await talk.news.wait()

    # Audio

    def _track_found(self, track: MediaStreamTrack) -> None:
        self._begin(self._take(track))
        self._begin(self._listen())

    async def _take(self, track: MediaStreamTrack) -> None:
        """Takes audio as it comes, with silence where packets are missing."""
        pending: asyncio.Future[Any] | None = None
        due: int | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(track.recv())
                done, _ = await asyncio.wait([pending], timeout=None if due is None else GAP)
                if not done:
                    assert due is not None
                    due += round(GAP * TRACK.rate)
                    self._hear(bytes(round(GAP * TRACK.rate) * TRACK.width))
                    continue
                frame = pending.result()
                pending = None
                missing = 0 if due is None else min(frame.pts - due, round(GAP * TRACK.rate))
                if missing > 0:
                    self._hear(bytes(missing * TRACK.width))
                samples: np.ndarray[Any, Any] = frame.to_ndarray()
                due = frame.pts + frame.samples
                self._hear(samples.tobytes())
        finally:
            if pending is not None:
                pending.cancel()

    def _hear(self, data: bytes) -> None:
        self._heard.append(data)
        self._heard_bytes += len(data)
        while self._heard_bytes > BEHIND:
            self._heard_bytes -= len(self._heard.popleft())
        self._sound.set()

    async def _listen(self) -> None:
        full = False
        while True:
            await self._sound.wait()
            self._sound.clear()
            data = b"".join(self._heard)
            self._heard.clear()
            self._heard_bytes = 0
            try:
                await self._talk.dialogue.hear(data)
                full = False
            except ApiError as error:
                # Of a turn by hand that is too long: said once, and what follows is not kept.
                if not full:
                    self._talk.put("error", error=error.body() | {"event_id": None})
                full = True
