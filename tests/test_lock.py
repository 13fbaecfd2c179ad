"""What CI installs is pinned by version and hash, what builds the package included."""

import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HERE = f"{sys.version_info.major}.{sys.version_info.minor}-{sysconfig.get_platform()}"
LINE = re.compile(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}")

FAKE = """#!/bin/sh
if [ "$1" = -c ]; then echo {here}; else echo "$*" >> {log}; fi
"""


def lines(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in text if line and not line.startswith("#")]


def pins(found: list[str]) -> dict[str, str]:
    pairs = (line.split("==") for line in found)
    return {canonicalize_name(name): version for name, version in pairs}


def locked() -> dict[str, str]:
    found = [LINE.fullmatch(line) for line in lines("requirements.lock")]
    assert all(found), "each line is one version and one hash"
    return pins([f"{match[1]}=={match[2]}" for match in found if match])


def test_versions_are_those_of_the_constraints():
    constraints = pins(lines("constraints.txt"))
    assert locked().items() <= constraints.items()
    assert "torch" in constraints
    assert "torch" not in locked()


def test_what_builds_the_package_is_pinned_and_locked():
    required = pins(PROJECT["build-system"]["requires"])
    assert required
    assert required.items() <= locked().items()


def needed(names: list[str]) -> set[str]:
    """All packages that these requirements lead to in this environment, torch's own left out."""
    found, waiting = set[str](), [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        if name in found:
            continue
        found.add(name)
        if name == "torch":
            continue
        for inner in map(Requirement, importlib.metadata.requires(name) or ()):
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(Requirement(re.sub(r";.*", "", str(inner))))
    return found


@pytest.mark.skipif(
    (ROOT / "requirements.lock").read_text().partition("\n")[0] != f"# for {HERE}",
    reason="the lock is for another Python or platform",
)
def test_it_holds_all_that_the_tests_need():
    project = PROJECT["project"]
    names = needed([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    assert names - locked().keys() == {"torch"}


@pytest.mark.parametrize(("here", "hashed"), [("locked", True), ("3.13-macosx-14.0-arm64", False)])
def test_the_install_compares_hashes_where_it_can(tmp_path, here, hashed):
    first = (ROOT / "requirements.lock").read_text().partition("\n")[0]
    here = first.removeprefix("# for ") if hashed else here
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE.format(here=here, log=log))
    python.chmod(0o755)
    subprocess.run([ROOT / ".ci" / "install", python], check=True)
    calls = log.read_text().splitlines()
    if hashed:
        assert "--require-hashes --no-deps -r requirements.lock" in calls[0]
        assert calls[1].endswith("-c constraints.txt torch")
        assert "--no-deps --no-build-isolation -e ." in calls[2]
    else:
        assert [call.endswith("-c constraints.txt -e .[dev]") for call in calls] == [True]


def test_make_installs_by_it():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert ".ci/install $(BIN)/python" in makefile


APART = ("clients", "browser")
"""What has an environment of its own."""

PIN = re.compile(r"(\S+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n")


@pytest.mark.parametrize("name", APART)
def test_what_lies_apart_is_pinned_and_locked(name):
    wanted = {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, lines(f".ci/{name}.in"))
    }
    text = (ROOT / ".ci" / f"{name}.txt").read_text(encoding="utf-8")
    found = PIN.findall(text)
    locked_text = "".join(f"{name}=={version}{hashes}\n" for name, version, hashes in found)
    assert locked_text == re.sub(r"(?m)^#.*\n", "", text), "each line is one version and its hashes"
    assert wanted
    assert wanted.items() <= {canonicalize_name(name): each for name, each, _ in found}.items()
    if name == "clients":
        assert wanted["openai"] == pins(lines("constraints.txt"))["openai"]


@pytest.mark.parametrize("name", APART)
def test_what_lies_apart_has_what_it_is_locked_for(name):
    text = (ROOT / ".ci" / f"{name}.txt").read_text(encoding="utf-8")
    pythons = re.search(r"# For Python (.*) on linux-x86_64", text)[1].split(", ")
    least, limit = map(int, re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    assert pythons == [f"3.{minor}" for minor in range(least, limit)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^\t.* -m pip install .*--require-hashes .*\.ci/{name}\.txt$", makefile)


def test_npm_packages_are_pinned_with_hashes_and_name_no_registry():
    folder = ROOT / "tests" / "server" / "browser"
    wanted = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    text = (folder / "package-lock.json").read_text(encoding="utf-8")
    packages = json.loads(text)["packages"]
    top = packages.pop("")
    assert top["dependencies"] == wanted
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all(each["integrity"].startswith("sha512-") for each in packages.values())
    assert "resolved" not in text


def test_rays_packages_are_pinned_and_are_not_the_tests_own():
    text = (ROOT / ".ci" / "ray.txt").read_text(encoding="utf-8")
    found = PIN.findall(text)
    locked_text = "".join(f"{name}=={version}{hashes}\n" for name, version, hashes in found)
    assert locked_text == re.sub(r"(?m)^#.*\n", "", text), "each line is one version and its hashes"
    versions = {canonicalize_name(name): version for name, version, _ in found}
    (wanted,) = map(Requirement, lines(".ci/ray.in"))
    (extra,) = (
        requirement
        for requirement in map(Requirement, PROJECT["project"]["optional-dependencies"]["ray"])
        if requirement.name == "ray"
    )
    assert str(wanted.specifier) == f"=={versions['ray']}"
    assert extra.specifier.contains(versions["ray"])
    # They stand before .venv's packages on the path.
    assert not versions.keys() & pins(lines("constraints.txt")).keys()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"(?m)^\t.* --require-hashes --no-deps --target \$\(RAY\)", makefile)
