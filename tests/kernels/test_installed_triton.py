"""Which installed Triton is used; any other is a line, and never an error."""

import importlib
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mimo_fast.kernels import dispatch, installed_triton
from mimo_fast.kernels.installed_triton import ADVICE, ENVIRONMENT, Installed, find

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
STUB = "def jit(function):\n    return function\n"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a Triton of this source first on the path, and says what is found."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    # The real one, which a second import would end the process with, is out of reach.
    others = [each for each in sys.path if "packages" not in each]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])

    def put(source: str | None, language: str = "constexpr = int\n") -> Installed:
        folder = tmp_path / "triton"
        folder.mkdir()
        if source is not None:
            (folder / "__init__.py").write_text(source)
            (folder / "language.py").write_text(language)
        importlib.invalidate_caches()
        return find()

    yield put
    for name in ("triton", "triton.language"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("version", "refusal"),
    [
        ("2.1.0", "Triton 2.1.0 is older than 3.5"),
        ("3.2.0", "Triton 3.2.0 is older than 3.5"),
        ("3.4.1", "Triton 3.4.1 is older than 3.5"),
        ("3.5.0", ""),
        ("3.5.1+git9844da95", ""),
        ("3.7.0.post22", ""),
        ("3.9.12", ""),
        ("3.10.0", "Triton 3.10.0 is newer than 3.9, the newest that was tested"),
        ("3.10.0.dev20261101", "Triton 3.10.0.dev20261101 is newer than 3.9, the newest that was"),
        ("4.0.0", "Triton 4.0.0 is newer than 3.9, the newest that was tested"),
        ("main", "Triton of version 'main' is unknown"),
    ],
)
def test_a_version_is_used_or_refused(install, version, refusal):
    found = install(f"__version__ = '{version}'\n{STUB}")
    assert found.version == version
    assert found.refusal.startswith(refusal)
    assert bool(found.refusal) == bool(refusal)
    assert (found.module is None, found.language is None) == (bool(refusal), bool(refusal))
    assert ("not used: " in found.line()) == bool(refusal)


def test_a_refused_version_is_not_imported(install):
    """Importing may be what ends the process."""
    found = install('__version__: str = "3.2.0"\nraise SystemExit("imported")\n')
    assert found.refusal == "Triton 3.2.0 is older than 3.5"


def test_any_version_is_taken_where_that_is_wanted(install, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "any")
    found = install(f"__version__ = '3.10.0'\n{STUB}")
    assert found.module.jit
    assert found.line() == f"3.10.0, used on GPUs, untested ({ENVIRONMENT})"


@pytest.mark.parametrize(
    ("source", "language", "said"),
    [
        (
            "raise ImportError('libtriton.so: undefined\\n symbol')",
            "",
            "ImportError: libtriton.so: u",
        ),
        ("raise OSError('cannot read')", "", "OSError: cannot read"),
        ("1 / 0", "", "ZeroDivisionError"),
        ("def jit(:", "", "SyntaxError"),
        (STUB, "raise AttributeError('no such name')", "AttributeError: no such name"),
        (STUB, "", "AttributeError"),
        ("", "constexpr = int", "AttributeError"),
        ("raise ImportError('long ' * 1000)", "", "ImportError: long long"),
    ],
)
def test_one_that_is_broken_is_a_line(install, source, language, said):
    found = install(f"__version__ = '3.6.0'\n{source}\n", language)
    assert (found.module, found.language, found.version) == (None, None, "3.6.0")
    assert found.refusal.startswith("Triton 3.6.0 does not import: ")
    assert said in found.refusal
    assert "\n" not in found.line()
    assert len(found.line()) < 400


@pytest.mark.parametrize("source", [None, "", "version = 1\n"])
def test_one_that_states_no_version_is_a_line(install, source):
    """A folder that an uninstallation left behind is a package of no version too."""
    found = install(source)
    assert found.module is None
    assert found.refusal == "Triton of version '?' is unknown"


def test_none_at_all(install, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:2])
    found = find()
    assert (found.version, found.refusal) == ("", "Triton is not installed")
    with warnings.catch_warnings():
        # A CPU build of torch comes without: nothing is wrong.
        warnings.simplefilter("error")
        installed_triton.warn(found)


