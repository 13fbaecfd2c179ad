"""Weight-only quantization: formats, the search for scales, checkpoints on disk, and import of GPTQ checkpoints."""

from .convert import WeightSource, quantize_checkpoint
from .formats import Format, QuantizationConfig, checkpoint_bytes, stored_formats, stored_shapes
from .gptq import from_gptq, import_gptq
from .search import quantize, relative_error

__all__ = [
    "Format", "QuantizationConfig", "WeightSource", "checkpoint_bytes", "from_gptq", "import_gptq", "quantize",
    "quantize_checkpoint", "relative_error", "stored_formats", "stored_shapes",
]  # fmt: skip
