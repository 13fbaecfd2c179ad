"""A quantized matrix as it is stored: layout, packing and unpacking.

One joined matrix [N, K], w = scale (q - zero), with a scale and a zero for each group of values
along K. Its q are
packed so that a thread which loads 16 bytes can unpack them by shift and mask into values that meet
consecutive x: a block of up to 128 columns is W words of P planes, and plane p of word w is column
p W + w of the block.

    4 bits, block of 128: 16 words, 8 planes            8 bits, block of 128: 32 words, 4 planes
    word      0    1    2  ...  15                      word      0    1    2  ...  31
    bits 0-3  k0   k1   k2      k15                     bits 0-7   k0   k1   k2      k31
    bits 4-7  k16  k17  k18     k31                     bits 8-15  k32  k33  k34     k63
       ...                                                 ...
    bits 28+  k112 k113 k114    k127                    bits 24+   k96  k97  k98     k127

q is stored as an offset: q + 8 or q + 128.

On a GPU that begins a kernel before the last one has ended (programmatic dependent launch, sm_90
on), the CUDA kernels read a weight before they wait for what ran before. So whoever makes or
changes a weight's tensors (bias included) must synchronize, or launch a kernel that is not begun
early, as torch's own are, between that and the first product with it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

DEQUANTIZED_AT_ONCE = 2**22
"""Values that the plain product unpacks at a time: bounds its memory."""


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix [N, K] in packed form.

    Args:
        words: int32 [N, K bits / 32], see the module.
        scales: floating [N, K / group].
        zeros: floating [N, K / group], or None for none.
        bias: [N] or None.
        bits: of a value, 4 or 8.
        levels: float32 [16], for a table of levels in place of q - 8.
        torch_scales: None, or the scales as torch's CPU products read them; then words are as those
            do: int8 [N, K], or uint8 [N, K / 2] of `pack_torch_int4`. `pack_for_torch` makes it.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    bits: int
    levels: Tensor | None = None
    torch_scales: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        # A copy has memory of its own: what is cached about this one's is not copied.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def stack(cls, blocks: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Joins the rows of matrices of one format, all in our form or all in torch's.

        Raises:
            ValueError: they differ in width or format.
        """
        first = blocks[0]
        if len(blocks) == 1:
            return first
        if any(block._form != first._form for block in blocks):
            raise ValueError(
                "matrices of different widths or formats cannot be joined: "
                "give their part one format"
            )
        biased = any(block.bias is not None for block in blocks)
        return replace(
            first,
            words=torch.cat([block.words for block in blocks]),
            scales=torch.cat([block.scales for block in blocks]),
            zeros=torch.cat([block.zeros for block in blocks if block.zeros is not None])
            if first.zeros is not None
            else None,
            bias=torch.cat([block._bias_or_zeros for block in blocks]) if biased else None,
            torch_scales=_joined_scales(
                [block.torch_scales for block in blocks if block.torch_scales is not None]
            ),
        )

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.words), self.words.shape[1] * self.words.itemsize * 8 // self.bits

    @cached_property
    def group(self) -> int:
        """Values along K that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    @cached_property
    def plans(self) -> dict[Hashable, Any]:
        """How products with it are computed; `plan.py` fills it."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes that one product must read."""
        return nbytes(self.words, self.scales, self.zeros, self.bias)

    def take(self, rows: Tensor) -> QuantizedWeight:
        """The rows of these indices [R], as for an embedding; not of a weight in torch's form."""
        zeros, bias = (None if t is None else t[rows] for t in (self.zeros, self.bias))
        return replace(
            self, words=self.words[rows], scales=self.scales[rows], zeros=zeros, bias=bias
        )

    @property
    def _form(self) -> tuple[object, ...]:
        return (
            self.shape[1],
            self.group,
            self.bits,
            self.scales.dtype,
            self.zeros is None,
            self.levels is None,
            self.torch_scales is None,
        )

    @property
    def _bias_or_zeros(self) -> Tensor:
        # Scales may be of a wider dtype than activations; a bias, where any block has one, sets it
        # in torch.cat.
        return self.scales.new_zeros(len(self.words)) if self.bias is None else self.bias


