"""Which implementation of an op runs: Triton on CUDA tensors, plain torch on all others.

MIMO_FAST_KERNELS=torch or =triton overrides it; triton on CPU tensors needs TRITON_INTERPRET=1, as
the tests set it. Where Triton cannot be used (`installed_triton`), or its first launch on a GPU
fails, plain torch runs.

Programmatic dependent launch (PDL), on Hopper and newer: a kernel that is launched with
`early_launch` starts as soon as every block of the kernel before it has called `pdl_trigger` or
ended. Its launch and its first reads then overlap with the end of that kernel. The rule:

    A kernel that is launched early calls `pdl_wait` on every path of every program, before it
    writes anything, and before it reads anything that a kernel or a copy of the same run wrote.

Before the wait it may only read weights and tables that were complete before the first kernel of
the run was launched. Writes come after the wait even where no kernel in flight writes the same
memory: an earlier kernel may still read it, or may still have to read what was there before the
allocator gave it away.

`pdl_wait` waits until the one kernel before has ended and its writes are visible. That covers all
earlier kernels because that kernel, too, ends only after its own wait: if one kernel of a chain did
not wait, the next would pass its wait while kernels further back still run. So a kernel that needs
nothing of its predecessor waits as well. Kernels that are not launched early, such as torch's,
start after all earlier ones have ended, which keeps the chain intact.
`tests/kernels/test_early_launch.py` checks every kernel against the rule.

The trigger is correct at any place, but its place decides which kernels are resident together: if
the next kernel starts while a small grid still occupies some multiprocessors, two of its blocks may
share one multiprocessor while another gets none. So each kernel has a `PdlTrigger` in
`PDL_TRIGGERS`, to be changed after a measurement by `benchmarks/studies/chains.py`.
csrc/cuda/warp.cuh has the same two calls as `pdl_launch_dependents` and `pdl_wait`.

MIMO_FAST_PDL overrides the table and is read at every launch: 0 turns PDL of the Triton kernels
off, 1 means "first" for all, the name of any `PdlTrigger` applies to all, and "rms_norm=last,..."
to single kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimo_fast.kernels import installed_triton

ENVIRONMENT = "MIMO_FAST_KERNELS"

TRITON = installed_triton.find()
if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    triton, tl = TRITON.module, TRITON.language
if os.environ.get(ENVIRONMENT) != "torch":
    installed_triton.warn(TRITON)

SPILLS = triton is not None and TRITON.minor < installed_triton.FEW_SPILLS
"""Whether this version of Triton needs tiles that take fewer registers."""

try:
    if triton is None:
        raise ImportError
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_PDL = "launch_pdl" in CUDAOptions.__dataclass_fields__
    """Whether this version of Triton supports programmatic dependent launch."""
except ImportError:
    gdc_launch_dependents = gdc_wait = None
    HAS_PDL = False

PDL_ENVIRONMENT = "MIMO_FAST_PDL"
PDL_CAPABILITY = 9
"""Lowest major compute capability with programmatic dependent launch."""


class PdlTrigger(IntEnum):
    """How a kernel takes part in PDL; the value is passed as its constexpr PDL."""

    OFF = 0
    """Takes no part."""
    NONE = 1
    """Launched early, without a trigger: the next kernel starts as its blocks end."""
    LETS = 2
    """Launched like any other kernel; triggers as its first statement."""
    FIRST = 1 | 2
    """Launched early; triggers as its first statement."""
    WAITED = 1 | 4
    """Launched early; triggers after its own wait, so no more than two kernels are resident."""
    LAST = 1 | 8
    """Launched early; triggers before its last stores, where it calls `pdl_trigger_last`."""


PDL_TRIGGERS = {
    "code_step": PdlTrigger.FIRST,
    "dense_embed": PdlTrigger.FIRST,
    "dense_gemv": PdlTrigger.OFF,
    "head_logits": PdlTrigger.FIRST,
    "merge_splits": PdlTrigger.FIRST,
    "patch_embed": PdlTrigger.FIRST,
    "patch_noise": PdlTrigger.FIRST,
    "quantized_embed": PdlTrigger.FIRST,
    "rms_norm": PdlTrigger.FIRST,
    "rotary_attention": PdlTrigger.FIRST,
    "small_decode": PdlTrigger.FIRST,
    "split_attention": PdlTrigger.FIRST,
    "take_settings": PdlTrigger.FIRST,
    "text_check": PdlTrigger.FIRST,
    "text_digit": PdlTrigger.FIRST,
    "text_draw": PdlTrigger.FIRST,
    "text_settle": PdlTrigger.FIRST,
}
"""Kernel, without "_kernel" -> its fastest trigger in the chains that it is part of.

