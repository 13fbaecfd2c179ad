"""Relative error of each weight format on Gaussian rows, and the 7B language model's size in it.

python -m benchmarks.studies.quantization_error [FILE.json]
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.studies.common import write
from mimo_fast.bench.machine import describe_machine
from mimo_fast.bench.synthetic import preset_configs
from mimo_fast.quantization import (
    Format,
    QuantizationConfig,
    checkpoint_bytes,
    quantize,
    relative_error,
)

ROWS, WIDTHS = 64, (4096, 11008)
FORMATS = ("int4-g64", "int4", "nf4", "int8-g128", "int8")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {}
    for width in WIDTHS:
        weight = torch.randn(ROWS, width, generator=generator)
        for name in FORMATS:
            errors[f"{name} K={width}"] = round(
                float(relative_error(weight, quantize(weight, Format.parse(name)))), 5
            )
    config, _ = preset_configs("7b")
    choices = {name: QuantizationConfig.parse(name) for name in (None, "int8", "int4", "nf4")}
    sizes = {str(name): checkpoint_bytes(config, choice) for name, choice in choices.items()}
    record = {"machine": [*describe_machine()], "relative_error": errors, "bytes_7b_lm": sizes}
    print(json.dumps(record, indent=1))
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else None, record)


if __name__ == "__main__":
    main()
