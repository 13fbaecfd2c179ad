"""What endpoints over HTTP share: bodies of JSON, voices by name, answers that stream."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import HTTPConnection, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mimo_fast.json_files import shown
from mimo_fast.server.checks import Json, needed, refusal
from mimo_fast.server.checks import text as checked_text
from mimo_fast.server.errors import ApiError, as_api_error
from mimo_fast.server.json_values import parse_json

Item = TypeVar("Item")

LARGE = 2**18
"""Bytes of JSON that are parsed beside the event loop."""

SEEDS = 2**63
"""A seed is any number modulo this."""

FIELDS, FIELD = 64, 2**16
"""Fields of a form, and bytes of one, at most."""

SSE = "text/event-stream"


def content_type(request: Request) -> str:
    """What a request's body is, without parameters, in lower case; "" where it does not say."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def usage_of(groups_in: int, groups_out: int) -> dict[str, int]:
    """The `usage` of an answer: groups heard or read, and said."""
    total = groups_in + groups_out
    return {"input_tokens": groups_in, "output_tokens": groups_out, "total_tokens": total}


async def read_json(request: Request) -> Json:
    """The object of a request's body.

    Raises:
        ApiError: it is something else.
    """
    kind = content_type(request)
    if kind != "application/json":
        problem = f"the body is {kind or 'of no type'}; send JSON"
        raise ApiError(f"{problem} with Content-Type: application/json", 415, "unsupported_type")
    body = await request.body()
    if len(body) < LARGE:
        return parse_object(body)
    found: Json = await request.app.state.service.threads.decode(parse_object, body)
    return found


def parse_object(body: bytes | str) -> Json:
    """JSON -> an object, whose numbers are finite.

    Raises:
        ApiError: it is something else.
    """
    try:
        found = parse_json(body)
    except ValueError as error:
        raise ApiError(f"the body cannot be read: {error}", 400, "invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError("the body must be an object of JSON", 400, "invalid_json")
    return found


def said_text(body: Json, name: str, most: int) -> str:
    """A field that holds a text which is more than space."""
    found = checked_text(needed(body, name), name, most)
    if not found.strip():
        raise refusal(f"{name} is empty", name)
    return found


def read_seed(body: Json) -> int | None:
    """The seed of a request: any whole number, of which this many differ; None where it says none.

    OpenAI's chats have one; here everything that draws does.
    """
    if body.get("seed") is None:
        return None
    if isinstance(body["seed"], int) and not isinstance(body["seed"], bool):
        return body["seed"] % SEEDS
    raise refusal(f"seed must be a whole number, not {shown(body['seed'])}", "seed", "invalid_type")


def find_voice(connection: HTTPConnection, value: Any, param: str = "voice") -> Path | None:
    """The recording of the voice that a request names; None for the model's own.

    Raises:
        ApiError: there is no such voice, or the model cannot speak in it.
    """
    state = connection.app.state
    name = value.get("id") if isinstance(value, dict) else value
    voice = state.voices.find("default" if name is None else name)
    if voice is None:
        problem = f"there is no voice {shown(name)}"
        raise refusal(f"{problem}; GET /v1/audio/voices lists those there are", param)
    path: Path | None = voice.path
    state.service.check_voice(path)
    return path


async def begun(items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """The same items; the first is there when this returns.

    So what goes wrong before there is anything to send is answered by a status.
    """
    try:
        first = await anext(items, None)
    except BaseException:
        await items.aclose()
        raise

    async def all_of_them() -> AsyncGenerator[Item, None]:
        try:
            if first is not None:
                yield first
                async for item in items:
                    yield item
        finally:
            await items.aclose()

    return all_of_them()


class Streamed(StreamingResponse):
    """An answer that is sent as it is made.

    Args:
        leave: called when it has ended, however it did: what it was made from is let go of at once,
            although its client has gone and nobody waits.
    """

    def __init__(
        self,
        parts: AsyncIterator[bytes | str],
        media_type: str,
        leave: Callable[[], object],
        headers: dict[str, str] | None = None,
    ) -> None:
        # Proxies that collect an answer would take the streaming out of it.
        more = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"} | (headers or {})
        super().__init__(parts, media_type=media_type, headers=more)
        self._parts, self._leave = parts, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()
            close = getattr(self._parts, "aclose", None)
            if close is not None:
                with suppress(RuntimeError):
                    await close()


def event(data: Json | str) -> str:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n"


async def as_events(
    parts: AsyncGenerator[Json, None],
    report: Callable[[BaseException], Awaitable[object]] | None = None,
) -> AsyncGenerator[str, None]:
    """Objects -> server-sent events; an error ends them with one that says so."""
    try:
        async for part in parts:
            yield event(part)
    except Exception as error:
        yield event({"error": as_api_error(error).body()})
        raise
    finally:
        await parts.aclose()
