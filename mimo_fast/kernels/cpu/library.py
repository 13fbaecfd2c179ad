"""The kernels of csrc/cpu: built with a C++ compiler on x86-64 or aarch64 Linux.

They are compiled once for each instruction set; the fastest that the CPU has is chosen at load.
MIMO_FAST_CPU=portable, avx2, avx512 or neon chooses another. MIMO_FAST_KERNELS=torch or =triton
turns all of them off.

Functions raise ValueError where tensors do not fit each other, since native code reads addresses.
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
from mimo_fast.kernels.sample import ROWS_OF, SamplerTensors

INSTRUCTION_SET = "MIMO_FAST_CPU"
"""Environment variable that names a set of kernels."""

try:
    from mimo_fast import _native
except ImportError:  # Built without a compiler, or for a torch that brings no OpenMP.
    if os.environ.get(INSTRUCTION_SET):
        # An error only where a set is asked for, as is a set that this CPU lacks.
        raise
    _native = None  # type: ignore[assignment]

BLOCKS = {4: (64, 128), 8: (32, 64, 128)}
"""Columns packed together that the kernels know, by bits."""

VIEW = "_native_view"
"""Attribute of a quantized weight that holds its native view; copies of the weight lack it."""

DTYPES = (torch.float32, torch.bfloat16)


def available() -> bool:
    return _native is not None and not os.environ.get(ENVIRONMENT)


def compiled() -> ModuleType:
    """The compiled module, where `available()`."""
    assert _native is not None
    return _native


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch's operations on this thread, as is best for a small model.

    Waking other threads takes longer than its operations do, and much longer where other programs
    use the cores. Native calls over many rows still divide them among as many threads as there were
    before. Other threads' settings are not changed. Where the program has called
    `torch.set_num_threads` itself, MKL's products keep to that.
    """
    # Torch sets a thread's number of threads at its first use; ask before changing it.
    torch.get_num_threads()
    compiled().narrow()
    try:
        yield
    finally:
        compiled().widen()


def state() -> str:
    """One line for `mimo-fast info`."""
    if _native is None:
        return "not built (they need a C++ compiler when mimo-fast is installed, on Linux)"
    if not available():
        return f"turned off by {ENVIRONMENT}"
    return (
        "quantized products, decode attention, sampling and small models on the CPU, "
        f"by {_native.instruction_set()} (it runs {', '.join(_native.instruction_sets())})"
    )


def expect(holds: bool, message: str) -> None:
    """Checks a condition on the arguments.

    Raises:
        ValueError: it does not hold.
    """
    if not holds:
        raise ValueError(message)


def refuses(weight: QuantizedWeight) -> str:
    """Why `quantized_matmul` does not multiply by a weight stored like this, or ""."""
    if _native is None:
        return "the native kernels were not built"
    if os.environ.get(ENVIRONMENT):
        return f"{ENVIRONMENT} is set"
    return _refuses_form(weight)


def _refuses_form(weight: QuantizedWeight) -> str:
    words, scales, zeros = weight.words, weight.scales, weight.zeros
    if not all(part is None or part.is_cpu for part in (words, scales, zeros)):
        return "the weight is not on a CPU"
    if weight.bits not in BLOCKS or words.ndim != 2 or scales.ndim != 2:
        return "words and scales are not two matrices of 4 or 8 bits"
    if not words.shape[1] or not scales.shape[1]:
        return "it has no columns"
    if weight.levels is not None:
        return "the format has a table of levels"
    if weight.torch_scales is not None:
        return "the weight is packed for torch's products"
    if math.gcd(128, weight.group) not in BLOCKS[weight.bits]:
        return f"groups of {weight.group} with {weight.bits} bits"
    if scales.dtype != torch.bfloat16 or not (zeros is None or zeros.dtype == torch.float16):
        return "scales are not bfloat16, or zeros not float16"
    parts = (weight.words, scales, zeros)
    contiguous = all(part is None or part.is_contiguous() for part in parts)
    return "" if contiguous else "the weight is not contiguous"


def takes_weight(weight: QuantizedWeight) -> bool:
    """Whether `quantized_matmul` multiplies by a weight stored like this."""
    return not refuses(weight)


