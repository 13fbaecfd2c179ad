"""Checks of what a client sends; every refusal names the parameter and what it may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mimo_fast.json_files import shown
from mimo_fast.server.errors import ApiError

Json = dict[str, Any]


def refusal(problem: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(problem, code=code, param=param)


def mapping(value: Any, param: str) -> Json:
    if not isinstance(value, dict):
        raise refusal(f"{param} must be an object, not {shown(value)}", param, "invalid_type")
    return value


def needed(event: Mapping[str, Any], name: str, param: str | None = None) -> Any:
    """A field that must be there."""
    if event.get(name) is None:
        param = param or name
        raise refusal(f"{param} is missing", param, "missing_required_parameter")
    return event[name]


def text(value: Any, param: str, longest: int) -> str:
    if not isinstance(value, str):
        raise refusal(f"{param} must be a text, not {shown(value)}", param, "invalid_type")
    if len(value) > longest:
        problem = f"{param} has {len(value)} characters, {longest} are the most"
        raise refusal(problem, param, "string_above_max_length")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refusal(f"{param} holds half of a surrogate pair", param) from None
    return value


def one_of(value: Any, param: str, known: Collection[Any]) -> Any:
    if not isinstance(value, str) or value not in known:
        names = ", ".join(map(repr, known))
        raise refusal(f"{param} is {shown(value)}; it may be {names}", param)
    return value


def boolean(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise refusal(f"{param} must be true or false, not {shown(value)}", param, "invalid_type")
    return value


def number(value: Any, param: str, least: float, most: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:
        raise refusal(f"{param} is {shown(value)}; it may be {least:g} to {most:g}", param)
    return float(value)


def whole(value: Any, param: str, least: int, most: int) -> int:
    found = number(value, param, least, most)
    if found != int(found):
        raise refusal(f"{param} must be a whole number, not {shown(value)}", param, "invalid_type")
    return int(found)


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], param: str) -> None:
    """Raises ApiError for the first name that is not known."""
    for name in given:
        if name not in known:
            full = f"{param}.{name}" if param else str(name)
            raise refusal(f"unknown parameter {full:.100}", full[:100], "unknown_parameter")


def metadata(value: Any, param: str) -> dict[str, str] | None:
    """At most 16 texts by their names."""
    if value is None:
        return None
    found = mapping(value, param)
    if len(found) > 16:
        raise refusal(f"{param} has more than 16 entries", param)
    for name, each in found.items():
        text(name, param, 64)
        text(each, f"{param}.{name[:64]}", 512)
    return found
