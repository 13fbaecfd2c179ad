"""Converts checkpoints that other tools quantized: GPTQ (also by AutoRound), bitsandbytes NF4."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mimo_fast.checkpoint.files import DENSE, DTYPES, Weights, is_finite, open_weights
from mimo_fast.checkpoint.folder import check_new_folder
from mimo_fast.checkpoint.layout import Shapes, lm_counts, lm_shapes
from mimo_fast.config import LMConfig, PathLike, read_json
from mimo_fast.errors import CheckpointError, MimoFastError
from mimo_fast.json_files import cut, shown
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.quantization import bitsandbytes, gptq
from mimo_fast.quantization.convert import write_quantized
from mimo_fast.quantization.formats import (
    FOREIGN_KEY,
    SCALES,
    PackedMatrices,
    QuantizationConfig,
)
from mimo_fast.quantization.search import quantize, relative_error

METHODS: dict[str, Callable[[Weights, Shapes, Mapping[str, Any]], PackedMatrices]] = {
    "gptq": gptq.packed_matrices,
    "auto-round": gptq.packed_matrices,
    "autoround": gptq.packed_matrices,
    "bitsandbytes": bitsandbytes.packed_matrices,
}
"""Importers by the quant_method of config.json."""

DAMAGED = "download the checkpoint again"


def import_checkpoint(
    source: PathLike,
    target: PathLike,
    quantization: str | Mapping[str, str | None] | QuantizationConfig | None = None,
    *,
    progress: bool = True,
) -> dict[str, float]:
    """Converts a language model's checkpoint that another tool quantized; values do not change.

    Args:
        quantization: for matrices that the source holds dense, such as lm_head, and for those that
            our forms cannot hold, which are unpacked; by default both are stored dense.

    Returns:
        Relative error of what was quantized here; the original of imported matrices is not known.

    Raises:
        CheckpointError: the source's form is not supported, a package is missing, or the target
            is not empty.
    """
    source = Path(source)
    check_new_folder(Path(target))
    raw = dict(read_json(source / "config.json"))
    about = raw.pop(FOREIGN_KEY, None)
    method = about.get("quant_method") if isinstance(about, Mapping) else None
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{source} is quantized by {shown(method)}: only GPTQ and bitsandbytes NF4 are imported"
        )
    config, weights = LMConfig.from_dict(raw, str(source / "config.json")), open_weights(source)
    weights.check_counts(lm_counts(config))
    shapes = lm_shapes(config)
    with _their_form(source):
        packed = METHODS[method](weights, shapes, about)
    _check_shapes(weights, shapes, packed)
    chosen = QuantizationConfig.parse(quantization) or QuantizationConfig()
    formats = chosen.formats(shapes) | packed.formats
    unpacked = [name for name in shapes if name not in packed.shapes]
    dtypes = packed.dtypes | {name: weights.dtype(name) for name in unpacked}

    def matrix(name: str) -> QuantizedWeight | Tensor:
        if name not in packed.shapes:
            return weights.finite(name)
        with _their_form(source):
            found = packed.get(name)
        numbers = found.scales if isinstance(found, QuantizedWeight) else found
        if numbers.dtype not in SCALES or not is_finite(numbers):
            raise CheckpointError(
                f"{source}: {name} holds NaN or infinite values, or is of a wrong type: {DAMAGED}"
            )
        return found

    def dense(name: str) -> Tensor:
        found = matrix(name)
        assert isinstance(found, Tensor)
        return found

    hide = None if progress else True
    with tqdm(total=len(formats), desc="importing", unit="matrix", delay=1, disable=hide) as bar:

        def convert(name: str) -> tuple[QuantizedWeight, float | None]:
            bar.update(1)
            found = matrix(name)
            if isinstance(found, QuantizedWeight):
                return found, None
            quantized = quantize(found, formats[name], name=name)
            return quantized, relative_error(found, quantized)

        plan = raw, shapes, formats, dtypes
        about = {"parts": chosen.parts(), "imported": method}
        return write_quantized(Path(target), *plan, dense, convert, about, copy_from=source)


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


def _check_shapes(weights: Weights, shapes: Shapes, packed: PackedMatrices) -> None:
    for name, shape in shapes.items():
        found = packed.shapes[name] if name in packed.shapes else weights.shape(name)
        if found != tuple(shape):
            raise CheckpointError(
                f"{weights.directory}: {name} is {list(found)}, not {list(shape)}: "
                "use the config.json that belongs to these weights"
            )
    for name, dtype in packed.dtypes.items():
        if dtype not in (SCALES if name.endswith(".scales") else [DTYPES[each] for each in DENSE]):
            raise CheckpointError(
                f"{weights.directory}: {name} is of type {shown(dtype)}, which cannot be computed "
                f"with: {DAMAGED}"
            )
