"""Weight-only quantization: formats, the search for scales, checkpoints on disk, import from other tools."""

from .bitsandbytes import from_bitsandbytes
from .convert import WeightSource, quantize_checkpoint
from .formats import FOREIGN_KEY, Format, QuantizationConfig, checkpoint_bytes, stored_formats, stored_shapes
from .gptq import from_gptq
from .imports import import_checkpoint
from .search import quantize, relative_error

__all__ = [
    "FOREIGN_KEY", "Format", "QuantizationConfig", "WeightSource", "checkpoint_bytes", "from_bitsandbytes", "from_gptq",
    "import_checkpoint", "quantize", "quantize_checkpoint", "relative_error", "stored_formats", "stored_shapes",
]  # fmt: skip
