"""Weight-only quantization: formats, search for scales, checkpoints, imports."""

from mimo_fast.quantization.bitsandbytes import from_bitsandbytes
from mimo_fast.quantization.convert import WeightSource, quantize_checkpoint
from mimo_fast.quantization.formats import (
    FOREIGN_KEY,
    Format,
    QuantizationConfig,
    checkpoint_bytes,
    stored_formats,
    stored_shapes,
    stored_types,
)
from mimo_fast.quantization.gptq import from_gptq
from mimo_fast.quantization.imports import import_checkpoint
from mimo_fast.quantization.search import quantize, relative_error
from mimo_fast.quantization.variants import SharedSource, VariantSource

__all__ = [
    "FOREIGN_KEY",
    "Format",
    "QuantizationConfig",
    "SharedSource",
    "VariantSource",
    "WeightSource",
    "checkpoint_bytes",
    "from_bitsandbytes",
    "from_gptq",
    "import_checkpoint",
    "quantize",
    "quantize_checkpoint",
    "relative_error",
    "stored_formats",
    "stored_shapes",
    "stored_types",
]
