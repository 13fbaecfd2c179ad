"""Converts checkpoints that other tools quantized, each with the module that knows its form."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.checkpoint.files import DENSE, DTYPES, Weights, is_finite
from mimo_fast.checkpoint.folder import check_new_folder
from mimo_fast.checkpoint.gguf import GGUF
from mimo_fast.checkpoint.layout import Shapes, joined, lm_shapes
from mimo_fast.checkpoint.names import open_lm_weights
from mimo_fast.config import LMConfig, PathLike, read_json
from mimo_fast.errors import CheckpointError, MimoFastError
from mimo_fast.json_files import cut, shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.quantization import bitsandbytes, compressed_tensors, float8, gguf, gptq
from mimo_fast.quantization.convert import write_quantized
from mimo_fast.quantization.formats import (
    CONFIG_KEY,
    FOREIGN_KEY,
    SCALES,
    Format,
    PackedMatrices,
    QuantizationConfig,
)
from mimo_fast.quantization.search import quantize, relative_error

METHODS: dict[str, Callable[[Weights, Shapes, Mapping[str, Any]], PackedMatrices]] = {
    "gptq": gptq.packed_matrices,
    "auto-round": gptq.packed_matrices,
    "autoround": gptq.packed_matrices,
    "bitsandbytes": bitsandbytes.packed_matrices,
    "compressed-tensors": compressed_tensors.packed_matrices,
    "fp8": float8.packed_matrices,
}
"""Importers by the quant_method of config.json."""

KNOWN = "GPTQ, AutoRound, bitsandbytes NF4, compressed-tensors and FP8"

DAMAGED = "download the checkpoint again"

Quantization = str | Mapping[str, str | None] | QuantizationConfig | None


def import_checkpoint(
    source: PathLike,
    target: PathLike,
    quantization: Quantization = None,
    *,
    speech_from: PathLike | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Converts a language model's checkpoint that another tool quantized; values do not change.

    What none of our forms can hold is unpacked, to the type that config.json states, or bfloat16. A
    remark about what of the checkpoint is not done here is given as a warning.

    Args:
        source: a directory, or a GGUF file of the backbone.
        quantization: for matrices that the source holds dense, such as lm_head, and for those that
            our forms cannot hold, which are unpacked; by default both are stored dense.
        speech_from: with a GGUF file, the dense checkpoint that it was converted from, which has
            the speech parts, the config and the tokenizer.

    Returns:
        Relative error of what was quantized here; the original of imported matrices is not known.

    Raises:
        CheckpointError: the source's form is not supported, a package is missing, or the target
            is not empty.
    """
    source, target = Path(source), Path(target)
    check_new_folder(target)
    if source.suffix == ".gguf":
        return _import_backbone(source, target, quantization, speech_from, progress)
    if speech_from is not None:
        raise ValueError(f"speech_from belongs to a GGUF file, and {source} is none: leave it out")
    raw = dict(read_json(source / "config.json"))
    about = raw.pop(FOREIGN_KEY, None)
    method = about.get("quant_method") if isinstance(about, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{source} is quantized by {shown(method)}: only {KNOWN} are imported"
        )
    config = LMConfig.from_dict(raw, str(source / "config.json"))
    weights = open_lm_weights(source, config)
    with _their_form(source):
        packed = METHODS[method](weights, lm_shapes(config), about)
    return _Import(source, raw, config, weights, packed, method).write(
        target, quantization, progress
    )


def _import_backbone(
    path: Path, target: Path, quantization: Quantization, speech: PathLike | None, progress: bool
) -> dict[str, float]:
    if speech is None:
        raise CheckpointError(
            f"{path} holds a backbone alone: give the checkpoint that it was converted from as "
            "--speech-from DIR, whose speech parts are taken"
        )
    speech = Path(speech)
    raw = dict(read_json(speech / "config.json"))
    if raw.get(FOREIGN_KEY) or CONFIG_KEY in raw:
        raise CheckpointError(f"{speech} is quantized: give the checkpoint that it was made from")
    config = LMConfig.from_dict(raw, str(speech / "config.json"))
    weights = open_lm_weights(speech, config)
    file = GGUF(path)
    with _their_form(path):
        packed = gguf.packed_matrices(file, lm_shapes(config), config)
    return _Import(path, raw, config, weights, packed, "gguf", speech).write(
        target, quantization, progress
    )


