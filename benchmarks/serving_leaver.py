"""A client that waits to be killed: python -m benchmarks.serving_leaver STATE URL SPEECH.pcm

It gets into the state, writes a line, and stays there.
"""

from __future__ import annotations

import base64
import json
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from websockets.sync.client import ClientConnection, connect

from benchmarks.serving_clients import PCM_S, Request, form, posted, wav_file

LONG = "one two three four five six seven eight nine ten " * 20
"""A text that takes a while to say."""


def here() -> None:
    print("here", flush=True)


def stay() -> None:
    time.sleep(600)


def _sent(url: str, request: Request, share: float = 1.0) -> socket.socket:
    """A connection on which a request was sent, or the beginning of one."""
    where, body = urlsplit(url), request.body or b""
    made = socket.create_connection((where.hostname, where.port), timeout=600)
    lines = [f"POST {request.path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    made.sendall("\r\n".join([*lines, "", ""]).encode() + body[: round(share * len(body))])
    return made


def _transcription(pcm: bytes) -> Request:
    return form({"model": "whisper-1"}, wav_file(pcm * (60 * PCM_S // len(pcm))))


def _speech() -> Request:
    content = {"model": "tts-1", "voice": "alloy", "input": LONG, "response_format": "pcm"}
    return posted("/v1/audio/speech", content)


def uploads(url: str, pcm: bytes) -> None:
    made = _sent(url, _transcription(pcm), share=0.5)
    here()
    stay()
    made.close()


def waits(url: str, pcm: bytes) -> None:
    made = _sent(url, _transcription(pcm))
    here()
    made.recv(1)
    stay()


def listens(url: str, pcm: bytes) -> None:
    made = _sent(url, _speech())
    made.recv(4096)
    here()
    while made.recv(4096):
        time.sleep(0.05)
    stay()


def reads_nothing(url: str, pcm: bytes) -> None:
    made = _sent(url, _speech())
    made.recv(1)
    here()
    stay()


def _session(url: str) -> ClientConnection:
    made = connect(url.replace("http", "ws", 1) + "/v1/realtime", compression=None)
    made.recv()
    return made


def _send(session: ClientConnection, type: str, **fields: object) -> None:
    session.send(json.dumps({"type": type} | fields))


def speaks(url: str, pcm: bytes) -> None:
    """In a realtime session, at the pace of speech."""
    session = _session(url)
    here()
    size = PCM_S // 10
    for i in count():
        begin = i * size % (len(pcm) - size)
        audio = base64.b64encode(pcm[begin : begin + size]).decode()
        _send(session, "input_audio_buffer.append", audio=audio)
        time.sleep(0.1)


def is_answered(url: str, pcm: bytes) -> None:
    """In a realtime session, while it is spoken to."""
    session = _session(url)
    content = [{"type": "input_text", "text": "count from one to nine"}]
    said = {"type": "message", "role": "user", "content": content}
    here()
    while True:
        _send(session, "conversation.item.create", item=said)
        _send(session, "response.create")
        while json.loads(session.recv())["type"] != "response.done":
            pass


def lets_pile_up(url: str, pcm: bytes) -> None:
    """In a realtime session, with more events on their way than it reads."""
    where = urlsplit(url)
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    small.connect((where.hostname, where.port))
    session = connect(url.replace("http", "ws", 1) + "/v1/realtime", sock=small, compression=None)
    content = [{"type": "input_text", "text": "a " * 8000}]
    said = {"id": "long", "type": "message", "role": "user", "content": content}
    _send(session, "conversation.item.create", item=said)
    content = [{"type": "input_text", "text": "count from one to nine"}]
    asked = [{"type": "message", "role": "user", "content": content}]
    for _ in range(4):
        _send(session, "response.create", response={"conversation": "none", "input": asked})
    for _ in range(1000):
        _send(session, "conversation.item.retrieve", item_id="long")
    here()
    stay()


def streams_text(url: str, pcm: bytes) -> None:
    session = connect(url.replace("http", "ws", 1) + "/v1/audio/speech/stream", compression=None)
    _send(session, "input.text", text=LONG)
    _send(session, "input.done")
    here()
    while session.recv():
        pass


STATES: dict[str, Callable[[str, bytes], None]] = {
    "uploads": uploads,
    "waits": waits,
    "listens": listens,
    "reads nothing": reads_nothing,
    "speaks": speaks,
    "is answered": is_answered,
    "lets pile up": lets_pile_up,
    "streams text": streams_text,
}

if __name__ == "__main__":
    STATES[sys.argv[1]](sys.argv[2], Path(sys.argv[3]).read_bytes())
