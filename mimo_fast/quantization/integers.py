"""Integers as other tools store them, and which of our forms holds the same values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, pack_words
from mimo_fast.quantization.formats import MIN_GROUP, Format, importable_group

MOST_BITS = 8

UNPACKED_AT_ONCE = 2**24
"""Values that are unpacked at a time: bounds memory, since each is an int32 on the way."""


@dataclass(frozen=True)
class Integers:
    """A matrix [N, K], w = scale (q - zero), with G groups along K of one scale and zero each.

    Args:
        bits: of q, 0 ... 2^bits - 1; from 2 to 8.
        columns: K.
        size: columns of a group.
        zeros: whether it has zeros of its own; without, each is the middle, 2^(bits - 1).
        middle: whether they are the middle all the same.
        in_order: whether the columns of a group are consecutive.
    """

    bits: int
    columns: int
    size: int
    zeros: bool
    middle: bool
    in_order: bool

    @property
    def form(self) -> Format | None:
        """Our form with the same values, None if there is none."""
        group = importable_group(self.size, self.columns)
        if not self.in_order:
            return None
        if self.bits <= 4:
            return Format("int4", group, symmetric=not self.zeros) if group else None
        # Of eight bits, only around the middle is q - zero surely within our -128 ... 127.
        if self.bits == MOST_BITS and not self.middle:
            return None
        if self.size == self.columns and self.columns % MIN_GROUP == 0:
            return Format("int8", None)
        return Format("int8", group) if group else None

    def converted(
        self, q: Tensor, scales: Tensor, zeros: Tensor | None = None, order: Tensor | None = None
    ) -> QuantizedWeight | Tensor:
        """The matrix in `form`, or as dense float32 [N, K] where there is none.

        Args:
            q: int32 [N, K].
            scales: [N, G].
            zeros: int32 [N, G], if it has any.
            order: int64 [K], the group of each column, unless they are in order.
        """
        form = self.form
        middle = 2 ** (self.bits - 1)
        if form is None:
            if order is None:
                order = torch.arange(self.columns, dtype=torch.int64, device=q.device) // self.size
            offsets = q - (middle if zeros is None else zeros[:, order])
            return scales.float()[:, order] * offsets.float()
        group = form.group or self.columns
        scales = scales.repeat_interleave(self.size // group, dim=1).contiguous()
        ours: Tensor | None = None
        if form.bits == 4 and zeros is not None:
            ours = (zeros - 8).half().repeat_interleave(self.size // group, dim=1)
        elif form.bits == 4:
            q = q + (8 - middle)
        else:
            shift = middle if zeros is None else zeros.repeat_interleave(self.size, dim=1)
            q = q - shift + 128
        words = pack_words(q, form.bits, group)
        return QuantizedWeight(words=words, scales=scales, zeros=ours, bias=None, bits=form.bits)


def by_rows(
    rows: int, columns: int, convert: Callable[[slice], QuantizedWeight | Tensor]
) -> QuantizedWeight | Tensor:
    """A matrix [N, K] that is converted some rows at a time."""
    step = max(1, UNPACKED_AT_ONCE // columns)
    parts = [convert(slice(start, start + step)) for start in range(0, rows, step)]
    packed = [part for part in parts if isinstance(part, QuantizedWeight)]
    dense = [part for part in parts if isinstance(part, Tensor)]
    return QuantizedWeight.stack(packed) if packed else torch.cat(dense)


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """int32 words [R, n] of values one after the other, the lowest bits first -> [R, 32 n / bits].

    A value may lie across two words. The last block of 32 values may be incomplete: it is filled up
    with zeros.
    """
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    blocks = words.unflatten(1, (-1, bits))
    values = []
    for start in range(0, 32 * bits, bits):
        word, offset = divmod(start, 32)
        value = blocks[..., word] >> offset
        if (low := 32 - offset) < bits:
            value = (value & (2**low - 1)) | (blocks[..., word + 1] << low)
        values.append(value & (2**bits - 1))
    return torch.stack(values, dim=-1).flatten(1)


def stream_bits(words: int, values: int) -> int | None:
    """Bits of a value of which so many fill so many words of int32; None if that fits none."""
    fitting = [bits for bits in range(2, MOST_BITS + 1) if -(-values * bits // 32) == words]
    return fitting[0] if len(fitting) == 1 else None


def column_groups(order: Tensor, size: int) -> Tensor | None:
    """A g_idx as int64, None where it says that groups of `size` columns are in order."""
    in_order = torch.arange(len(order), dtype=torch.int64, device=order.device) // size
    return None if torch.equal(order.long(), in_order) else order.long()
