"""Every option of the server; each is also an environment variable, `MIMO_FAST_*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help} | more)


@dataclass(frozen=True)
class Settings:
    """What a server allows; the fields' help is what `mimo-fast serve --help` shows."""

    host: str = _option("127.0.0.1", "address to listen on; any but loopback needs a key")
    port: int = _option(8000, "port to listen on; 0 takes a free one", least=0, most=65535)
    api_key: str | None = _option(None, "key that every client must give", secret=True)
    max_sessions: int = _option(16, "realtime sessions and speech streams at once", least=1)
    max_requests: int = _option(32, "requests that compute at once; more wait", least=1)
    queue_seconds: float = _option(10.0, "how long a request waits for a place", least=0)
    max_connections: int = _option(512, "connections at once", least=1)
    max_rate: float = _option(100.0, "requests a second of one address", least=1)
    max_body_bytes: int = _option(25 * MIB, "size of a request", least=1024)
    max_message_bytes: int = _option(24 * MIB, "size of a WebSocket message", least=1024)
    max_audio_seconds: float = _option(900.0, "length of a recording that is given", least=1)
    max_text_chars: int = _option(16384, "length of a text that is given", least=1)
    max_choices: int = _option(4, "answers that a request may ask for (n)", least=1)
    voices: Path | None = _option(None, "folder of recordings whose voices may be used")
    allow_voice_upload: bool = _option(False, "let clients add voices; asks for a consent note")
    allowed_origins: tuple[str, ...] = _option(
        (), "origins of other pages whose scripts may use this server"
    )
    allowed_hosts: tuple[str, ...] = _option((), "names that this server is reached by")
    log_words: bool = _option(False, "log what users say and hear")
    keep_alive: float = _option(-1.0, "unload the model after so long without use; -1 never")
    drain_seconds: float = _option(20.0, "time for what runs when the server stops", least=0)
    ssl_certfile: Path | None = _option(None, "certificate, for https")
    ssl_keyfile: Path | None = _option(None, "key of the certificate")
