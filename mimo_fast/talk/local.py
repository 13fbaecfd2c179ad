"""A dialogue with a model in this process, by the core of the server's realtime sessions."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from mimo_fast.audio.writing import pcm16
from mimo_fast.server.errors import ApiError
from mimo_fast.server.realtime.dialogue import Dialogue, Turns, longest_turn
from mimo_fast.server.realtime.items import Item
from mimo_fast.server.realtime.responses import Manner, Response
from mimo_fast.server.service import Service
from mimo_fast.talk.partner import Listener, Wishes


class LocalPartner:
    """Implements `Partner`, and the core's `Wire`."""

    def __init__(self, service: Service, wishes: Wishes) -> None:
        self._service, self._wishes = service, wishes

    async def open(self, listener: Listener) -> None:
        self._listener, service = listener, self._service
        self._dialogue = Dialogue(service, self, longest_turn(service), "talk")
        voice = self._wishes.voice
        manner = Manner(
            self._wishes.instructions,
            voice=None if voice is None else Path(voice),
            voice_name="",
            adapter=service.adapter,
        )
        turns = Turns(transcribes=True, adapter=service.adapter)
        self._dialogue.set_manner(manner, turns)
        if self._wishes.by_hand:
            await self._dialogue.set_hearing(None, None)

    async def hear(self, wav: np.ndarray) -> None:
        try:
            await self._dialogue.hear(pcm16(torch.from_numpy(wav)))
        except ApiError as error:
            self._listener.failed(error.message)

    async def begin_turn(self) -> None:
        with suppress(ApiError):
            self._dialogue.cancel()
        await self._dialogue.clear()

    async def take_turn(self) -> None:
        try:
            await self._dialogue.commit()
            await self._dialogue.respond()
        except ApiError as error:
            self._listener.failed(error.message)

    async def truncate(self, item: str, heard_ms: float) -> None:
        # A reply that was forgotten meanwhile needs no cut.
        with suppress(ApiError):
            self._dialogue.truncate(item, heard_ms)

    async def close(self) -> None:
        await asyncio.shield(self._dialogue.close())

    # The wire

    async def ready(self) -> None:
        """The speaker's line has room for a reply of any length: the core sends it at a pace."""

    def silence(self) -> list[tuple[Response, float]]:
        """None: the speaker tells what was heard, by `truncate`."""
        return []

    def speech_started(self, item_id: str, at_ms: int) -> None:
        self._listener.turn_began()

    def speech_stopped(self, item_id: str, at_ms: int) -> None:
        self._listener.turn_ended()

    def timed_out(self, item_id: str, start_ms: int, end_ms: int) -> None: ...
    def committed(self, item_id: str, before: str | None) -> None: ...
    def item_added(self, item: Item, before: str | None) -> None: ...
    def item_done(self, item: Item, before: str | None) -> None: ...
    def item_deleted(self, item_id: str) -> None: ...
    def response_created(self, response: Response) -> None: ...

    def response_begun(self, response: Response, before: str | None) -> None:
        self._listener.reply_began(response.item.id)

    def said(self, response: Response, text: str, audio: bytes) -> None:
        samples = np.frombuffer(audio, "<i2").astype(np.float32) / 32768
        self._listener.reply_said(response.item.id, text, samples)

    def response_ended(self, response: Response, before: str | None) -> None:
        problem = None if response.error is None else response.error.message
        self._listener.reply_ended(response.item.id if response.begun else None, problem)

    def transcribing(self, item_id: str, text: str) -> None:
        self._listener.user_said(item_id, text, False)

    def transcribed(self, item_id: str, text: str, seconds: float) -> None:
        self._listener.user_said(item_id, text, True)

    def not_transcribed(self, item_id: str, error: ApiError) -> None:
        self._listener.user_said(item_id, "(not understood)", True)
