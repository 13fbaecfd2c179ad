"""Every option of the server; each is also an environment variable, `MIMO_FAST_*`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mimo_fast.errors import ConfigError

MIB = 1 << 20
SUFFIXES = {"k": 1 << 10, "m": MIB, "g": 1 << 30}
LEVELS = ("debug", "info", "warning", "error")


ICE_URL = re.compile(r"(stun|turns?):[^\s/?#@,]+(\?transport=(udp|tcp))?")


def _about(help: str, **rules: Any) -> dict[str, Any]:
    """What the command line and the checks know of a field."""
    return {"help": help} | rules


@dataclass(frozen=True)
class Settings:
    """What a server does and allows; the fields' help is that of `mimo-fast serve --help`.

    Raises:
        ConfigError: a value is out of range, or the server would be open to a network.
    """

    host: str = field(
        default="127.0.0.1",
        metadata=_about("address to listen on; any but this machine's needs a key"),
    )
    port: int = field(
        default=8000, metadata=_about("port to listen on; 0 takes a free one", least=0, most=65535)
    )
    api_key: str | None = field(
        default=None, metadata=_about("key that every client must give", secret=True)
    )
    max_sessions: int = field(
        default=16, metadata=_about("realtime sessions and speech streams at once", least=1)
    )
    max_requests: int = field(
        default=8, metadata=_about("requests that compute at once; others wait", least=1)
    )
    queue_seconds: float = field(
        default=20.0, metadata=_about("seconds that a request may wait for its turn", least=0)
    )
    max_load: float = field(
        default=0.0,
        metadata=_about(
            "share of real time that all who listen may need together, such as 0.9, as measured; "
            "who comes beyond it is refused; 0 for no bound",
            least=0,
        ),
    )
    max_parked_bytes: int = field(
        default=0,
        metadata=_about(
            "host memory for replies that wait for a stream; 0 for no bound", least=0, unit="bytes"
        ),
    )
    max_connections: int = field(default=512, metadata=_about("connections at once", least=1))
    max_rate: float = field(
        default=100.0, metadata=_about("requests a second from one address", least=0.1)
    )
    max_body_bytes: int = field(
        default=25 * MIB, metadata=_about("size of a request", least=1024, unit="bytes")
    )
    max_message_bytes: int = field(
        default=24 * MIB, metadata=_about("size of a WebSocket message", least=1024, unit="bytes")
    )
    max_audio_seconds: float = field(
        default=900.0, metadata=_about("seconds of a recording", least=1)
    )
    max_text_chars: int = field(default=16384, metadata=_about("characters of a text", least=1))
    max_choices: int = field(
        default=4, metadata=_about("answers that a request may ask for (n)", least=1)
    )
    voices: Path | None = field(
        default=None, metadata=_about("folder of recordings whose voices may be asked for")
    )
    allow_voice_upload: bool = field(
        default=False, metadata=_about("let clients add voices, with a consent note each")
    )
    examples: Path | None = field(
        default=None,
        metadata=_about("folder of sets of examples by which conversions may be asked for"),
    )
    mark: bool = field(
        default=False,
        metadata=_about("put a watermark into what is said, which some people hear; 0.2 s later"),
    )
    allowed_origins: tuple[str, ...] = field(
        default=(),
        metadata=_about("other web pages that may use this server, such as https://app.example"),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(), metadata=_about("names that this server is reached by")
    )
    ice_servers: tuple[dict[str, Any], ...] = field(
        default=(),
        metadata=_about(
            "STUN and TURN servers of WebRTC calls from other networks: JSON, or addresses such as "
            "stun:stun.example:3478",
            unit="ice",
            secret=True,
        ),
    )
    log_words: bool = field(default=False, metadata=_about("log what users say and hear"))
    log_level: str = field(
        default="info", metadata=_about("least severity that is logged", choices=LEVELS)
    )
    keep_alive: float = field(
        default=-1.0,
        metadata=_about(
            "free the model after so long without use, such as 5m; -1 keeps it", unit="time"
        ),
    )
    drain_seconds: float = field(
        default=20.0, metadata=_about("seconds that SIGTERM leaves to what runs", least=0)
    )
    ssl_certfile: Path | None = field(default=None, metadata=_about("certificate, for https"))
    ssl_keyfile: Path | None = field(
        default=None, metadata=_about("private key of the certificate")
    )
    wyoming: str | None = field(
        default=None,
        metadata=_about(
            "also serve Home Assistant's protocol, such as tcp://127.0.0.1:10300", metavar="URI"
        ),
    )
    wyoming_clients: tuple[str, ...] = field(
        default=(),
        metadata=_about("addresses or networks that may use it, besides this machine's"),
    )

    self_signed: bool = field(
        default=False,
        metadata=_about("https with a certificate that this machine makes for itself, and keeps"),
    )

    ray: bool = field(
        default=False, metadata=_about("serve by replicas, processes of a Ray cluster")
    )
    ray_address: str | None = field(
        default=None,
        metadata=_about("cluster that runs already, such as auto; none starts one on this machine"),
    )
    replicas: int = field(
        default=1, metadata=_about("replicas, or those that autoscaling begins with", least=1)
    )
    min_replicas: int = field(
        default=1, metadata=_about("replicas that autoscaling keeps", least=1)
    )
    max_replicas: int = field(
        default=0, metadata=_about("replicas that autoscaling may start; 0 for no autoscaling")
    )
    target_ongoing: float = field(
        default=8.0,
        metadata=_about("sessions and requests a replica that autoscaling aims at", least=0.1),
    )
    cpus_per_replica: float = field(
        default=1.0, metadata=_about("CPU cores, or a share of one, of each replica", least=0)
    )
    gpus_per_replica: float = field(
        default=-1.0,
        metadata=_about(
            "GPUs, or a share of one, of each replica; -1 for one where the model runs on a GPU"
        ),
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_range(each.name, getattr(self, each.name), each.metadata)
        if self.api_key is not None and not _is_key(self.api_key):
            raise ConfigError("api_key must be printable ASCII without spaces, quotes or commas")
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"{self.host:.100} is reachable from other machines: set a key with --api-key or "
                "MIMO_FAST_API_KEY, or listen on 127.0.0.1"
            )
        for server in self.ice_servers:
            _check_ice_server(server)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("https needs both --ssl-certfile and --ssl-keyfile")
        for name in ("ssl_certfile", "ssl_keyfile"):
            file = getattr(self, name)
            if file is not None and not file.is_file():
                raise ConfigError(f"{option_of(name)}: there is no file {file}")
        if self.voices is not None and not self.voices.is_dir():
            raise ConfigError(f"--voices: there is no folder {self.voices}")
        if self.examples is not None and not self.examples.is_dir():
            raise ConfigError(f"--examples: there is no folder {self.examples}")
        if self.allow_voice_upload and self.voices is None:
            raise ConfigError("--allow-voice-upload needs --voices DIR, where they are kept")
        self._check_wyoming()
        if self.ray and self.wyoming is not None:
            fix = "leave --ray out, or serve it by another process"
            raise ConfigError(f"--wyoming is served by one process: {fix}")
        if 0 < self.max_replicas < self.min_replicas:
            raise ConfigError("--max-replicas is less than --min-replicas")
        for origin in self.allowed_origins:
            if origin != "*" and (
                not origin.startswith(("http://", "https://")) or "/" in _host(origin)
            ):
                raise ConfigError(
                    f"--allowed-origins: {origin:.100} is not like https://app.example"
                )

    @property
    def wyoming_address(self) -> tuple[str, int]:
        """Host and port of `wyoming`.

        Raises:
            ConfigError: it is no such address.
        """
        parts = urlsplit(self.wyoming or "")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if parts.scheme != "tcp" or not host or port is None:
            problem = f"--wyoming: {self.wyoming!s:.100} is not like tcp://127.0.0.1:10300"
            raise ConfigError(problem)
        return host, port

    def _check_wyoming(self) -> None:
        for each in self.wyoming_clients:
            try:
                ip_network(each, strict=False)
            except ValueError:
                problem = (
                    f"--wyoming-clients: {each:.50} is not like 192.168.1.20 or 192.168.1.0/24"
                )
                raise ConfigError(problem) from None
        if self.wyoming is None:
            return
        host, _ = self.wyoming_address
        if not is_loopback(host) and not self.wyoming_clients:
            raise ConfigError(
                f"{host:.100} is reachable from other machines, and Wyoming knows no keys: name "
                "those that may use it with --wyoming-clients, or listen on 127.0.0.1"
            )


def option_of(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def variable_of(name: str) -> str:
    """The environment variable of a field."""
    return f"MIMO_FAST_{name.upper()}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_bytes(text: str) -> int:
    """A size: "25M", "512k", "1000"."""
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


def read_time(text: str) -> float:
    """A duration in seconds: "5m", "90s", "1h", "0", "-1" for ever."""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:].lower())
    return float(text) if factor is None else float(text[:-1]) * factor


def read_ice_servers(text: str) -> tuple[dict[str, Any], ...]:
    """ICE servers: JSON of `RTCIceServer` objects, or their addresses with commas between them.

    Raises:
        ValueError: it is neither.
    """
    if not text.strip().startswith(("[", "{")):
        addresses = filter(None, (part.strip() for part in text.split(",")))
        return tuple({"urls": [address]} for address in addresses)
    found = json.loads(text)
    servers = found if isinstance(found, list) else [found]
    if not all(isinstance(server, dict) for server in servers):
        raise ValueError("not a list of objects")
    return tuple(servers)


def _check_ice_server(server: dict[str, Any]) -> None:
    urls = server.get("urls")
    for url in urls if isinstance(urls, list) else [urls]:
        if not isinstance(url, str) or not ICE_URL.fullmatch(url):
            raise ConfigError(
                f"--ice-servers: {url!s:.100} is not like stun:stun.example:3478 or "
                "turn:turn.example:3478?transport=udp"
            )
        named = all(isinstance(server.get(name), str) for name in ("username", "credential"))
        if url.startswith("turn") and not named:
            raise ConfigError(
                f"--ice-servers: {url:.100} needs a name and a password: give JSON such as "
                '[{"urls": "turn:turn.example:3478", "username": "u", "credential": "p"}]'
            )
    if unknown := set(server) - {"urls", "username", "credential"}:
        raise ConfigError(f"--ice-servers: there is no field {min(unknown):.40}")


def _host(origin: str) -> str:
    return origin.partition("://")[2]


def _is_key(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and not set(key) & set(' ",')


def _check_range(name: str, value: Any, rules: Any) -> None:
    least, most = rules.get("least"), rules.get("most")
    choices = rules.get("choices")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{option_of(name)} must be a finite number")
    if least is not None and value < least:
        raise ConfigError(f"{option_of(name)} must be at least {least}, not {value}")
    if most is not None and value > most:
        raise ConfigError(f"{option_of(name)} must be at most {most}, not {value}")
    if choices is not None and value not in choices:
        raise ConfigError(f"{option_of(name)} must be one of {', '.join(choices)}")
