"""The kernels of csrc/, present where this package was built with a C++ compiler on x86-64 Linux;
they need AVX2.

MIMO_FAST_KERNELS=torch or =triton turns them off.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import ENVIRONMENT
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.sample import SamplerTensors

try:
    from mimo_fast import _native
except ImportError:  # Built without a compiler, or for a torch that brings no OpenMP.
    _native = None  # type: ignore[assignment]

BLOCKS = {4: (64, 128), 8: (32, 64, 128)}
"""Columns packed together that the kernels know, by bits."""

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    return _native is not None and _native.runs_here() and not os.environ.get(ENVIRONMENT)


def compiled() -> ModuleType:
    """The compiled module, where `available()`."""
    assert _native is not None
    return _native


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations stay on this thread, as those of a small model should: waking another
    takes longer than they do, and many times longer where other programs use the cores.

    Other threads are left as they are. Where the program has called `torch.set_num_threads` itself,
    MKL's products keep to that.
    """
    # Torch chooses a thread's number when it is first asked.
    torch.get_num_threads()
    before = compiled().set_threads(1)
    try:
        yield
    finally:
        compiled().set_threads(before)


def state() -> str:
    """One line for `mimo-fast info`."""
    if _native is None:
        return "not built (they need a C++ compiler when mimo-fast is installed, on x86-64 Linux)"
    if not _native.runs_here():
        return "built, but this CPU has no AVX2"
    if not available():
        return f"turned off by {ENVIRONMENT}"
    return "quantized products, decode attention, sampling and small models on the CPU"


def takes_weight(weight: QuantizedWeight) -> bool:
    """Whether `quantized_matmul` multiplies by a weight stored like this."""
    return (
        available()
        and weight.words.device.type == "cpu"
        and weight.words.is_contiguous()
        and weight.levels is None
        and weight.torch_scales is None
        and math.gcd(128, weight.group) in BLOCKS[weight.bits]
        and weight.scales.dtype == torch.bfloat16
        and (weight.zeros is None or weight.zeros.dtype == torch.float16)
    )


def quantized_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """`matmul` of qmatmul.py: nothing is rounded between the norm and the result.

    x is read with 16 bits for each block's largest value; rows of x do not depend on one another.
    """
    assert _native is not None
    if x.dtype not in DTYPES:
        norm = norm and RMSNorm(norm.weight.float(), norm.eps)
        wide = quantized_matmul(
            x.float(), weight, norm, None if residual is None else residual.float(), swiglu
        )
        return wide.to(x.dtype)
    rows, columns = weight.shape
    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty(*x.shape[:-1], rows // 2 if swiglu else rows)
    added = None if residual is None else residual.expand_as(y).to(x.dtype).contiguous()
    bias = None if weight.bias is None else weight.bias.to(x.dtype).contiguous()
    gain = None if norm is None else norm.weight.to(x.dtype).contiguous()
    _native.quantized_matmul(
        x=flat.data_ptr(),
        y=y.data_ptr(),
        words=weight.words.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=address(weight.zeros),
        bias=address(bias),
        norm=address(gain),
        residual=address(added),
        eps=norm.eps if norm else 0.0,
        swiglu=swiglu,
        type=_type(x),
        bits=weight.bits,
        block=math.gcd(128, weight.group),
        group=weight.group,
        M=len(flat),
        N=rows,
        K=columns,
    )
    return y


def takes_attention(qkv: Tensor, cache: LayerKV) -> bool:
    """Whether `decode_attention` attends to such a cache."""
    dense = cache.k_scales is None and cache.k.dtype == qkv.dtype and cache.k.shape[3] % 8 == 0
    return (
        dense
        and qkv.device.type == "cpu"
        and qkv.dtype in DTYPES
        and not qkv.requires_grad
        and available()
    )


def decode_attention(
    qkv: Tensor, table: Tensor, cache: LayerKV, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    """`decode_attention` of decode_attention.py, its arguments checked there."""
    assert _native is not None
    k = cache.k
    y = qkv.new_empty(len(qkv), 1, heads * k.shape[3])
    _native.decode_attention(
        qkv=qkv.data_ptr(),
        table=table.data_ptr(),
        k=k.data_ptr(),
        v=cache.v.data_ptr(),
        slots=slots.data_ptr(),
        starts=starts.data_ptr(),
        y=y.data_ptr(),
        type=_type(qkv),
        rows=len(qkv),
        heads=heads,
        kv_heads=k.shape[1],
        head_dim=k.shape[3],
        positions=table.shape[1],
        capacity=k.shape[2],
        row_stride=qkv.stride(0),
        slot_stride=k.stride(0),
        head_stride=k.stride(1),
        position_stride=k.stride(2),
    )
    return y


def takes_logits(
    logits: Tensor, settings: SamplerTensors, seeds: Tensor, draws: Tensor, banned: Tensor | None
) -> bool:
    """Whether `sample_text` draws from them."""
    rows = len(logits)
    return (
        logits.device.type == "cpu"
        and not logits.requires_grad
        and available()
        and logits.shape[1] > 0
        and fit_rows(rows, settings, seeds, draws)
        and (
            banned is None
            or (banned.dtype == torch.bool and banned.shape in (logits.shape, logits.shape[1:]))
        )
    )


def sample_text(
    logits: Tensor,
    settings: SamplerTensors,
    seeds: Tensor,
    draws: Tensor,
    banned: Tensor | None,
    slot: int,
) -> Tensor:
    """`sample_text` of sample_text.py."""
    assert _native is not None
    rows, size = logits.shape
    flat, ids = logits.float().contiguous(), torch.empty(rows, dtype=torch.int64)
    banned = None if banned is None else banned.contiguous()
    _native.sample(
        logits=flat.data_ptr(),
        ids=ids.data_ptr(),
        banned=address(banned),
        banned_stride=size if banned is not None and banned.ndim == 2 else 0,
        rows=rows,
        size=size,
        slot=slot,
        **sampler_rows(settings, seeds, draws),
    )
    return ids


def gumbel(seed: int, draw: int, slot: int, first: int, count: int) -> Tensor:
    """The noise that the native samplers add: float32 [count] of ids from `first` on, as `gumbel`
    of sample.py."""
    assert _native is not None
    noise = torch.empty(count)
    _native.gumbel(
        seed=seed, draw=draw, slot=slot, first=first, count=count, noise=noise.data_ptr()
    )
    return noise


def fit_rows(rows: int, settings: SamplerTensors, seeds: Tensor, draws: Tensor) -> bool:
    """Whether the settings are of so many rows, each as the samplers read it."""
    return all(
        x.shape == (rows,) and x.dtype == dtype and x.is_contiguous()
        for x, dtype in (
            (settings.temperature, torch.float32),
            (settings.top_k, torch.int64),
            (settings.tail, torch.float32),
            (settings.greedy, torch.bool),
            (seeds, torch.int64),
            (draws, torch.int64),
        )
    )


def sampler_rows(settings: SamplerTensors, seeds: Tensor, draws: Tensor) -> dict[str, int]:
    return {
        "temperature": settings.temperature.data_ptr(),
        "top_k": settings.top_k.data_ptr(),
        "tail": settings.tail.data_ptr(),
        "greedy": settings.greedy.data_ptr(),
        "seeds": seeds.data_ptr(),
        "draws": draws.data_ptr(),
    }


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type(tensor: Tensor) -> _native.Type:
    return _native.Type.float32 if tensor.dtype == torch.float32 else _native.Type.bfloat16
