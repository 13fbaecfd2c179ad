"""A folder of several files is whole or is not there, whatever ends the program that writes it."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import KIT_PAIR, copy_tree, fault

from mimo_fast.checkpoint import folder as folder_module
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.folder import new_folder, partial_folder
from mimo_fast.checkpoint.initialize import init_checkpoint
from mimo_fast.errors import CheckpointError
from mimo_fast.quantization import quantize_checkpoint
from mimo_fast.text.tokenizer import Tokenizer

LM = KIT_PAIR[0]

QUANTIZE = """
import sys, time
from mimo_fast.quantization import convert, quantize_checkpoint
quantize, slow = convert.quantize, float(sys.argv[3])
def slowly(*arguments, **named):
    time.sleep(slow)
    return quantize(*arguments, **named)
convert.quantize = slowly
quantize_checkpoint(sys.argv[1], sys.argv[2], "int8", progress=False)
"""

INITIALIZE = """
import sys, time
from mimo_fast.checkpoint import initialize
draw, slow = initialize._draw, float(sys.argv[3])
def slowly(*arguments):
    time.sleep(slow)
    return draw(*arguments)
initialize._draw = slowly
initialize.init_checkpoint(sys.argv[2], progress=False)
"""

RUNS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "quantize": (QUANTIZE, lambda out: quantize_checkpoint(LM, out, "int8", progress=False)),
    "init-checkpoint": (INITIALIZE, lambda out: init_checkpoint(out, progress=False)),
}


def start(code: str, target: Path, slow: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(Path(folder_module.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, LM, target, str(slow)], env=environment)


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[str, Callable[[Path], object], dict[str, bytes]]:
    """A program that writes a folder, the same in this process, and what it should hold."""
    code, here = RUNS[request.param]
    whole = tmp_path_factory.mktemp("whole") / "out"
    here(whole)
    return code, here, files(whole)


class TestKilled:
    def test_while_it_writes_it_leaves_nothing_under_the_final_name(self, run, tmp_path, capfd):
        code, here, whole = run
        target = tmp_path / "out"
        writer = start(code, target, slow=0.05)
        while not any(partial_folder(target).rglob("*.partial")):
            assert writer.poll() is None, "it is done before it was killed"
            time.sleep(0.01)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert not target.exists()
        assert partial_folder(target).is_dir(), "nothing was left, so that nothing is tried here"
        capfd.readouterr()
        here(target)
        assert files(target) == whole
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        said = capfd.readouterr().err.splitlines()
        assert said == [f"removed {partial_folder(target)}, which an interrupted run had left"]

    @pytest.mark.slow
    @pytest.mark.parametrize("wait", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5])
    def test_at_any_moment_the_folder_is_whole_or_not_there(self, run, tmp_path, wait):
        code, here, whole = run
        target = tmp_path / "out"
        writer = start(code, target, slow=0.02)
        while not partial_folder(target).exists() and not target.exists():
            assert writer.poll() in (None, 0), "it failed before it wrote"
            time.sleep(0.005)
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        if target.exists():
            assert files(target) == whole
        else:
            here(target)
            assert files(target) == whole

    def test_what_an_earlier_version_left_inside_is_removed(self, tmp_path, capfd):
        target = tmp_path / "out"
        target.mkdir()
        (target / ".model.safetensors.partial").write_bytes(b"x")
        quantize_checkpoint(LM, target, "int8", progress=False)
        assert "interrupted run had left" in capfd.readouterr().err
        assert open_weights(target).parameters
        assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_the_folder_appears_at_once_with_its_tokenizer(tmp_path, monkeypatch):
    """At the only rename of the folder all of its files are there, and on the disk."""
    seen, flushed, rename, fsync = list[set[str]](), set[int](), os.rename, os.fsync

    def watched(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out":
            paths = [path for path in Path(source).rglob("*") if path.is_file()]
            assert {path.stat().st_ino for path in paths} <= flushed
            seen.append({path.name for path in paths})
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.add(os.fstat(file).st_ino), fsync(file)))
    quantize_checkpoint(LM, tmp_path / "out", "int8", progress=False)
    (names,) = seen
    assert {"config.json", "model.safetensors", "tokenizer.json"} < names
    assert Tokenizer.from_directory(tmp_path / "out").encode("a")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_error_leaves_nothing(tmp_path, error):
    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("x")
            raise error

    with pytest.raises(type(error)):
        write()
    assert not list(tmp_path.iterdir())


def test_two_runs_at_once_do_not_mix(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
        said = list[str]()
        second = threading.Thread(
            target=lambda: said.append(fault(lambda: new_folder(tmp_path / "out").__enter__()))
        )
        second.start()
        second.join()
        assert "another run is writing" in said[0]
    assert (tmp_path / "out" / "a").read_text() == "x"


class TestTargets:
    def test_one_that_is_not_empty_is_left_alone(self, tmp_path):
        (tmp_path / "mine.txt").write_text("precious")
        for target in (tmp_path, tmp_path / "mine.txt"):
            message = fault(lambda target=target: quantize_checkpoint(LM, target, "int8"))
            assert "is not an empty directory" in message
        assert files(tmp_path) == {"mine.txt": b"precious"}

    def test_its_own_source(self, tmp_path):
        copy_tree(LM, tmp_path)
        before = files(tmp_path)
        assert "already holds weights" in fault(
            lambda: quantize_checkpoint(tmp_path, tmp_path, "int8")
        )
        assert files(tmp_path) == before

    def test_an_empty_one_keeps_its_mode(self, tmp_path):
        (tmp_path / "out").mkdir(mode=0o750)
        mode = (tmp_path / "out").stat().st_mode
        quantize_checkpoint(LM, tmp_path / "out", "int8", progress=False)
        assert (tmp_path / "out").stat().st_mode == mode

    def test_a_link_to_an_empty_one(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        quantize_checkpoint(LM, tmp_path / "link", "int8", progress=False)
        assert (tmp_path / "link").is_symlink()
        assert open_weights(tmp_path / "real").parameters

    def test_the_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "working directory" in fault(lambda: init_checkpoint("."))

    def test_a_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert init_checkpoint("~/out", progress=False)[0].is_dir()
        assert (tmp_path / "out" / "lm").is_dir()

    def test_one_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="cannot write"):
            init_checkpoint(tmp_path / "file" / "out", progress=False)

    def test_what_is_no_file_is_not_copied(self, tmp_path):
        copy_tree(LM, tmp_path / "in")
        os.mkfifo(tmp_path / "in" / "merges.txt")
        (tmp_path / "in" / "odd.json").mkdir()
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8", progress=False)
        assert not {"merges.txt", "odd.json"} & {path.name for path in (tmp_path / "out").iterdir()}