class _Import:
    """A checkpoint on its way into our form.

    Args:
        source: what errors name.
        raw: config.json without what the other tool added.
        weights: the tensors as they are stored.
        packed: those of them that are packed.
        method: the other tool.
        companions: where the tokenizer is, if not in `source`.
    """

    def __init__(
        self,
        source: Path,
        raw: Mapping[str, Any],
        config: LMConfig,
        weights: Weights,
        packed: PackedMatrices,
        method: str,
        companions: Path | None = None,
    ) -> None:
        self.source, self.raw, self.weights, self.packed = source, raw, weights, packed
        self.method, self.companions = method, companions or source
        self.shapes = lm_shapes(config)
        self.kept = {name: form for name, form in packed.formats.items() if self._alike(name)}
        self.unpacked = getattr(torch, config.dtype or "bfloat16")

    def write(self, target: Path, quantization: Quantization, progress: bool) -> dict[str, float]:
        self._check()
        for remark in self.packed.remarks:
            warnings.warn(f"{self.source}: {remark}", stacklevel=4)
        chosen = QuantizationConfig.parse(quantization) or QuantizationConfig()
        formats = chosen.formats(self.shapes) | self.kept
        hide = None if progress else True
        with tqdm(
            total=len(formats), desc="importing", unit="matrix", delay=1, disable=hide
        ) as bar:

            def convert(name: str) -> tuple[QuantizedWeight, float | None]:
                bar.update(1)
                found = self.matrix(name)
                if isinstance(found, QuantizedWeight):
                    return found, None
                quantized = quantize(found, formats[name], name=name)
                return quantized, relative_error(found, quantized)

            plan = self.raw, self.shapes, formats, self._dtypes()
            about = {"parts": chosen.parts(), "imported": self.method}
            return write_quantized(
                target, *plan, self.dense, convert, about, copy_from=self.companions
            )

    def matrix(self, name: str) -> QuantizedWeight | Tensor:
        """One tensor; packed if it stays so."""
        if name not in self.packed.shapes:
            return self.weights.finite(name)
        with _their_form(self.source):
            found = self.packed.get(name)
        numbers = found.scales if isinstance(found, QuantizedWeight) else found
        if numbers.dtype not in SCALES or not is_finite(numbers):
            raise CheckpointError(
                f"{self.source}: {name} holds NaN or infinite values, or is of a wrong type: "
                f"{DAMAGED}"
            )
        if isinstance(found, QuantizedWeight) and name not in self.kept:
            return dequantize(found)
        return found

    def dense(self, name: str) -> Tensor:
        found = self.matrix(name)
        assert isinstance(found, Tensor)
        return found

    def _alike(self, name: str) -> bool:
        """Whether a packed matrix and those that are computed as one with it are of one form."""
        forms = {self._form(each) for each in joined(name)}
        return len(forms) == 1

    def _form(self, name: str) -> tuple[Format | None, torch.dtype | None]:
        return self.packed.formats.get(name), self.packed.dtypes.get(f"{name}.scales")

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of all tensors when dense, and of packed ones whose dtype is not the usual one."""
        dense = {
            name: self.unpacked if name in self.packed.shapes else self.weights.dtype(name)
            for name in self.shapes
        }
        return dense | self.packed.dtypes

    def _check(self) -> None:
        """Compares what the files hold with what the config calls for."""
        packed, weights = self.packed, self.weights
        for name, shape in packed.shapes.items():
            if shape != tuple(self.shapes[name]):
                raise CheckpointError(
                    f"{self.source}: {name} is {list(shape)}, not {list(self.shapes[name])}: "
                    "use the config.json that belongs to these weights"
                )
        for name, dtype in packed.dtypes.items():
            allowed = SCALES if name.endswith(".scales") else [DTYPES[each] for each in DENSE]
            if dtype not in allowed:
                raise CheckpointError(
                    f"{self.source}: {name} is of type {shown(dtype)}, which cannot be computed "
                    f"with: {DAMAGED}"
                )
        dense = {name: shape for name, shape in self.shapes.items() if name not in packed.shapes}
        parts = {name: weights.shape(name) for name in packed.parts if name in weights.names()}
        weights.validate(dense, optional=parts)


@contextmanager
def _their_form(source: Path) -> Iterator[None]:
    """Explains tensors and JSON that are not of the form that their tool writes."""
    try:
        yield
    except MimoFastError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        problem = f"{source} is not in the form that it claims ({type(e).__name__}: {cut(e)})"
        raise CheckpointError(f"{problem}: {DAMAGED}") from e
