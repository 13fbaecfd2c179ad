"""Who may use the server: its names, the pages whose scripts call it, keys and rates."""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from time import monotonic
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mimo_fast.server.client_secrets import PREFIX, ClientSecrets, opens
from mimo_fast.server.errors import ApiError, full
from mimo_fast.server.settings import Settings, is_loopback

OPEN = frozenset({"/", "/health", "/ready"})
"""Paths that need no key, besides those under `STATIC`."""

STATIC = "/static/"
KEY_PROTOCOL = "openai-insecure-api-key."
"""Prefix of the WebSocket subprotocol by which a browser, which cannot set headers, sends a key."""

BURST = 5.0
"""Seconds of the rate that may come at once."""

ADDRESSES = 4096
"""Addresses whose rates are remembered."""


class Guard:
    """Refuses requests and WebSockets that may not use the server, before anything is read.

    A name in the Host header that is not the server's own is refused, or a web page could reach a
    local server by a name of its own that resolves to this machine. An Origin other than the
    server's and those of the settings is refused, or any page could use a server without a key.
    A client secret is a key for realtime sessions, which find it in `scope["client_secret"]`.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, secrets: ClientSecrets | None = None
    ) -> None:
        self._app = app
        self._secrets = ClientSecrets() if secrets is None else secrets
        self._key = None if settings.api_key is None else _digest(settings.api_key)
        self._origins = frozenset(origin.lower() for origin in settings.allowed_origins)
        self._hosts = _hosts(settings)
        self._rates = Rates(settings.max_rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            self._check(scope)
            if scope["type"] == "websocket":
                send = _choosing_protocol(scope, send)
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name_of(host) not in self._hosts:
            raise ApiError(
                f"this server is not known as {host:.100}: use its own name, or start it with "
                "--allowed-hosts",
                421,
                "host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._allows(scope, origin.lower(), host.lower()):
            raise ApiError(
                f"pages of {origin:.100} may not use this server: start it with --allowed-origins",
                403,
                "origin_not_allowed",
            )
        path, client = scope["path"], scope.get("client")
        is_open = path in OPEN or path.startswith(STATIC)
        if wait := 0.0 if is_open else self._rates.wait(client[0] if client else ""):
            raise full("too many requests: slow down, or raise --max-rate", wait)
        given = "" if is_open else _given_key(headers)
        if given.startswith(PREFIX) and not self._is_key(given):
            self._let_in(scope, given)
        elif self._key is not None and not is_open:
            if not given:
                raise _wrong_key("no key was given: send the header 'Authorization: Bearer KEY'")
            if not self._is_key(given):
                raise _wrong_key("the key is not this server's")

    def _is_key(self, given: str) -> bool:
        return self._key is not None and hmac.compare_digest(_digest(given), self._key)

    def _let_in(self, scope: Scope, given: str) -> None:
        secret = self._secrets.find(given)
        if secret is None:
            raise _wrong_key("there is no such client secret, or it has expired: ask for another")
        if not opens(scope["path"]):
            raise ApiError(
                "a client secret opens realtime sessions and nothing else: use the server's key",
                403,
                "client_secret_scope",
            )
        scope["client_secret"] = secret

    def _allows(self, scope: Scope, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
        return origin == f"{scheme}://{host}"


class Rates:
    """Requests a second of each address: a bucket that fills at `rate` and holds `BURST` of it."""

    def __init__(self, rate: float) -> None:
        self._rate, self._most = rate, max(1.0, rate * BURST)
        self._buckets = OrderedDict[str, tuple[float, float]]()

    def wait(self, address: str) -> float:
        """Takes one request; seconds until there would be room for it, 0 where there is."""
        now = monotonic()
        left, at = self._buckets.pop(address, (self._most, now))
        left = min(self._most, left + (now - at) * self._rate)
        missing = max(0.0, 1 - left)
        self._buckets[address] = (left if missing else left - 1, now)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return missing / self._rate


def _digest(key: str) -> bytes:
    # Digests have one length, so that comparing them takes one time.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    for each in _protocols(headers):
        if each.startswith(KEY_PROTOCOL):
            return each.removeprefix(KEY_PROTOCOL)
    return ""


def _wrong_key(message: str) -> ApiError:
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(message, 401, "invalid_api_key", headers=headers)


def _protocols(headers: Headers) -> list[str]:
    listed = headers.getlist("sec-websocket-protocol")
    return [each.strip() for line in listed for each in line.split(",")]


def _choosing_protocol(scope: Scope, send: Send) -> Send:
    """Accepts with subprotocol "realtime" where it was offered: a browser insists on one of its."""

    async def choosing(message: Message) -> None:
        chosen = message.get("subprotocol") or "realtime"
        if message["type"] == "websocket.accept" and chosen in scope.get("subprotocols", ()):
            message = {**message, "subprotocol": chosen}
        await send(message)

    return choosing


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _hosts(settings: Settings) -> frozenset[str] | None:
    """Names that the server goes by; None for any, where a key keeps strangers out."""
    given = {_name_of(host) for host in settings.allowed_hosts}
    if not given and not is_loopback(settings.host):
        return None
    if "*" in settings.allowed_hosts:
        return None
    return frozenset({*given, "localhost", "127.0.0.1", "::1", _name_of(settings.host)})
