"""Keys and values of a sequence outside the KV cache: evicted, or saved."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.runtime.lm.state import DecodeState


@dataclass(frozen=True)
class Snapshot:
    """A copy of a slot's first `length` positions in host memory (pinned where there is a GPU).

    parts [L, Hkv, length, ...] and hidden [D] have the cache's own types, so restoring them is
    exact.
    """

    length: int
    parts: tuple[Tensor, ...]
    hidden: Tensor

    @classmethod
    def take(cls, state: DecodeState, slot: int, length: int) -> "Snapshot":
        """Copies a slot's first positions."""
        parts = tuple(to_host(part[:, slot, :, :length]) for part in state.cache.parts)
        return cls(length, parts, to_host(state.hidden[slot]))

    def put(self, state: DecodeState, slot: int, length: int | None = None) -> None:
        """Restores the positions, or the first `length` of them, into any slot."""
        length = self.length if length is None else min(length, self.length)
        for part, saved in zip(state.cache.parts, self.parts, strict=True):
            part[:, slot, :, :length].copy_(saved[:, :, :length], non_blocking=True)
        state.hidden[slot].copy_(self.hidden, non_blocking=True)
        state.lengths[slot] = length

    def fits(self, state: DecodeState) -> bool:
        """Whether it is not empty and has the types and shapes of this state's cache."""
        if not 0 < self.length <= state.capacity:
            return False
        own = [part[:, 0, :, : self.length] for part in state.cache.parts]
        expected = [(part.dtype, part.shape) for part in (*own, state.hidden[0])]
        return expected == [(part.dtype, part.shape) for part in (*self.parts, self.hidden)]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.parts, self.hidden))


def to_host(part: Tensor) -> Tensor:
    """A copy in host memory, pinned where there is a GPU."""
    copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda, device="cpu")
    return copy.copy_(part)