Measured in benchmarks/results/2026-11-28-h100-chains.json. Dense products are off: with them on, a
group of words in bfloat16 took 6.45 ms where 5.71 had been measured without
(2026-11-28-nvidia-h100-80gb-hbm3.jsonl, 2026-11-27-nvidia-h100-80gb-hbm3-baselines.jsonl).
"""


def forced() -> str:
    """Which implementation the environment asks for; "" where it leaves the choice to each op."""
    choice = os.environ.get(ENVIRONMENT, "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"{ENVIRONMENT} is {choice!r}; use 'torch', 'triton' or leave it unset")
    return choice


def use_triton(x: Tensor) -> bool:
    """Whether the Triton kernel of an op should run on x."""
    choice = forced()
    if choice == "torch" or x.requires_grad or not (x.is_cuda or choice == "triton"):
        return False
    return not refusal(x.device)


def refusal(device: torch.device) -> str:
    """Why Triton's kernels cannot run on a device, or ""; a reason is a warning the first time."""
    if triton is None:
        reason = TRITON.refusal
    else:
        reason = _launch_error(device) if device.type == "cuda" else ""
        if not reason:
            return ""
        reason = f"Triton {TRITON.version} does not run on {device}: {reason}"
    if device.type == "cuda":
        installed_triton.warn_once(
            f"{reason}: plain torch takes the kernels' place ({installed_triton.ADVICE})"
        )
    return reason


def jit(kernel):
    """`triton.jit`; without Triton the function itself, which is then never launched."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def first_launch_kernel(x_ptr):
    """Shows that a kernel can be compiled, loaded and launched."""
    tl.store(x_ptr, 1)


_launched: dict[torch.device, str] = {}
"""GPU -> the error of the first launch on it, "" for none."""


def _launch_error(device: torch.device) -> str:
    """The error of a first launch on a GPU in one line, or "".

    Triton needs more than itself: a C compiler for its launcher, ptxas, a driver that knows its
    code. A machine may lack any.
    """
    if device not in _launched:
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return ""
        _launched[device] = _first_launch(device)
    return _launched[device]


def _first_launch(device: torch.device) -> str:
    try:
        with torch.cuda.device(device):
            first_launch_kernel[(1,)](torch.zeros(1, dtype=torch.int32, device=device))
    except torch.OutOfMemoryError:
        # That says nothing about Triton.
        raise
    except Exception as error:
        return installed_triton.one_line(error)
    return ""


@jit
def pdl_trigger(PDL: tl.constexpr):
    """Lets the next kernel start once all blocks of this one are here; for FIRST and LETS."""
    if PDL & 2:
        gdc_launch_dependents()


@jit
def pdl_trigger_last(PDL: tl.constexpr):
    """The trigger after a kernel's last read; for LAST."""
    if PDL & 8:
        gdc_launch_dependents()


@jit
def pdl_wait(PDL: tl.constexpr):
    """Waits until the kernel before has ended and its writes are visible; then triggers for WAITED.

    The module's docstring has the rule.
    """
    if PDL & 1:
        gdc_wait()
    if PDL & 4:
        gdc_launch_dependents()


@jit
def load_float(x_ptr, mask):
    """As float32, zeros where the mask is off."""
    return tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)


@jit
def prefetch(x_ptr, PDL: tl.constexpr):
    """Prefetches weights into L2, before the wait."""
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
    """Launch arguments of a kernel that takes PDL, on x's device.

    kernel: a key of `PDL_TRIGGERS`.
    """
    if not x.is_cuda or not _supports_pdl(x.device):
        return {"PDL": 0}
    trigger = _trigger_of(kernel, os.environ.get(PDL_ENVIRONMENT, ""))
    early = {"launch_pdl": True} if trigger & PdlTrigger.NONE else {}
    return {"PDL": int(trigger)} | early


@cache
def _trigger_of(kernel: str, override: str) -> PdlTrigger:
    known = PDL_TRIGGERS[kernel]
    for part in override.split(",") if override else ():
        name, _, value = part.rpartition("=")
        value = {"0": "off", "1": "first"}.get(value, value).upper()
        if value not in PdlTrigger.__members__ or name not in PDL_TRIGGERS.keys() | {""}:
            raise ValueError(f"{PDL_ENVIRONMENT} has {part!r}: it takes 0, 1 or KERNEL=WHERE")
        if name in ("", kernel):
            known = PdlTrigger[value]
    return known


@cache
def _supports_pdl(device: torch.device) -> bool:
    # AMD GPUs number their capabilities differently.
    nvidia = torch.version.hip is None
    capability = torch.cuda.get_device_capability(device)[0]
    return HAS_PDL and nvidia and capability >= PDL_CAPABILITY


@dataclass(frozen=True)
class Case:
    """One configuration of a kernel to be compiled without a GPU.

    Args:
        signature: type of the arguments that are neither constexprs nor "i32", such as "*bf16",
            "fp32"; complete when it is made, without those of other kernels.
        constexprs: value of every constexpr but PDL, which follows from the architecture.
        ieee: the compiled code must not contain TF32.
        wide_loads: it must contain global loads of 16 bytes.
        unaligned: integer or pointer arguments that must not be assumed to be multiples of 16.
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

    def __post_init__(self) -> None:
        taken = [x for x in self.kernel.arg_names if x not in self.constexprs and x != "PDL"]
        signature = {name: self.signature.get(name, "i32") for name in taken}
        object.__setattr__(self, "signature", signature)


def pointers(**names: str) -> dict[str, str]:
    """Part of a signature: pointers(bf16="x y") is {"x_ptr": "*bf16", "y_ptr": "*bf16"}."""
    return {f"{name}_ptr": f"*{kind}" for kind, some in names.items() for name in some.split()}


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
