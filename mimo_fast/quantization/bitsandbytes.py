"""Import of matrices that bitsandbytes stored as NF4, as transformers saves them.

A matrix X [N, K] is stored as X uint8 [N K / 2, 1], two values a byte, the first in the high bits,
and its state: X.absmax, a scale for each block of consecutive values; X.quant_map [16], the levels;
and X.quant_state.bitsandbytes__nf4, JSON as bytes with the shape and the block size. Where scales
are quantized as well, X.absmax is uint8, and X.nested_absmax and X.nested_quant_map expand it.
bitsandbytes itself reads all of that here.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mimo_fast.checkpoint.files import Weights
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, pack_words
from mimo_fast.quantization.formats import Format, PackedMatrices, importable_group
from mimo_fast.quantization.search import NF4_LEVELS

STATE = "quant_state.bitsandbytes__nf4"
FIELDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def from_bitsandbytes(packed: Tensor, state: Mapping[str, Tensor]) -> QuantizedWeight | Tensor:
    """One matrix in our nf4 form with the same values, or as a dense float32 matrix [N, K].

    It is dense where our form cannot hold it: blocks that do not end with a row, or other levels.
    `state` has its tensors by the names of FIELDS.

    Raises:
        CheckpointError: bitsandbytes is not installed, or the tensors do not belong together.
    """
    functional = _functional()
    try:
        read = functional.QuantState.from_dict(dict(state), device=packed.device)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"bitsandbytes cannot read the state of a matrix ({error}): download it again"
        ) from error
    (rows, columns), flat = read.shape, packed.view(torch.uint8).flatten()
    if 2 * len(flat) != rows * columns or -(-rows * columns // read.blocksize) != len(read.absmax):
        raise CheckpointError(
            "packed values, absmax and shape are not of one matrix: download the checkpoint again"
        )
    # The stored values, not rounded to the dtype of the saved model.
    read.dtype = torch.float32
    group = importable_group(read.blocksize, columns)
    levels = torch.tensor(NF4_LEVELS, device=flat.device, dtype=torch.float32)
    if group is None or not torch.equal(read.code, levels):
        return functional.dequantize_4bit(flat[:, None], read)
    scales = read.absmax
    if read.nested:
        scales = functional.dequantize_blockwise(scales, read.state2) + read.offset
    q = torch.stack((flat >> 4, flat & 15), dim=1).view(rows, columns)
    return QuantizedWeight(
        words=pack_words(q, 4, group),
        bias=None,
        bits=4,
        zeros=None,
        levels=levels,
        scales=scales.float().repeat_interleave(read.blocksize // group).view(rows, -1),
    )


def packed_matrices(weights: Weights, shapes: Shapes, about: Mapping[str, Any]) -> PackedMatrices:
    """The matrices that a checkpoint holds packed, from headers and each matrix's JSON alone.

    Raises:
        CheckpointError: it holds another form than NF4, or bitsandbytes is not installed.
    """
    kind = about.get("bnb_4bit_quant_type") if about.get("load_in_4bit") else "8-bit"
    if kind != "nf4":
        problem = f"{weights.directory} holds {kind} weights of bitsandbytes"
        raise CheckpointError(f"{problem}: only NF4 is imported")
    _functional()
    from bitsandbytes.utils import unpack_tensor_to_dict

    stored = [name for name in shapes if f"{name}.{STATE}" in weights.names()]
    states = {name: unpack_tensor_to_dict(weights.get(f"{name}.{STATE}")) for name in stored}
    sizes = {name: (state["blocksize"], state["shape"][1]) for name, state in states.items()}
    groups = {name: importable_group(*size) for name, size in sizes.items()}

    def get(name: str) -> QuantizedWeight | Tensor:
        present = [field for field in FIELDS if f"{name}.{field}" in weights.names()]
        state = {field: weights.get(f"{name}.{field}") for field in present}
        return from_bitsandbytes(weights.get(name), state)

    found = PackedMatrices(get)
    for name, state in states.items():
        form = Format("nf4", groups[name]) if groups[name] else None
        parts = [name, *(f"{name}.{field}" for field in FIELDS)]
        found.add(name, tuple(state["shape"]), form, parts)
        found.dtypes[name] = getattr(torch, state["dtype"])
    return found


def _functional() -> ModuleType:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise CheckpointError(
            "this checkpoint is in bitsandbytes' form, which is not installed here: "
            "pip install 'mimo-fast[bitsandbytes]'"
        ) from error
    return functional
