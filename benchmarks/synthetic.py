"""Single matrices of random weights, as a loaded model holds them.

`mimo_fast.bench.synthetic` makes whole models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimo_fast.bench.synthetic import random_reader
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight
from mimo_fast.quantization import Format, WeightSource
from mimo_fast.quantization.formats import stored_tensors


def random_weight(
    form: str,
    blocks: Sequence[int],
    columns: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bias: bool = False,
    seed: int = 0,
) -> Weight | QuantizedWeight:
    """A matrix of row blocks on a device, as a loaded model holds it; scales and biases are random.

    form: "dense", or the name of a quantization format.
    """
    names = [f"m{i}" for i in range(len(blocks))]
    shapes: Shapes = {
        f"{name}.weight": (rows, columns) for name, rows in zip(names, blocks, strict=True)
    }
    shapes |= {f"{name}.bias": (rows,) for name, rows in zip(names, blocks, strict=True) if bias}
    chosen = None if form == "dense" else Format.parse(form).fit(columns)
    formats = {f"{name}.weight": chosen for name in names} if chosen else {}
    plain = random_reader(stored_tensors(shapes, formats, dtype), device, seed)

    def read(name: str) -> Tensor:
        tensor, generator = plain(name), torch.Generator(device).manual_seed(seed)
        if name.endswith("bias"):
            return tensor.normal_(generator=generator)
        if name.endswith("scales"):
            return tensor * (0.5 + torch.rand(tensor.shape, device=device, generator=generator)).to(
                tensor.dtype
            )
        return tensor

    return WeightSource(read, dtype, formats).weight(*names, bias=bias)


def shape_weight(form: str, rows: int, columns: int, biased: bool) -> Weight | QuantizedWeight:
    """A weight without memory, for its bytes; dense ones are bfloat16."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bias = empty((rows,)) if biased else None
    chosen = None if form == "dense" else Format.parse(form).fit(columns)
    if chosen is None:
        return Weight.stack([empty((rows, columns))], [bias])
    parts = {key: empty(*stored) for key, stored in chosen.tensors("w", (rows, columns)).items()}
    return QuantizedWeight(
        parts["w.words"], parts["w.scales"], parts.get("w.zeros"), bias, chosen.bits
    )
