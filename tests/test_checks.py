"""`make test` and `make check` together run every test, and each once."""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mimo_fast.kernels import installed_triton

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def output_of(command: list[str], without: str, **added: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the repository, without the environment's variables of this name."""
    environment = {name: value for name, value in os.environ.items() if without not in name}
    options = {"cwd": ROOT, "env": environment | added}
    return subprocess.run(command, capture_output=True, text=True, **options)


@dataclass
class Run:
    """One call of pytest.

    again: it repeats some tests with another version of a package, first on the path.
    """

    environment: dict[str, str]
    paths: list[Path]
    ignore: list[Path]
    marks: str
    names: str = ""

    @property
    def again(self) -> bool:
        return "PYTHONPATH" in self.environment

    def takes(self, file: Path) -> bool:
        taken, ignored = (map(file.is_relative_to, each) for each in (self.paths, self.ignore))
        return any(taken) and not any(ignored)

    def collected(self) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--collect-only"]
        command += [*map(str, self.paths), *(f"--ignore={path}" for path in self.ignore)]
        command += ["-p", "no:cacheprovider", "-m", self.marks, "-k", self.names]
        result = output_of(command, without="PYTEST", **self.environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return [line for line in result.stdout.splitlines() if line.startswith("tests/")]


EVERYTHING = Run({"TRITON_INTERPRET": "1"}, [Path("tests")], [], "")


def runs(target: str) -> list[Run]:
    """The calls of pytest that `make TARGET` makes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", dest="marks", default="")
    parser.add_argument("-k", dest="names", default="")
    parser.add_argument("-r")
    parser.add_argument("-n")
    parser.add_argument("--dist")
    parser.add_argument("--ignore", type=Path, action="append", default=[])
    parser.add_argument("paths", type=Path, nargs="*")
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    listed = output_of(command, without="MAKE")
    listed.check_returncode()
    found = []
    for line in listed.stdout.splitlines():
        before, is_pytest, after = line.partition(" -m pytest")
        if not is_pytest:
            continue
        options = parser.parse_args(shlex.split(after))
        environment = dict(word.split("=") for word in shlex.split(before) if "=" in word)
        paths = options.paths or EVERYTHING.paths
        found.append(Run(environment, paths, options.ignore, options.marks, options.names))
    return found


@pytest.fixture(scope="module")
def before_commits() -> list[Run]:
    return runs("test")


@pytest.fixture(scope="module")
def all_before_merges() -> list[Run]:
    return runs("check")


@pytest.fixture(scope="module")
def before_merges(all_before_merges: list[Run]) -> list[Run]:
    return [run for run in all_before_merges if not run.again]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_is_run_whole(file, before_commits, before_merges):
    before = [run.marks for run in before_commits if run.takes(file)]
    after = [run.marks for run in before_merges if run.takes(file)]
    assert (before, after) in ((["not slow"], ["slow"]), ([], [""]))


def test_the_interpreter_runs_its_own_files(before_merges):
    for run in before_merges:
        interpreted = all(path.is_relative_to("tests/interpreted") for path in run.paths)
        assert (run.environment.get("TRITON_INTERPRET") == "1") == interpreted


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no build for this platform")
def test_the_compile_matrix_is_run_again_with_the_oldest_triton(all_before_merges):
    (again,) = [run for run in all_before_merges if run.again]
    assert again.paths == [Path("tests/kernels/test_compile_matrix.py")]
    assert again.names.startswith("test_compiles_without_spills and (sm_90 or ")
    text = (ROOT / ".ci" / "oldest-triton.txt").read_text(encoding="utf-8")
    version = ".".join(map(str, installed_triton.OLDEST))
    assert re.findall(r"(?m)^triton==(\S+) ", text) == [f"{version}.0"]
    assert len(set(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", text))) == 6


ALONE = [Path("tests/server/browser"), Path("tests/server/replicas")]


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="has other parts"
)
def test_what_needs_the_machine_to_itself_comes_last(all_before_merges):
    assert [run.paths for run in all_before_merges[-2:]] == [[each] for each in ALONE]
    assert [run.paths for run in runs("alone")] == [[each] for each in ALONE]
    # After its prerequisites, which run side by side, and by its recipe, which does not.
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (parts, recipe) = re.search(r"(?m)^check: (.*)\n\t(.*)$", text).groups()
    assert not re.search(r"\b(alone|browser|ray)\b", parts)
    assert "$(MAKE) alone" in recipe


def test_no_test_lies_where_none_is_looked_for():
    for path in (ROOT / "tests").rglob("*.py"):
        if path.relative_to(ROOT) not in FILES:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(async )?def test_|^class Test", text, re.M)


def joined(each: Iterable[Run]) -> Iterator[Run]:
    """The runs; two that divide the same files by the mark `slow` are one."""
    alike: dict[str, list[Run]] = {}
    for run in each:
        alike.setdefault(str(replace(run, marks="")), []).append(run)
    for group in alike.values():
        halves = sorted(run.marks for run in group) == ["not slow", "slow"]
        yield from [replace(group[0], marks="")] if halves else group


def test_only_two_halves_are_joined():
    fast, slow = (Run({}, [Path("tests")], [], marks) for marks in ("not slow", "slow"))
    other = replace(slow, ignore=[Path("tests/server")])
    assert [*joined([fast, other, slow])] == [replace(fast, marks=""), other]
    for kept in ([fast, slow, slow], [fast, fast], [slow], [fast, replace(slow, names="x")]):
        assert [*joined(kept)] == kept


@pytest.mark.slow
def test_every_test_is_collected_once(before_commits, before_merges):
    each = joined([*before_commits, *before_merges])
    found = Counter(name for run in each for name in run.collected())
    assert found == Counter(EVERYTHING.collected())
