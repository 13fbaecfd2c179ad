"""Short-lived keys for browsers and phones: each opens realtime sessions of its settings only."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from mimo_fast.server.checks import Json
from mimo_fast.server.errors import ApiError, full

PREFIX = "ek_"
"""What every client secret begins with."""

SCOPE = frozenset({"/v1/realtime", "/v1/realtime/calls"})
"""Paths that a client secret opens, besides those below `/v1/realtime/calls/`."""

MOST = 1000
"""Client secrets at once."""

MOST_BYTES = 16 << 20
"""Of the settings of all of them, as JSON."""


@dataclass(frozen=True)
class ClientSecret:
    """A key, of which only the digest is kept.

    Attributes:
        session: Settings of the sessions that it opens.
        ends: When it expires, by the store's clock.
        size: Bytes of `session` as JSON.
    """

    digest: bytes = field(repr=False)
    session: Json = field(repr=False)
    ends: float
    size: int


class ClientSecrets:
    """The client secrets of a server, which forgets them when they expire and when it stops.

    Args:
        clock: seconds, of a clock that nobody sets.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._known = dict[bytes, ClientSecret]()
        self._size = 0

    def __len__(self) -> int:
        return len(self._known)

    def make(self, session: Json, seconds: float) -> str:
        """A new secret.

        Raises:
            ApiError: of status 429, there are too many.
        """
        self._forget_expired()
        size = len(json.dumps(session))
        if size > MOST_BYTES:
            raise ApiError("the settings of a session are too large", 413, param="session")
        if len(self._known) >= MOST or self._size + size > MOST_BYTES:
            first = min(secret.ends for secret in self._known.values())
            wait = max(1.0, first - self._clock())
            raise full("too many client secrets: wait until some have expired", wait)
        value = PREFIX + secrets.token_urlsafe(32)
        digest = _digest(value)
        self._known[digest] = ClientSecret(digest, session, self._clock() + seconds, size)
        self._size += size
        return value

    def find(self, value: str) -> ClientSecret | None:
        """The secret of this value; None for one that is unknown or has expired."""
        digest = _digest(value)
        # What the time of a look-up tells is about a digest, from which no value follows.
        found = self._known.get(digest)
        if found is None or not hmac.compare_digest(found.digest, digest):
            return None
        return found if self._clock() < found.ends else None

    def _forget_expired(self) -> None:
        now = self._clock()
        for digest in [each for each, secret in self._known.items() if now >= secret.ends]:
            self._size -= self._known.pop(digest).size


def opens(path: str) -> bool:
    """Whether client secrets are let in at a path."""
    return path in SCOPE or path.startswith("/v1/realtime/calls/")


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).digest()
