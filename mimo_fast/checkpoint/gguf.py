"""Reads GGUF files, the form of llama.cpp: metadata, and tensors of blocks, mapped.

A file is the magic, a version, two counts, metadata (key, type, value), the tensors' headers (name,
dimensions with the innermost first, type, offset), and their data, aligned. The facts are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import cut, regular_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_ENTRIES = 2**20
"""Of metadata or tensors; an array's items are bounded by the file's size."""

STRING, ARRAY = 8, 9
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""struct's letter of each type of metadata."""


@dataclass(frozen=True)
class Blocks:
    """How a type stores values: blocks of `values` in `nbytes`."""

    name: str
    values: int
    nbytes: int


TYPES = {
    0: Blocks("F32", 1, 4),
    1: Blocks("F16", 1, 2),
    2: Blocks("Q4_0", 32, 18),
    3: Blocks("Q4_1", 32, 20),
    6: Blocks("Q5_0", 32, 22),
    7: Blocks("Q5_1", 32, 24),
    8: Blocks("Q8_0", 32, 34),
    12: Blocks("Q4_K", 256, 144),
    13: Blocks("Q5_K", 256, 176),
    14: Blocks("Q6_K", 256, 210),
    30: Blocks("BF16", 1, 2),
}
"""Types of tensors that are read, by their number."""


@dataclass(frozen=True)
class Stored:
    """One tensor: its shape, outermost first, its type and where it begins in the file."""

    shape: tuple[int, ...]
    type: Blocks
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.values * self.type.nbytes


class GGUF:
    """An open GGUF file.

    Attributes:
        path: Of the file.
        metadata: Strings and numbers by key; arrays are left out.
        tensors: Headers by name.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file and reads its headers.

        Raises:
            CheckpointError: it is absent, damaged, cut short, or of a type that is not read.
        """
        self.path = path
        try:
            regular_size(path)
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._place = 0
            self._read_headers()
        except CheckpointError:
            raise
        except FileNotFoundError as error:
            raise CheckpointError(f"there is no file {path}") from error
        except (OSError, OverflowError, UnicodeError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({cut(error)}): download it again"
            ) from error

    def blocks(self, name: str) -> Tensor:
        """The data of a tensor, uint8 [rows, blocks of a row, bytes of a block], a view."""
        stored = self.tensors[name]
        data = torch.frombuffer(
            self._bytes, dtype=torch.uint8, count=stored.nbytes, offset=stored.start
        )
        return data.view(math.prod(stored.shape[:-1]), -1, stored.type.nbytes)

    def _read_headers(self) -> None:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin as a GGUF file")
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"version {version} is not read")
        tensors, entries = self._number("Q"), self._number("Q")
        if max(tensors, entries) > MOST_ENTRIES:
            raise ValueError("it counts too much")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key, kind = self._string(), self._number("I")
            if kind == ARRAY:
                self._skip_array()
            else:
                self.metadata[key] = self._string() if kind == STRING else self._scalar(kind)
        headers = [self._header() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("its alignment is none")
        start = -(-self._place // alignment) * alignment
        self.tensors: dict[str, Stored] = {}
        for name, shape, kind, offset in headers:
            if kind not in TYPES:
                known = ", ".join(each.name for each in TYPES.values())
                raise CheckpointError(
                    f"{self.path}: {cut(name)} is of type {kind}, which is not read: quantize to "
                    f"one of {known}"
                )
            stored = Stored(shape, TYPES[kind], start + offset)
            if not shape or 0 in shape or shape[-1] % stored.type.values or name in self.tensors:
                raise ValueError(f"{name} is {[*shape]} or there twice")
            if stored.start + stored.nbytes > len(self._bytes):
                raise ValueError(f"{name} ends behind the file")
            self.tensors[name] = stored

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        name, count = self._string(), self._number("I")
        if count > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {count} dimensions")
        inner_first = [self._number("Q") for _ in range(count)]
        return name, tuple(reversed(inner_first)), self._number("I"), self._number("Q")

    def _take(self, count: int) -> bytes:
        end = self._place + count
        if end > len(self._bytes):
            raise ValueError("its headers end behind the file")
        data, self._place = self._bytes[self._place : end], end
        return data

    def _number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

    def _scalar(self, kind: int) -> Any:
        if kind not in SCALARS:
            raise ValueError(f"metadata of type {kind}")
        return self._number(SCALARS[kind])

    def _string(self) -> str:
        return self._take(self._number("Q")).decode()

    def _skip_array(self) -> None:
        kind, count = self._number("I"), self._number("Q")
        if kind in SCALARS:
            self._take(struct.calcsize(f"<{SCALARS[kind]}") * count)
        elif kind == STRING:
            for _ in range(count):
                self._take(self._number("Q"))
        else:
            raise ValueError(f"an array of type {kind}")
