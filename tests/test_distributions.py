"""What `make dist` makes installs and runs without the checkout, and users' code type-checks."""

import ast
import builtins
import importlib.util
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from distributions import Environment, install
from emulated import exclusive
from packaging.requirements import Requirement
from packaging.version import Version

import mimo_fast

ROOT = Path(__file__).parents[1]
DIST = ROOT / ".ci" / "dist.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("build") is None or sys.platform != "linux",
    reason="needs what makes distributions",
)


@dataclass(frozen=True)
class Made:
    wheel: Path
    source: Path
    environment: Environment
    """Where the wheel is installed."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """Built once a run of the tests, of what the editable install has compiled."""
    with exclusive(tmp_path_factory, "distributions") as folder:
        target, environment = folder / "dist", folder / "wheel-environment"
        if not environment.exists():
            command = [sys.executable, DIST, "--from-checkout", target]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (wheel,) = target.glob("*.whl")
            install(wheel, environment)
        (wheel,), (source,) = target.glob("*.whl"), target.glob("*.tar.gz")
        return Made(wheel, source, Environment(environment))


def speaks(environment: Environment, folder: Path) -> str:
    """Says a word with nano in an empty folder; returns what `info` prints."""
    told = environment.run("mimo-fast", "info", cwd=folder)
    assert told.returncode == 0, told.stderr
    said = environment.run("mimo-fast", "tts", "seven", "-o", "out.wav", cwd=folder)
    assert said.returncode == 0, said.stderr
    assert (folder / "out.wav").stat().st_size > 10_000
    where = environment.run(
        "python", "-c", "import mimo_fast; print(mimo_fast.__file__)", cwd=folder
    )
    assert Path(where.stdout.strip()).is_relative_to(environment.folder)
    return told.stdout


@pytest.mark.slow
def test_the_wheel_runs_where_it_is_installed(made, tmp_path):
    told = speaks(made.environment, tmp_path)
    assert told.startswith(f"mimo-fast {mimo_fast.__version__}, ")
    with zipfile.ZipFile(made.wheel) as opened:
        compiled = any(name.startswith("mimo_fast/_native.") for name in opened.namelist())
    assert ("native kernels: quantized products" in told) == compiled
    assert ("manylinux_2_" in made.wheel.name) == compiled


@pytest.mark.slow
def test_the_source_installs_without_a_compiler_and_runs(made, tmp_path):
    environment = install(made.source, tmp_path / "environment", compilers=False)
    told = speaks(environment, tmp_path)
    assert "native kernels: not built" in told
    assert "cuda kernels: not built" in told


@pytest.mark.slow
def test_the_source_holds_what_a_build_and_the_checks_need(made):
    with tarfile.open(made.source) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for name in ("setup.py", "Makefile", "CHANGELOG.md", ".ci/run", "csrc/cuda/unpack.cu"):
        assert name in names
    assert any(name.startswith("tests/golden/") for name in names)
    assert not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.slow
def test_the_wheel_states_what_it_needs(made):
    with zipfile.ZipFile(made.wheel) as opened:
        names = opened.namelist()
        (name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = opened.read(name).decode()
    assert "mimo_fast/py.typed" in names
    needed = [Requirement(each) for each in re.findall(r"(?m)^Requires-Dist: (.*)$", metadata)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {str(each) for each in needed if not each.marker or "extra" not in str(each.marker)}
    assert base == {str(Requirement(each)) for each in project["dependencies"]}
    assert f"\nVersion: {mimo_fast.__version__}\n" in metadata


def examples(document: Path) -> str:
    """The Python blocks of a document as one module; what they take for granted is declared."""
    text = document.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```$", text))
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {*dir(builtins)}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    free = sorted({node.id for node in names} - bound)
    declared = "".join(f"{name}: {TAKEN_FOR_GRANTED.get(name, 'typing.Any')}\n" for name in free)
    return f"import typing\nimport mimo_fast\n{declared}\n{code}"


TAKEN_FOR_GRANTED = {"model": "mimo_fast.MimoAudio", "session": "mimo_fast.Session"}

PUBLIC = """
import asyncio
from typing import assert_type

import torch

import mimo_fast
from mimo_fast import Chunk, LM, MimoAudio, Session, load

model = load("lm", "codec", device="cpu", quantization="int8")
assert_type(model, MimoAudio)
assert_type(model.session(), Session)
assert_type(mimo_fast.MimoAudio("nano", "nano").codec, mimo_fast.Codec)
for chunk in model.stream("tts", "seven"):
    assert_type(chunk, Chunk)
    assert_type(chunk.audio, torch.Tensor)
    assert_type(chunk.sample_rate, int)


async def listens() -> None:
    async for chunk in model.astream("tts", "seven"):
        assert_type(chunk, Chunk)


asyncio.run(listens())
sampler = mimo_fast.MiMoSampler(do_sample=True, temperature=0.6, top_p=0.9)
try:
    model.asr_sft(1.5)  # type: ignore[arg-type]
except mimo_fast.MimoFastError:
    pass
"""


@pytest.mark.slow
def test_users_code_type_checks_strictly(made, tmp_path):
    """The examples of the documents, and every public name has a type."""
    # Triton's absence or a missing import of a user's own is not what is tested.
    pytest.importorskip("mypy")
    # The server's page has code of other packages alone, which tests/server runs.
    pages = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "server.md"]
    documents = [ROOT / "README.md", *pages]
    found = {path: examples(path) for path in documents if "```python" in path.read_text("utf-8")}
    assert len(found) >= 2
    modules = {f"{path.stem.lower()}_examples.py": code for path, code in found.items()}
    revealed = "".join(f"reveal_type(mimo_fast.{name})\n" for name in mimo_fast.__all__)
    modules |= {"public.py": PUBLIC, "names.py": f"import mimo_fast\n{revealed}"}
    for name, code in modules.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    # Of an installed package mypy reports errors in the code that uses it alone.
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    command += [made.environment.python, "--cache-dir", tmp_path / "cache", *modules]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    types = re.findall(r'names\.py:\d+: note: Revealed type is "(.*)"', done.stdout)
    assert len(types) == len(mimo_fast.__all__)
    assert [each for each in types if each == "Any" or "Unknown" in each] == []


def test_a_file_too_few_or_too_many_is_an_error(tmp_path):
    """The check itself."""
    checks = runpy.run_path(str(DIST))
    archive = tmp_path / "mimo_fast-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("mimo_fast-1.dist-info/METADATA", "Metadata-Version: 2.1\n")
    with pytest.raises(SystemExit, match="lacks mimo_fast/"):
        checks["check_wheel"](archive)
    with zipfile.ZipFile(archive, "a") as opened:
        for name in (*checks["versioned"]("mimo_fast"), "mimo_fast/_native.x.so", "tests/a.py"):
            opened.writestr(name, "")
    with pytest.raises(SystemExit, match=r"should not have tests/a\.py$"):
        checks["check_wheel"](archive)


def test_the_version_has_one_definition_and_a_section_of_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mimo_fast.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"(?m)^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changelog)
    version = Version(mimo_fast.__version__)
    # Between releases the version is the next one's, as a development version.
    assert sections[0] == ("Unreleased" if version.is_devrelease else str(version))
    assert all(Version(each) < version for each in sections[1:])
