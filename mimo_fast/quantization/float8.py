"""Import of FP8 matrices: float8 values and scales, widened, since no kernel here computes in FP8.

A layer M [N, K] is stored as M.weight float8 [N, K] and a scale of the whole matrix, of each row,
of groups along K or of blocks: M.weight_scale (compressed-tensors) or M.weight_scale_inv
(transformers' fine-grained FP8, of DeepSeek). Either is multiplied with. The facts are those of
https://github.com/vllm-project/compressed-tensors and https://github.com/huggingface/transformers.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import Weights
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.json_files import shown
from mimo_fast.quantization.formats import SCALES, PackedMatrices

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_NAMES = ("weight_scale", "weight_scale_inv")

OF_ACTIVATIONS = (
    *(f"{what}_{kind}" for what in ("input", "output") for kind in ("scale", "zero_point")),
    *("activation_scale", "input_scale_ub", "k_scale", "v_scale", "q_scale"),
)
"""Last parts of names of tensors that quantize activations or a KV cache, not weights."""

REMARK = "activations and the KV cache stay as they are: what quantizes them is not applied"


def packed_matrices(weights: Weights, shapes: Shapes, about: Mapping[str, Any]) -> PackedMatrices:
    """The matrices that a checkpoint holds in FP8; `about` is its quantization_config.

    Raises:
        CheckpointError: a matrix has no scale, or one of another shape.
    """
    blocks = [about.get("weight_block_size")]
    found = PackedMatrices(lambda name: widened(weights, name, blocks))
    add_float8(found, weights, shapes, blocks)
    add_activations(found, weights, about.get("activation_scheme") is not None)
    return found


def add_float8(
    found: PackedMatrices, weights: Weights, shapes: Shapes, blocks: Iterable[Any]
) -> None:
    """Adds the matrices that are stored in FP8, and checks that each has a scale that fits."""
    for name in shapes:
        if name in weights.names() and weights.dtype(name) in FLOAT8:
            scale = _scale_name(weights, name)
            if weights.dtype(scale) not in SCALES:
                raise CheckpointError(
                    f"{weights.directory}: {scale} is of type {shown(weights.dtype(scale))}, and "
                    "only floating-point scales are imported: export with those"
                )
            _block(weights.shape(scale), weights.shape(name), blocks, name)
            found.add(name, weights.shape(name), None, (name, scale))


def add_activations(found: PackedMatrices, weights: Weights, quantized: bool) -> None:
    """Adds tensors that quantize activations as not needed, with a remark if there is any."""
    extra = [name for name in weights.names() if name.rpartition(".")[2] in OF_ACTIVATIONS]
    found.parts.update(extra)
    if extra or quantized:
        found.remarks.append(REMARK)


def widened(weights: Weights, name: str, blocks: Iterable[Any]) -> Tensor:
    """One matrix as float32: float8 values times scales, exact but for one rounding to float32."""
    values, scale = weights.get(name).float(), weights.get(_scale_name(weights, name)).float()
    rows, columns = _block(tuple(scale.shape), tuple(values.shape), blocks, name)
    if scale.numel() == 1:
        return values * scale.reshape(())
    wide = scale.repeat_interleave(rows, dim=0)[: len(values)]
    return values * wide.repeat_interleave(columns, dim=1)[:, : values.shape[1]]


def _scale_name(weights: Weights, name: str) -> str:
    stem = name.removesuffix("weight")
    for scale in SCALE_NAMES:
        if f"{stem}{scale}" in weights.names():
            return f"{stem}{scale}"
    raise CheckpointError(
        f"{weights.directory}: {name} is FP8 and has no scale: download the checkpoint again"
    )


def _block(
    scale: tuple[int, ...], shape: tuple[int, ...], blocks: Iterable[Any], name: str
) -> tuple[int, int]:
    """Rows and columns of a matrix that share a scale; `blocks` are the sizes that are stated."""
    rows, columns = shape
    stated = [(*map(int, block),) for block in blocks if block]
    if all(size == 1 for size in scale):
        return rows, columns
    if scale in ((rows,), (rows, 1)):
        return 1, columns
    for height, width in stated:
        if scale == (-(-rows // height), -(-columns // width)):
            return height, width
    if len(scale) == 2 and scale[0] == rows and columns % scale[1] == 0:
        return 1, columns // scale[1]
    raise CheckpointError(
        f"the scale of {name} is {list(scale)} for {list(shape)}, in no block that config.json "
        "states: download the checkpoint again"
    )