def test_a_refusal_is_one_warning_a_process(install, capsys):
    found = install("__version__ = '3.3.1'\n")
    installed_triton.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *about, **_: print(
            warnings.formatwarning(*about[:4]), file=sys.stderr, end=""
        )
        for _ in range(3):
            installed_triton.warn(found)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"Triton 3.3.1 is older than 3.5: plain torch takes the kernels' place ({ADVICE})"
    )


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice can see, with Triton in working order."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "triton", object())
    monkeypatch.setattr(dispatch, "_launched", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    installed_triton.warn_once.cache_clear()
    return monkeypatch


class OnGPU:
    """What the choice asks of a tensor."""

    requires_grad = False
    is_cuda = True
    device = GPU


def test_a_first_launch_that_fails_is_a_line_and_plain_torch(gpu):
    """Without a C compiler, for example, Triton imports and cannot launch."""
    launches = []

    def launch(device):
        launches.append(device)
        return "RuntimeError: Failed to find C compiler"

    gpu.setattr(dispatch, "_first_launch", launch)
    with pytest.warns(RuntimeWarning) as said:
        assert [dispatch.use_triton(OnGPU()) for _ in range(3)] == [False] * 3
    assert launches == [GPU]
    (line,) = [str(each.message) for each in said]
    assert "does not run on cuda:0: RuntimeError: Failed to find C compiler: plain torch" in line


def test_a_first_launch_that_works_is_made_once(gpu):
    launches = []
    gpu.setattr(dispatch, "_first_launch", lambda device: launches.append(device) or "")
    assert all(dispatch.use_triton(OnGPU()) for _ in range(3))
    assert launches == [GPU]


def test_no_launch_is_tried_inside_a_graph_that_is_captured(gpu):
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu.setattr(dispatch, "_first_launch", lambda device: pytest.fail("it would be captured"))
    assert dispatch.use_triton(OnGPU())
    assert dispatch._launched == {}


@pytest.mark.skipif(dispatch.triton is None, reason="needs Triton")
def test_the_error_of_a_launch_is_one_line(monkeypatch):
    """The launch itself, where there is no driver: on a tensor of the CPU."""

    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("0 active drivers\n(2). There should only be one.")

    monkeypatch.setattr(dispatch, "first_launch_kernel", Kernel())
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    found = dispatch._first_launch(torch.device("cpu"))
    assert found == "RuntimeError: 0 active drivers (2). There should only be one."


def test_without_triton_a_gpu_is_told_of_it(gpu):
    gpu.setattr(dispatch, "triton", None)
    gpu.setattr(dispatch, "TRITON", Installed("", None, None, "Triton is not installed"))
    with pytest.warns(RuntimeWarning, match="Triton is not installed: plain torch takes"):
        assert not dispatch.use_triton(OnGPU())


def test_the_metadata_asks_for_what_is_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for extra in ("cuda", "dev"):
        (found,) = [each for each in map(Requirement, extras[extra]) if each.name == "triton"]
        oldest, newest = installed_triton.OLDEST, installed_triton.NEWEST
        assert str(found.specifier) == f"<{newest[0]}.{newest[1] + 1},>={oldest[0]}.{oldest[1]}"
    # Triton 3.5 came with torch 2.9.
    for needed in (*project["dependencies"], *extras["cuda"]):
        if (found := Requirement(needed)).name == "torch":
            assert str(found.specifier) == ">=2.9"


@pytest.mark.slow
def test_a_command_goes_on_with_one_line(tmp_path):
    """Even where Triton's kernels are asked for."""
    folder = tmp_path / "triton"
    folder.mkdir()
    (folder / "__init__.py").write_text("__version__ = '3.2.0'\nimport os\nos.abort()\n")
    environment = {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    environment |= {"MIMO_FAST_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "mimo_fast", "tts", "seven", "-o", tmp_path / "out.wav"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.wav").stat().st_size > 1000
    lines = [line for line in done.stderr.splitlines() if "Triton" in line]
    assert len(lines) == 1
    assert "Triton 3.2.0 is older than 3.5: plain torch takes the kernels' place" in lines[0]
