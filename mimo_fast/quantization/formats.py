"""Storage formats: which part of the model has which, with names, shapes and bytes.

A quantized matrix X.weight [N, K] is stored as X.weight.words, X.weight.scales and, where zeros are
free, X.weight.zeros; `kernels/matmul/quantized_weight.py` has the layout. config.json lists these
matrices under `mimo_fast_quantization`.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import suggestion
from mimo_fast.checkpoint.layout import Shapes, lm_shapes
from mimo_fast.config import LMConfig
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import cut, shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight

CONFIG_KEY = "mimo_fast_quantization"
VERSION = 1

PARTS: dict[str, str | tuple[str, ...]] = {
    "backbone": "model.layers.",
    "lm_head": "lm_head.",
    "text_embeddings": "model.embed_tokens.",
    "patch_decoder": "local_transformer.layers.",
    "patch_encoder": "input_local_transformer.layers.",
    "codec": ("encoder.layers.", "decoder.layers.", "decoder.vocoder.layers."),
}
"""Name prefixes of each part that may be quantized; all other tensors stay dense."""

NAMED = ("int4", "int4-sym", "int8", "nf4", "dense")
MIN_GROUP = 32
"""Values in 16 bytes of 4-bit weights; a matrix whose K is no multiple of it stays dense."""

SCALES = (torch.bfloat16, torch.float16, torch.float32)

FOREIGN_KEY = "quantization_config"
"""Key of config.json where other tools describe their quantization."""


@dataclass(frozen=True)
class Format:
    """How one matrix is stored.

    Args:
        kind: "int4" (w = scale (q - zero)), "int8" (w = scale q), or "nf4" (w = scale * a level of
            a fixed table).
        group: values along K that share a scale; None is a whole row (int8 only).
        symmetric: no zeros (int4 only; the others never have them).
    """

    kind: str
    group: int | None
    symmetric: bool = True

    @classmethod
    def parse(cls, text: str) -> "Format":
        """Parses "int4", "int4-sym", "int8" or "nf4", with its group as "-g32", "-g64", "-g128".

        The default is 128 for int4, 64 for nf4, the row for int8.
        """
        match = re.fullmatch(r"(int4-sym|int4|int8|nf4)(?:-g(32|64|128))?", text)
        if not match:
            known = f"use {', '.join(NAMED)}, or one with -g32, -g64, -g128"
            groups = [f"{name}-g{size}" for name in NAMED[:-1] for size in (32, 64, 128)]
            near = suggestion(text, [*NAMED, *groups])
            raise ValueError(f"no weight format {shown(text)}, {near}: {known}")
        name, group = match[1], match[2]
        default = {"int8": None, "nf4": 64}.get(name, 128)
        return cls(name.removesuffix("-sym"), int(group) if group else default, name != "int4")

    def __str__(self) -> str:
        name = self.kind + ("-sym" if self.kind == "int4" and self.symmetric else "")
        return name if self.group is None else f"{name}-g{self.group}"

    @property
    def bits(self) -> int:
        return 8 if self.kind == "int8" else 4

    def fit(self, columns: int) -> "Format | None":
        """This format with its group halved until it divides K; None if no group does."""
        if columns % MIN_GROUP:
            return None
        return self if self.group is None else replace(self, group=math.gcd(self.group, columns))

    def tensors(
        self, name: str, shape: tuple[int, ...]
    ) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of the tensors that store a matrix; the writer requests them in order."""
        rows, columns = shape
        groups = columns // (self.group or columns)
        # nf4 keeps the float32 scales of its published form, and so its exact values.
        scales = torch.float32 if self.kind == "nf4" else torch.bfloat16
        stored = {
            f"{name}.words": ((rows, columns * self.bits // 32), torch.int32),
            f"{name}.scales": ((rows, groups), scales),
        }
        if self.symmetric:
            return stored
        return stored | {f"{name}.zeros": ((rows, groups), torch.float16)}


@dataclass(frozen=True)
class QuantizationConfig:
    """Format of each part; None is dense. The codec is quantized at load, its codebooks never."""

    backbone: Format | None = None
    lm_head: Format | None = None
    text_embeddings: Format | None = None
    patch_decoder: Format | None = None
    patch_encoder: Format | None = None
    codec: Format | None = None

    @classmethod
    def parse(
        cls, value: "str | Mapping[str, str | None] | QuantizationConfig | None"
    ) -> "QuantizationConfig | None":
        """Parses a named choice ("int8", "int4", "nf4"), or a format for each part.

        A mapping is {"backbone": "int4-g64", ...}; parts left out, None or "dense" stay dense.

        Raises:
            ValueError: no such name, part or format.
        """
        if value is None or isinstance(value, QuantizationConfig):
            return value
        if isinstance(value, str):
            if value not in CHOICES:
                known = f"{', '.join(CHOICES)} or a format for each part"
                raise ValueError(
                    f"no quantization {shown(value)}, {suggestion(value, CHOICES)}: use {known}"
                )
            value = CHOICES[value]
        if not isinstance(value, Mapping):
            problem = "is a name or a mapping of parts to formats"
            raise TypeError(f"quantization {problem}, not {shown(value)}")
        for part in sorted(map(str, set(value) - set(PARTS))):
            parts = f"the parts are {', '.join(PARTS)}"
            raise ValueError(f"no part {part} to quantize, {suggestion(part, PARTS)}: {parts}")
        chosen = {part: text for part, text in value.items() if text not in (None, "dense")}
        return cls(**{part: Format.parse(str(text)) for part, text in chosen.items()})

    def parts(self) -> dict[str, str | None]:
        """The parts in the form that `parse` reads."""
        formats = {field.name: getattr(self, field.name) for field in fields(self)}
        return {part: None if chosen is None else str(chosen) for part, chosen in formats.items()}

    def format_of(self, name: str, shape: tuple[int, ...]) -> Format | None:
        """Format of one tensor by upstream's name; None is dense."""
        part = next((part for part, prefix in PARTS.items() if name.startswith(prefix)), None)
        chosen: Format | None = getattr(self, part) if part else None
        if chosen is None or len(shape) != 2 or not name.endswith(".weight"):
            return None
        return chosen.fit(shape[1])

    def formats(self, shapes: Shapes) -> dict[str, Format]:
        """The matrices among `shapes` that get quantized."""
        found = {name: self.format_of(name, shape) for name, shape in shapes.items()}
        return {name: chosen for name, chosen in found.items() if chosen}


_INT4 = {"backbone": "int4", "lm_head": "int8", "text_embeddings": "int8", "patch_decoder": "int8"}

CHOICES: dict[str, dict[str, str]] = {
    "int8": {"backbone": "int8", "lm_head": "int8", "patch_decoder": "int8"},
    "int4": _INT4,
    "nf4": _INT4 | {"backbone": "nf4"},
}
"""The formats of a name; int4's text embeddings would be a fifth of the checkpoint in bfloat16."""


@dataclass
class PackedMatrices:
    """The matrices that another tool left packed in a checkpoint, by upstream's names.

    Args:
        get: one matrix, in our form or as a dense float32 tensor.

    Attributes:
        shapes: of every packed matrix.
        formats: our form of those that one can hold; the others are unpacked.
        dtypes: of those when unpacked, where not config.json's, and of packed tensors whose dtype
            is not the usual one.
        parts: names of the tensors in the files that these are made of, or that are not needed.
        remarks: what of the checkpoint is not done here, a line each.
    """

    get: Callable[[str], QuantizedWeight | Tensor]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)

    def add(
        self, name: str, shape: tuple[int, ...], form: Format | None, parts: Iterable[str]
    ) -> None:
        self.shapes[name] = shape
        self.parts.update(parts)
        if form:
            self.formats[name] = form


def importable_group(size: int, columns: int) -> int | None:
    """Our group for another tool's of `size` along K, a longer one split; None if none fits."""
    return min(size, 128) if columns % size == 0 and (size in (32, 64) or size % 128 == 0) else None


def stored_formats(raw: Mapping[str, Any], source: str) -> dict[str, Format]:
    """Format of every matrix that a config.json lists as quantized; empty for a dense checkpoint.

    Raises:
        CheckpointError: the entry is malformed or of a later version.
    """
    entry = raw.get(CONFIG_KEY)
    if entry is None:
        return {}
    if not isinstance(entry, Mapping) or entry.get("version") != VERSION:
        version = entry.get("version") if isinstance(entry, Mapping) else None
        raise CheckpointError(
            f"{source}: quantized form {shown(version)} is unknown: update mimo-fast or quantize "
            "again"
        )
    try:
        return {name: Format.parse(about["format"]) for name, about in entry["tensors"].items()}
    # A list has no items, a number no key.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: its '{CONFIG_KEY}' is damaged ({cut(error)}): quantize again"
        ) from error


