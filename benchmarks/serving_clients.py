"""Clients of a server that is being worn out: requests of all kinds, right, wrong, or left.

They use sockets as they are, so that they can leave in the middle of anything. Realtime sessions
are in `serving_sessions.py`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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
        body = request.body or b""
        if leaves is not None and leaves(-len(body)):
            await self._ask(request, body[: len(body) // 2])
            self.hang_up()
            return LEFT, b""
        outcome, got = LEFT[0], bytearray()
        async for status, part in self.parts(request):
            outcome, got = status, got + part
            if leaves is not None and part and leaves(len(got)):
                self.hang_up()
                return LEFT, bytes(got)
        return (outcome, _code(outcome, bytes(got))), bytes(got)

    async def parts(self, request: Request) -> AsyncIterator[tuple[int, bytes]]:
        """The status and each part of the body as it comes; at first an empty one."""
        reader = await self._ask(request, request.body or b"")
        assert self._writer is not None
        await self._writer.drain()
        status, headers = await self._head(reader)
        yield status, b""
        async for part in self._parts(reader, headers):
            yield status, part
        if headers.get("connection") == "close":
            self.hang_up()

    async def _ask(self, request: Request, body: bytes) -> asyncio.StreamReader:
        """Writes the head of a request and so much of its body."""
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
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        return self._reader

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


def _leaving(rng: random.Random) -> Callable[[int], bool]:
    """When to hang up: while the request is sent, or once some of the answer has come."""
    after = rng.choice((None, 0, 1000, 20_000))
    return lambda got: got <= 0 if after is None else got > after


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
    leaves = _leaving(rng) if rng.random() < LEAVING else None
    try:
        async with asyncio.timeout(PATIENCE):
            got, body = await connection.ask(request, leaves)
    except (OSError, EOFError, ValueError, IndexError) as error:
        connection.hang_up()
        tally.answered(kind, (0, type(error).__name__), request.expected)
        return
    expected = request.expected if leaves is None else request.expected | {LEFT}
    tally.answered(kind, got, expected)
    if got[0] == 200 and len(body) < request.least:
        tally.problems[f"{kind}: {len(body)} bytes only"] += 1
