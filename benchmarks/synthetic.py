"""Models of any dimensions with random weights made in place, dense or quantized: nothing is read from a disk."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.kernels.qmatmul import QuantizedWeight, Weight
from mimo_fast.layout import Shapes, lm_shapes
from mimo_fast.quantization import Format, QuantizationConfig, WeightSource
from mimo_fast.quantization.formats import stored_tensors
from mimo_fast.runtime.lm import LM


def random_lm(
    config: LMConfig, quantization: str | None, dtype: torch.dtype, device: torch.device | str = "cpu",
    empty_id: int = 1, seed: int = 0,
) -> LM:  # fmt: skip
    """A language model whose activations stay of order 1; quantized matrices are made in their packed form."""
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(lm_shapes(config)) if chosen else {}
    tensors = stored_tensors(lm_shapes(config), formats, dtype)
    return LM(config, empty_id, WeightSource(random_reader(tensors, device, seed), dtype, formats))


def random_reader(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device | str, seed: int
) -> Callable[[str], Tensor]:
    """name -> tensor, the same whenever it is asked for."""

    def read(name: str) -> Tensor:
        shape, dtype = tensors[name]
        generator = torch.Generator(device).manual_seed(seed + hash_of(name))
        if dtype == torch.int32:
            return torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype, device=device, generator=generator)
        if name.endswith(".zeros"):
            return torch.full(shape, -0.5, dtype=dtype, device=device)
        if name.endswith(".scales"):
            words, _ = tensors[name.removesuffix("scales") + "words"]
            return torch.full(shape, _scale(words, tensors, name), dtype=dtype, device=device)
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0, 1.0 if "embed" in name else shape[1] ** -0.5, generator=generator)

    return read


def _scale(words: tuple[int, ...], tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], name: str) -> float:
    """Makes uniform random q of this matrix's bits give values of variance 1 / K."""
    # int4 has zeros or nf4's float32 scales; whatever else is packed is int8.
    four = name.removesuffix("scales") + "zeros" in tensors or tensors[name][1] == torch.float32
    bits = 4 if four else 8
    columns = words[1] * 32 // bits
    spread = math.sqrt((2 ** (2 * bits) - 1) / 12) if tensors[name][1] != torch.float32 else 0.5
    return columns**-0.5 / spread


def hash_of(name: str) -> int:
    """The same number for a name in every process."""
    return int.from_bytes(name.encode(), "little") % (2**31 - 1)


def random_weight(
    form: str, blocks: Sequence[int], columns: int, dtype: torch.dtype, device: torch.device | str = "cpu",
    bias: bool = False, seed: int = 0,
) -> Weight | QuantizedWeight:  # fmt: skip
    """A matrix of row blocks as a loaded model holds it on this device, with random scales and biases.

    form: "dense", or the name of a quantization format.
    """
    names = [f"m{i}" for i in range(len(blocks))]
    shapes: Shapes = {f"{name}.weight": (rows, columns) for name, rows in zip(names, blocks, strict=True)}
    shapes |= {f"{name}.bias": (rows,) for name, rows in zip(names, blocks, strict=True) if bias}
    chosen = None if form == "dense" else Format.parse(form).fit(columns)
    formats = {f"{name}.weight": chosen for name in names} if chosen else {}
    plain = random_reader(stored_tensors(shapes, formats, dtype), device, seed)

    def read(name: str) -> Tensor:
        tensor, generator = plain(name), torch.Generator(device).manual_seed(seed)
        if name.endswith("bias"):
            return tensor.normal_(generator=generator)
        if name.endswith("scales"):
            return tensor * (0.5 + torch.rand(tensor.shape, device=device, generator=generator)).to(tensor.dtype)
        return tensor

    return WeightSource(read, dtype, formats).weight(*names, bias=bias)


def shape_weight(form: str, rows: int, columns: int, biased: bool) -> Weight | QuantizedWeight:
    """A weight of no memory, for its bytes; dense ones are bfloat16."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bias = empty((rows,)) if biased else None
    chosen = None if form == "dense" else Format.parse(form).fit(columns)
    if chosen is None:
        return Weight.stack([empty((rows, columns))], [bias])
    parts = {key: empty(*stored) for key, stored in chosen.tensors("w", (rows, columns)).items()}
    return QuantizedWeight(parts["w.words"], parts["w.scales"], parts.get("w.zeros"), bias, chosen.bits)
