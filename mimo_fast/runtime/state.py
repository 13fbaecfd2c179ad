"""Everything that changes while decoding: key/value caches, positions, random counters. Passed in, never global."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import LMConfig, TransformerConfig


@dataclass
class KVCache:
    """Preallocated keys and values of B slots: k and v [L, B, Hkv, S, Dh], and how many positions each slot holds."""

    k: Tensor
    v: Tensor
    lengths: list[int]

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        shape = (config.layers, slots, config.kv_heads, capacity, config.head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v, [0] * slots)

    @property
    def capacity(self) -> int:
        """Positions a slot can hold."""
        return self.k.shape[3]


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
