"""Errors in the API's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_fast.errors import (
    AudioError,
    BusyError,
    ClosedError,
    DeviceMemoryError,
    NumericError,
    PromptError,
    TaskError,
)


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: what is wrong and how to mend it, for whoever wrote the client.
        status: of HTTP; realtime sessions do not use it.
        code: a short name that clients compare.
        param: the argument that is wrong.
        kind: the `type` of the API's error object.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that a client gets, without `event_id`."""
        return {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }


def full(what: str, seconds: float = 1.0) -> ApiError:
    """The refusal of a server whose places are taken."""
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return ApiError(what, 429, "rate_limit_exceeded", kind="rate_limit_error", headers=headers)


def as_api_error(error: BaseException) -> ApiError:
    """Any error of a request; what nobody foresaw says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AudioError):
        return ApiError(str(error), 400, "invalid_audio")
    if isinstance(error, TaskError):
        return ApiError(str(error), 400, "unsupported_value")
    if isinstance(error, PromptError):
        return ApiError(str(error), 400, "context_length_exceeded")
    if isinstance(error, BusyError):
        return full(str(error))
    if isinstance(error, DeviceMemoryError):
        return full("the server is out of memory; try again")
    if isinstance(error, NumericError):
        return ApiError("the model's values were not finite", 500, "model_error")
    if isinstance(error, ClosedError):
        return ApiError("the server is stopping", 503, "server_stopping")
    return ApiError("an error of the server; its log has more", 500, "internal_error")
