"""Weights of a model with an adapter that is not merged: what it leaves alone is shared, the rest
its own.

    a matrix with A and B        the model's own, shared, and the adapter beside it
    a matrix that is replaced    one of the variant's own, in the format of the model's
    embeddings, heads of codes   copies of the variant's own, merged

`LM` reads the model from a `SharedSource` and each variant from a `VariantSource`, by the same
names.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from mimo_fast.checkpoint.adapters import Adapter, Change
from mimo_fast.checkpoint.files import is_finite
from mimo_fast.checkpoint.layout import Shapes
from mimo_fast.errors import CheckpointError
from mimo_fast.kernels.matmul.adapted import AdaptedWeight, Rows, StoredWeight, joined, padded
from mimo_fast.kernels.matmul.product import AnyWeight, Weight
from mimo_fast.kernels.matmul.quantized_weight import (
    DEQUANTIZED_AT_ONCE,
    QuantizedWeight,
    dequantize,
    dequantize_to,
)
from mimo_fast.quantization.convert import Read, WeightSource
from mimo_fast.quantization.search import quantize

Given = TypeVar("Given")


class SharedSource(WeightSource):
    """A `WeightSource` that gives the same tensors when it is asked again."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._given: dict[Hashable, Any] = {}

    def __call__(self, name: str) -> Tensor:
        return self._once(name, super().__call__, name)

    def stored_weight(self, *modules: str, bias: bool | Sequence[bool] = False) -> StoredWeight:
        key = "weight", modules, bias if isinstance(bias, bool) else tuple(bias)
        return self._once(key, super().stored_weight, *modules, bias=bias)

    def stacked(self, *names: str) -> Tensor:
        return self._once(("stacked", names), super().stacked, *names)

    def table(self, module: str) -> Tensor | QuantizedWeight:
        return self._once(("table", module), super().table, module)

    def _once(
        self, key: Hashable, give: Callable[..., Given], *arguments: Any, **named: Any
    ) -> Given:
        if key not in self._given:
            self._given[key] = give(*arguments, **named)
        found: Given = self._given[key]
        return found


