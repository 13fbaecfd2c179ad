"""Finds, validates, opens and writes checkpoints: a directory of config.json and safetensors.

Reading is lazy. Files are memory-mapped and only their headers are parsed, so a checkpoint is
validated before anything is allocated, and no tensor is in memory twice. Weights are one file or
shards. The format is that of https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimo_fast.checkpoint.folder import new_file, write_json
from mimo_fast.checkpoint.hub import download
from mimo_fast.checkpoint.layout import Counts, Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import cut, read_json, regular_size, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30
NAMES_SHOWN = 8
LONGEST_NAME = 255
"""Bytes of a file's name at most."""

LARGEST = 1e18
"""Magnitude of a value at most: the product of two is finite in float32."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DENSE = ("F32", "F16", "BF16", "F64")
"""Types of tensors that are computed with, in the order in which errors name them."""

GGUF_FIX = "convert it with `mimo-fast quantize FILE.gguf OUT --speech-from DIR` and load OUT"

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def find_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The directory of a checkpoint: `source` itself, or a hub id "owner/name".

    A hub checkpoint is downloaded, or found in the cache.

    Raises:
        CheckpointError: nothing is there, the hub refuses or is out of reach, or config.json or
            safetensors are absent.
    """
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise TypeError(f"a checkpoint is a directory or a hub id OWNER/NAME, not a {kind}")
    directory = Path(text := os.fspath(source)).expanduser()
    # These are False for whatever the system does not take as a path.
    if os.path.isfile(directory) and directory.suffix == ".gguf":
        raise CheckpointError(f"{directory} holds a backbone alone: {GGUF_FIX}")
    if os.path.isfile(directory):
        raise CheckpointError(
            f"{directory} is a file: give the directory that holds it and config.json"
        )
    if not os.path.isdir(directory):
        path_like = text.startswith((".", "/", "~")) or "\\" in text or text.count("/") != 1
        if not isinstance(source, str) or path_like:
            raise CheckpointError(
                f"no directory {directory}, and 'nano' is the small model in the package: give a "
                "checkpoint directory or a hub id OWNER/NAME"
            )
        directory = download(
            text,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    _require_files(directory)
    return directory


def _require_files(directory: Path) -> None:
    try:
        suffixes = {path.suffix for path in directory.iterdir()}
    except OSError as error:
        raise CheckpointError(f"cannot read {directory}: {error.strerror or error}") from error
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory} has no config.json: give a directory that holds a whole checkpoint"
        )
    if ".safetensors" not in suffixes:
        problem = "no *.safetensors: copy the weights there or download them again"
        if ".gguf" in suffixes:
            problem = f"only GGUF files: {GGUF_FIX}"
        if suffixes & {".bin", ".pt", ".pth"}:
            problem = "only PyTorch .bin/.pt weights: only safetensors are read, convert them"
        raise CheckpointError(f"{directory} has {problem}")


