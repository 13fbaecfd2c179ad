"""Small checkpoint pairs on disk, and what a loaded model says: shared by the kinds."""

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trials import TESTS, Note, Wrong

if TYPE_CHECKING:
    from mimo_fast import MimoAudio

KIT = TESTS / "golden" / "checkpoint"
GROUPS = 96
"""Context of the models here, so that no reply is long."""

SECOND = torch.sin(torch.arange(9600) / 7) * 0.3


def load_kit() -> "MimoAudio":
    import mimo_fast

    torch.set_num_threads(1)
    return mimo_fast.load(KIT / "lm", KIT / "codec", device="cpu", max_seq_len=GROUPS, max_batch=2)


def answer(model: "MimoAudio") -> tuple[str, torch.Tensor]:
    """A short spoken reply: text and codes' audio, always the same of one model."""
    chunks = [*model.stream("tts", "hello", seed=5, max_new_tokens=3, min_new_tokens=3)]
    return "".join(c.text for c in chunks), torch.cat([c.audio for c in chunks])


def same(one: tuple[str, torch.Tensor], two: tuple[str, torch.Tensor]) -> bool:
    return one[0] == two[0] and torch.equal(one[1], two[1])


class Bystander:
    """A model that was loaded before, and goes on as if nothing had happened beside it."""

    def __init__(self) -> None:
        self.model = load_kit()
        # The last exchange of a model is what add_history continues, and so ends.
        self.neighbour = copy.copy(self.model)
        self.expected = answer(self.model)
        # Once more: the first answer may have found the prefix cache empty.
        self.check(None)

    def check(self, error: BaseException | None) -> None:
        """Raises unless the model answers as before, `error` still being held."""
        try:
            given = answer(self.model)
        except BaseException as other:
            raise Wrong(f"the model does not answer after an error: {other!r}") from error
        if not same(given, self.expected):
            raise Wrong("the model answers something else after an error") from error

    @contextmanager
    def watched(self, rng: random.Random) -> Iterator[None]:
        """In every fourth case a stream is open meanwhile; after an error the model answers."""
        open_stream = None
        if rng.random() < 0.25:
            open_stream = self.neighbour.stream(
                "tts", "hello", seed=5, max_new_tokens=3, min_new_tokens=3
            )
            chunks = [next(open_stream)]
        try:
            yield
        except BaseException as error:
            self.check(error)
            raise
        finally:
            if open_stream is not None:
                try:
                    chunks += open_stream
                except BaseException as other:
                    raise Wrong(f"a stream that ran beside it fails: {other!r}") from other
                text, audio = "".join(c.text for c in chunks), torch.cat([c.audio for c in chunks])
                if not same((text, audio), self.expected):
                    raise Wrong("a stream that ran beside it says something else")


def check_speech(chunks: list[Any]) -> None:
    """Raises unless what was streamed is audio and text."""
    for chunk in chunks:
        if chunk.audio.dtype != torch.float32 or chunk.audio.ndim != 1:
            raise Wrong(f"a chunk is {chunk.audio.dtype} {list(chunk.audio.shape)}")
        if not chunk.audio.isfinite().all():
            raise Wrong("a chunk's audio is not finite")


Files = dict[str, bytes | Callable[[Path], object]]
"""Content by path, or what makes the file."""


def read_files(folder: Path) -> Files:
    """Every file of a pair, by path from its folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_files(files: Files, originals: Files, kept: Path, folder: Path) -> None:
    """Files into a fresh folder; those that equal the originals are links to `kept`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif content is originals.get(name):
            os.link(kept / name, path)
        else:
            path.write_bytes(content)


def copy_kit(folder: Path) -> None:
    shutil.copytree(KIT, folder, copy_function=shutil.copyfile)


def special_file(rng: random.Random) -> tuple[Callable[[Path], object], str]:
    """What lies in the place of a file and is none."""
    kinds: dict[str, Callable[[Path], object]] = {
        "a FIFO": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a dangling link": lambda path: path.symlink_to("nothing"),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
        "a link to its folder": lambda path: path.symlink_to("."),
        "a hole of 1 GB": lambda path: (path.touch(), os.truncate(path, 2**30)),
    }
    what = rng.choice([*kinds])
    return copy.copy(kinds[what]), what


def write_special(path: Path, rng: random.Random, note: Note) -> None:
    make, what = special_file(rng)
    note(what)
    make(path)