def quantized_matmul(
    x: Tensor,
    weight: QuantizedWeight,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """`matmul` of kernels/matmul; nothing is rounded between the norm and the result.

    x is quantized to 16 bits, scaled by the largest value of each block; rows of x do not depend on
    one another.
    """
    assert _native is not None
    vectors = (x, residual, weight.bias, None if norm is None else norm.weight)
    if not all(part is None or part.is_floating_point() for part in vectors):
        raise ValueError("x, the residual, the bias and the norm are not floating-point")
    if x.dtype not in DTYPES:
        norm = norm and RMSNorm(norm.weight.float(), norm.eps)
        wide = quantized_matmul(
            x.float(), weight, norm, None if residual is None else residual.float(), swiglu
        )
        return wide.to(x.dtype)
    rows, columns = weight.shape
    if x.ndim == 0 or x.shape[-1] != columns or x.device.type != "cpu":
        raise ValueError(f"x is {list(x.shape)} on {x.device}, the weight {columns} wide on a CPU")
    if weight.bias is not None and weight.bias.shape != (rows,):
        raise ValueError(f"the bias is not one of {rows} rows")
    if norm is not None and norm.weight.shape != (columns,):
        raise ValueError(f"the norm is not {columns} wide")
    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty(*x.shape[:-1], rows // 2 if swiglu else rows)
    added = None if residual is None else residual.expand_as(y).to(x.dtype).contiguous()
    bias = None if weight.bias is None else weight.bias.to(x.dtype).contiguous()
    gain = None if norm is None else norm.weight.to(x.dtype).contiguous()
    product = _native.QuantizedMatmul(
        weight=view(weight),
        type=_type(x),
        **addresses(bias=bias, norm=gain),
        eps=norm.eps if norm else 0.0,
        swiglu=swiglu,
    )
    product.run(**addresses(x=flat, y=y, residual=added), rows=len(flat))
    return y


def view(weight: QuantizedWeight) -> _native.QuantizedWeight:
    """The native view of a weight, which must outlive it; made once and kept with the weight.

    Raises:
        ValueError: its parts do not fit each other.
    """
    known = vars(weight).get(VIEW)
    if known is not None:
        return known
    reason = _refuses_form(weight)
    expect(not reason, f"native code does not read the weight: {reason}")
    (rows, columns), scales, zeros = weight.shape, weight.scales, weight.zeros
    groups = columns // weight.group
    expect(scales.shape == (rows, groups), f"the scales are not those of {rows} rows")
    expect(zeros is None or zeros.shape == scales.shape, "zeros are not shaped as scales")
    made = compiled().QuantizedWeight(
        **addresses(words=weight.words, scales=scales, zeros=zeros),
        bits=weight.bits,
        block=math.gcd(128, weight.group),
        group=weight.group,
        rows=rows,
        columns=columns,
    )
    vars(weight)[VIEW] = made
    return made


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
    """`decode_attention` of decode_attention.py.

    Raises:
        ValueError: shapes or types do not fit, or a slot is none of the cache's.
    """
    assert _native is not None
    k, v = cache.k, cache.v
    if k.ndim != 4 or cache.k_scales is not None:
        raise ValueError(f"the cache is {list(k.shape)}, not [B, Hkv, S, Dh] without scales")
    kv_heads, head_dim = k.shape[1], k.shape[3]
    width = (heads + 2 * kv_heads) * head_dim
    if qkv.shape[1:] != (1, width) or qkv.stride(2) != 1:
        raise ValueError(f"qkv is {list(qkv.shape)}, not [R, 1, {width}]")
    if qkv.dtype not in DTYPES or k.dtype != qkv.dtype or v.dtype != qkv.dtype:
        raise ValueError(f"qkv is {qkv.dtype} and the cache {k.dtype}, {v.dtype}")
    cache_view = view_cache(k[None], v[None])
    check_table(table, head_dim)
    y = qkv.new_empty(len(qkv), 1, heads * head_dim)
    attention = _native.DecodeAttention(
        type=_type(qkv),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        table=table.data_ptr(),
        positions=table.shape[1],
    )
    attention.run(
        **addresses(qkv=qkv, y=y),
        row_stride=qkv.stride(0),
        cache=cache_view,
        at=positions(len(qkv), slots, starts),
    )
    return y


def check_table(table: Tensor, head_dim: int) -> None:
    """Raises ValueError unless a table is of `rope_table` for heads of so many values."""
    shape = table.shape
    fits = len(shape) == 3 and shape[0] == 2 and shape[2] == head_dim // 2
    if not fits or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"the table is not float32 [2, positions, {head_dim // 2}]")


def view_cache(k: Tensor, v: Tensor) -> _native.Cache:
    """The native view of keys and values [L, B, Hkv, S, Dh], which are read in place.

    Raises:
        ValueError: their layouts differ, or heads are not contiguous.
    """
    if k.ndim != 5 or k.shape != v.shape or k.stride() != v.stride() or k.stride(-1) != 1:
        raise ValueError("keys and values are not of one layout, heads contiguous")
    layers, slots, _, capacity, _ = k.shape
    strides = zip(("layer", "slot", "head", "position"), k.stride(), strict=False)
    return compiled().Cache(
        **addresses(k=k, v=v),
        layers=layers,
        slots=slots,
        capacity=capacity,
        **{f"{name}_stride": stride for name, stride in strides},
    )


def positions(rows: int, slots: Tensor, starts: Tensor) -> _native.Positions:
    """Where `rows` rows append.

    Raises:
        ValueError: slots or starts are not contiguous int64 [rows].
    """
    for values in (slots, starts):
        if values.dtype != torch.int64 or values.shape != (rows,) or not values.is_contiguous():
            raise ValueError(f"slots or starts are not int64 [{rows}], but {list(values.shape)}")
    return compiled().Positions(**addresses(slots=slots, starts=starts), rows=rows)


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
        and (banned is None or _bans(banned, logits))
    )


