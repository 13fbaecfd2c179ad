"""Import of 4-bit matrices in the GPTQ layout, which AutoRound writes too.

A linear layer M [N, K] is stored as M.qweight int32 [K / 8, N] (8 consecutive k a word, the lowest
bits first), M.qzeros int32 [G, N / 8] (8 consecutive n a word), M.scales [G, N] and M.g_idx [K],
the group of each k. Its values are scale (q - zero), where the original layout ("gptq", v1) stores
zero - 1 and "gptq_v2" stores zero. The facts are those of https://github.com/AutoGPTQ/AutoGPTQ and
https://github.com/ModelCloud/GPTQModel.
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
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, pack_words
from mimo_fast.quantization.formats import Format, PackedMatrices, importable_group


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, v1: bool = True
) -> QuantizedWeight | Tensor:
    """One layer in our int4 form with the same values, or as a dense float32 matrix [N, K].

    It is dense where our form cannot hold it: groups in activation order, or of a size that is
    neither 32, 64 nor a multiple of 128. The caller handles the bias.

    Raises:
        CheckpointError: the tensors do not belong together.
    """
    q = _unpack(qweight.T)
    (rows, columns), groups = q.shape, len(scales)
    belong = scales.shape == (groups, rows) and qzeros.shape == (groups, rows // 8)
    if not belong or columns % groups or rows % 8:
        raise CheckpointError(
            "qweight, qzeros and scales are not of one 4-bit GPTQ layer: only 4-bit is imported"
        )
    zeros = _unpack(qzeros).T + (1 if v1 else 0)
    size = columns // groups
    in_order = torch.arange(columns, device=q.device, dtype=torch.int64) // size
    order = in_order if g_idx is None else g_idx.long()
    if order.shape != (columns,) or order.min() < 0 or order.max() >= groups:
        raise CheckpointError(
            "g_idx does not give each column of its layer a group: download the checkpoint again"
        )
    group = importable_group(size, columns)
    if group is None or not torch.equal(order, in_order):
        return scales.T.float()[:, order] * (q - zeros[:, order]).float()
    per_group = [t.repeat_interleave(size // group, dim=1) for t in (scales.T, zeros)]
    return QuantizedWeight(
        words=pack_words(q, 4, group),
        scales=per_group[0].contiguous(),
        zeros=(per_group[1] - 8).half(),
        bias=None,
        bits=4,
    )


def packed_matrices(weights: Weights, shapes: Shapes, about: Mapping[str, Any]) -> PackedMatrices:
    """The matrices that a checkpoint holds packed; `about` is its quantization_config.

    Raises:
        CheckpointError: its layout is not GPTQ's, or not of 4 bits.
    """
    v1 = _is_v1(about, weights.directory)
    found: dict[str, tuple[int, ...]] = {}
    formats, dtypes = dict[str, Format](), dict[str, torch.dtype]()
    for name in shapes:
        layer = name.removesuffix("weight")
        if f"{layer}qweight" not in weights.names():
            continue
        words, rows = weights.shape(f"{layer}qweight")
        found[name], dtypes[name] = (rows, words * 8), torch.bfloat16
        size = words * 8 // weights.shape(f"{layer}scales")[0]
        group = importable_group(size, words * 8)
        if group and _in_order(weights, layer, size):
            formats[name] = Format("int4", group, symmetric=False)
            dtypes[f"{name}.scales"] = weights.dtype(f"{layer}scales")
    return PackedMatrices(found, formats, dtypes, lambda name: _layer(weights, name, v1))


def _layer(weights: Weights, name: str, v1: bool) -> QuantizedWeight | Tensor:
    layer = name.removesuffix("weight")
    g_idx = weights.get(f"{layer}g_idx") if f"{layer}g_idx" in weights.names() else None
    parts = ("qweight", "qzeros", "scales")
    qweight, qzeros, scales = (weights.get(f"{layer}{part}") for part in parts)
    return from_gptq(qweight, qzeros, scales, g_idx, v1=v1)


def _in_order(weights: Weights, layer: str, size: int) -> bool:
    if f"{layer}g_idx" not in weights.names():
        return True
    order = weights.get(f"{layer}g_idx")
    return torch.equal(
        order.long(), torch.arange(len(order), dtype=torch.int64, device="cpu") // size
    )


def _is_v1(about: Mapping[str, Any], source: Path) -> bool:
    """Whether the stored zeros are one too low (layout v1)."""
    bits, packing = about.get("bits"), str(about.get("packing_format", ""))
    if "awq" in packing:
        raise CheckpointError(
            f"{source} is packed as {shown(packing)}: of AutoRound's layouts only GPTQ's can be "
            "imported"
        )
    if bits != 4:
        raise CheckpointError(f"{source} holds {bits}-bit weights: only 4-bit GPTQ is imported")
    return str(about.get("checkpoint_format", "gptq")) != "gptq_v2"


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, n] -> [R, 8 n], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(1)
