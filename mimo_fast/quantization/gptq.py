"""Import of 4-bit checkpoints in the GPTQ layout, which AutoRound writes too.

A linear layer M [N, K] is stored as M.qweight int32 [K / 8, N] (8 consecutive k a word, the lowest bits first),
M.qzeros int32 [G, N / 8] (8 consecutive n a word), M.scales [G, N] and M.g_idx [K], the group of each k. Its values are
scale (q - zero), where the original layout ("gptq", v1) stores zero - 1 and "gptq_v2" stores zero. The facts are those
of https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/ModelCloud/GPTQModel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoint import Weights, open_weights
from ..config import LMConfig, read_json
from ..errors import CheckpointError
from ..kernels.quantized_weight import QuantizedWeight, pack_words
from ..layout import lm_shapes
from .convert import PathLike, write_quantized
from .formats import Format, QuantizationConfig
from .search import quantize, relative_error


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, v1: bool = True
) -> QuantizedWeight | Tensor:
    """One layer in our int4 form, with the very same values; bias is the caller's.

    Where our form cannot hold the layer (groups in activation order, or of a size that is neither 32, 64 nor a multiple
    of 128), its values as a dense float32 matrix [N, K] instead.

    Raises:
        CheckpointError: the tensors do not belong together.
    """
    q = _unpack(qweight.T)
    (rows, columns), groups = q.shape, len(scales)
    if scales.shape != (groups, rows) or qzeros.shape != (groups, rows // 8) or columns % groups or rows % 8:
        raise CheckpointError("qweight, qzeros and scales are not of one 4-bit GPTQ layer: only 4-bit is imported")
    zeros = _unpack(qzeros).T + (1 if v1 else 0)
    size = columns // groups
    in_order = torch.arange(columns, device=q.device) // size
    order = in_order if g_idx is None else g_idx.long()
    if order.shape != (columns,) or order.min() < 0 or order.max() >= groups:
        raise CheckpointError("g_idx does not name a group for each column of its layer: download the checkpoint again")
    if not torch.equal(order, in_order) or not _representable(size):
        return scales.T.float()[:, order] * (q - zeros[:, order]).float()
    # A longer group is several of ours with the same scale.
    group = min(size, 128)
    per_group = [t.repeat_interleave(size // group, dim=1) for t in (scales.T, zeros)]
    return QuantizedWeight(
        words=pack_words(q, 4, group), scales=per_group[0].contiguous(), zeros=(per_group[1] - 8).half(), bias=None,
        bits=4,
    )


def import_gptq(
    source: PathLike, target: PathLike, quantization: str | Mapping[str, str | None] | QuantizationConfig | None = None,
    *, progress: bool = True,
) -> dict[str, float]:
    """Converts a GPTQ or AutoRound W4 checkpoint of the language model into our quantized form.

    Args:
        quantization: for matrices that the source holds dense, such as lm_head, and for those in activation order,
            which are unpacked; by default both are stored dense.

    Returns:
        Relative error of what was quantized here; of what was imported, the original is not known.

    Raises:
        CheckpointError: the source is not such a checkpoint, or the target holds weights.
    """
    source = Path(source)
    raw = dict(read_json(source / "config.json"))
    v1 = _is_v1(raw.pop("quantization_config", None), source)
    shapes, weights = lm_shapes(LMConfig.from_dict(raw, str(source / "config.json"))), open_weights(source)
    packed = {name for name in shapes if f"{name.removesuffix('weight')}qweight" in weights.names()}
    _check_shapes(weights, shapes, packed)
    chosen = QuantizationConfig.parse(quantization) or QuantizationConfig()
    formats, dtypes = chosen.formats(shapes), dict.fromkeys(packed, torch.bfloat16)
    for name in packed:
        layer = name.removesuffix("weight")
        size = shapes[name][1] // weights.shape(f"{layer}scales")[0]
        if _in_order(weights, layer, size) and _representable(size):
            formats[name] = Format("int4", min(size, 128), symmetric=False)
            dtypes[f"{name}.scales"] = weights.dtype(f"{layer}scales")
    dtypes |= {name: weights.dtype(name) for name in shapes if name not in packed}
    with tqdm(total=len(formats), desc="importing", unit="matrix", delay=1, disable=None if progress else True) as bar:

        def convert(name: str) -> tuple[QuantizedWeight, float | None]:
            bar.update(1)
            matrix = _layer(weights, name, v1) if name in packed else weights.get(name)
            if isinstance(matrix, QuantizedWeight):
                return matrix, None
            quantized = quantize(matrix, formats[name])
            return quantized, relative_error(matrix, quantized)

        def read(name: str) -> Tensor:
            matrix = _layer(weights, name, v1) if name in packed else weights.get(name)
            assert isinstance(matrix, Tensor)
            return matrix

        about = {"parts": chosen.parts(), "imported": "gptq"}
        return write_quantized(
            Path(target), raw, shapes, formats, dtypes, read, convert, about=about, copy_from=source
        )


def _layer(weights: Weights, name: str, v1: bool) -> QuantizedWeight | Tensor:
    layer = name.removesuffix("weight")
    g_idx = weights.get(f"{layer}g_idx") if f"{layer}g_idx" in weights.names() else None
    qweight, qzeros, scales = (weights.get(f"{layer}{part}") for part in ("qweight", "qzeros", "scales"))
    return from_gptq(qweight, qzeros, scales, g_idx, v1=v1)


def _in_order(weights: Weights, layer: str, size: int) -> bool:
    if f"{layer}g_idx" not in weights.names():
        return True
    order = weights.get(f"{layer}g_idx")
    return torch.equal(order.long(), torch.arange(len(order)) // size)


def _representable(size: int) -> bool:
    return size in (32, 64) or size % 128 == 0


def _is_v1(about: Any, source: Path) -> bool:
    """Whether zeros are stored less one, from quantization_config."""
    about = about if isinstance(about, Mapping) else {}
    method, bits = str(about.get("quant_method", "")), about.get("bits")
    packing = str(about.get("packing_format", ""))
    if not any(known in method for known in ("gptq", "auto-round", "autoround")) or "awq" in packing:
        raise CheckpointError(f"{source} is no GPTQ checkpoint by its config.json (method {method!r} {packing!r}): "
                              "only the GPTQ layout is imported")
    if bits != 4:
        raise CheckpointError(f"{source} holds {bits}-bit weights: only 4-bit GPTQ is imported")
    return str(about.get("checkpoint_format", "gptq")) != "gptq_v2"


def _check_shapes(weights: Weights, shapes: Mapping[str, tuple[int, ...]], packed: set[str]) -> None:
    for name, shape in shapes.items():
        if name not in packed:
            found: tuple[int, ...] = weights.shape(name)
        else:
            words, rows = weights.shape(f"{name.removesuffix('weight')}qweight")
            found = (rows, words * 8)
        if found != tuple(shape):
            raise CheckpointError(f"{weights.directory}: {name} is {list(found)}, not {list(shape)}: "
                                  "use the config.json that belongs to these weights")


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, n] -> [R, 8 n], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(1)