class Weights:
    """Read-only view of a checkpoint's tensors: headers in memory, files mapped while it lives.

    `files` gives for each tensor name the open safetensors file that holds it; `open_weights` makes
    it.

    Attributes:
        changed: Names of tensors whose values are not those of the file.
    """

    changed: frozenset[str] = frozenset()

    def __init__(self, directory: Path, files: Mapping[str, Any]) -> None:
        self.directory = directory
        self._files = dict(files)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, file in self._files.items():
            header = file.get_slice(name)
            self._headers[name] = (tuple(header.get_shape()), str(header.get_dtype()))

    def names(self) -> Iterable[str]:
        return self._headers.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        stored = self._header(name)[1]
        if stored not in DTYPES:
            raise CheckpointError(
                f"{self.directory}: {name} is of type {stored}, which is not supported: convert it"
            )
        return DTYPES[stored]

    def get(
        self, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """One tensor; on the CPU in its stored dtype a view of the mapped file.

        Such a view is not copied, and its pages are read on first use. Writing to it changes this
        process's copy of the page, never the file. On another device the dtype is converted after
        the transfer.
        """
        self.dtype(name)
        return self._files[name].get_tensor(name).to(device).to(dtype=dtype)

    def finite(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """`get` of a tensor that is read whole anyway, and is checked by `is_finite`.

        Raises:
            CheckpointError: it holds NaN, infinite or absurd values.
        """
        tensor = self.get(name, device=device)
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self.directory}: {name} holds NaN or infinite values, or some beyond "
                f"{LARGEST:g}: the weights are damaged, download or convert them again"
            )
        return tensor

    def check_counts(self, counts: Counts) -> None:
        """Compares what a config counts with what the files hold, before `validate` lists it.

        Args:
            counts: pattern of tensor names with a number in its group -> (key, value of config).

        Raises:
            CheckpointError: there are fewer, or more.
        """
        for pattern, (key, value) in counts.items():
            matches = (re.match(pattern, name) for name in self._headers)
            held = len({match[1] for match in matches if match})
            if value > held:
                name = pattern.replace(r"(\d+)", "N").replace("\\", "")
                raise CheckpointError(
                    f"{self.directory}: config.json says '{key}' is {value}, but the files hold "
                    f"{held} {name}*: use the config.json that belongs to these weights"
                )

    def validate(
        self,
        expected: Shapes,
        optional: Shapes | None = None,
        packed: Mapping[str, Iterable[torch.dtype]] | None = None,
    ) -> None:
        """Compares the headers with the tensors a config calls for, before anything is allocated.

        Args:
            expected: must be there, in a type of `DENSE` unless `packed` names them.
            optional: may be there.
            packed: types of tensors of `expected` that are no dense matrix.

        Raises:
            CheckpointError: names all that is missing, unexpected, of a wrong shape or type.
        """
        allowed, packed = expected | (optional or {}), packed or {}
        faults: dict[str, list[str]] = {
            "missing": [name for name in expected if name not in self._headers],
            "unexpected": [name for name in self._headers if name not in allowed],
            "wrongly shaped": [],
            "not floating point": [],
            "of a wrong type": [],
        }
        for name, (shape, dtype) in self._headers.items():
            if name in allowed and shape != tuple(allowed[name]):
                problem = f"{name} is {list(shape)}, not {list(allowed[name])}"
                faults["wrongly shaped"].append(problem)
            if name in packed:
                types = [DTYPE_NAMES[each] for each in packed[name]]
                if dtype not in types:
                    faults["of a wrong type"].append(f"{name} is {dtype}, not {' or '.join(types)}")
            elif name in expected and dtype not in DENSE:
                faults["not floating point"].append(f"{name} is {dtype}")
        named = ((kind, items) for kind, items in faults.items() if items)
        if found := "; ".join(f"{len(items)} {kind} ({abridge(items)})" for kind, items in named):
            raise CheckpointError(
                f"{self.directory}: the tensors are not those of config.json: {found}: "
                "use the config.json that belongs to these weights, or download both again"
            )

    def shards(self) -> list[list[str]]:
        """Names of the tensors of each file."""
        found: dict[int, list[str]] = {}
        for name, file in self._files.items():
            found.setdefault(id(file), []).append(name)
        return list(found.values())

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        return sum(math.prod(shape) for shape, _ in self._headers.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        names = self._headers
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in names)

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise CheckpointError(
                f"{self.directory} has no tensor {name}: use the config.json of these weights"
            )
        return self._headers[name]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or beyond `LARGEST`, in one pass and without a temporary tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN is both the least and the greatest, and is not below anything.
    return bool((torch.stack(torch.aminmax(tensor)).double().abs() <= LARGEST).all())


def open_weights(directory: str | os.PathLike[str]) -> Weights:
    """Opens model.safetensors, the shards of its index, or the only other safetensors file.

    Raises:
        CheckpointError: there are no weights or it is unclear which, or a file is absent, damaged
            or cut short.
        ConfigError: the index is not a JSON object.
    """
    directory = Path(directory)
    _require_files(directory)
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if index.is_file() and not single.is_file():
        return Weights(directory, _open_shards(index))
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if len(files) > 1:
        found = abridge([path.name for path in files])
        raise CheckpointError(
            f"{directory} has several safetensors files ({found}) but no {INDEX_FILE}: add it"
        )
    file = _open(files[0])
    return Weights(directory, dict.fromkeys(file.keys(), file))


