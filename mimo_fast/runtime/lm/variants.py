"""A language model whose rows choose their adapter: the model, and a variant of it for each.

A variant shares every tensor that its adapter leaves alone (`quantization/variants.py`). Rows of a
call are grouped by `DecodeState.adapters`, and each group is computed by its variant, in one call:
whatever adapters the rows beside it have, a row has the bits that it has among those of its own.
A step reads the model's weights once for each adapter among its rows, and each of these adapters
once; of the patch decoder at each of its steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.runtime.lm.model import LM, PlacedIds
from mimo_fast.runtime.lm.state import DecodeState, by_place


@checked
class AdaptedLM(LM):
    """A model with adapters that are not merged.

    What is not of certain slots is the model's own, without an adapter: `embed`, `encode_patches`,
    `text_logits`, `local_hidden`. `variant` has them with one.

    Args:
        base: the model itself.
        variants: it with each adapter.
        adapters, digests: names and digests of these.
    """

    def __init__(
        self, base: LM, variants: Sequence[LM], adapters: Sequence[str], digests: Sequence[str]
    ) -> None:
        self._variants = base, *variants
        for each in self._variants:
            # Persistent kernels are not made for it: each variant would have its own.
            each._executor = replace(each._executor, persistent=None)
        vars(self).update(vars(base), _variants=self._variants)
        self.adapters, self.adapter_digests = tuple(adapters), ("", *digests)

    @cached_property
    def adapter_nbytes(self) -> int:
        base, *variants = self._variants
        own = {tensor.data_ptr(): tensor.nbytes for each in variants for tensor in _tensors(each)}
        shared = {tensor.data_ptr() for tensor in _tensors(base)}
        return sum(size for at, size in own.items() if at not in shared)

    def prefill_together(self, parts: Sequence[PlacedIds], state: DecodeState) -> None:
        for place, rows in by_place(state, [part.slot for part in parts]).items():
            self._variants[place].prefill_together([parts[row] for row in rows], state)

    def prefills_alike(self, state: DecodeState) -> bool:
        return all(each.prefills_alike(state) for each in self._variants)

    def hidden_chunks(
        self, ids: Tensor, state: DecodeState, slot: int, start: int = 0
    ) -> Iterator[Tensor]:
        return self._variants[state.adapters[slot]].hidden_chunks(ids, state, slot, start)

    def prefill_packed(self, ids: Tensor, places: Tensor, state: DecodeState) -> Tensor:
        """As `LM.prefill_packed`, but that slots are read on the host."""
        return self._of_rows(
            state,
            places[:, 0],
            lambda lm, rows: lm.prefill_packed(ids[rows], places[rows], state),
        )

    def stage(self, state: DecodeState, slot: int, text: int, codes: Tensor) -> None:
        self._variants[state.adapters[slot]].stage(state, slot, text, codes)

    def step(self, state: DecodeState, slots: Tensor) -> None:
        for lm, rows in self._groups(state, slots):
            lm.step(state, slots[rows])

    def sample_text(
        self,
        state: DecodeState,
        slots: Tensor,
        settings: SamplerTensors,
        banned: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        def sample(lm: LM, rows: Tensor) -> Tensor:
            given = (None if x is None else x[rows] for x in (banned, logits))
            return lm.sample_text(state, slots[rows], settings.select(rows), *given)

        return self._of_rows(state, slots, sample)

    def sample_patch(self, state: DecodeState, slots: Tensor, settings: SamplerTensors) -> Tensor:
        return self._of_rows(
            state,
            slots,
            lambda lm, rows: lm.sample_patch(state, slots[rows], settings.select(rows)),
        )

    def decode_patch(
        self, local: Tensor, state: DecodeState, slots: Tensor, settings: SamplerTensors
    ) -> Tensor:
        return self._of_rows(
            state,
            slots,
            lambda lm, rows: lm.decode_patch(
                local[rows], state, slots[rows], settings.select(rows)
            ),
        )

    def _groups(self, state: DecodeState, slots: Tensor) -> Iterator[tuple[LM, Tensor]]:
        """Variants, and indices of the rows of each; slots are read on the host."""
        for place, rows in (by_place(state, slots.tolist()) or {0: []}).items():
            indices = torch.tensor(rows, dtype=torch.int64, device=slots.device)
            yield self._variants[place], indices

    def _of_rows(
        self, state: DecodeState, slots: Tensor, compute: Callable[[LM, Tensor], Tensor]
    ) -> Tensor:
        """What is computed for rows of each variant, in the order of the slots."""
        groups = [*self._groups(state, slots)]
        made = torch.cat([compute(*group) for group in groups])
        return made[torch.cat([rows for _, rows in groups]).argsort()]


def _tensors(part: Any) -> Iterator[Tensor]:
    """Tensors of a model's weights and tables."""
    if isinstance(part, LM):
        tables = part.text_embeddings, part.code_embeddings, part.embeddings_to_local
        part = part.network, *tables
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _tensors(each)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))
