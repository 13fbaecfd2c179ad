"""Files by path: what can be read or written is known before a model is loaded; whole writes.

Nothing but the standard library is imported until a compressed format is asked for.
"""

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from mimo_fast.errors import AudioError

FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}
"""Suffix -> libsndfile's format and subtype."""

OPEN_IT = "open it yourself and pass the file object"


LONGEST_NAME = 300
"""Characters of a name in an error."""


def name_of(source: Any) -> str:
    """Name of a source or target in an error, always one line."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "the audio data"
    path = source if isinstance(source, str | os.PathLike) else getattr(source, "name", None)
    if path in (0, "<stdin>"):
        return "standard input"
    if not isinstance(path, str | os.PathLike):
        return f"the {type(source).__name__} object"
    text = os.fsdecode(path)
    text = text if text and text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."


def reason_of(error: Exception) -> str:
    """What the operating system or libsndfile says, on one line."""
    if isinstance(error, TypeError):
        return "it has no header"
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()).removeprefix("Error : ").rstrip(".")


def soundfile_library() -> Any:
    """The soundfile module, imported when needed: functions on arrays run without it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: it finds no libsndfile
        raise AudioError("audio files need the package soundfile: pip install soundfile") from error
    return soundfile


def check_readable(path: str | os.PathLike[str], fix: str = OPEN_IT) -> int:
    """Bytes in a readable regular file. Pipes and devices are refused: they may never end.

    Args:
        fix: what to do with a pipe or a device.

    Raises:
        AudioError: it is missing, not a regular file, or may not be read.
    """
    name = name_of(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{name} is a folder, not a regular file; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{name} is not a regular file; {fix}")
        with open(path, "rb"):  # soundfile would not say why it cannot
            return status.st_size
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot read {name}: {reason_of(error)}") from error


def audio_format(path: str | os.PathLike[str]) -> tuple[str, str]:
    """libsndfile's format and subtype of a path's suffix.

    Raises:
        AudioError: the suffix is none of FORMATS, or this libsndfile cannot write it.
    """
    name = name_of(path)
    suffix = os.path.splitext(os.fsdecode(path))[1].lower()
    if suffix not in FORMATS:
        known, what = ", ".join(FORMATS), f"audio as {suffix}" if suffix else "a name without one"
        raise AudioError(f"cannot write {name}: use one of the suffixes {known}, not {what}")
    chosen = FORMATS[suffix]
    if suffix != ".wav" and not soundfile_library().check_format(*chosen):
        raise AudioError(f"cannot write {name}: the installed libsndfile is too old for {suffix}")
    return chosen


def check_writable(path: str | os.PathLike[str], fix: str = OPEN_IT) -> None:
    """Finds out, without a change to it, whether a file can be written or created.

    Args:
        fix: what to do with a pipe or a device.

    Raises:
        AudioError: it cannot.
    """
    name = name_of(path)
    try:
        if (real := _regular(path, name, fix)).exists():
            with open(real, "r+b"):
                return
        _try_folder(real.parent)
    except FileNotFoundError as error:
        folder = real.parent if os.path.islink(path) else Path(os.fsdecode(path)).parent
        raise AudioError(f"cannot write {name}: there is no folder {name_of(folder)}") from error
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot write {name}: {reason_of(error)}") from error


def check_folder(path: str | os.PathLike[str]) -> None:
    """Finds out, without a change to it, whether a folder exists or can be made to hold files.

    Raises:
        AudioError: it cannot.
    """
    name, folder = name_of(path), Path(os.path.abspath(path))
    try:
        # Of each missing folder os.stat also tells that its name is too long.
        while not _exists(folder):
            folder = folder.parent
        _try_folder(folder)
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot write into {name}: {reason_of(error)}") from error


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _try_folder(folder: Path) -> None:
    """Creates a file and removes it: permissions alone do not tell of read-only file systems."""
    trial = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        open(trial, "xb").close()
    finally:
        with suppress(OSError):
            trial.unlink(missing_ok=True)


def _regular(path: str | os.PathLike[str], name: str, fix: str) -> Path:
    """The file behind all links; it need not exist.

    Raises:
        AudioError: something else is there.
    """
    real = Path(os.path.realpath(os.fsdecode(path)))
    try:
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        return real
    if stat.S_ISDIR(mode):
        raise AudioError(f"cannot write {name}: it is not a regular file but a folder")
    if not stat.S_ISREG(mode):
        raise AudioError(f"cannot write {name}: it is not a regular file; {fix}")
    return real


def check_target(path: str | os.PathLike[str], fix: str = OPEN_IT) -> None:
    """`check_writable` for audio: the suffix is checked as well."""
    check_writable(path, fix)
    audio_format(path)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears complete or not at all.

    A link is written through. A file that was there keeps its mode, owner, attributes and hard
    links.

    Raises:
        AudioError: it cannot be written.
    """
    name = name_of(path)
    try:
        real = _regular(path, name, OPEN_IT)
        if _bound_to_inode(real) or not _replaced(real, data):
            _overwrite(real, data)
    except (OSError, ValueError) as error:
        raise AudioError(f"cannot write {name}: {reason_of(error)}") from error


def _bound_to_inode(path: Path) -> bool:
    """Whether a file has other names, or attributes such as an access control list."""
    if not path.exists():
        return False
    attributes = list[str]()
    if hasattr(os, "listxattr"):
        with suppress(OSError):  # a file system without any
            attributes = [name for name in os.listxattr(path) if name != "security.selinux"]
    return bool(attributes) or path.stat().st_nlink > 1


def _replaced(path: Path, data: bytes) -> bool:
    """Whether a new file could take the place of the old one, if any, in one step."""
    before = path.stat() if path.exists() else None
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
        if before is not None:
            os.chown(partial, before.st_uid, before.st_gid)
            os.chmod(partial, stat.S_IMODE(before.st_mode))
        os.replace(partial, path)
        return True
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # Of another owner, in a folder that takes no new files, or a mount point.
        refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
        if before is not None and isinstance(error, OSError) and error.errno in refusals:
            return False
        raise


def _overwrite(path: Path, data: bytes) -> None:
    """Writes into the file that is there.

    This cannot be atomic: the one atomic step is a rename, which puts a new inode under this name
    alone, while the other names, the owner or the mount belong to the old inode. A full disk at
    least is found before a byte is changed.
    """
    with open(path, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fallocate") and data:
            try:
                os.posix_fallocate(file.fileno(), 0, len(data))
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    file.truncate(size)
                    raise
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        file.truncate(len(data))