def _bans(banned: Tensor, logits: Tensor) -> bool:
    return banned.dtype == torch.bool and banned.shape in (logits.shape, logits.shape[1:])


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
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}, not floating [R, V]")
    rows, size = logits.shape
    if not fit_rows(rows, settings, seeds, draws):
        raise ValueError(f"settings, seeds and draws are not of {rows} rows")
    if banned is not None and not _bans(banned, logits):
        raise ValueError("banned is not bool, of the ids or of rows of them")
    flat, ids = logits.float().contiguous(), torch.empty(rows, dtype=torch.int64, device="cpu")
    banned = None if banned is None else banned.contiguous()
    _native.sample(
        logits=_native.Logits(
            **addresses(values=flat, banned=banned),
            banned_stride=size if banned is not None and banned.ndim == 2 else 0,
            size=size,
            slot=slot,
        ),
        settings=sampler_rows(settings, seeds, draws),
        ids=ids.data_ptr(),
    )
    return ids


def gumbel(seed: int, draw: int, slot: int, first: int, count: int) -> Tensor:
    """The noise that the native samplers add, as `gumbel` of sample.py.

    Returns float32 [count], for ids from `first` on.
    """
    assert _native is not None
    noise = torch.empty(count, dtype=torch.float32, device="cpu")
    _native.gumbel(
        seed=seed, draw=draw, slot=slot, first=first, count=count, noise=noise.data_ptr()
    )
    return noise


def fit_rows(rows: int, settings: SamplerTensors, seeds: Tensor, draws: Tensor) -> bool:
    """Whether the settings are of so many rows, each as the samplers read it."""
    values = [(getattr(settings, name), kind) for name, kind in ROWS_OF.items()]
    values += [(seeds, torch.int64), (draws, torch.int64)]
    return all(x.shape == (rows,) and x.dtype == kind and x.is_contiguous() for x, kind in values)


def sampler_rows(settings: SamplerTensors, seeds: Tensor, draws: Tensor) -> _native.SamplerRows:
    """The native view of settings that `fit_rows`."""
    return compiled().SamplerRows(
        **addresses(**{name: getattr(settings, name) for name in ROWS_OF}),
        **addresses(seeds=seeds, draws=draws),
        rows=len(seeds),
    )


def address(tensor: Tensor | None) -> int:
    """Where a tensor's values lie; 0 for none.

    Raises:
        ValueError: they are not in the memory of this CPU.
    """
    if tensor is None:
        return 0
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise ValueError(f"a tensor of {list(tensor.shape)} is on {tensor.device}, not on a CPU")
    return tensor.data_ptr()


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    """Arguments that native code reads, or writes, by address; 0 for none."""
    return {name: address(tensor) for name, tensor in tensors.items()}


def _type(tensor: Tensor) -> _native.Type:
    return _native.Type.float32 if tensor.dtype == torch.float32 else _native.Type.bfloat16
