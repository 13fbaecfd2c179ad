"""Which implementation of an op runs: Triton on CUDA tensors, plain torch on all others.

MIMO_FAST_KERNELS=torch or =triton overrides it; triton on CPU tensors needs TRITON_INTERPRET=1, as
the tests use it.
"""

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it.
    triton = tl = None

ENVIRONMENT = "MIMO_FAST_KERNELS"
EXPERIMENTAL = "MIMO_FAST_EXPERIMENTAL"


def forced() -> str:
    """Which implementation the environment asks for; "" where it leaves the choice to each op."""
    choice = os.environ.get(ENVIRONMENT, "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{ENVIRONMENT} is {choice!r}; use 'torch', 'triton' or leave it unset")
    return choice


def experimental() -> bool:
    """Whether to use what no GPU has yet shown to be right and faster."""
    return os.environ.get(EXPERIMENTAL, "") not in ("", "0")


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernel of an op should run on x."""
    choice = forced()
    if triton is None or choice == "torch" or x.requires_grad:
        return False
    return x.is_cuda or choice == "triton"


def jit(kernel):
    """`triton.jit`, or the function untouched where Triton is missing: then it is never
    launched."""
    return kernel if triton is None else triton.jit(kernel)


@dataclass(frozen=True)
class Case:
    """One configuration of a kernel to be compiled without a GPU.

    Args:
        signature: type of every argument that is not a constexpr, such as "*bf16", "i32", "fp32".
        constexprs: value of every constexpr.
        ieee: no TF32 may appear. wide_loads: global loads of 16 bytes must appear.
        unaligned: integer or pointer arguments that may not be assumed to be multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    warps: int = 4
    stages: int = 3
    ieee: bool = False
    wide_loads: bool = False
    unaligned: tuple[str, ...] = ()


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
