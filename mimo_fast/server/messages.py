"""The messages of a chat -> turns of a conversation, whose recordings are decoded.

Every text, recording and message is bounded; nothing that a client names is opened.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mimo_fast.audio.segments import levelled
from mimo_fast.errors import AudioError
from mimo_fast.json_files import shown
from mimo_fast.server.audio import CONTAINERS, FIX, decode
from mimo_fast.server.checks import Json, mapping, needed, one_of, refusal
from mimo_fast.server.checks import text as checked_text
from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.items import Reply, Said
from mimo_fast.server.service import Service
from mimo_fast.server.settings import Settings

MOST_MESSAGES, MOST_PARTS, MOST_RECORDINGS = 512, 64, 32
"""Of a request, of a message, and of a request's recordings."""

ROLES = ("system", "developer", "user", "assistant")

CONTEXT = "cut it: the recordings of a request share the model's context, which holds no more"


@dataclass(frozen=True)
class Heard:
    """An answer that was heard: what the model remembers, and its words."""

    reply: Reply
    text: str


@dataclass
class Turns:
    """A conversation.

    Attributes:
        before: Earlier turns, oldest first: what the user said, the reply, its text.
        said: What the user says now.
        instructions: Of the system, and what the user wrote beside a recording.
    """

    before: list[tuple[tuple[Said, ...], Reply, str]] = field(default_factory=list)
    said: tuple[Said, ...] = ()
    instructions: str | None = None


@dataclass
class _Room:
    """What a request may still hold."""

    characters: int
    seconds: float
    fix: str
    parts: int = MOST_MESSAGES

    def text(self, value: Any, param: str) -> str:
        found = checked_text(value, param, self.characters)
        self.characters -= len(found)
        return found


async def read_messages(
    service: Service, settings: Settings, messages: Any, find: Callable[[str], Heard | None]
) -> Turns:
    """The conversation of a request.

    Args:
        find: an earlier answer by the id of its audio.

    Raises:
        ApiError: a message is wrong, or nothing that this model can be told.
    """
    if not isinstance(messages, list) or not messages:
        raise refusal("messages must be a list of one message at least", "messages")
    if len(messages) > MOST_MESSAGES:
        problem = f"messages has {len(messages)} entries, {MOST_MESSAGES} are the most"
        raise refusal(problem, "messages", "array_above_max_length")
    if sum(map(_recordings, messages)) > MOST_RECORDINGS:
        problem = f"the messages have more than {MOST_RECORDINGS} recordings"
        raise refusal(problem, "messages", "array_above_max_length")
    room, turns = _room(service, settings), Turns()
    instructions, said, beside = list[str](), list[Said](), list[str]()
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        mapping(message, param)
        role = one_of(message.get("role"), f"{param}.role", ROLES)
        if role == "user":
            recordings, texts = await _user(service, message, param, room)
            # A recording is what is said; what is written beside it says how to answer.
            said += recordings or [Said(text) for text in texts]
            beside += texts if recordings else []
        elif role == "assistant":
            reply, text = _assistant(message, param, room, find)
            if said:
                turns.before.append((tuple(said), reply, text))
            said, beside = [], []
        else:
            instructions += [text for _, text in _texts(message, param, room)]
    if not said:
        raise refusal("the last message must be the user's", "messages")
    turns.said = tuple(said)
    turns.instructions = "\n".join([*instructions, *beside]).strip() or None
    return turns


def _room(service: Service, settings: Settings) -> _Room:
    """All recordings of a request are one prompt, so they share what its context holds."""
    model, rate = service.model, service.sample_rate
    group = model.group_size * model.codec.config.samples_per_frame / rate
    # Not asked of the engine, which is the compute thread's.
    capacity = min(model.setup.max_seq_len, model.lm.config.max_positions)
    held, most = capacity * group, settings.max_audio_seconds
    return _Room(settings.max_text_chars, min(held, most), CONTEXT if held < most else FIX)


def _recordings(message: Any) -> int:
    """How many recordings a message may have; before any of them is decoded."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") != "text" for part in content)


def _contents(message: Json, param: str, room: _Room) -> Sequence[tuple[str, Json]]:
    """Parts of a message, and what they are called in errors."""
    content = needed(message, "content", f"{param}.content")
    if isinstance(content, str):
        return [(f"{param}.content", {"type": "text", "text": content})]
    if not isinstance(content, list) or not 0 < len(content) <= MOST_PARTS:
        problem = f"{param}.content must be a text, or a list of 1 to {MOST_PARTS} parts"
        raise refusal(problem, f"{param}.content")
    room.parts -= len(content)
    if room.parts < 0:
        raise refusal(f"the messages have more than {MOST_MESSAGES} parts", "messages")
    named = [(f"{param}.content[{i}]", part) for i, part in enumerate(content)]
    return [(name, mapping(part, name)) for name, part in named]


def _texts(
    message: Json, param: str, room: _Room, known: Sequence[str] = ("text",)
) -> list[tuple[str, str]]:
    found = list[tuple[str, str]]()
    for name, part in _contents(message, param, room):
        kind = one_of(part.get("type"), f"{name}.type", known)
        found.append((name, room.text(part.get(kind), f"{name}.{kind}")))
    return found


async def _user(
    service: Service, message: Json, param: str, room: _Room
) -> tuple[list[Said], list[str]]:
    recordings, texts = list[Said](), list[str]()
    for name, part in _contents(message, param, room):
        if one_of(part.get("type"), f"{name}.type", ("text", "input_audio")) == "text":
            text = room.text(part.get("text"), f"{name}.text")
            texts += [text] if text.strip() else []
            continue
        audio = mapping(part.get("input_audio"), f"{name}.input_audio")
        data = needed(audio, "data", f"{name}.input_audio.data")
        one_of(audio.get("format"), f"{name}.input_audio.format", CONTAINERS)
        name, rate = f"{name}.input_audio.data", service.sample_rate
        wav = await service.threads.decode(_decoded, data, rate, room.seconds, name, room.fix)
        room.seconds -= len(wav) / rate
        recordings.append(Said(None, True, len(wav) / rate, wav))
    if not recordings and not texts:
        raise refusal(f"{param}.content says nothing", f"{param}.content")
    return recordings, texts


def _decoded(data: Any, rate: int, seconds: float, param: str, fix: str) -> Tensor:
    """A recording in base64 -> float32 [n], its level set."""
    try:
        encoded = base64.b64decode(data, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise refusal(f"{param} is no base64", param) from None
    try:
        return levelled(decode(encoded, rate, seconds, param, fix))
    except AudioError as error:
        raise ApiError(str(error), 400, "invalid_audio", param) from error


def _assistant(
    message: Json, param: str, room: _Room, find: Callable[[str], Heard | None]
) -> tuple[Reply, str]:
    if message.get("tool_calls") or message.get("function_call"):
        problem = f"{param}.tool_calls: this model calls no tools; leave it out"
        raise refusal(problem, f"{param}.tool_calls", "unsupported_parameter")
    if message.get("audio") is not None:
        name = f"{param}.audio.id"
        audio_id = needed(mapping(message["audio"], f"{param}.audio"), "id", name)
        heard = find(checked_text(audio_id, name, 200))
        if heard is None:
            problem = f"there is no audio {shown(audio_id)}, or it has expired; send its transcript"
            raise ApiError(f"{problem} as content instead", 404, "audio_not_found", name)
        return heard.reply, heard.text
    texts = _texts(message, param, room, ("text", "refusal"))
    return Reply(), "\n".join(text for _, text in texts).strip()
