"""Everything that changes while decoding: KV caches, positions, the last group, counters."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

Made = TypeVar("Made")

NO_POSITION = -1
"""Length of the scratch row: a step appends nothing to it and does not advance it."""


@dataclass
class KVCache:
    """Preallocated keys and values of B slots.

    k, v [L, B, Hkv, S, Dh]; with k_scales and v_scales [L, B, Hkv, S] they are int8, see `LayerKV`.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        config: TransformerConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized: bool = False,
    ) -> "KVCache":
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_dim)
        stored = torch.int8 if quantized else dtype
        parts = [torch.empty(shape, dtype=stored, device=device) for _ in range(2)]
        if quantized:
            parts += [torch.empty(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)]
        return cls(*parts)

    @property
    def capacity(self) -> int:
        """Positions that a slot can hold."""
        return self.k.shape[3]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All tensors of the cache, each [L, B, Hkv, S, ...]."""
        return tuple(x for x in (self.k, self.v, self.k_scales, self.v_scales) if x is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(part.nbytes for part in self.parts)

    def layer(self, index: int) -> LayerKV:
        scales = (None if x is None else x[index] for x in (self.k_scales, self.v_scales))
        return LayerKV(self.k[index], self.v[index], *scales)


def kv_bytes(
    config: TransformerConfig,
    slots: int,
    capacity: int,
    dtype: torch.dtype,
    quantized: bool = False,
) -> int:
    """`nbytes` of a cache of these dimensions, from shapes alone."""
    scale = torch.float32.itemsize
    head = config.head_dim + scale if quantized else config.head_dim * dtype.itemsize
    return 2 * config.layers * slots * config.kv_heads * capacity * head


@dataclass
class DecodeState:
    """B slots, and after them one scratch row that pads a batch to the size of a captured graph.

    The tensors keep their addresses for the life of the state, and decoding a group changes nothing
    else, so that graphs can be replayed.

    Attributes:
        cache: The backbone's KV cache.
        patch_cache: The patch decoder's KV cache; its rows are in the order of the call and used
            within one patch.
        rows: Row numbers of `patch_cache`, int64 [B + 1].
        patch_starts: Position of each row at each patch-decoder step, int64 [steps, B + 1].
        lengths: Number of positions that each slot holds, int64 [B + 1].
        hidden: The backbone's last hidden states [B + 1, D].
        text: Text of the group sampled last, int64 [B + 1].
        codes: Codes of that group, int64 [B + 1, C, G]; valid where the text is `<|empty|>`.
        patches: The patch encoder's output for these codes [B + 1, D]; the next step feeds it.
        seeds: Random keys, int64 [B + 1].
        draws: Number of groups drawn, int64 [B + 1]; seed and draws identify every draw.
        text_sampler, code_sampler: Sampler settings of each slot.
        banned: Text ids that must not be drawn, bool [B + 1, V].
        adapters: Place of the adapter of each slot (`LM.place_of`), in host memory, B + 1 entries;
            0 for none. Whoever gives a slot to a sequence sets it before its prompt is prefilled.
    """

    cache: KVCache
    patch_cache: KVCache
    rows: Tensor
    patch_starts: Tensor
    lengths: Tensor
    hidden: Tensor
    text: Tensor
    codes: Tensor
    patches: Tensor
    seeds: Tensor
    draws: Tensor
    text_sampler: SamplerTensors
    code_sampler: SamplerTensors
    banned: Tensor
    adapters: list[int]

    @classmethod
    def allocate(
        cls,
        config: LMConfig,
        seeds: Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        quantized_cache: bool = False,
    ) -> "DecodeState":
        slots, dim = len(seeds), config.backbone.dim
        rows = slots + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        steps = torch.arange(config.patch_steps, device=device, dtype=torch.int64)
        lengths = zeros()
        lengths[slots] = NO_POSITION
        decoder, place = config.patch_decoder, (dtype, device)
        return cls(
            cache=KVCache.allocate(config.backbone, slots, capacity, *place, quantized_cache),
            patch_cache=KVCache.allocate(decoder, rows, config.patch_steps, *place),
            rows=torch.arange(rows, device=device, dtype=torch.int64),
            patch_starts=steps[:, None].expand(-1, rows).contiguous(),
            lengths=lengths,
            hidden=zeros(dim, dtype=dtype),
            text=zeros(),
            codes=zeros(config.channels, config.group_size),
            patches=zeros(dim, dtype=dtype),
            seeds=torch.tensor([*seeds, 0], dtype=torch.int64, device=device),
            draws=zeros(),
            text_sampler=_any_settings(rows, device),
            code_sampler=_any_settings(rows, device),
            banned=zeros(config.vocab_size, dtype=torch.bool),
            adapters=[0] * rows,
        )

    @property
    def slots(self) -> int:
        return self.cache.k.shape[1]

    @property
    def capacity(self) -> int:
        """Positions that a slot can hold."""
        return self.cache.capacity

    def set_samplers(self, slot: int, text: MiMoSampler, codes: MiMoSampler) -> None:
        """Sets the samplers of a slot."""
        device = self.lengths.device
        self.text_sampler.write(slot, sampler_tensors([text], device))
        self.code_sampler.write(slot, sampler_tensors([codes], device))


def by_place(state: DecodeState, slots: Sequence[int]) -> dict[int, list[int]]:
    """Places of adapters, and which of the slots, by their index, have each."""
    found: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        found.setdefault(state.adapters[slot], []).append(row)
    return found


def in_order(rows: Iterable[Sequence[int]], made: Iterable[Iterable[Made]]) -> list[Made]:
    """What was made for each part's rows, in the order of all rows: of parts as `by_place`'s."""
    by_row = dict[int, Made]()
    for part, values in zip(rows, made, strict=True):
        by_row |= zip(part, values, strict=True)
    return [by_row[row] for row in range(len(by_row))]


def _any_settings(rows: int, device: torch.device) -> SamplerTensors:
    """Placeholder settings of all rows; the flags assume nothing of what rows will be set to."""
    return replace(sampler_tensors([GREEDY] * rows, device), all_greedy=False, any_top_k=True)
