"""`python -m mimo_fast.server.probe`: whether the server of this machine is ready, as an exit code.

For health checks of containers that have no curl. The address is taken from the server's own
variables: MIMO_FAST_HOST, MIMO_FAST_PORT, MIMO_FAST_SSL_CERTFILE.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys

WAIT = 12.0
"""Seconds that an answer may take: `/ready` itself waits for ten."""

EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ready(host: str, port: int, encrypted: bool = False) -> bool:
    """Whether `GET /ready` is answered with 200."""
    try:
        if encrypted:
            # A certificate is for other names than this machine's.
            context = ssl._create_unverified_context()
            secure = http.client.HTTPSConnection
            asked: http.client.HTTPConnection = secure(host, port, timeout=WAIT, context=context)
        else:
            asked = http.client.HTTPConnection(host, port, timeout=WAIT)
        asked.request("GET", "/ready", headers={"Host": f"localhost:{port}"})
        return asked.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def main() -> int:
    host = os.environ.get("MIMO_FAST_HOST", "").strip("[]")
    port = int(os.environ.get("MIMO_FAST_PORT") or 8000)
    encrypted = bool(os.environ.get("MIMO_FAST_SSL_CERTFILE"))
    return 0 if is_ready(EVERYWHERE.get(host, host), port, encrypted) else 1


if __name__ == "__main__":
    sys.exit(main())
