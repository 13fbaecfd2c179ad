"""Clients of a server that is being worn out: requests of all kinds, sessions, and their ends.

They use sockets and WebSockets as they are, so that they can leave in the middle of anything.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

RATE = 24_000
PCM_S = 2 * RATE
"""Bytes of a second of audio."""

PATIENCE = 120.0
"""Seconds after which an answer that does not come is a problem; a busy machine is slow."""

LEFT = (0, None)
"""What a client that left in the middle got."""

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
TEXTS = (
    "good morning",
    "what is three plus four",
    "what is the capital of france",
    "one two three four five six seven eight nine ten",
)

Outcome = tuple[int, str | None]
"""Status and the error's code; 101 and an event's code in sessions."""


@dataclass
class Tally:
    """What came of everything.

    Attributes:
        outcomes: Of each kind of request, how often which status and code.
        events: Of the sessions: turns, replies, errors.
        problems: What should not have happened.
        talk: Seconds of speech that sessions sent and were sent.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    talk: float = 0.0

    def answered(self, kind: str, got: Outcome, expected: frozenset[Outcome]) -> None:
        name = "left" if got == LEFT else " ".join(str(part) for part in got if part is not None)
        self.outcomes.setdefault(kind, Counter())[name] += 1
        if got not in expected:
            self.problems[f"{kind}: {name}"] += 1


@dataclass(frozen=True)
class Request:
    """A request and what may come of it."""

    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "POST"
    expected: frozenset[Outcome] = frozenset({(200, None)})
    least: int = 1


def form(fields: dict[str, str], file: bytes, name: str = "speech.wav") -> Request:
    """A transcription as a browser's form."""
    parts = [
        f'--part\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
    ]
    head = f'--part\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    body = b"".join([*parts, head.encode(), file, b"\r\n--part--\r\n"])
    kind = ("Content-Type", "multipart/form-data; boundary=part")
    return Request("/v1/audio/transcriptions", body, (kind,))


def posted(path: str, content: Any, least: int = 1) -> Request:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Request(path, body, (("Content-Type", "application/json"),), least=least)


def wav_file(pcm: bytes) -> bytes:
    size = len(pcm).to_bytes(4, "little")
    head = b"RIFF" + (len(pcm) + 36).to_bytes(4, "little") + b"WAVEfmt "
    head += (16).to_bytes(4, "little") + b"\1\0\1\0" + RATE.to_bytes(4, "little")
    return head + PCM_S.to_bytes(4, "little") + b"\2\0\x10\0data" + size + pcm


Sounds = list[bytes]
"""Recordings of somebody who speaks, 16-bit PCM."""


def _speech(rng: random.Random, sounds: Sounds) -> Request:
    format = rng.choice(FORMATS)
    content = {"model": "tts-1", "voice": "alloy", "input": rng.choice(TEXTS)}
    return posted("/v1/audio/speech", content | {"response_format": format}, least=500)


def _speech_events(rng: random.Random, sounds: Sounds) -> Request:
    content = {"model": "tts-1", "voice": "verse", "input": rng.choice(TEXTS)}
    options = {"response_format": "pcm", "stream_format": "sse"}
    return posted("/v1/audio/speech", content | options, least=500)


def _transcription(rng: random.Random, sounds: Sounds) -> Request:
    format = rng.choice(("json", "text", "verbose_json", "srt", "vtt"))
    fields = {"model": "whisper-1", "response_format": format}
    return form(fields, wav_file(rng.choice(sounds)))


def _transcript_events(rng: random.Random, sounds: Sounds) -> Request:
    return form({"model": "whisper-1", "stream": "true"}, wav_file(rng.choice(sounds)))


