"""No argument crashes a native function or makes it read beyond its tensors."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import exclusive

from mimo_fast.kernels.cpu import library as native

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SANITIZE = "-fsanitize=address -fno-omit-frame-pointer -g1 -w"

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)


def run(*arguments: str | Path, **environment: str) -> str:
    """What `wrong_arguments.py` prints in a process of its own."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, HERE / "wrong_arguments.py", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def check(printed: str) -> None:
    *problems, last = printed.splitlines()
    assert not problems, "\n".join(problems)
    assert int(last.removesuffix(" calls")) > 1500


@pytest.mark.slow
def test_wrong_arguments_are_errors():
    check(run())


def library(name: str) -> str:
    """Where the compiler's library of this name is."""
    command = ["g++", f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory, monkeypatch_module) -> Path:
    """The native module with AddressSanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    pybind11, machine = pytest.importorskip("pybind11"), os.uname().machine
    sys.path.insert(0, str(ROOT / "csrc"))
    import cpu_build
    from ninja_file import NinjaFile

    with exclusive(tmp_path_factory, "address") as directory:
        # After the usual -O3, with which instrumented code takes minutes to compile.
        sets = {name: f"{flags} -O1" for name, flags in cpu_build.SETS[machine].items()}
        monkeypatch_module.setitem(cpu_build.SETS, machine, sets)
        ninja = NinjaFile(directory / "address")
        includes = [pybind11.get_include(), sysconfig.get_path("include")]
        name = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = f"{compiler} {SANITIZE}"
        cpu_build.add_extension(ninja, command, machine, includes, name)
        if not ninja.run():
            pytest.skip("this compiler has no AddressSanitizer")
        return ninja.directory / name


@pytest.mark.slow
@pytest.mark.parametrize("instructions", native.compiled().instruction_sets())
def test_no_call_leaves_its_tensors(sanitized, instructions):
    # libstdc++ too: otherwise ASan finds no __cxa_throw, as Python is a program of C.
    preloaded = [library("libasan.so"), library("libstdc++.so.6")]
    # Python and torch free nothing at exit; torch maps more than is there.
    options = "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1"
    printed = run(
        sanitized,
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS=options,
        MIMO_FAST_CPU=instructions,
    )
    check(printed)