def _open_shards(index: Path) -> dict[str, Any]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor to file: download it again")
    shards: dict[str, Any] = {}
    tensors: dict[str, set[str]] = {}
    for shard in sorted(set(table.values())):
        odd = not shard.isprintable() or len(shard.encode()) > LONGEST_NAME
        if odd or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            problem = f"{index} names {shown(shard)}, which is not a file beside it"
            raise CheckpointError(f"{problem}: download it again")
        shards[shard] = _open(index.parent / shard)
        tensors[shard] = set(shards[shard].keys())
    absent = [f"{name} from {shard}" for name, shard in table.items() if name not in tensors[shard]]
    if absent:
        problem = f"{index} lists tensors absent from their shards ({abridge(absent)})"
        raise CheckpointError(f"{problem}: download it again")
    # In the order of the shards, which that of the index need not be.
    return {name: shards[shard] for name, shard in sorted(table.items(), key=lambda item: item[1])}


def _open(path: Path) -> Any:
    return open_safetensors(path, "download it again")


def open_safetensors(path: Path, fix: str) -> Any:
    """A safetensors file, mapped; `fix` is the advice of its errors.

    Raises:
        CheckpointError: it is absent, no regular file, damaged, or cut short.
    """
    try:
        regular_size(path)
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: {fix}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or cut(error)
        raise CheckpointError(f"{path} is damaged or cut short ({reason}): {fix}") from error


def write_checkpoint(
    directory: str | os.PathLike[str],
    shapes: Shapes,
    read: Callable[[str], Tensor | Iterable[Tensor]],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    shards: Iterable[list[str]] | None = None,
    advance: Callable[[int], object] = lambda written: None,
) -> None:
    """Writes the tensors of `shapes` in shards, then config.json.

    A shard has at most `shard_bytes`, or one tensor, unless `shards` says which names it has.
    `read(name)` returns one tensor, or
    consecutive pieces of the flattened tensor; peak memory is what it returns at a time. Everything
    is converted to `dtype`, one for all or one for each name. `advance` is called with the number
    of bytes written. An interrupted write leaves no config.json and no incomplete file under a
    final name; in a `new_folder` it leaves nothing.

    Raises:
        CheckpointError: weights are already there, a tensor has another size, or the disk is full.
    """
    directory = Path(directory)
    # Hidden ones are what a killed run has left.
    if any(not path.name.startswith(".") for path in directory.glob("*.safetensors*")):
        raise CheckpointError(
            f"{directory} already holds weights: choose another directory or delete them"
        )
    dtypes = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    planned = _plan(sizes, shard_bytes) if shards is None else [list(names) for names in shards]
    weight_map = dict[str, str]()
    for i, names in enumerate(planned, 1):
        numbered = f"model-{i:05d}-of-{len(planned):05d}.safetensors"
        shard = numbered if len(planned) > 1 else SINGLE_FILE
        # Wide types first: every tensor is then aligned to its item size, as safetensors aligns it.
        names.sort(key=lambda name: -dtypes[name].itemsize)
        weight_map |= dict.fromkeys(names, shard)
        with new_file(directory / shard) as file:
            file.write(_file_header({name: sizes[name] for name in names}, shapes, dtypes))
            for name in names:
                start = file.tell()
                data = read(name)
                for piece in [data] if isinstance(data, Tensor) else data:
                    stored = piece.detach().to("cpu", dtypes[name]).contiguous()
                    advance(file.write(stored.view(-1).view(torch.uint8).numpy().data))
                if file.tell() - start != sizes[name]:
                    raise CheckpointError(
                        f"the data of tensor {name} does not fill its shape {list(shapes[name])}"
                    )
    if len(planned) > 1:
        about = {"total_size": sum(sizes.values())}
        write_json(directory / INDEX_FILE, {"metadata": about, "weight_map": weight_map})
    write_json(directory / "config.json", config)


def _plan(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    free = 0
    for name, size in sizes.items():
        if not shards or size > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(name)
        free -= size
    return shards


def _file_header(
    sizes: Mapping[str, int], shapes: Shapes, dtypes: Mapping[str, torch.dtype]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + size
        dtype, place = DTYPE_NAMES[dtypes[name]], [start, end]
        header[name] = {"dtype": dtype, "shape": shapes[name], "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def abridge(items: list[str]) -> str:
    """The first of these names, and how many more there are, for an error."""
    more = len(items) - NAMES_SHOWN
    return ", ".join(cut(item) for item in items[:NAMES_SHOWN]) + (
        f" and {more} more" if more > 0 else ""
    )
