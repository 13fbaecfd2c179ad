"""A reader of Dockerfiles: stages and their instructions, with arguments and variables put in."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One FROM and what follows it.

    Attributes:
        base: the image or the stage that it begins with.
        instructions: (name, rest) of each instruction, in order.
    """

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [rest for each, rest in self.instructions if each == name]

    def last(self, name: str) -> str:
        return self.all(name)[-1]

    def command(self, name: str) -> list[str]:
        """The list of an instruction in its exec form."""
        found = json.loads(self.last(name))
        assert isinstance(found, list)
        return found

    @property
    def environment(self) -> dict[str, str]:
        pairs = (word.partition("=") for rest in self.all("ENV") for word in shlex.split(rest))
        return {name: value for name, _, value in pairs}

    def copied(self) -> list[tuple[list[str], str]]:
        """Sources and target of each COPY from the build's context."""
        words = [rest.split() for rest in self.all("COPY")]
        return [(each[:-1], each[-1]) for each in words if not each[0].startswith("--from")]


def read_dockerfile(path: Path) -> list[Stage]:
    text = "\n".join(
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    )
    text = re.sub(r"\\\n\s*", " ", text)
    defaults, stages = dict[str, str](), list[Stage]()
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.partition(" ")
        assert name.isupper(), line
        if name == "ARG" and not stages:
            key, _, value = rest.partition("=")
            defaults[key] = value
        elif name == "FROM":
            base, _, stage = rest.partition(" AS ")
            for key, value in defaults.items():
                base = base.replace(f"${{{key}}}", value)
            stages.append(Stage(stage, base))
        else:
            stages[-1].instructions.append((name, rest.strip()))
    return stages


class Ignored:
    """The patterns of a .dockerignore; the last that matches a path decides."""

    def __init__(self, path: Path) -> None:
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        self._patterns = [line for line in lines if line and not line.startswith("#")]

    def __call__(self, path: str) -> bool:
        ignored = False
        for pattern in self._patterns:
            wanted = pattern.removeprefix("!")
            if _matches(path, wanted):
                ignored = not pattern.startswith("!")
        return ignored


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a path or a folder above it."""
    expression = re.escape(pattern.strip("/")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
    expression = expression.replace(r"\[", "[").replace(r"\]", "]")
    return re.fullmatch(f"{expression}(?:/.*)?", path) is not None
