"""Which new GPU paths run by default: those with a committed result on the same family of GPUs.

The result shows them right and faster. MIMO_FAST_EXPERIMENTAL=1 turns all of them on wherever they
can run, =0 turns all of them off. `mimo-fast info` lists them.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from enum import Enum

import torch

ENVIRONMENT = "MIMO_FAST_EXPERIMENTAL"


class NewPath(Enum):
    """A path that replaces an established one; its value is its name in `mimo-fast info`."""

    PROMPT_GRAPHS = "prompts as CUDA graphs"
    PACKED_PROMPTS = "several prompts in one graph"
    ENCODER_GRAPHS = "encoding of a recording as a CUDA graph"
    CODEC_ROWS = "chunks of several codec streams in one computation"
    CONDITIONAL_GRAPHS = "a group as one conditional graph"
    FUSED_PROMPT_PRODUCTS = "products of prompts that unpack in registers"
    ROW_TILES = "products of 9 to 256 rows that read a weight once"
    ENGINE = "patch decoder, encoder, backbone and the codec's decoder as persistent kernels"


MEASURED: dict[NewPath, dict[int, str]] = {
    NewPath.PROMPT_GRAPHS: {9: "2026-11-28-h100-prompts.json"},
    NewPath.PACKED_PROMPTS: {},
    NewPath.ENCODER_GRAPHS: {},
    NewPath.CODEC_ROWS: {},
    NewPath.CONDITIONAL_GRAPHS: {9: "2026-11-28-h100-overlap.json"},
    NewPath.FUSED_PROMPT_PRODUCTS: {},
    NewPath.ROW_TILES: {},
    NewPath.ENGINE: {},
}
"""Major compute capability -> the file of benchmarks/results that shows it right and faster."""


def enabled(path: NewPath, device: torch.device) -> bool:
    """Whether a model on this device should take a path; asked where the path is constructed."""
    choice = os.environ.get(ENVIRONMENT, "")
    if choice:
        return choice != "0"
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] in MEASURED[path]


def describe(
    device: torch.device, refuses: Mapping[NewPath, Callable[[torch.device], str]] | None = None
) -> Iterator[str]:
    """A line a path for `mimo-fast info`: whether it is on, and why.

    refuses: of paths that a device may refuse, what says why it does; "" where it does not.
    """
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    for path in NewPath:
        state = "on" if enabled(path, device) else "off"
        if os.environ.get(ENVIRONMENT, ""):
            why = f"{ENVIRONMENT} asks for it"
        elif capability in MEASURED[path]:
            why = f"measured in {MEASURED[path][capability]}"
        else:
            why = "no GPU of this family has shown it right and faster"
        # A device is asked only for what is on: its answer may take a launch.
        refused = (refuses or {}).get(path)
        if state == "on" and refused is not None and (reason := refused(device)):
            state, why = "off", f"{why}, but {reason}"
        yield f"{path.value}: {state} ({why})"