def _chat(rng: random.Random, sounds: Sounds) -> Request:
    said: Any = rng.choice(TEXTS)
    if rng.random() < 0.5:
        data = base64.b64encode(wav_file(rng.choice(sounds))).decode()
        said = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]
    content: dict[str, Any] = {
        "model": "gpt-audio",
        "messages": [{"role": "user", "content": said}],
    }
    if rng.random() < 0.5:
        content |= {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
        content["stream"] = True
    return posted("/v1/chat/completions", content)


def _models(rng: random.Random, sounds: Sounds) -> Request:
    paths = ("/v1/models", "/v1/audio/voices", "/health", "/ready", "/metrics", "/api/ps", "/")
    return Request(rng.choice(paths), method="GET")


def _wrong(rng: random.Random, sounds: Sounds) -> Request:
    request, expected = rng.choice(_wrong_ones(rng))
    return Request(request.path, request.body, request.headers, request.method, frozenset(expected))


def _wrong_ones(rng: random.Random) -> list[tuple[Request, set[Outcome]]]:
    """Requests that are refused, each with the answers that it may have."""
    speech, chat = "/v1/audio/speech", "/v1/chat/completions"
    good = {"model": "tts-1", "voice": "alloy", "input": "good morning"}
    bad: set[Outcome] = {
        (400, code)
        for code in (
            *("invalid_json", "invalid_type", "invalid_value", "missing_required_parameter"),
            *("string_above_max_length", "unsupported_value", "unknown_parameter", "missing_field"),
            *("invalid_audio", "invalid_request", "empty_string", "invalid_base64"),
            *("invalid_voice", "voice_not_found", "unsupported_format", None),
        )
    }
    noise = rng.randbytes(2000)
    gzip = (("Content-Encoding", "gzip"), ("Content-Type", "application/json"))
    return [
        (posted(speech, b"{"), bad),
        (posted(speech, b"[" * 50_000), bad),
        (posted(speech, b'{"input": "\xff\xfe"}'), bad),
        (posted(speech, b"[]"), bad),
        (posted(speech, good | {"input": 5}), bad),
        (posted(speech, good | {"input": "a" * 20_000}), bad),
        (posted(speech, good | {"voice": "nobody"}), bad | {(404, "voice_not_found")}),
        (posted(speech, good | {"response_format": "exe"}), bad),
        (posted(speech, good | {"model": "gpt-17"}), {(404, "model_not_found")}),
        (posted(chat, {"model": "gpt-audio", "messages": "hello"}), bad),
        (posted(chat, {"model": "gpt-audio", "messages": []}), bad),
        (form({"model": "whisper-1"}, noise), bad),
        (form({"model": "whisper-1"}, b""), bad),
        (form({"model": "whisper-1", "response_format": "exe"}, noise), bad),
        (Request("/v1/nothing", b"{}"), {(404, "not_found")}),
        (Request(speech, None, method="GET"), {(405, "method_not_allowed")}),
        (Request(speech, b"x" * 100, gzip), {(415, "unsupported_encoding")}),
        (
            Request("/v1/models", None, (("Host", "evil.example"),), "GET"),
            {(421, "host_not_allowed")},
        ),
        (
            Request("/v1/models", None, (("Origin", "http://evil.example"),), "GET"),
            {(403, "origin_not_allowed")},
        ),
        (Request("/v1/models/gpt-17", None, method="GET"), {(404, "model_not_found")}),
    ]


KINDS: dict[str, tuple[int, Callable[[random.Random, Sounds], Request]]] = {
    "speech": (30, _speech),
    "speech as events": (4, _speech_events),
    "transcription": (14, _transcription),
    "transcription as events": (4, _transcript_events),
    "chat": (12, _chat),
    "models and such": (18, _models),
    "wrong": (18, _wrong),
}
"""Kind of request -> its share in percent, and how one is made."""

LEAVING = 0.1
"""Share of the requests whose client leaves in the middle."""


class Connection:
    """An HTTP/1.1 connection that is kept, and made anew where it ended."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self, request: Request, leaves: Callable[[int], bool] | None = None
    ) -> tuple[Outcome, bytes]:
        """The outcome and the body; `leaves(bytes so far)` says whether to hang up there."""
        if self._reader is not None and self._reader.at_eof():
            # The server has ended it: nothing was asked for a while.
            self.hang_up()
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        assert self._reader is not None
        named = dict(request.headers)
        lines = [
            f"{request.method} {request.path} HTTP/1.1",
            f"Host: {named.pop('Host', 'localhost')}",
        ]
        lines += [f"{name}: {value}" for name, value in named.items()]
        if request.body is not None:
            lines.append(f"Content-Length: {len(request.body)}")
        self._writer.write("\r\n".join([*lines, "", ""]).encode())
        body = request.body or b""
        if leaves is not None and leaves(-len(body)):
            self._writer.write(body[: len(body) // 2])
            self.hang_up()
            return LEFT, b""
        self._writer.write(body)
        await self._writer.drain()
        status, headers = await self._head(self._reader)
        got = bytearray()
        async for part in self._parts(self._reader, headers):
            got += part
            if leaves is not None and leaves(len(got)):
                self.hang_up()
                return LEFT, bytes(got)
        if headers.get("connection") == "close":
            self.hang_up()
        return (status, _code(status, bytes(got))), bytes(got)

    async def _head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":")[::2] for line in head[1:] if line)
        return int(head[0].split()[1]), {name.lower(): value.strip() for name, value in pairs}

    async def _parts(
        self, reader: asyncio.StreamReader, headers: dict[str, str]
    ) -> AsyncIterator[bytes]:
        if "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await reader.readline(), 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)

    def hang_up(self) -> None:
        """Ends the connection without a word to the server."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._writer = None


def _code(status: int, body: bytes) -> str | None:
    """The error's code; "no error object" where an error has none."""
    if status < 400:
        return None
    try:
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
    except (ValueError, LookupError, TypeError, AssertionError):
        return "no error object"
    return None if error["code"] is None else str(error["code"])


async def one_request(
    connection: Connection,
    rng: random.Random,
    sounds: Sounds,
    tally: Tally,
    kind: str | None = None,
) -> None:
    """A request, of a kind that chance takes unless it is given, read to its end or left."""
    kind = kind or rng.choices([*KINDS], [weight for weight, _ in KINDS.values()])[0]
    request = KINDS[kind][1](rng, sounds)
    leaves = None
    if rng.random() < LEAVING:
        # While it sends, or once it has got some of the answer.
        after = rng.choice((None, 0, 1000, 20_000))

        def leaves(got: int) -> bool:
            return got <= 0 if after is None else got > after

    try:
        async with asyncio.timeout(PATIENCE):
            got, body = await connection.ask(request, leaves)
    except (OSError, EOFError, ValueError, IndexError) as error:
        connection.hang_up()
        # A refusal may come while the rest of the request is on its way.
        tally.answered(kind, (0, type(error).__name__), request.expected)
        return
    tally.answered(kind, got, request.expected | {LEFT} if leaves else request.expected)
    if got[0] == 200 and len(body) < request.least:
        tally.problems[f"{kind}: {len(body)} bytes only"] += 1


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
        said = {"type": "message", "role": "user"}
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
        said = {"type": "message", "role": "user"}
        said["content"] = [{"type": "input_text", "text": self._rng.choice(TEXTS)}]
        await self.send("conversation.item.create", item=said)
        await self.send("response.create")

    async def _detect(self, detection: dict[str, Any] | None) -> None:
        before, type = self.mark(), "session.updated"
        heard = {"input": {"turn_detection": detection}}
        await self.send("session.update", session={"type": "realtime", "audio": heard})
        await self.until(lambda seen: seen[type] > before[type])


WRONG_EVENTS = (
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
