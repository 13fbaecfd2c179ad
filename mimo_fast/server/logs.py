"""The log: one JSON object a line, without the users' words unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("mimo_fast.server")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request or session that the current task serves."""

words_wanted: ContextVar[bool] = ContextVar("words_wanted", default=False)
"""Whether the users' words may be logged in the current task."""


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs an event with its fields; those that are None are left out.

    Fields must hold no words of users; those go through `said`.
    """
    if LOGGER.isEnabledFor(level):
        identity = request_id.get()
        found = {"request": identity} if identity else {}
        found |= {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(level, event, extra={"fields": found})


def said(text: str) -> str | int:
    """Words for a log: themselves if they are asked for, else their number of characters."""
    return text if words_wanted.get() else len(text)


def log_failure(error: BaseException, **fields: Any) -> None:
    """Logs an error that nobody foresaw: where it arose, and its message only with words.

    A message may quote what a user said.
    """
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    shown = f"{type(error).__name__}: {error}" if words_wanted.get() else type(error).__name__
    log("error", logging.ERROR, error=shown, where=where, **fields)


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != LOGGER.name:
            found["logger"] = record.name
        if record.exc_info and record.exc_info[0] is not None:
            found["error"] = record.exc_info[0].__name__
        found |= getattr(record, "fields", {})
        # In ASCII: some characters of others end a line, or change what a terminal shows.
        return json.dumps(found, default=str)


def set_up_logs(level: str, stream: TextIO | None = None) -> None:
    """Sends the server's log, and the warnings of what it stands on, to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    wanted = {"mimo_fast.server": level.upper()}
    wanted |= dict.fromkeys(("uvicorn.error", "aiortc", "aioice"), "WARNING")
    for name, least in wanted.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
