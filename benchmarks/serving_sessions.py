"""Realtime sessions that wear a server out: turns, interruptions, wrong events, and their ends."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks.serving_clients import PATIENCE, PCM_S, RATE, TEXTS, Sounds, Tally


class Session:
    """A realtime session at the pace of the machine: audio is sent as fast as it is taken."""

    def __init__(self, socket: ClientConnection, rng: random.Random, tally: Tally) -> None:
        self._socket, self._rng, self._tally = socket, rng, tally
        self._seen = Counter[str]()
        self._news = asyncio.Condition()
        self._ids = Counter[str]()
        self._last: str | None = None
        self._expected: set[str] = set()

    async def send(self, type: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": type} | fields))

    async def speak(self, pcm: bytes, silence: float = 0.0) -> None:
        """Audio in pieces of a tenth of a second."""
        pcm += bytes(round(silence * RATE) * 2)
        self._tally.talk += len(pcm) / PCM_S
        for i in range(0, len(pcm), PCM_S // 10):
            audio = base64.b64encode(pcm[i : i + PCM_S // 10]).decode()
            await self.send("input_audio_buffer.append", audio=audio)

    async def until(self, true: Callable[[Counter[str]], bool]) -> None:
        """Waits until events have been seen; what `true` gets counts them by their types."""
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: true(self._seen))

    def mark(self) -> Counter[str]:
        return self._seen.copy()

    async def read(self) -> None:
        try:
            async for message in self._socket:
                self._note(json.loads(message))
                async with self._news:
                    self._news.notify_all()
        except ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd is not None else None
            if code is not None:
                self._tally.problems[f"session closed: {code}"] += 1

    def _note(self, event: dict[str, Any]) -> None:
        type = event["type"]
        self._seen[type] += 1
        self._ids[event["event_id"]] += 1
        if self._ids[event["event_id"]] > 1:
            self._tally.problems["an event_id twice"] += 1
        if type == "response.output_audio.delta":
            self._tally.talk += len(event["delta"]) * 3 / 4 / PCM_S
            self._last = event["item_id"]
        elif type == "response.done":
            status = event["response"]["status"]
            self._tally.events[f"reply {status}"] += 1
            if status == "failed":
                self._tally.problems["reply failed"] += 1
        elif type == "error":
            code = event["error"]["code"]
            self._tally.events[f"error {code}"] += 1
            if code not in self._expected:
                self._tally.problems[f"error event {code}"] += 1

    def _answered(self, before: Counter[str], replies: int = 1) -> Callable[[Counter[str]], bool]:
        """Whether so many replies have begun since, and none is in progress."""

        def over(seen: Counter[str]) -> bool:
            begun, ended = seen["response.created"], seen["response.done"]
            return begun == ended and ended - before["response.done"] >= replies

        return over

    async def _heard(self, before: Counter[str]) -> None:
        type = "input_audio_buffer.speech_stopped"
        await self.until(lambda seen: seen[type] > before[type])

    # What a session does

    async def spoken(self, sounds: Sounds) -> None:
        before = self.mark()
        await self.speak(self._rng.choice(sounds), 1.0)
        await self._heard(before)
        await self.until(self._answered(before))

    async def interrupted(self, sounds: Sounds) -> None:
        before = self.mark()
        await self._ask_in_text()
        await self.until(lambda seen: seen["response.created"] > before["response.created"])
        if self._rng.random() < 0.7:
            delta = "response.output_audio.delta"
            await self.until(
                lambda seen: seen[delta] > before[delta] or self._answered(before)(seen)
            )
        await self.speak(self._rng.choice(sounds), 1.0)
        await self._heard(before)
        await self.until(self._answered(before, 2))

    async def typed(self, sounds: Sounds) -> None:
        before = self.mark()
        await self._ask_in_text()
        await self.until(self._answered(before))

    async def by_hand(self, sounds: Sounds) -> None:
        await self._detect(None)
        before = self.mark()
        await self.speak(self._rng.choice(sounds))
        await self.send("input_audio_buffer.commit")
        await self.send("response.create")
        await self.until(self._answered(before))
        await self._detect({"type": "server_vad", "silence_duration_ms": 400})

    async def cancelled(self, sounds: Sounds) -> None:
        self._expected |= {"response_cancel_not_active"}
        before = self.mark()
        await self._ask_in_text()
        await asyncio.sleep(self._rng.random() * 0.2)
        await self.send("response.cancel")
        await self.until(self._answered(before))

    async def cut(self, sounds: Sounds) -> None:
        """A reply is truncated, maybe while it is made."""
        self._expected |= {"item_truncate_invalid_item_id", "item_truncate_invalid"}
        before, type = self.mark(), "conversation.item.truncated"
        await self._ask_in_text()
        delta = "response.output_audio.delta"
        await self.until(lambda seen: seen[delta] > before[delta] or self._answered(before)(seen))
        at = self._rng.randrange(800)
        where = {"item_id": self._last or "none", "content_index": 0, "audio_end_ms": at}
        await self.send("conversation.item.truncate", **where)
        await self.until(lambda seen: seen[type] + seen["error"] > before[type] + before["error"])
        await self.until(self._answered(before))

    async def beside(self, sounds: Sounds) -> None:
        before = self.mark()
        said: dict[str, Any] = {"type": "message", "role": "user"}
        said["content"] = [{"type": "input_text", "text": self._rng.choice(TEXTS)}]
        options = {"conversation": "none", "input": [said], "output_modalities": ["text"]}
        await self.send("response.create", response=options)
        await self.until(self._answered(before))

    async def wrong(self, sounds: Sounds) -> None:
        self._expected |= {
            *("invalid_value", "invalid_type", "invalid_json", "invalid_base64"),
            *("missing_required_parameter", "unknown_parameter", "item_retrieve_invalid_item_id"),
            *("input_audio_buffer_commit_empty", "item_delete_invalid_item_id"),
        }
        before = self.mark()
        for sent in self._rng.sample(WRONG_EVENTS, 3):
            await self._socket.send(sent)
        await self.until(lambda seen: seen["error"] - before["error"] >= 3)

    async def _ask_in_text(self) -> None:
        said: dict[str, Any] = {"type": "message", "role": "user"}
        said["content"] = [{"type": "input_text", "text": self._rng.choice(TEXTS)}]
        await self.send("conversation.item.create", item=said)
        await self.send("response.create")

    async def _detect(self, detection: dict[str, Any] | None) -> None:
        before, type = self.mark(), "session.updated"
        heard = {"input": {"turn_detection": detection}}
        await self.send("session.update", session={"type": "realtime", "audio": heard})
        await self.until(lambda seen: seen[type] > before[type])


WRONG_EVENTS: tuple[str | bytes, ...] = (
    "{",
    "[]",
    "5",
    b"\0\1",
    '{"type": "nothing"}',
    '{"type": ["session.update"]}',
    '{"type": "input_audio_buffer.append", "audio": "!"}',
    '{"type": "input_audio_buffer.append", "audio": 5}',
    '{"type": "session.update"}',
    '{"type": "session.update", "session": {"type": "realtime", "max_output_tokens": NaN}}',
    '{"type": "conversation.item.retrieve", "item_id": "none"}',
    '{"type": "conversation.item.delete", "item_id": "none"}',
    '{"type": "response.create", "response": {"max_output_tokens": -1}}',
)

ACTIONS: dict[str, tuple[int, Callable[[Session, Sounds], Any]]] = {
    "spoken": (40, Session.spoken),
    "interrupted": (15, Session.interrupted),
    "typed": (8, Session.typed),
    "by hand": (10, Session.by_hand),
    "cancelled": (8, Session.cancelled),
    "cut": (8, Session.cut),
    "beside": (5, Session.beside),
    "wrong": (6, Session.wrong),
}
"""What a session does -> how often in percent, and how."""

VANISHING = 0.3
"""Share of the sessions whose client vanishes in the middle of something."""


async def one_session(url: str, rng: random.Random, sounds: Sounds, tally: Tally) -> None:
    """Some turns; then a clean close, or a client that vanishes in the middle."""
    turns = rng.choices(
        [*ACTIONS], [weight for weight, _ in ACTIONS.values()], k=rng.randrange(1, 9)
    )
    vanishes = rng.random() < VANISHING
    try:
        async with _connected(url) as socket:
            session = Session(socket, rng, tally)
            reading = asyncio.ensure_future(session.read())
            try:
                await session.until(lambda seen: seen["session.created"] == 1)
                for i, turn in enumerate(turns):
                    tally.events[turn] += 1
                    doing = asyncio.ensure_future(ACTIONS[turn][1](session, sounds))
                    if vanishes and i == len(turns) - 1:
                        await asyncio.wait({doing}, timeout=rng.random())
                        doing.cancel()
                        tally.events["vanished"] += 1
                        socket.transport.abort()
                        await asyncio.wait({doing})
                        return
                    await doing
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
        tally.events["closed"] += 1
    except InvalidStatus as refused:
        tally.problems[f"session refused: {refused.response.status_code}"] += 1
    except (OSError, ConnectionClosed) as error:
        tally.problems[f"session: {type(error).__name__}"] += 1
    except TimeoutError:
        tally.problems[f"session: nothing came for {PATIENCE:.0f} s"] += 1


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[ClientConnection]:
    where = url.replace("http", "ws", 1) + "/v1/realtime"
    async with connect(where, compression=None, ping_interval=None, close_timeout=5) as socket:
        yield socket
