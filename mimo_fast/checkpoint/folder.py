"""Files and folders that are whole or not there, whatever ends the program.

A file is written beside its place under a hidden name and renamed. A folder of several files is
written into a hidden folder beside its place, flushed to the disk, and renamed once at the end.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mimo_fast.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"


def partial_folder(target: Path) -> Path:
    """Where `new_folder` writes: hidden, beside the target and so on the same disk."""
    return target.with_name(f".{target.name}{PARTIAL}")


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends without an error.

    What a killed run has left is removed first, with a line on stderr.

    Raises:
        CheckpointError: the target exists and is not empty, another run writes it, or the disk
            refuses.
    """
    place = Path(os.path.realpath(Path(target).expanduser()))
    check_new_folder(place)
    staged = partial_folder(place)
    with _refused(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        left_over = staged.is_dir()
        staged.mkdir(exist_ok=True)
    try:
        lock = _lock(staged, place)
    except BlockingIOError as error:
        raise CheckpointError(f"another run is writing {place}: wait until it is done") from error
    try:
        if left_over:
            with _refused(staged):
                _empty(staged)
            print(f"removed {staged}, which an interrupted run had left", file=sys.stderr)
        try:
            yield staged
            with _refused(place):
                _flush_folder(staged)
                if place.is_dir():
                    shutil.copymode(place, staged)
                os.rename(staged, place)
                _flush_folder(place.parent, inside=False)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
    finally:
        if lock is not None:
            os.close(lock)


def check_new_folder(target: Path) -> None:
    """Raises CheckpointError unless `target` is absent, or an empty folder that may be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is not an empty directory: choose another")
    # A killed run of an earlier version has left such files inside.
    held = [path for path in target.iterdir() if not _is_left_over(path)]
    if any(".safetensors" in path.name for path in held):
        raise CheckpointError(
            f"{target} already holds weights: choose another directory or delete them"
        )
    if held:
        raise CheckpointError(f"{target} exists and is not an empty directory: choose another")
    if target.samefile(Path.cwd()):
        raise CheckpointError(f"{target} is the working directory: name a new folder in it")
    for path in [*target.iterdir()]:
        with _refused(path):
            path.unlink()
        print(f"removed {path}, which an interrupted run had left", file=sys.stderr)


def _is_left_over(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(PARTIAL) and not path.is_dir()


def _lock(staged: Path, place: Path) -> int | None:
    """A lock on the folder, which ends with the process; None where the system has none."""
    if fcntl is None:
        return None
    with _refused(place):
        descriptor = os.open(staged, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have renamed or removed it between the two calls.
        if not os.path.lexists(staged) or os.stat(staged).st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        # A file system without locks.
        pass
    return descriptor


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush_folder(folder: Path, inside: bool = True) -> None:
    """Flushes names, and files inside that did not come from `new_file`, to the disk."""
    if inside:
        for path in folder.rglob("*"):
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    # Some systems do not open folders, and some file systems do not flush them.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends without an error.

    Raises:
        CheckpointError: the disk refuses.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with _refused(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes one JSON object, whole or not at all."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Explains what the system refuses."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error.strerror or error}): free space or write elsewhere"
        ) from error
