"""The page's files: read once, looked up by name, never opened by a client's path."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mimo_fast.server.settings import is_loopback

SITE = Path(__file__).parent / "site"
INDEX = "index.html"

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Media types by suffix: those of the system's tables differ from machine to machine."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        # WebSockets of the same host are 'self', too.
        "connect-src 'self'",
        # What was recorded or said is played from memory.
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self), screen-wake-lock=(self), camera=(), geolocation=()",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser asks each time whether the file is still the same: an update is seen at once.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class File:
    """A file of the page.

    Attributes:
        tag: Its ETag.
    """

    data: bytes
    media: str
    tag: str


@cache
def page_files() -> dict[str, File]:
    """Every file by its path under `SITE`, with `/` between its parts."""
    found = dict[str, File]()
    for path in sorted(SITE.rglob("*")):
        if path.suffix in TYPES and path.is_file():
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            found[path.relative_to(SITE).as_posix()] = File(data, TYPES[path.suffix], tag)
    return found


def _answer(request: Request, file: File) -> Response:
    headers = HEADERS | {"ETag": file.tag}
    if request.url.scheme == "https" or is_loopback(request.url.hostname or ""):
        # Browsers complain of it on any other page.
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
    known = request.headers.get("if-none-match", "")
    if file.tag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=304, headers=headers)
    # The charset is part of the type already.
    return Response(file.data, headers=headers | {"Content-Type": file.media})


async def page(request: Request) -> Response:
    """`/`."""
    return _answer(request, page_files()[INDEX])


async def static_files(scope: Scope, receive: Receive, send: Send) -> None:
    """`/static/...`, as an application that is mounted there."""
    if scope["type"] != "http":
        raise HTTPException(404, "there is no such file")
    request = Request(scope, receive)
    if request.method not in ("GET", "HEAD"):
        raise HTTPException(405, "files are read, with GET", {"Allow": "GET, HEAD"})
    prefix = f"{scope.get('root_path', '').rstrip('/')}/"
    file = page_files().get(scope["path"].removeprefix(prefix))
    if file is None:
        raise HTTPException(404, "there is no such file")
    await _answer(request, file)(scope, receive, send)
