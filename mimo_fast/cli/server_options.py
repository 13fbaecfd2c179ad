"""The fields of `Settings` as options of `mimo-fast serve`."""

import argparse
import os
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from mimo_fast.errors import ConfigError
from mimo_fast.server.settings import (
    Settings,
    option_of,
    read_bytes,
    read_ice_servers,
    read_time,
    variable_of,
)

GROUPS = {
    "address": ("host", "port", "ssl_certfile", "ssl_keyfile", "self_signed", "ice_servers"),
    "access": ("api_key", "allowed_origins", "allowed_hosts"),
    "voices": ("voices", "allow_voice_upload", "examples", "mark"),
    "Home Assistant": ("wyoming", "wyoming_clients"),
    "limits": (
        *("max_sessions", "max_requests", "queue_seconds", "max_connections", "max_rate"),
        *("max_body_bytes", "max_message_bytes", "max_audio_seconds", "max_text_chars"),
        *("max_choices", "max_load", "max_parked_bytes"),
    ),
    "replicas": (
        *("ray", "ray_address", "replicas", "min_replicas", "max_replicas", "target_ongoing"),
        *("cpus_per_replica", "gpus_per_replica"),
    ),
    "running": ("keep_alive", "drain_seconds", "log_level", "log_words"),
}

FOLDERS = "voices", "examples"

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class FromVariable(str):
    """The text of an environment variable, which an error about it names."""

    name: str

    def __new__(cls, name: str) -> "FromVariable":
        made = super().__new__(cls, os.environ[name])
        made.name = name
        return made


def naming_variable(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of an option whose errors name the variable that its text is from."""

    def reading(text: str) -> Any:
        try:
            return read(text)
        except argparse.ArgumentTypeError as error:
            if isinstance(text, FromVariable):
                raise argparse.ArgumentTypeError(f"{text.name} {error}") from error
            raise

    return reading


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field; one that is not given is taken from the environment."""
    known = {each.name: each for each in fields(Settings)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(
            title, "each is also MIMO_FAST_ and its name, in capitals"
        )
        for name in names:
            _add(group, known.pop(name))
    assert not known, f"no group has {', '.join(known)}"


def take_variables(parser: argparse.ArgumentParser) -> None:
    """Makes the environment the default of the parser's other options, which commands share."""
    known = {each.name for each in fields(Settings)}
    for action in parser._actions:
        text = os.environ.get(variable_of(action.dest))
        if not text or action.dest in known or not action.option_strings:
            continue
        if action.nargs == 0:
            action.default = text.lower() in YES
        elif isinstance(action, argparse._AppendAction):
            action.default = [part.strip() for part in text.split(",")]
        else:
            action.default = FromVariable(variable_of(action.dest))
            if callable(action.type):
                action.type = naming_variable(action.type)


def check_choices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses values of the environment that an option would refuse: argparse checks no default.

    Raises:
        ConfigError: one is not among its option's choices.
    """
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        for value in given if isinstance(given, list) else [given]:
            if action.choices and value is not None and value not in action.choices:
                listed = ", ".join(map(str, action.choices))
                raise ConfigError(f"{variable_of(action.dest)} must be one of {listed}")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of parsed options.

    Raises:
        ConfigError: they contradict each other.
    """
    check_choices(args.parser, args)
    found = {each.name: getattr(args, each.name) for each in fields(Settings)}
    for each in fields(Settings):
        if found[each.name] is None and isinstance(each.default, bool):
            found[each.name] = _flag(each)
    return Settings(**found)


def _add(group: argparse._ArgumentGroup, each: Field[Any]) -> None:
    name, rules = each.name, each.metadata
    given = os.environ.get(variable_of(name))
    shown = "from the environment" if given and rules.get("secret") else given or _shown(each)
    options: dict[str, Any] = {"help": f"{rules['help']} [{shown}]".replace("%", "%%")}
    if isinstance(each.default, bool):
        options |= {"action": argparse.BooleanOptionalAction}
        group.add_argument(option_of(name), default=None, **options)
        return
    if isinstance(each.default, tuple):
        options |= {"metavar": "JSON" if each.metadata.get("unit") == "ice" else "A,B"}
    else:
        options |= {"metavar": _metavar(each)}
    # A text as default is read like one that is given, and only if this command is.
    options["default"] = FromVariable(variable_of(name)) if given else each.default
    group.add_argument(option_of(name), type=naming_variable(_reader(each)), **options)


def _shown(each: Field[Any]) -> str:
    value: Any = each.default
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if each.metadata.get("unit") == "bytes":
        return f"{value >> 20}M" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(each: Field[Any]) -> str:
    if "metavar" in each.metadata:
        return str(each.metadata["metavar"])
    if "choices" in each.metadata:
        return "|".join(each.metadata["choices"])
    if isinstance(each.default, int | float):
        return {"bytes": "BYTES", "time": "TIME"}.get(each.metadata.get("unit", ""), "N")
    known = {"host": "ADDRESS", "api_key": "KEY", "ray_address": "ADDRESS"}
    known |= dict.fromkeys(FOLDERS, "DIR")
    return known.get(each.name, "FILE")


def _reader(each: Field[Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            if each.metadata.get("unit") == "bytes":
                return read_bytes(text)
            if each.metadata.get("unit") == "time":
                return read_time(text)
            if each.metadata.get("unit") == "ice":
                return read_ice_servers(text)
            if isinstance(each.default, int | float):
                return type(each.default)(text)
        except ValueError as error:
            kind = {"bytes": "a size such as 25M", "time": "a time such as 5m"}
            kind |= {"ice": "JSON, or addresses with commas"}
            wanted = kind.get(each.metadata.get("unit", ""), "a number")
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text:.40}") from error
        if isinstance(each.default, tuple):
            return tuple(filter(None, (part.strip() for part in text.split(","))))
        if each.name in (*FOLDERS, "ssl_certfile", "ssl_keyfile"):
            return Path(os.path.expanduser(text)) if text else None
        # A plain text: that of a variable knows its name, and is not for other processes.
        return str(text) if text else each.default

    return read


def _flag(each: Field[Any]) -> bool:
    """An option of yes or no that was not given, from the environment."""
    text = os.environ.get(variable_of(each.name), "").lower()
    if text not in (*YES, *NO):
        raise ConfigError(f"{variable_of(each.name)} must be 1 or 0, not {text:.40}")
    return text in YES if text else bool(each.default)
