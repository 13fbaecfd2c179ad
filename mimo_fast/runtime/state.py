"""Everything that changes while decoding: key/value caches, positions, random counters. Passed in, never global."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LMConfig, TransformerConfig
from ..kernels.kv_cache import LayerKV


@dataclass
class KVCache:
    """Preallocated keys and values of B slots, and how many positions each slot holds.

    k, v [L, B, Hkv, S, Dh]; with k_scales and v_scales [L, B, Hkv, S] they are int8, see `LayerKV`.
    """

    k: Tensor
    v: Tensor
    lengths: list[int]
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device,
        quantized: bool = False,
    ) -> "KVCache":  # fmt: skip
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_dim)
        k, v = (torch.empty(shape, dtype=torch.int8 if quantized else dtype, device=device) for _ in range(2))
        if not quantized:
            return cls(k, v, [0] * slots)
        k_scales, v_scales = (torch.empty(shape[:-1], dtype=torch.float32, device=device) for _ in range(2))
        return cls(k, v, [0] * slots, k_scales, v_scales)

    @property
    def capacity(self) -> int:
        """Positions a slot can hold."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.nbytes for x in (self.k, self.v, self.k_scales, self.v_scales) if x is not None)

    def layer(self, index: int) -> LayerKV:
        scales = (None if x is None else x[index] for x in (self.k_scales, self.v_scales))
        return LayerKV(self.k[index], self.v[index], *scales)


def kv_bytes(config: TransformerConfig, slots: int, capacity: int, dtype: torch.dtype, quantized: bool = False) -> int:
    """`nbytes` of a cache of these dimensions, from shapes alone."""
    head = config.head_dim + torch.float32.itemsize if quantized else config.head_dim * dtype.itemsize
    return 2 * config.layers * slots * config.kv_heads * capacity * head


@dataclass
class DecodeState:
    """B rows being decoded.

    hidden [B, D]: the backbone's last hidden state of each slot, from which its next group is sampled.
    seeds, draws int64 [B]: a slot's random key, and how many groups it has drawn; together they name every draw.
    """

    cache: KVCache
    patch_cache: KVCache
    hidden: Tensor
    seeds: Tensor
    draws: Tensor

    @classmethod
    def allocate(
        cls, config: LMConfig, seeds: list[int], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "DecodeState":
        slots = len(seeds)
        return cls(
            cache=KVCache.allocate(config.backbone, slots, capacity, dtype, device),
            patch_cache=KVCache.allocate(config.patch_decoder, slots, config.patch_steps, dtype, device),
            hidden=torch.zeros(slots, config.backbone.dim, dtype=dtype, device=device),
            seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
            draws=torch.zeros(slots, dtype=torch.int64, device=device),
        )