def _joined_scales(parts: list[Tensor]) -> Tensor | None:
    """[N], or [K / group, N, 2], joined along N."""
    return torch.cat(parts, dim=parts[0].ndim // 2) if parts else None


def pack_words(q: Tensor, bits: int, group: int) -> Tensor:
    """Offsets [N, K] (0 ... 2^bits - 1) -> int32 words [N, K bits / 32]."""
    planes = 32 // bits
    width = math.gcd(128, group) // planes
    split = q.to(torch.int32).unflatten(1, (-1, planes, width))
    words = split[:, :, 0].clone()
    for plane in range(1, planes):
        words |= split[:, :, plane] << (bits * plane)
    return words.flatten(1)


def unpack_words(words: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `pack_words`: int32 offsets [N, K]."""
    planes = 32 // bits
    split = words.unflatten(1, (-1, 1, math.gcd(128, group) // planes))
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)[:, None]
    return (split >> shifts).bitwise_and_(2**bits - 1).flatten(1)


def pack_torch_int4(q: Tensor) -> Tensor:
    """Offsets [N, K] -> uint8 [N, K / 2] as torch's CPU product reads them on this machine; N in
    whole blocks."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)


def unpack_torch_int4(words: Tensor, order: Tensor) -> Tensor:
    """The inverse of `pack_torch_int4`, given `torch_int4_order()`: uint8 offsets [N, K]."""
    rows, half = words.shape
    columns = words.view(-1, 2 * half, len(order) // 2).transpose(1, 2).contiguous()
    nibbles = torch.cat((columns & 15, columns >> 4), dim=1)
    return nibbles.index_select(1, order.argsort()).view(rows, 2 * half)


@cache
def torch_int4_order() -> Tensor | None:
    """Which row of a block each nibble of torch's form belongs to, low nibbles first; None if it
    has no such form.

    The form depends on torch's version and the CPU's instruction set. Those known put the columns
    of a block of rows one after the other, each in one permutation of the rows. The largest block
    for which that holds is taken.
    """
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    columns = 64
    for block in (64, 32, 16):
        row = torch.arange(block, dtype=torch.int64, device="cpu")[:, None].expand(block, columns)
        # Rows are numbered by two digits of 16, which takes two packings.
        low, high = (pack_torch_int4(digit).view(columns, -1) for digit in (row % 16, row // 16))
        numbers = torch.cat(
            ((low & 15) + 16 * (high & 15), (low >> 4) + 16 * (high >> 4)), dim=1
        ).long()
        order = numbers[0]
        if torch.equal(numbers, order.expand_as(numbers)) and torch.equal(
            order.sort().values, row[:, 0]
        ):
            q = torch.randint(
                16,
                (4 * block, 2 * columns),
                generator=torch.Generator().manual_seed(0),
                dtype=torch.int64,
                device="cpu",
            )
            return (
                order
                if torch.equal(unpack_torch_int4(pack_torch_int4(q), order), q.byte())
                else None
            )
    return None


def dequantize(weight: QuantizedWeight, start: int = 0, end: int | None = None) -> Tensor:
    """Rows start ... end as float32 [R, K]: scale (q - zero), each step rounded to float32."""
    rows = slice(*slice(start, end).indices(len(weight.words)))
    offsets = _offsets(weight, rows)
    if weight.levels is None:
        values = offsets.float().sub_(1 << (weight.bits - 1))
    else:
        values = weight.levels.index_select(0, offsets.flatten()).view(offsets.shape)
    grouped = values.unflatten(1, (-1, weight.group))
    if weight.zeros is not None:
        grouped -= weight.zeros[rows].float()[..., None]
    return grouped.mul_(weight.scales[rows].float()[..., None]).flatten(1)


def _offsets(weight: QuantizedWeight, rows: slice) -> Tensor:
    """q as non-negative integers [R, K]."""
    if weight.torch_scales is None:
        return unpack_words(weight.words[rows], weight.bits, weight.group)
    if weight.bits == 8:
        return weight.words[rows].short() + 128
    order = torch_int4_order()
    assert order is not None
    block = len(order)
    first = rows.start // block * block
    whole = unpack_torch_int4(weight.words[first : -(-rows.stop // block) * block], order)
    return whole[rows.start - first : rows.stop - first]


def dequantize_to(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """All of it in a dtype [N, K]; float32 copies are of a few rows at a time."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.words.device)
    step = max(1, DEQUANTIZED_AT_ONCE // weight.shape[1])
    for start in range(0, len(out), step):
        out[start : start + step] = dequantize(weight, start, start + step)
    return out


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
