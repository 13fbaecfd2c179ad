"""The log: one JSON object a line, without the users' words unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("mimo_fast.server")

FRAMES = 12
"""Calls that are named of an error."""

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
    shown = f"{type(error).__name__}: {error}" if words_wanted.get() else type(error).__name__
    log("error", logging.ERROR, error=shown, where=where(error), **fields)


def where(error: BaseException) -> list[str]:
    """The innermost calls in which an error arose, and those of what it arose from."""
    found = list[str]()
    for each in (error.__cause__ or error.__context__, error):
        frames = traceback.extract_tb(each.__traceback__)[-FRAMES:] if each else []
        found += [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    return found


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != LOGGER.name:
            found["logger"] = record.name
            # asyncio shows the task, and with it the error's message, in further lines.
            found["event"] = found["event"].partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            found |= {"error": type(error).__name__, "where": where(error)}
        found |= getattr(record, "fields", {})
        # In ASCII: some characters of others end a line, or change what a terminal shows.
        return json.dumps(found, default=str)


def set_up_logs(level: str, stream: TextIO | None = None) -> None:
    """Sends the server's log, and warnings of all else in the process, to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_of_thread


def _log_unraisable(found: sys.UnraisableHookArgs) -> None:
    """An error that nobody could be given, such as one of a generator that is thrown away."""
    if found.exc_value is not None:
        log_failure(found.exc_value, ignored_in=getattr(found.object, "__qualname__", None))


def _log_of_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
        log_failure(found.exc_value, thread=found.thread.name if found.thread else None)
