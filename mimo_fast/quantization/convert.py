"""Writes quantized checkpoints tensor by tensor; `WeightSource` reads dense and quantized ones."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.checkpoint.files import SHARD_BYTES, write_checkpoint
from mimo_fast.checkpoint.folder import check_new_folder, new_folder
from mimo_fast.checkpoint.hub import copy_companions
from mimo_fast.checkpoint.layout import Shapes, lm_shapes
from mimo_fast.checkpoint.names import open_lm_weights
from mimo_fast.config import LMConfig, PathLike, read_json
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.dispatch import use_triton
from mimo_fast.kernels.matmul.adapted import AnyWeight, StoredWeight
from mimo_fast.kernels.matmul.cpu import pack_for_torch
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize_to
from mimo_fast.quantization.formats import (
    CONFIG_KEY,
    FOREIGN_KEY,
    VERSION,
    Format,
    QuantizationConfig,
    stored_tensors,
)
from mimo_fast.quantization.search import NF4_LEVELS, quantize, relative_error

Read = Callable[[str], Tensor]
Convert = Callable[[str], tuple[QuantizedWeight, float | None]]
"""Upstream's name of a matrix -> its quantized form and relative error, None if unknown."""


class WeightSource:
    """Tensors and matrices by upstream's names, however they are stored; a model is built from it.

    Args:
        read: tensor by its name in the file, on the target device, in its stored dtype.
        dtype: of activations, and so of everything dense; None keeps the stored dtype.
        stored: format of each matrix that the file holds quantized.
        requested: quantization to do now, of matrices that the file holds dense.
        join: on a GPU, copy the row blocks of a dense matrix into one, for one launch; False shares
            them uncopied.
    """

    def __init__(
        self,
        read: Read,
        dtype: torch.dtype | None = None,
        stored: Mapping[str, Format] | None = None,
        requested: QuantizationConfig | None = None,
        join: bool = True,
    ) -> None:
        self._read, self._dtype, self._join = read, dtype, join
        self._stored, self._requested = dict(stored or {}), requested
        if self._stored and requested:
            raise CheckpointError(
                "the checkpoint is quantized already: load it without quantization="
            )

    def __call__(self, name: str) -> Tensor:
        """One tensor, dense; a quantized matrix is unpacked, to bfloat16 if no dtype is wanted."""
        if name in self._stored:
            return dequantize_to(self._quantized(name, None), self._dtype or torch.bfloat16)
        tensor = self._read(name)
        if self._requested and (chosen := self._requested.format_of(name, tuple(tensor.shape))):
            # Quantize and unpack: quantizing at load equals loading a quantized checkpoint.
            return dequantize_to(quantize(tensor, chosen, name=name), self._dtype or tensor.dtype)
        return tensor.to(self._dtype)

    def weight(self, *modules: str, bias: bool | Sequence[bool] = False) -> AnyWeight:
        """The matrix whose row blocks are M.weight for the given modules M.

        bias: whether there is M.bias, one for all or one for each.

        Raises:
            CheckpointError: the blocks are not all dense or all of one format.
        """
        return self.stored_weight(*modules, bias=bias)

    def stored_weight(self, *modules: str, bias: bool | Sequence[bool] = False) -> StoredWeight:
        """`weight` of a model without adapters."""
        names = [f"{module}.weight" for module in modules]
        biased = [bias] * len(modules) if isinstance(bias, bool) else bias
        pairs = zip(modules, biased, strict=True)
        biases = [self(f"{module}.bias") if has else None for module, has in pairs]
        if any(name in self._stored for name in names):
            if not all(name in self._stored for name in names):
                problem = f"only some of {', '.join(names)} are quantized"
                raise CheckpointError(f"{problem}: quantize the checkpoint again")
            return self._joined([*map(self._quantized, names, biases)])
        blocks = [self._read(name) for name in names]
        chosen = self._requested and self._requested.format_of(names[0], tuple(blocks[0].shape))
        if chosen:
            dense = zip(blocks, biases, names, strict=True)
            return self._joined([quantize(block, chosen, own, name) for block, own, name in dense])
        blocks = [block.to(self._dtype) for block in blocks]
        if self._join and len(blocks) > 1 and blocks[0].is_cuda:
            # One launch for all; on the CPU they stay views of the file.
            each = zip(blocks, biases, strict=True)
            filled = [block.new_zeros(len(block)) if own is None else own for block, own in each]
            return Weight.stack([torch.cat(blocks)], [torch.cat(filled)] if any(biased) else [])
        return Weight.stack(blocks, biases)

    def stacked(self, *names: str) -> Tensor:
        """Tensors [N_i, D] one below the other, dense."""
        return torch.cat([self(name) for name in names])

    def table(self, module: str) -> Tensor | QuantizedWeight:
        """The embedding table M.weight as it is stored or wanted, to be read row by row."""
        name = f"{module}.weight"
        if name in self._stored:
            return self._quantized(name, None)
        tensor = self._read(name)
        chosen = self._requested and self._requested.format_of(name, tuple(tensor.shape))
        return quantize(tensor, chosen, name=name) if chosen else tensor.to(self._dtype)

    def _quantized(self, name: str, bias: Tensor | None) -> QuantizedWeight:
        chosen = self._stored[name]
        words = self._read(f"{name}.words")
        return QuantizedWeight(
            words=words,
            scales=self._read(f"{name}.scales"),
            bias=bias,
            bits=chosen.bits,
            zeros=None if chosen.symmetric else self._read(f"{name}.zeros"),
            levels=torch.tensor(NF4_LEVELS, device=words.device, dtype=torch.float32)
            if chosen.kind == "nf4"
            else None,
        )

    def _joined(self, blocks: list[QuantizedWeight]) -> QuantizedWeight:
        try:
            joined = QuantizedWeight.stack(blocks)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if self._dtype != torch.bfloat16 or use_triton(joined.words):
            return joined
        return joined if native.takes_weight(joined) else pack_for_torch(joined)


