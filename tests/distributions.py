"""Environments that hold an installed distribution and see the dependencies of this one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A program of its bin/, in a folder that holds nothing of the checkout."""
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        keep |= {"HOME": str(cwd), "OMP_NUM_THREADS": "1"}
        program, *arguments = map(str, command)
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd,
            env=keep,
            capture_output=True,
            text=True,
        )


def install(distribution: Path, folder: Path, compilers: bool = True) -> Environment:
    """Installs a wheel or a source distribution, alone, into a new environment.

    compilers: whether building finds any.
    """
    made = Environment(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Their own .pth files are not read: an editable install of the checkout is one.
    dependencies = [each for each in sys.path if each.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join([*dependencies, ""]))
    command = [sys.executable, "-m", "pip", "--python", made.python, "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not compilers:
        environment |= {"PATH": str(folder / "bin"), "CXX": "", "CUDA_HOME": str(folder)}
    subprocess.run([*command, distribution], check=True, env=environment)
    return made
