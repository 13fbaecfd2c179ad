"""Replies that a realtime session makes, and the conversation as the model is asked about it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch

from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.items import Item, Reply, Said, new_id
from mimo_fast.server.realtime.mind import HELLO, Ask, Mind
from mimo_fast.server.realtime.sound import PCM, Encoder, Format
from mimo_fast.server.worker import Stream

BURST, PACE = 0.25, 2.0
"""Seconds of a reply that are sent at once; what follows comes at twice the pace at which it
is played. So little is made for nothing where the user interrupts, and others get their turn."""

Reason = Literal["turn_detected", "client_cancelled", "max_output_tokens"]
End = Literal["completed", "cancelled", "incomplete", "failed"]


@dataclass(frozen=True)
class Manner:
    """How replies are made.

    Attributes:
        instructions: For all of a session's replies.
        asked: Of one reply: what it is to be about where the user has said nothing new.
        most: Groups of a reply at most.
        adapter: That they are computed with; None for the model itself.
    """

    instructions: str | None = None
    asked: str | None = None
    voice: Path | None = None
    voice_name: str = "alloy"
    speaks: bool = True
    most: int | None = None
    format: Format = PCM
    adapter: str | None = None


@dataclass(frozen=True)
class Sound:
    """A piece of a reply as a client gets it: some text, some bytes, their milliseconds."""

    text: str
    audio: bytes
    ms: float


@dataclass
class Response:
    """A reply in progress.

    Attributes:
        item: Where it is written; it is part of the conversation once it has begun.
        aside: It is made beside the conversation, and not part of it.
        turn_ended: `perf_counter` when the turn was declared over, or the reply was asked for.
    """

    manner: Manner
    ask: Ask
    metadata: dict[str, str] | None = None
    aside: bool = False
    spoken_to: bool = False
    id: str = field(default_factory=lambda: new_id("resp"))
    item: Item = field(default_factory=lambda: Item(new_id("item"), "assistant"))
    status: Literal["in_progress"] | End = "in_progress"
    reason: Reason | None = None
    error: ApiError | None = None
    begun: bool = False
    turn_ended: float = field(default_factory=perf_counter)
    first_audio: float | None = None
    stream: Stream[Sound] | None = None
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.status != "in_progress"

    @property
    def played_ms(self) -> float:
        """Audio that a listener has heard at most."""
        if self.first_audio is None:
            return 0.0
        return min(1000 * (perf_counter() - self.first_audio), self.ask.reply.ms)

    @property
    def due(self) -> float:
        """Seconds until more of it is sent."""
        if self.first_audio is None:
            return 0.0
        return self.first_audio + (self.ask.reply.ms / 1000 - BURST) / PACE - perf_counter()

    @property
    def latency(self) -> dict[str, float | int | None]:
        """Milliseconds of its parts; None where not measured."""
        ask = self.ask
        waited = None if self.first_audio is None else self.first_audio - self.turn_ended

        def ms(seconds: float | None) -> float | None:
            return None if seconds is None else round(1000 * seconds, 1)

        return {
            "first_audio_ms": ms(waited),
            "encode_ms": ms(ask.times.encode),
            "prefill_ms": ms(ask.times.prefill),
            "groups": ask.usage.text_out + ask.usage.audio_out,
        }


def ask_about(items: Sequence[Item], manner: Manner) -> Ask:
    """What the model is asked: the last turn of the user, after the ones before.

    Where the user has said nothing since the last reply, it is asked what `manner` asks, else the
    last question again.
    """
    before = list[tuple[tuple[Said, ...], Reply, str]]()
    waiting, system = list[Said](), [manner.instructions]
    for item in items:
        if item.kind != "message":
            continue
        if item.role == "system":
            system.append(item.text)
        elif item.role == "user":
            waiting += item.contents
        elif item.reply is not None and (said := tuple(waiting) or item.reply.asked):
            before.append((said, item.reply, item.text))
            waiting = []
    said = tuple(waiting)
    if not said and manner.asked:
        said = (Said(manner.asked),)
    if not said:
        said = before[-1][0] if before else (Said(HELLO),)
    instructions = "\n".join(filter(None, system)) or None
    how = manner.voice, manner.speaks, manner.most
    return Ask(before, said, instructions, *how, adapter=manner.adapter)


def sounds(mind: Mind, ask: Ask, format: Format) -> Iterator[Sound]:
    """A reply as bytes of a format; runs in the compute thread."""
    rate = mind.sample_rate
    encoder = Encoder(format, rate, mind.marked)
    first = True
    with closing(mind.answer(ask)) as answer:
        for piece in answer:
            # The text of a reply begins with a space.
            text = piece.text.lstrip() if first else piece.text
            first = first and not text
            audio, ms = b"", 0.0
            if piece.audio is not None and len(piece.audio):
                audio, ms = encoder.push(piece.audio), 1000 * len(piece.audio) / rate
            yield Sound(text, audio, ms)
        if ask.speaks:
            nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
            yield Sound("", encoder.push(nothing, ended=True), 0.0)