class VariantSource(WeightSource):
    """What a variant is read from.

    Args:
        base: what the model was read from.
        merged: reads a tensor as `base` does, with the adapter merged (`AdaptedWeights`).
        shapes: of the model's tensors, `lm_shapes`.
    """

    def __init__(self, base: SharedSource, adapter: Adapter, merged: Read, shapes: Shapes) -> None:
        super().__init__(merged, base._dtype, base._stored, base._requested, base._join)
        self._base, self._adapter, self._shapes = base, adapter, shapes
        self._changes = adapter.changes

    def __call__(self, name: str) -> Tensor:
        return super().__call__(name) if name in self._changes else self._base(name)

    def stacked(self, *names: str) -> Tensor:
        shared = self._changes.keys().isdisjoint(names)
        return self._base.stacked(*names) if shared else super().stacked(*names)

    def table(self, module: str) -> Tensor | QuantizedWeight:
        name = f"{module}.weight"
        if name not in self._changes:
            return self._base.table(module)
        return self._quantized(name, None) if name in self._stored else super().table(module)

    def weight(self, *modules: str, bias: bool | Sequence[bool] = False) -> AnyWeight:
        """The matrix of `WeightSource.weight`, with what the adapter makes of it.

        Raises:
            CheckpointError: with its scale the adapter holds NaN, infinite or absurd values.
        """
        changes = [self._changes.get(f"{module}.weight") for module in modules]
        beside = [change if change and change.base is None else None for change in changes]
        biased = [bias] * len(modules) if isinstance(bias, bool) else bias
        pairs = zip(modules, biased, strict=True)
        biases = [self(f"{module}.bias") if has else None for module, has in pairs]
        if any(change and change.base is not None for change in changes):
            base = self._replaced(modules, biases)
        else:
            base = self._base.stored_weight(*modules, bias=bias)
            if any(f"{module}.bias" in self._changes for module in modules):
                base = _with_biases(base, biases)
        return self._adapted(base, modules, beside, biases) if any(beside) else base

    def _quantized(self, name: str, bias: Tensor | None) -> QuantizedWeight:
        """A matrix that the checkpoint stores quantized, with the adapter merged, quantized again.

        Merged on the CPU, as everywhere.
        """
        stored = self._base._quantized(name, bias)
        dense = self._changes[name].merged(dequantize_to(stored, torch.float32).cpu())
        self._check(name, dense)
        made = quantize(dense.to(stored.words.device), self._stored[name], bias, name)
        if not stored.words.is_pinned():
            return made
        zeros = None if made.zeros is None else made.zeros.pin_memory()
        return replace(
            made, words=made.words.pin_memory(), scales=made.scales.pin_memory(), zeros=zeros
        )

    def _replaced(self, modules: Sequence[str], biases: Sequence[Tensor | None]) -> StoredWeight:
        """A matrix of which some row blocks are the adapter's."""
        names = [f"{module}.weight" for module in modules]
        changes = (self._changes.get(name) for name in names)
        own = [change is not None and change.base is not None for change in changes]
        sources = [self if replaced else self._base for replaced in own]
        blocks = zip(sources, names, biases, strict=True)
        if any(name in self._stored for name in names):
            return self._joined([source._quantized(name, bias) for source, name, bias in blocks])
        read = {name: source._read for source, name, _ in blocks}
        read |= {f"{module}.bias": self._read for module in modules}
        mixed = WeightSource(
            lambda name: read[name](name), self._dtype, requested=self._requested, join=self._join
        )
        return mixed.stored_weight(*modules, bias=[bias is not None for bias in biases])

    def _adapted(
        self,
        base: StoredWeight,
        modules: Sequence[str],
        changes: Sequence[Change | None],
        biases: Sequence[Tensor | None],
    ) -> AdaptedWeight:
        """The base with A and B beside it, of the modules that have a change."""
        counts = [self._shapes[f"{module}.weight"][0] for module in modules]
        pairs = [
            None if change is None else self._low_rank(change, module)
            for module, change in zip(modules, changes, strict=True)
        ]
        a = torch.cat([pair[0] for pair in pairs if pair])
        rows = tuple(
            Rows(count, Weight.stack([pair[1]]) if pair else None)
            for count, pair in zip(counts, pairs, strict=True)
        )
        joins = self._join and a.is_cuda and len(rows) > 1
        made = AdaptedWeight(base, Weight.stack([a]), joined(rows) if joins else rows)
        if not any(change and change.magnitude is not None for change in changes):
            return made
        factors, first = list[Tensor](), 0
        for module, change, pair, count in zip(modules, changes, pairs, counts, strict=True):
            factor = torch.ones(count, dtype=torch.float32, device=a.device)
            if change and change.magnitude is not None and pair:
                factor = change.magnitude.to(factor) / _norms(base, first, *pair)
                self._check(f"{module}.weight", factor)
            factors.append(factor)
            first += count
        bias = _filled(biases, counts) if any(each is not None for each in biases) else None
        bare = _with_biases(base, [None] * len(biases))
        return replace(made, base=bare, factor=torch.cat(factors), bias=bias)

    def _low_rank(self, change: Change, module: str) -> tuple[Tensor, Tensor]:
        """A and B of a matrix on the device, in the dtype to compute in.

        The scale goes into B in float32, which is rounded once: products with B are not rounded
        once more for it. Powers of two, as most scales are, change no bit of B.
        """
        assert change.a is not None
        assert change.b is not None
        like = self._base("model.norm.weight")
        b = change.b.float() * change.scale
        self._check(f"{module}.weight", b)
        return padded(*(part.to(like.device, like.dtype) for part in (change.a, b)))

    def _check(self, name: str, values: Tensor) -> None:
        if not is_finite(values):
            raise CheckpointError(
                f"{self._adapter.directory}: with its scale the adapter of {name} holds NaN or "
                "infinite values, or absurd ones: train the adapter again"
            )


def _with_biases(weight: StoredWeight, biases: Sequence[Tensor | None]) -> StoredWeight:
    """The same matrix with other biases, one for each module."""
    if isinstance(weight, Weight) and len(weight.blocks) == len(biases):
        return replace(weight, biases=tuple(biases))
    # q, k and v, the only matrices that are joined and have biases, all have one.
    known = [bias for bias in biases if bias is not None]
    whole = torch.cat(known) if known else None
    if isinstance(weight, Weight):
        return replace(weight, biases=(whole,))
    return replace(weight, bias=whole)


def _filled(biases: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor:
    """The biases of all modules as one, zeros where there is none."""
    like = next(bias for bias in biases if bias is not None)
    pairs = zip(biases, counts, strict=True)
    return torch.cat([like.new_zeros(count) if each is None else each for each, count in pairs])


def _norms(weight: StoredWeight, first: int, a: Tensor, b: Tensor) -> Tensor:
    """Norms float32 [n] of rows first ... first + n - 1 of W + B A; a few rows are wide at once."""
    found = list[Tensor]()
    step = max(1, DEQUANTIZED_AT_ONCE // weight.shape[1])
    for start in range(0, len(b), step):
        part = b[start : start + step].float() @ a.float()
        part += _wide(weight, first + start, first + start + len(part))
        found.append(torch.linalg.norm(part, dim=1))
    return torch.cat(found)


def _wide(weight: StoredWeight, start: int, end: int) -> Tensor:
    """Rows of a matrix in float32."""
    if isinstance(weight, QuantizedWeight):
        return dequantize(weight, start, end)
    parts, first = list[Tensor](), 0
    for block in weight.blocks:
        parts.append(block[max(start - first, 0) : max(end - first, 0)].float())
        first += len(block)
    return torch.cat(parts)
