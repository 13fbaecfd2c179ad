"""Which implementation of an op runs: Triton on CUDA tensors, plain torch on all others.

MIMO_FAST_KERNELS=torch or =triton overrides it; triton on CPU tensors needs TRITON_INTERPRET=1, as
the tests use it.

Programmatic dependent launch, on Hopper and newer: the blocks of a kernel that is launched with
`early_launch` start as soon as every block of the kernel before it has called `let_the_next_begin`
or ended, so that its launch and what it may read at once are over when that one ends. The rule:

    A kernel that is launched early calls `wait_for_the_last` on every path of every program, before
    it writes anything, and before it reads anything that a kernel or a copy of the same run wrote.

Before it, only weights and tables may be read that were complete before the first kernel of the run
was launched. Writes come after it even where nothing in flight writes the same memory, since a
kernel before may still read it, or be yet to read what lay there before the allocator gave it away.

The wait is for the end of the one kernel before, and its memory. That covers all before it because
that one, too, ends only after its own wait: if one kernel of a chain did not wait, the next would
pass its wait while kernels further back still run. So there are no exceptions for
kernels that need nothing of their predecessor. Kernels that are not launched early, torch's for
instance, begin after the end of all before them, and keep the chain.
`tests/kernels/test_early_launch.py` holds every kernel to the rule.

Where the next kernel is let begin is free, for any place is right, but it decides what is resident
together: a successor whose blocks start while a small grid still has some multiprocessors may put
two of its blocks where there is room and none where there is not. So each kernel has a `Begin` in
`BEGINS`: the one line a kernel that is to be changed after a measurement by
`benchmarks/studies/chains.py`. csrc/cuda/warp.cuh has the two calls under the same names.

MIMO_FAST_PDL overrides the table, and is asked at every launch: 0 turns early launches of Triton's
kernels off, 1 is "first" for all, any name of `Begin` is that for all, and "rms_norm=last,..." for
some.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it.
    triton = tl = None

try:
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    KNOWS_EARLY_LAUNCH = "launch_pdl" in CUDAOptions.__dataclass_fields__
    """Whether this Triton has programmatic dependent launch."""
except ImportError:
    gdc_launch_dependents = gdc_wait = None
    KNOWS_EARLY_LAUNCH = False

ENVIRONMENT = "MIMO_FAST_KERNELS"
EARLY_ENVIRONMENT = "MIMO_FAST_PDL"
EARLY_CAPABILITY = 9
"""Major compute capability from which a kernel can be launched early."""


class Begin(IntEnum):
    """How a kernel takes part in early launches; the values are what its PDL is. WAITS: launched
    early, and waits. The others: where it lets the next kernel begin."""

    OFF = 0
    NONE = 1
    """Launched early; the next begins as its blocks end."""
    LETS = 2
    """Launched as any other; lets the next begin first of all."""
    FIRST = 1 | 2
    WAITED = 1 | 4
    """Lets the next begin once it has waited itself: no more than two kernels are resident."""
    LAST = 1 | 8
    """Lets the next begin ahead of its last stores, where it calls `let_the_next_begin_last`."""


BEGINS = {
    "code_step": Begin.FIRST,
    "dense_embed": Begin.FIRST,
    "dense_gemv": Begin.WAITED,
    "head_logits": Begin.FIRST,
    "merge_splits": Begin.FIRST,
    "patch_embed": Begin.FIRST,
    "patch_noise": Begin.FIRST,
    "quantized_embed": Begin.FIRST,
    "rms_norm": Begin.FIRST,
    "rotary_attention": Begin.FIRST,
    "small_decode": Begin.FIRST,
    "split_attention": Begin.FIRST,
    "take_settings": Begin.FIRST,
    "text_check": Begin.FIRST,
    "text_digit": Begin.FIRST,
    "text_draw": Begin.FIRST,
    "text_settle": Begin.FIRST,
}
"""Of each kernel, named without "_kernel": the fastest in the chains that it is part of
(benchmarks/results/2026-11-28-h100-chains.json)."""


def forced() -> str:
    """Which implementation the environment asks for; "" where it leaves the choice to each op."""
    choice = os.environ.get(ENVIRONMENT, "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{ENVIRONMENT} is {choice!r}; use 'torch', 'triton' or leave it unset")
    return choice


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


@jit
def let_the_next_begin(PDL: tl.constexpr):
    """Lets the next kernel's blocks start once all of this kernel's have come here: first of all
    where PDL is `Begin.FIRST` or LETS."""
    if PDL & 2:
        gdc_launch_dependents()


@jit
def let_the_next_begin_last(PDL: tl.constexpr):
    """The same behind all else that a kernel reads, where PDL is `Begin.LAST`."""
    if PDL & 8:
        gdc_launch_dependents()


@jit
def wait_for_the_last(PDL: tl.constexpr):
    """Waits until the kernel before has ended and its memory can be seen. See the rule above. Lets
    the next begin then, where PDL is `Begin.WAITED`."""
    if PDL & 1:
        gdc_wait()
    if PDL & 4:
        gdc_launch_dependents()


@jit
def prefetch(x_ptr, PDL: tl.constexpr):
    """Fetches the lines of L2 at these addresses, of weights, ahead of the wait."""
    if PDL & 1:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [x_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def early_launch(x: Tensor, kernel: str) -> dict[str, int | bool]:
    """Launch arguments of a kernel that takes PDL, on x's device; `kernel` is a key of `BEGINS`."""
    if not x.is_cuda or not _begins_early(x.device):
        return {"PDL": 0}
    begin = _begin(kernel, os.environ.get(EARLY_ENVIRONMENT, ""))
    return {"PDL": int(begin), "launch_pdl": True} if begin & Begin.NONE else {"PDL": int(begin)}


@cache
def _begin(kernel: str, override: str) -> Begin:
    known = BEGINS[kernel]
    for part in override.split(",") if override else ():
        name, _, value = part.rpartition("=")
        value = {"0": "off", "1": "first"}.get(value, value).upper()
        if value not in Begin.__members__ or name not in BEGINS.keys() | {""}:
            raise ValueError(f"{EARLY_ENVIRONMENT} has {part!r}: it takes 0, 1 or KERNEL=WHERE")
        if name in ("", kernel):
            known = Begin[value]
    return known


@cache
def _begins_early(device: torch.device) -> bool:
    # A GPU of another maker has capabilities of its own.
    nvidia = torch.version.hip is None
    capability = torch.cuda.get_device_capability(device)[0]
    return KNOWS_EARLY_LAUNCH and nvidia and capability >= EARLY_CAPABILITY


@dataclass(frozen=True)
class Case:
    """One configuration of a kernel to be compiled without a GPU.

    Args:
        signature: type of every argument that is not a constexpr, such as "*bf16", "i32", "fp32".
        constexprs: value of every constexpr but PDL, which follows from what it is compiled for.
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
