"""Keys and values of one layer, in the activations' dtype or as int8 with float32 scales.

    scale = max |x| / 127,  stored = round(x / scale),  read as scale stored

x is one head at one position, so there is a scale for each position and head.

The scale is of the float32 value, after the rotation of a key; a head of zeros has scale 0. Scales
are stored apart from the int8 values, position by position, so a block of positions reads its
scales as one line and its int8 heads in 16-byte loads. A cached position takes 2 Hkv (Dh + 4) bytes
instead of 4 Hkv Dh: 52% at Dh = 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import jit, pointers, tl

LEVELS = 127


@dataclass(frozen=True)
class LayerKV:
    """Keys and values of B slots.

    Args:
        k, v: [B, Hkv, S, Dh] of one layout, heads contiguous; int8 where there are scales.
        k_scales, v_scales: float32 [B, Hkv, S] of one layout, positions contiguous; or None for
            none.

    Raises:
        ValueError: they do not go together.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def __post_init__(self) -> None:
        k, v, scales, v_scales = self.k, self.v, self.k_scales, self.v_scales
        alike = k.shape == v.shape and k.stride() == v.stride() and k.dtype == v.dtype
        if not alike or k.stride(-1) != 1:
            raise ValueError(
                f"k {list(k.shape)} and v {list(v.shape)} must have one layout, heads contiguous"
            )
        if (scales is None) != (v_scales is None) or (scales is None) == (k.dtype == torch.int8):
            raise ValueError("int8 keys and values come with scales for both, others with none")
        if (
            scales is not None
            and v_scales is not None
            and not (
                scales.shape == v_scales.shape == k.shape[:3]
                and scales.stride() == v_scales.stride()
                and scales.stride(2) == 1
            )
        ):
            raise ValueError(
                f"scales {list(scales.shape)} must be [B, Hkv, S] in one layout, contiguous last"
            )

    @property
    def capacity(self) -> int:
        """Positions a slot can hold."""
        return self.k.shape[2]

    def append(self, slot: int, start: int, k: Tensor, v: Tensor) -> None:
        """Stores k and v [Hkv, T, Dh] at positions start ... start + T - 1 of a slot."""
        for x, stored, scales in ((k, self.k, self.k_scales), (v, self.v, self.v_scales)):
            place = slice(start, start + x.shape[1])
            if scales is None:
                stored[slot, :, place] = x
            else:
                stored[slot, :, place], scales[slot, :, place] = quantize_heads(x)

    def read(self, slot: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values of a slot, [1, Hkv, end, Dh] each.

        int8 ones are dequantized to dtype.
        """
        k, v = self.k[slot : slot + 1, :, :end], self.v[slot : slot + 1, :, :end]
        if self.k_scales is None or self.v_scales is None:
            return k, v
        k_scales, v_scales = (
            scales[slot : slot + 1, :, :end, None] for scales in (self.k_scales, self.v_scales)
        )
        return (k * k_scales).to(dtype), (v * v_scales).to(dtype)

    def check_append(
        self, qkv: Tensor, table: Tensor, slots: Tensor, starts: Tensor, heads: int
    ) -> None:
        """Checks that rows qkv [R, T, (heads + 2 Hkv) Dh] can be rotated and appended.

        Raises:
            ValueError: they cannot.
        """
        rows, _, width = qkv.shape
        kv_heads, head_dim = self.k.shape[1], self.k.shape[3]
        if width != (heads + 2 * kv_heads) * head_dim:
            raise ValueError(
                f"qkv of width {width} is not {heads} + 2 x {kv_heads} heads of {head_dim}"
            )
        if table.shape[-1] * 2 != head_dim or len(slots) != rows or len(starts) != rows:
            raise ValueError(
                f"appending {rows} rows needs as many slots and starts, and {head_dim // 2} angles"
            )
        if any(x.stride(-1) != 1 for x in (qkv, slots, starts)) or not table.is_contiguous():
            raise ValueError(
                "an append needs qkv, slots, starts and table contiguous over their last dimension"
            )
        if self.k_scales is None and self.k.dtype != qkv.dtype:
            raise ValueError(
                f"a cache of {self.k.dtype} does not take {qkv.dtype}: allocate it so, or quantized"
            )

    def append_arguments(
        self, qkv: Tensor, table: Tensor, slots: Tensor, starts: Tensor
    ) -> dict[str, Any]:
        """Launch arguments common to all kernels that append."""
        k_scales, v_scales = (self.k if x is None else x for x in (self.k_scales, self.v_scales))
        return {
            "qkv_ptr": qkv,
            "cos_ptr": table[0],
            "sin_ptr": table[1],
            "k_ptr": self.k,
            "v_ptr": self.v,
            "k_scales_ptr": k_scales,
            "v_scales_ptr": v_scales,
            "slots_ptr": slots,
            "starts_ptr": starts,
            "stride_xr": qkv.stride(0),
            "stride_cb": self.k.stride(0),
            "stride_ch": self.k.stride(1),
            "stride_cs": self.k.stride(2),
            "stride_sb": k_scales.stride(0),
            "stride_sh": k_scales.stride(1),
            "LIMIT": min(table.shape[1], self.capacity),
            "QUANTIZED": self.k_scales is not None,
        }


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., Dh] -> int8 [..., Dh] and float32 scales [...]."""
    x = x.float()
    scales = x.abs().amax(-1) * (1 / LEVELS)
    return (x / scales.where(scales > 0, 1)[..., None]).round().to(torch.int8), scales


@jit
def scale_of(b_largest):
    return b_largest * (1.0 / 127.0)


@jit
def to_levels(b_x, b_scale):
    """b_x / b_scale rounded half to even, as float32.

    Adding 1.5 x 2^23 leaves no bits for a fraction.
    """
    b_levels = tl.div_rn(b_x, tl.where(b_scale > 0, b_scale, 1.0) + tl.zeros_like(b_x))
    return (b_levels + 12582912.0) - 12582912.0


APPEND_UNALIGNED = ("LIMIT", "H", "HKV", "stride_sb", "stride_sh")
"""Arguments of `append_signature` that need not be multiples of 16."""


def cache_signature(dtype: str, quantized: bool) -> dict[str, str]:
    """Types of keys, values and their scales."""
    if quantized:
        return pointers(i8="k v", fp32="k_scales v_scales")
    return pointers(**{dtype: "k v k_scales v_scales"})


def append_signature(dtype: str, quantized: bool) -> dict[str, str]:
    """Types of `LayerKV.append_arguments`."""
    others = pointers(fp32="cos sin", i64="slots starts") | pointers(**{dtype: "qkv"})
    return cache_signature(dtype, quantized) | others
