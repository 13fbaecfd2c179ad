"""Import of matrices in the GPTQ layout, which AutoRound writes too.

A linear layer M [N, K] of b bits is stored as M.qweight int32 [K b / 32, N] (consecutive k, the
lowest bits first), M.qzeros int32 [G, N b / 32] (consecutive n), M.scales [G, N] and M.g_idx [K],
the group of each k. Its values are scale (q - zero). Stored zeros are one too low in GPTQ's first
layout ("gptq", v1) and as they are in "gptq_v2". AutoRound writes both: "auto_round:auto_gptq" is
v1, "auto_round" and "auto_round:gptqmodel" are v2. Which layers are packed, and in how many bits,
is read off the tensors, so whatever a config excludes or sets for single layers is followed. The
facts are those of https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/ModelCloud/GPTQModel and
https://github.com/intel/auto-round.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import Weights
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization.formats import PackedMatrices
from mimo_fast.quantization.integers import (
    MOST_BITS,
    Integers,
    by_rows,
    column_groups,
    stream_bits,
    unpack_stream,
)

AUTO_ROUND_V1 = ("auto_round:auto_gptq", "auto_round:gptq")
AUTO_ROUND_V2 = ("auto_round", "auto_round:gptqmodel")
KERNELS = ("exllamav2", "tritonv2", "triton", "marlin", "cuda", "torch")
"""That some versions of AutoRound name after the packing; they change nothing in a file."""

OVERRIDES = ("extra_config", "dynamic")
"""Keys under which AutoRound and GPTQModel keep what differs for single layers."""


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    v1: bool = True,
    bits: int = 4,
    group_size: int | None = None,
) -> QuantizedWeight | Tensor:
    """One layer in our int4 or int8 form with the same values, or as a dense float32 matrix [N, K].

    It is dense where neither form can hold it: groups in activation order, or of a size that is
    neither 32, 64 nor a multiple of 128, or 8 bits around another zero than 128. The caller handles
    the bias.

    Args:
        bits: of a value, 2 to 8.
        group_size: columns of a group, where the last one is shorter; None: all are equal.

    Raises:
        CheckpointError: the tensors do not belong together.
    """
    (words, rows), groups = qweight.shape, len(scales)
    columns = words * 32 // bits
    whole = qweight.dtype == qzeros.dtype == torch.int32
    belong = (
        whole and scales.shape == (groups, rows) and qzeros.shape == (groups, -(-rows * bits // 32))
    )
    if not belong or not groups or (group_size is None and g_idx is None and columns % groups):
        raise CheckpointError(
            f"qweight, qzeros and scales are not of one {bits}-bit GPTQ layer: download the "
            "checkpoint again"
        )
    if g_idx is not None and (
        g_idx.shape != (columns,) or g_idx.min() < 0 or g_idx.max() >= groups
    ):
        raise CheckpointError(
            "g_idx does not give each column of its layer a group: download the checkpoint again"
        )
    layout = _layout(bits, columns, group_size or columns // groups, qzeros, g_idx, v1)
    zeros = _zeros(qzeros, bits, v1)[:, :rows].T
    order = None if g_idx is None else column_groups(g_idx, layout.size)

    def convert(part: slice) -> QuantizedWeight | Tensor:
        q = unpack_stream(qweight[:, part].T, bits)
        return layout.converted(q, scales.T[part], zeros[part], order)

    return by_rows(rows, columns, convert)


def packed_matrices(weights: Weights, shapes: Shapes, about: Mapping[str, Any]) -> PackedMatrices:
    """The matrices that a checkpoint holds packed; `about` is its quantization_config.

    Raises:
        CheckpointError: its layout is not GPTQ's, or what config.json says contradicts the tensors.
    """
    v1 = _is_v1(about, weights.directory)
    sizes, always_middle = _stated(about, "group_size"), _always_symmetric(about)
    widths = _stated(about, "bits")
    layouts: dict[str, Integers] = {}
    found = PackedMatrices(lambda name: _read(weights, name, layouts[name], v1, always_middle))
    for name, (*_, columns) in shapes.items():
        stored = _stored(weights, name)
        if "qweight" not in stored:
            continue
        (words, rows), groups = weights.shape(stored["qweight"]), weights.shape(stored["scales"])[0]
        bits, size = stream_bits(words, columns), _group_size(columns, groups, sizes)
        if bits is None or size is None or rows != shapes[name][0]:
            raise CheckpointError(
                f"{weights.directory}: {name} is of {words} x {rows} words in {groups} groups, "
                f"which are not {list(shapes[name])} of config.json: use the one that belongs to "
                "these weights"
            )
        if widths and bits not in widths:
            raise CheckpointError(
                f"{weights.directory}: {name} is in {bits} bits, and config.json says "
                f"{' or '.join(map(str, sorted(widths)))}: use the one that belongs to these "
                "weights"
            )
        g_idx = weights.get(stored["g_idx"]) if "g_idx" in stored else None
        # Only of 8 bits do the zeros decide about the form.
        zeros = weights.get(stored["qzeros"]) if bits == MOST_BITS else None
        layouts[name] = _layout(bits, columns, size, zeros, g_idx, v1)
        found.add(name, (rows, columns), layouts[name].form, stored.values())
        found.dtypes[f"{name}.scales"] = weights.dtype(stored["scales"])
        if _has_empty_bias(weights, name, shapes):
            found.parts.add(f"{name.removesuffix('weight')}bias")
    return found


def _stored(weights: Weights, name: str) -> dict[str, str]:
    """Names of the tensors of one layer, by their last part."""
    layer = name.removesuffix("weight")
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return {part: f"{layer}{part}" for part in parts if f"{layer}{part}" in weights.names()}


def _read(
    weights: Weights, name: str, layout: Integers, v1: bool, always_middle: bool
) -> QuantizedWeight | Tensor:
    parts = {part: weights.get(stored) for part, stored in _stored(weights, name).items()}
    if always_middle:
        zeros = _zeros(parts["qzeros"], layout.bits, v1)[:, : parts["scales"].shape[1]]
        if not bool((zeros == 2 ** (layout.bits - 1)).all()):
            raise CheckpointError(
                f"{weights.directory}: config.json says that zeros are symmetric in layout "
                f"{'v1' if v1 else 'v2'} of GPTQ, and those of {name} are not: correct its "
                "checkpoint_format or packing_format, or 'sym'"
            )
    return from_gptq(**parts, v1=v1, bits=layout.bits, group_size=layout.size)


def _layout(
    bits: int, columns: int, size: int, qzeros: Tensor | None, g_idx: Tensor | None, v1: bool
) -> Integers:
    middle = qzeros is not None and bool((_zeros(qzeros, bits, v1) == 2 ** (bits - 1)).all())
    in_order = g_idx is None or column_groups(g_idx, size) is None
    return Integers(bits, columns, size, zeros=True, middle=middle, in_order=in_order)


def _zeros(qzeros: Tensor, bits: int, v1: bool) -> Tensor:
    """Zeros int32 [G, n] of all n that fit into the words."""
    if v1 and 32 % bits == 0:
        # GPTQModel takes 1 off all zeros of a word at once: what a 0 borrows from the next one is
        # returned to it.
        qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))
    elif v1:
        return (unpack_stream(qzeros, bits) + 1) & (2**bits - 1)
    return unpack_stream(qzeros, bits)


def _has_empty_bias(weights: Weights, name: str, shapes: Shapes) -> bool:
    """Whether a layer without a bias got one of zeros, as some versions of AutoGPTQ give it."""
    bias = f"{name.removesuffix('weight')}bias"
    return bias not in shapes and bias in weights.names() and not weights.get(bias).any()


def _stated(about: Mapping[str, Any], key: str) -> set[int]:
    """The values of a key that config.json states, for all layers and for single ones."""
    values = [each.get(key) for each in (about, *_overrides(about))]
    return {value for value in values if type(value) is int and value > 0}


def _group_size(columns: int, groups: int, stated: set[int]) -> int | None:
    """Columns of a group; the last group may be shorter. None if that is unclear."""
    if groups == 1:
        return columns
    if stated:
        fitting = [size for size in stated if -(-columns // size) == groups]
        return fitting[0] if len(fitting) == 1 else None
    return columns // groups if groups and columns % groups == 0 else None


def _always_symmetric(about: Mapping[str, Any]) -> bool:
    stated = [each["sym"] for each in (about, *_overrides(about)) if "sym" in each]
    return bool(stated) and all(each is True for each in stated)


def _overrides(about: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    tables = [about.get(key) for key in OVERRIDES]
    layers = [each for table in tables if isinstance(table, Mapping) for each in table.values()]
    return [each for each in layers if isinstance(each, Mapping)]


def _is_v1(about: Mapping[str, Any], source: Path) -> bool:
    """Whether stored zeros are one too low."""
    if about.get("quant_method") == "gptq":
        layout = about.get("checkpoint_format", "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"{source} is packed as {shown(layout)}: of GPTQ's layouts gptq and gptq_v2 are "
                "imported"
            )
        return bool(layout == "gptq")
    # Before version 0.4 the key was "backend"; without one AutoRound itself assumes GPTQ's.
    stated = about.get("packing_format") or about.get("backend") or AUTO_ROUND_V1[0]
    packing = ":".join(part for part in str(stated).split(":") if part not in KERNELS)
    if packing not in (*AUTO_ROUND_V1, *AUTO_ROUND_V2):
        raise CheckpointError(
            f"{source} is packed as {shown(stated)}: of AutoRound's layouts only GPTQ's can be "
            "imported, so export it again with --format auto_round or auto_gptq"
        )
    return packing in AUTO_ROUND_V1
