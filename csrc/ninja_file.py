"""Writes and runs a build.ninja: parallel, and only what has changed since the last build."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path


def ninja_program() -> str | None:
    """The `ninja` of the Python package, or the one on the path; None for none."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


class NinjaFile:
    """Rules and edges of one build. Paths of edges are absolute or relative to `directory`, where
    the file, its log and its outputs are. Builds of other names there share outputs with it.
    """

    def __init__(self, directory: Path, name: str = "build.ninja") -> None:
        self.directory = directory.absolute()
        self._path = self.directory / name
        self._lines = ["ninja_required_version = 1.8", ""]
        self._targets: list[str] = []

    def rule(self, name: str, command: str, description: str, depfile: bool = False) -> None:
        """command: with $in, $out and the edges' variables. depfile: it writes the headers that it
        read to $out.d, as compilers do with -MMD -MF.
        """
        self._lines += [f"rule {name}", f"  command = {command}", f"  description = {description}"]
        if depfile:
            self._lines += ["  depfile = $out.d", "  deps = gcc"]
        self._lines.append("")

    def edge(
        self,
        output: str | Path,
        rule: str,
        inputs: Iterable[str | Path],
        variables: Mapping[str, str] | None = None,
        target: bool = False,
    ) -> str:
        """One output; returns its path. target: `run` makes it, and what it needs."""
        sources = " ".join(_escaped(str(path)) for path in inputs)
        self._lines.append(f"build {_escaped(str(output))}: {rule} {sources}")
        self._lines += [f"  {name} = {value}" for name, value in (variables or {}).items()]
        if target:
            self._targets.append(str(output))
        return str(output)

    def run(self) -> bool:
        """Whether all targets could be made; they lie under `directory`."""
        program = ninja_program()
        if program is None:
            print("ninja is missing: pip install ninja")
            return False
        self.directory.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join([*self._lines, ""]), encoding="utf-8")
        # ninja's own default is two more jobs than there are cores.
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [program, "-C", str(self.directory), "-f", self._path.name, "-j", jobs]
        return subprocess.run([*command, *self._targets], check=False).returncode == 0


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
