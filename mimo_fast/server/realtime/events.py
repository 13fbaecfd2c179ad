"""Items, responses and events of the GA dialect, as JSON."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from mimo_fast.server.checks import Json, mapping, needed, one_of, refusal, text
from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.items import Item, Reply, Said, new_id
from mimo_fast.server.realtime.responses import Response

MOST_PARTS = 64

CONTENT = {
    "user": ("input_text", "input_audio"),
    "system": ("input_text",),
    "assistant": ("output_text", "output_audio", "input_text"),
}
"""Kinds of content by role; Pipecat writes what an assistant said as input_text."""

CALLS = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def item_json(item: Item) -> Json:
    """An item without its audio, which can be longer than clients take as one message."""
    found: Json = {"id": item.id, "object": "realtime.item", "type": item.kind}
    found["status"] = item.status
    if item.kind != "message":
        return found | item.more
    return found | {"role": item.role, "content": [_content(item, each) for each in item.contents]}


def _content(item: Item, said: Said) -> Json:
    if item.role == "assistant":
        if said.spoken:
            return {"type": "output_audio", "transcript": said.text or ""}
        return {"type": "output_text", "text": said.text or ""}
    if said.spoken:
        return {"type": "input_audio", "transcript": said.text}
    return {"type": "input_text", "text": said.text or ""}


def part_json(said: Said) -> Json:
    """Content of a reply as its part, whose types have other names."""
    if said.spoken:
        return {"type": "audio", "transcript": said.text or ""}
    return {"type": "text", "text": said.text or ""}


def read_item(given: Any, longest: int, param: str = "item") -> tuple[Item, list[str | None]]:
    """An item that a client writes, and the base64 audio of each of its contents.

    Raises:
        ApiError: it is none.
    """
    value = mapping(given, param)
    kind = one_of(needed(value, "type", f"{param}.type"), f"{param}.type", ("message", *CALLS))
    name = value.get("id")
    id = new_id("item") if name is None else text(name, f"{param}.id", 128)
    if not id:
        raise refusal(f"{param}.id is empty", f"{param}.id")
    if kind != "message":
        more = {
            each: text(needed(value, each, f"{param}.{each}"), f"{param}.{each}", longest)
            for each in CALLS[kind]
        }
        return Item(id, None, kind=kind, more=more), []
    role = one_of(needed(value, "role", f"{param}.role"), f"{param}.role", CONTENT)
    contents = needed(value, "content", f"{param}.content")
    if not isinstance(contents, list) or not 0 < len(contents) <= MOST_PARTS:
        problem = f"{param}.content must be a list of 1 to {MOST_PARTS} parts"
        raise refusal(problem, f"{param}.content", "invalid_type")
    item, sounds = Item(id, role), list[str | None]()
    for i, each in enumerate(contents):
        where = f"{param}.content[{i}]"
        part = mapping(each, where)
        what = one_of(needed(part, "type", f"{where}.type"), f"{where}.type", CONTENT[role])
        sounds.append(None)
        if what == "input_audio":
            audio = needed(part, "audio", f"{where}.audio")
            if not isinstance(audio, str):
                raise refusal(f"{where}.audio must be base64", f"{where}.audio", "invalid_type")
            sounds[-1] = audio
            words = part.get("transcript")
            words = None if words is None else text(words, f"{where}.transcript", longest)
            item.contents.append(Said(words, spoken=True))
        elif what == "output_audio":
            # A reply of another session: its words count.
            item.contents.append(Said(text(part.get("transcript") or "", where, longest)))
        else:
            words = text(needed(part, "text", f"{where}.text"), f"{where}.text", longest)
            item.contents.append(Said(words))
    text(item.text, f"{param}.content", longest)
    if role == "assistant":
        item.reply = Reply()
    return item, sounds


def response_json(response: Response, conversation: str) -> Json:
    """A response; with usage and latencies once it has ended."""
    manner = response.manner
    found: Json = {
        "id": response.id,
        "object": "realtime.response",
        "status": response.status,
        "status_details": None,
        "output": [item_json(response.item)] if response.begun and response.ended else [],
        "conversation_id": None if response.aside else conversation,
        "output_modalities": ["audio" if manner.speaks else "text"],
        "max_output_tokens": "inf" if manner.most is None else manner.most,
        "audio": {"output": {"format": _format_json(response), "voice": manner.voice_name}},
        "metadata": response.metadata,
        "usage": None,
    }
    if not response.ended:
        return found
    details: Json = {"type": response.status}
    if response.reason is not None:
        details["reason"] = response.reason
    if response.error is not None:
        body = response.error.body()
        details["error"] = {name: body[name] for name in ("type", "code", "message")}
    if response.status != "completed":
        found["status_details"] = details
    found["latency"] = response.latency
    return found | {"usage": _usage(response)}


def _format_json(response: Response) -> Json:
    format = response.manner.format
    return {"type": format.name} | ({"rate": format.rate} if format.width == 2 else {})


def _usage(response: Response) -> Json:
    """Groups: a token of text or 160 ms of audio each."""
    usage = response.ask.usage
    inside, outside = usage.text_in + usage.audio_in, usage.text_out + usage.audio_out
    return {
        "total_tokens": inside + outside,
        "input_tokens": inside,
        "output_tokens": outside,
        "input_token_details": {
            "text_tokens": usage.text_in,
            "audio_tokens": usage.audio_in,
            "cached_tokens": usage.cached,
        },
        "output_token_details": {
            "text_tokens": usage.text_out,
            "audio_tokens": usage.audio_out,
        },
    }


def error_json(error: ApiError, event_id: str | None = None) -> Json:
    body = error.body()
    return {"type": "error", "error": body | {"event_id": event_id}}


class Outbox:
    """Events that wait for a client, each with an id of its own."""

    def __init__(self) -> None:
        self._waiting = deque[str]()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, type: str, **fields: Any) -> None:
        event = {"type": type, "event_id": new_id("event")} | fields
        self._waiting.append(json.dumps(event, separators=(",", ":")))

    def take(self) -> str:
        return self._waiting.popleft()
