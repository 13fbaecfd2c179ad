"""Writes requirements.lock: what `make test` installs, each file with its hash.

    python3.11 .ci/lock.py        needs a network; pip is the only client

pip resolves `.[dev]` and what builds the package, in the versions of constraints.txt, and names the
file of each. The hashes hold for this interpreter's version on this platform, which the first line
states: elsewhere `make` installs by constraints.txt alone. torch is left out: one version has CPU
and CUDA builds, in different indexes, and so no one hash; constraints.txt pins its version.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = {"torch", "mimo-fast"}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}-{sysconfig.get_platform()}"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:"]
        wanted = ["-c", "constraints.txt", "-e", ".[dev]", *project["build-system"]["requires"]]
        command = [sys.executable, "-m", "pip", "install", *options, "--report", report, *wanted]
        subprocess.run(command, check=True, cwd=ROOT)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = [
        f"# for {HERE}\n# Written by .ci/lock.py. torch has no one hash; see constraints.txt.\n"
    ]
    for each in sorted(found, key=lambda each: each["metadata"]["name"].lower()):
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        if name not in WITHOUT:
            digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{name}=={version} --hash=sha256:{digest}\n")
    (ROOT / "requirements.lock").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
