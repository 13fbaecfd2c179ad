"""The conversation: items in their order, as every dialect has them.

An item keeps codes and ids, not waveforms, so that an hour of talk is a few megabytes.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from mimo_fast.runtime.session import Exchange
from mimo_fast.server.errors import ApiError
from mimo_fast.text.prompt import Speech

MOST_ITEMS = 1000
"""Of a conversation; the oldest go."""

Role = Literal["user", "assistant", "system"]
Status = Literal["in_progress", "completed", "incomplete"]


def new_id(kind: str) -> str:
    """An id that no other session guesses."""
    return f"{kind}_{secrets.token_hex(12)}"


@dataclass
class Said:
    """Content of an item: text, or audio with its words as far as they are known.

    Attributes:
        text: What is written or said; None for audio that nobody has transcribed.
        spoken: Whether it is audio.
        wav: float32 [n] at 24 kHz, levelled, until the model has encoded it.
        speech: The codes of the audio or of the text as the model says it to itself.
    """

    text: str | None = None
    spoken: bool = False
    seconds: float = 0.0
    wav: Tensor | None = field(default=None, repr=False)
    speech: Speech | None = field(default=None, repr=False)


@dataclass
class Reply:
    """A reply as the model remembers it.

    Attributes:
        asked: What it answers.
        exchange: The turn in the model's dialogue; None where the reply came from elsewhere.
        words: (text, milliseconds of audio before it), as they came.
        ms: Audio of it so far, less what was not heard.
        sent_ms: Audio of it that the client was sent.
        dropped: The model is to forget that it was asked.
    """

    asked: tuple[Said, ...] = ()
    exchange: Exchange | None = None
    words: list[tuple[str, float]] = field(default_factory=list)
    ms: float = 0.0
    sent_ms: float = 0.0
    dropped: bool = False

    def heard_by(self, ms: float) -> str:
        """The words of which a listener has heard all after so many milliseconds.

        A word ends where the next begins; words that came together share their time.
        """
        starts = [*sorted({start for _, start in self.words}), self.ms]
        found, missed = "", False
        if not self.words:
            return found
        for start, end in pairwise(starts):
            burst = "".join(text for text, at in self.words if at == start)
            words = re.findall(r"\s*\S+(?:\s+$)?", burst) or [burst]
            for i, word in enumerate(words):
                missed = missed or start + (end - start) * (i + 1) / len(words) > ms
                found += "" if missed else word
        return found


@dataclass
class Item:
    """An item of a conversation.

    Attributes:
        kind: "message", or what else the dialect has, with its own fields in `more`.
        reply: Of an assistant's message.
    """

    id: str
    role: Role | None
    contents: list[Said] = field(default_factory=list)
    kind: str = "message"
    status: Status = "completed"
    more: dict[str, Any] = field(default_factory=dict)
    reply: Reply | None = None

    @property
    def text(self) -> str:
        return " ".join(filter(None, (content.text for content in self.contents)))


class Conversation:
    """Items in order."""

    def __init__(self) -> None:
        self._items: list[Item] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> tuple[Item, ...]:
        return tuple(self._items)

    @property
    def last(self) -> str | None:
        """Id of the last item."""
        return self._items[-1].id if self._items else None

    def find(self, id: str) -> Item | None:
        return next((item for item in self._items if item.id == id), None)

    def get(self, id: str, doing: str = "retrieve") -> Item:
        """Raises ApiError `item_<doing>_invalid_item_id` where there is none."""
        found = self.find(id)
        if found is None:
            raise ApiError(
                f"there is no item '{id:.64}' in this conversation",
                code=f"item_{doing}_invalid_item_id",
                param="item_id",
            )
        return found

    def add(self, item: Item, after: str | None = None) -> str | None:
        """Inserts an item -> the id of the one before it.

        Args:
            after: id of an item, "root" for the beginning, None for the end.

        Raises:
            ApiError: the id is taken, or there is no such item before it.
        """
        if self.find(item.id):
            raise ApiError(
                f"the conversation has an item '{item.id:.64}' already",
                code="item_create_duplicate_item_id",
                param="item.id",
            )
        place = len(self._items)
        if after == "root":
            place = 0
        elif after is not None:
            before = self.find(after)
            if before is None:
                raise ApiError(
                    f"there is no item '{after:.64}' to put the new one after",
                    code="item_create_invalid_previous_item_id",
                    param="previous_item_id",
                )
            place = self._items.index(before) + 1
        self._items.insert(place, item)
        return self._items[place - 1].id if place else None

    def remove(self, id: str) -> None:
        self._items.remove(self.get(id, "delete"))

    def crowded(self) -> Item | None:
        """The oldest item, where there are too many."""
        return self._items[0] if len(self._items) > MOST_ITEMS else None
