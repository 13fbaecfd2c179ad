"""`Slots`: which sequence has which slot of the KV cache, and where the others' keys are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.lm.snapshot import Snapshot
from mimo_fast.runtime.lm.state import DecodeState


class Slots:
    """The slots of one state; a sequence keeps its own until another needs it.

    A sequence that is evicted has its keys and values in host memory, and gets them back, bit for
    bit, in whatever slot it is placed in next. A sequence that nobody holds frees its slot.

    Attributes:
        owners: By slot; None for one that was never used.
        evictions: Number of sequences that were moved to host memory.
    """

    def __init__(self, state: DecodeState) -> None:
        self.state = state
        self.owners: list[weakref.ref[TokenSequence] | None] = [None] * state.slots
        self.used = [0] * state.slots
        self.evictions = 0
        self._clock = 0

    def __len__(self) -> int:
        return len(self.owners)

    def owner(self, slot: int) -> TokenSequence | None:
        """The sequence that has a slot; None for a free one."""
        owner = self.owners[slot]
        return None if owner is None else owner()

    def __iter__(self) -> Iterator[TokenSequence | None]:
        return (self.owner(slot) for slot in range(len(self.owners)))

    def touch(self, sequence: TokenSequence) -> None:
        """Notes that a sequence is used now."""
        assert sequence.slot is not None
        self._clock += 1
        self.used[sequence.slot] = self._clock

    def evict(self, sequence: TokenSequence) -> None:
        """Moves a sequence's keys and values to host memory."""
        assert sequence.slot is not None
        if sequence.cached:
            sequence.snapshot = Snapshot.take(self.state, sequence.slot, sequence.cached)
        self.owners[sequence.slot] = None
        sequence.slot = None
        self.evictions += 1

    def place(self, sequence: TokenSequence, slot: int) -> None:
        """Gives a free slot to a sequence, with its adapter, keys and values."""
        self.state.adapters[slot] = sequence.adapter
        if sequence.snapshot is not None:
            sequence.snapshot.put(self.state, slot)
        self.owners[slot] = weakref.ref(sequence)
        sequence.slot, sequence.snapshot = slot, None
        self.touch(sequence)

    def forget(self) -> None:
        """Takes every slot away without keeping what is in it."""
        for owner in filter(None, self):
            owner.slot, owner.cached = None, 0