def stored_shapes(shapes: Shapes, formats: Mapping[str, Format]) -> Shapes:
    """Names and shapes in the file: packed tensors replace each matrix of `formats`."""
    stored = stored_tensors(shapes, formats, torch.bfloat16)
    return {name: shape for name, (shape, _) in stored.items()}


def stored_tensors(
    shapes: Shapes, formats: Mapping[str, Format], dense: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in the file; dense: the dtype of the rest, one or by name."""
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in shapes.items():
        if name in formats:
            stored |= formats[name].tensors(name, shape)
        else:
            stored[name] = shape, dense if isinstance(dense, torch.dtype) else dense[name]
    return stored


def stored_types(shapes: Shapes, formats: Mapping[str, Format]) -> dict[str, list[torch.dtype]]:
    """Types that each packed tensor in the file may have, by name.

    Imported scales keep the type that the other tool gave them.
    """
    packed = {name: shapes[name] for name in formats if name in shapes}
    usual = stored_tensors(packed, formats, torch.bfloat16)
    return {
        name: [*SCALES] if name.endswith(".scales") else [dtype]
        for name, (_, dtype) in usual.items()
    }


def checkpoint_bytes(
    config: LMConfig, quantization: QuantizationConfig | None, dense: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of a language model's tensors on disk, from shapes alone, without file headers."""
    shapes = lm_shapes(config)
    formats = quantization.formats(shapes) if quantization else {}
    stored = stored_tensors(shapes, formats, dense)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())
