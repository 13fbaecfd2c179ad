"""Import of checkpoints that compressed-tensors wrote (llm-compressor, vLLM).

A layer M [N, K] is stored, by format, as

- pack-quantized: M.weight_packed int32 [N, ceil(K b / 32)] (consecutive k, the lowest bits first,
  q + 2^(b-1)), M.weight_scale [N, G], M.weight_zero_point int32 [ceil(N b / 32), G] if zeros are
  free, M.weight_shape, and M.weight_g_idx [K] if groups are in activation order;
- int-quantized, naive-quantized: M.weight int8 [N, K], M.weight_scale, M.weight_zero_point int8;
- float-quantized: see `float8.py`.

Its values are scale (q - zero). Which modules are packed and in how many bits is read off the
tensors. The facts are those of https://github.com/vllm-project/compressed-tensors.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import Weights
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization.float8 import add_activations, add_float8, widened
from mimo_fast.quantization.formats import PackedMatrices
from mimo_fast.quantization.integers import (
    Integers,
    by_rows,
    column_groups,
    stream_bits,
    unpack_stream,
)

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "dense")
MIXED = "mixed-precision"

FIELDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def packed_matrices(weights: Weights, shapes: Shapes, about: Mapping[str, Any]) -> PackedMatrices:
    """The matrices that a checkpoint holds packed; `about` is its quantization_config.

    Raises:
        CheckpointError: it holds another format, rotated or sparse weights, or tensors that do not
            belong together.
    """
    groups = [group for group in about.get("config_groups", {}).values() if group]
    _check_formats(about, groups, weights.directory)
    blocks = [(group.get("weights") or {}).get("block_structure") for group in groups]
    layouts: dict[str, Integers] = {}

    def get(name: str) -> QuantizedWeight | Tensor:
        if name not in layouts:
            return widened(weights, name, blocks)
        return _integers(weights, name, layouts[name])

    found = PackedMatrices(get)
    add_float8(found, weights, shapes, blocks)
    for name, shape in shapes.items():
        stored = _stored(weights, name)
        if "weight_packed" in stored or (
            name in weights.names() and weights.dtype(name) == torch.int8
        ):
            layouts[name] = _layout(weights, stored, name, shape)
            found.add(name, shape, layouts[name].form, (name, *stored.values()))
            found.dtypes[f"{name}.scales"] = weights.dtype(stored["weight_scale"])
    add_activations(found, weights, any(group.get("input_activations") for group in groups))
    return found


def _check_formats(
    about: Mapping[str, Any], groups: Iterable[Mapping[str, Any]], source: Path
) -> None:
    formats = {about.get("format"), *(group.get("format") for group in groups)} - {None, MIXED}
    for unknown in sorted(map(str, formats - set(FORMATS))):
        raise CheckpointError(
            f"{source} is of compressed-tensors' format {shown(unknown)}: only "
            f"{', '.join(FORMATS[:-1])} are imported"
        )
    for key in ("transform_config", "sparsity_config"):
        more = about.get(key)
        if isinstance(more, Mapping) and more and more.get("format") != "dense":
            raise CheckpointError(
                f"{source} has a '{key}' of compressed-tensors: only quantized weights are "
                "imported, neither rotated nor sparse ones"
            )


def _stored(weights: Weights, name: str) -> dict[str, str]:
    """Names of the tensors of one module, by their last part."""
    module = name.removesuffix("weight")
    return {part: f"{module}{part}" for part in FIELDS if f"{module}{part}" in weights.names()}


def _layout(
    weights: Weights, stored: Mapping[str, str], name: str, shape: tuple[int, ...]
) -> Integers:
    rows, columns = shape
    scales = weights.shape(stored["weight_scale"])
    groups = scales[1] if len(scales) == 2 else 1
    fault = f"{weights.directory}: {name} is not {list(shape)} as config.json says, or not in"
    if "weight_packed" in stored:
        height, words = weights.shape(stored["weight_packed"])
        bits = stream_bits(words, columns)
        told = weights.get(stored["weight_shape"]).tolist() if "weight_shape" in stored else None
        whole = weights.dtype(stored["weight_packed"]) == torch.int32
        if not whole or bits is None or height != rows or told not in (None, [*shape]):
            raise CheckpointError(f"{fault} 2 to 8 bits: use the config.json of these weights")
    else:
        bits = 8
        if weights.shape(name) != tuple(shape):
            raise CheckpointError(f"{fault} 8 bits: use the config.json of these weights")
    whole = scales in ((), (1,), (1, 1))
    if not whole and (scales[0] != rows or not groups or columns % groups):
        raise CheckpointError(f"{fault} groups of equal size: download the checkpoint again")
    size, has_zeros = columns // groups, "weight_zero_point" in stored
    order = weights.get(stored["weight_g_idx"]) if "weight_g_idx" in stored else None
    if order is not None and (
        order.shape != (columns,) or order.min() < 0 or order.max() >= groups
    ):
        raise CheckpointError(f"{fault} groups of its weight_g_idx: download the checkpoint again")
    zeros = _zeros(weights, stored, bits, rows) if has_zeros and bits == 8 else None
    return Integers(
        bits,
        columns,
        size,
        zeros=has_zeros,
        middle=not has_zeros or (zeros is not None and bool((zeros == 2 ** (bits - 1)).all())),
        in_order=order is None or column_groups(order, size) is None,
    )


def _integers(weights: Weights, name: str, layout: Integers) -> QuantizedWeight | Tensor:
    stored = _stored(weights, name)
    packed = "weight_packed" in stored
    values = weights.get(stored["weight_packed"] if packed else name)
    rows, scales = len(values), weights.get(stored["weight_scale"])
    # One scale of a whole matrix is one of each row here.
    scales = scales.reshape(-1, 1) if scales.numel() <= 1 or scales.ndim < 2 else scales
    scales = scales.expand(rows, -1)
    zeros = _zeros(weights, stored, layout.bits, rows) if layout.zeros else None
    order = None
    if "weight_g_idx" in stored:
        order = column_groups(weights.get(stored["weight_g_idx"]), layout.size)

    def convert(part: slice) -> QuantizedWeight | Tensor:
        words = values[part]
        q = unpack_stream(words, layout.bits)[:, : layout.columns] if packed else words.int() + 128
        return layout.converted(q, scales[part], None if zeros is None else zeros[part], order)

    return by_rows(rows, layout.columns, convert)


def _zeros(weights: Weights, stored: Mapping[str, str], bits: int, rows: int) -> Tensor:
    """Zeros [N, G] of offsets, int32."""
    zeros = weights.get(stored["weight_zero_point"])
    if zeros.dtype != (torch.int32 if "weight_packed" in stored else torch.int8):
        raise ValueError(f"{stored['weight_zero_point']} is of type {zeros.dtype}")
    if "weight_packed" in stored:
        return unpack_stream(zeros.mT, bits).mT[:rows]
    zeros = zeros.int().reshape(-1, 1) if zeros.ndim < 2 else zeros.int()
    return zeros.expand(rows, -1) + 2 ** (bits - 1)