def quantize_checkpoint(
    source: PathLike,
    target: PathLike,
    quantization: str | Mapping[str, str | None] | QuantizationConfig,
    *,
    progress: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, float]:
    """Quantizes a language model's checkpoint into another directory, with its tokenizer.

    One tensor is in memory at a time. The directory appears at the end, whole.

    Returns:
        Relative error of each quantized matrix by upstream's name; config.json keeps them too.

    Raises:
        CheckpointError: the source is no dense checkpoint, the target is not empty, or the disk is
            full.
        ValueError: the quantization is none.
    """
    source, target = Path(source), Path(target)
    chosen = QuantizationConfig.parse(quantization)
    if chosen is None:
        raise ValueError("no quantization was given: use int8, int4, nf4 or a format for each part")
    check_new_folder(target)
    raw = read_json(source / "config.json")
    if CONFIG_KEY in raw:
        raise CheckpointError(
            f"{source} is quantized already: give the checkpoint it was made from"
        )
    if raw.get(FOREIGN_KEY):
        raise CheckpointError(
            f"{source} was quantized by another tool: import_checkpoint converts it"
        )
    config = LMConfig.from_dict(raw, str(source / "config.json"))
    weights = open_lm_weights(source, config)
    weights.validate(shapes := lm_shapes(config))
    formats = chosen.formats(shapes)
    hide = None if progress else True
    with tqdm(total=len(formats), desc="quantizing", unit="matrix", delay=1, disable=hide) as bar:

        def convert(name: str) -> tuple[QuantizedWeight, float]:
            matrix = weights.finite(name)
            quantized = quantize(matrix, formats[name], name=name)
            bar.update(1)
            return quantized, relative_error(matrix, quantized)

        dtypes = {name: weights.dtype(name) for name in shapes}
        plan, about = (raw, shapes, formats, dtypes), {"parts": chosen.parts()}
        return write_quantized(
            target, *plan, weights.finite, convert, about, copy_from=source, shard_bytes=shard_bytes
        )


def write_quantized(
    target: Path,
    raw: Mapping[str, Any],
    shapes: Shapes,
    formats: Mapping[str, Format],
    dtypes: Mapping[str, torch.dtype],
    read: Read,
    convert: Convert,
    about: Mapping[str, Any],
    *,
    copy_from: Path,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, float]:
    """Writes matrices of `formats` as `convert` gives them, all else as `read` does.

    `dtypes` has every dense tensor, and may have packed ones whose dtype is not the usual one.
    Returns relative errors.
    """
    stored = stored_tensors(shapes, formats, dtypes)
    errors: dict[str, float] = {}
    waiting: dict[str, Tensor] = {}
    entry: dict[str, Any] = {"version": VERSION, **about, "tensors": {}}

    def pieces(name: str) -> Tensor:
        if name in shapes:
            return read(name)
        matrix, _, field = name.rpartition(".")
        if field == "words":
            quantized, error = convert(matrix)
            rounded = error and round(error, 6)
            entry["tensors"][matrix] = {"format": str(formats[matrix]), "error": rounded}
            if error is not None:
                errors[matrix] = error
            waiting[f"{matrix}.scales"] = quantized.scales
            if quantized.zeros is not None:
                waiting[f"{matrix}.zeros"] = quantized.zeros
            return quantized.words
        return waiting.pop(name)

    # config.json is written after the last tensor, when `entry` is complete.
    wanted = {name: shape for name, (shape, _) in stored.items()}
    dtype = {name: dtypes.get(name, usual) for name, (_, usual) in stored.items()}
    config = {**raw, CONFIG_KEY: entry}
    with new_folder(target) as folder:
        copy_companions(copy_from, folder)
        options: dict[str, Any] = {"config": config, "shard_bytes": shard_bytes}
        write_checkpoint(folder, wanted, pieces, dtype=dtype, **options)
    return errors
