"""A dialogue at a server, over its realtime protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch

from mimo_fast.audio.writing import pcm16
from mimo_fast.errors import MimoFastError
from mimo_fast.talk.partner import Listener, Wishes

PATIENCE = 15.0
"""Seconds that a server has to answer."""

MOST_MESSAGE = 2**24
"""Bytes of an event."""


class ServerError(MimoFastError):
    """A server cannot be reached, or ended the talk."""


class RemotePartner:
    """Implements `Partner`.

    Args:
        url: of the server: http://127.0.0.1:8000, or https, ws, wss.
    """

    def __init__(self, url: str, key: str | None, wishes: Wishes) -> None:
        self._url, self._key, self._wishes = realtime_url(url), key, wishes
        self._shown = url
        self._in_progress: str | None = None
        self._item: str | None = None
        self._reading: asyncio.Task[None] | None = None
        self._socket: Any = None
        self._closing = False

    async def open(self, listener: Listener) -> None:
        """Connects.

        Raises:
            ServerError: it cannot, or the server refuses what is wished.
        """
        self._listener = listener
        try:
            from websockets.asyncio.client import connect
            from websockets.exceptions import InvalidHandshake, InvalidStatus
        except ImportError as error:
            fix = "pip install 'mimo-fast[talk]'"
            raise ServerError(f"--server needs the package websockets: {fix}") from error
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            self._socket = await connect(
                self._url,
                additional_headers=headers,
                max_size=MOST_MESSAGE,
                open_timeout=PATIENCE,
                close_timeout=1,
            )
        except InvalidStatus as error:
            raise ServerError(self._refused(error.response)) from error
        except ssl.SSLError as error:
            raise ServerError(
                f"the certificate of {self._shown} is not trusted ({error.reason}): name its file "
                "in SSL_CERT_FILE"
            ) from error
        except (OSError, TimeoutError, InvalidHandshake) as error:
            why = getattr(error, "strerror", None) or str(error) or "it does not answer"
            raise ServerError(
                f"no server at {self._shown} ({why}): start one with mimo-fast serve, or correct "
                "--server"
            ) from error
        await self._configure()
        self._reading = asyncio.create_task(self._read())

    def _refused(self, response: Any) -> str:
        try:
            why = json.loads(response.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            why = f"status {response.status_code}"
        fix = {
            401: "give the server's key with --api-key or MIMO_FAST_API_KEY",
            429: "try again later",
            503: "try again later",
        }.get(response.status_code, "is it mimo-fast serve, or another with OpenAI's protocol?")
        return f"{self._shown} refuses ({why}): {fix}"

    async def _configure(self) -> None:
        wishes = self._wishes
        heard: dict[str, Any] = {"transcription": {"model": "whisper-1"}}
        if wishes.by_hand:
            heard["turn_detection"] = None
        audio: dict[str, Any] = {"input": heard}
        if wishes.voice is not None:
            audio["output"] = {"voice": wishes.voice}
        session: dict[str, Any] = {"type": "realtime", "audio": audio}
        if wishes.instructions is not None:
            session["instructions"] = wishes.instructions
        await self._send("session.update", session=session)
        try:
            async with asyncio.timeout(PATIENCE):
                while (event := await self._next())["type"] != "session.updated":
                    if event["type"] == "error":
                        raise ServerError(f"{self._shown}: {event['error'].get('message')}")
        except TimeoutError:
            raise ServerError(f"{self._shown} does not answer: is it mimo-fast serve?") from None
        except Exception as error:
            await self._socket.close()
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"{self._shown} ended the talk: {error}") from error

    async def hear(self, wav: np.ndarray) -> None:
        data = base64.b64encode(pcm16(torch.from_numpy(wav))).decode()
        await self._send("input_audio_buffer.append", audio=data)

    async def begin_turn(self) -> None:
        if self._in_progress is not None:
            await self._send("response.cancel", response_id=self._in_progress)
        await self._send("input_audio_buffer.clear")

    async def take_turn(self) -> None:
        await self._send("input_audio_buffer.commit")
        await self._send("response.create")

    async def truncate(self, item: str, heard_ms: float) -> None:
        place = {"item_id": item, "content_index": 0, "audio_end_ms": int(heard_ms)}
        await self._send("conversation.item.truncate", **place)

    async def close(self) -> None:
        self._closing = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close()

    async def _send(self, kind: str, **fields: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(json.dumps({"type": kind, **fields}))
        except ConnectionClosed as error:
            self._gone(error)

    async def _next(self) -> dict[str, Any]:
        event = json.loads(await self._socket.recv())
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ServerError(f"{self._shown} sends what is no event")
        return event

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._next())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._gone(error)

    def _gone(self, error: Exception) -> None:
        if self._closing:
            return
        self._closing = True
        frame = getattr(error, "rcvd", None)
        why = str(error) if frame is None else f"{frame.reason or 'it closed'}, code {frame.code}"
        self._listener.gone(ServerError(f"{self._shown} ended the talk: {why or 'it has gone'}"))

    def _take(self, event: dict[str, Any]) -> None:
        kind, listener = event["type"], self._listener
        heard = "conversation.item.input_audio_transcription."
        nothing = np.zeros(0, np.float32)
        if kind == "response.output_audio.delta":
            samples = np.frombuffer(base64.b64decode(event["delta"]), "<i2")
            listener.reply_said(event["item_id"], "", samples.astype(np.float32) / 32768)
        elif kind in ("response.output_audio_transcript.delta", "response.output_text.delta"):
            listener.reply_said(event["item_id"], event["delta"], nothing)
        elif kind == "input_audio_buffer.speech_started":
            listener.turn_began()
        elif kind == "input_audio_buffer.speech_stopped":
            listener.turn_ended()
        elif kind == "response.created":
            self._in_progress, self._item = event["response"]["id"], None
        elif kind == "response.output_item.added":
            self._item = event["item"]["id"]
            listener.reply_began(self._item)
        elif kind == "response.done":
            details = event["response"].get("status_details") or {}
            problem = (details.get("error") or {}).get("message")
            listener.reply_ended(self._item, problem)
            self._in_progress = self._item = None
        elif kind == f"{heard}delta":
            listener.user_said(event["item_id"], event["delta"], False)
        elif kind == f"{heard}completed":
            listener.user_said(event["item_id"], event["transcript"], True)
        elif kind == f"{heard}failed":
            listener.user_said(event["item_id"], "(not understood)", True)
        elif kind == "error" and not _is_late(event["error"]):
            listener.failed(str(event["error"].get("message")))


def _is_late(error: dict[str, Any]) -> bool:
    """Whether a cut or an end came after there was anything to cut."""
    return str(error.get("code") or "").startswith(("item_truncate", "response_cancel"))


def realtime_url(url: str) -> str:
    """The address of a server's realtime sessions, from what users write of it.

    Raises:
        ServerError: it is none.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise ServerError(f"--server {url:.100} is no address: give one like http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    if not path.endswith("/realtime"):
        path = f"{path}/realtime" if path.endswith("/v1") else f"{path}/v1/realtime"
    return urlunsplit((scheme, parts.netloc, path, parts.query, ""))
