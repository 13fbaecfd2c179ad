"""`Prefixes`: a radix tree of the beginnings of prompts, with their keys and values.

    (root) ─ system prompt and voice, 40 groups ─┬─ first example, 25 groups ─ ...
                                                 └─ another question, 9 groups

A prompt is a sequence of units: groups where a prompt has the same bits in whatever parts it is
prefilled, otherwise the chunks that a run by itself has. An edge holds units that no known prompt
parts company in, and, once they are worth it, the keys and values of their groups in host memory.
Bits from the tree are therefore those that the prompt would have computed. Prompts of different
adapters have no unit in common: each adapter's are a tree of its own below the root.

Every prompt is noted, as hashes, when it is asked for (`note`). What two prompts have in common, or
one declares to be shared, is kept as soon as one of them has computed it (`keep`), so that whoever
waits for it computes it no second time. The bytes of keys and values are bounded, and so is the
number of units; what was used least recently goes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from mimo_fast.runtime.lm.snapshot import to_host
from mimo_fast.runtime.lm.state import DecodeState

SHORTEST = 8
"""Groups below which what prompts have in common is computed again; a template has about three."""

UNITS = 2**17
"""Units that are noted at most, with or without keys and values."""


@dataclass(frozen=True)
class Unit:
    """Groups of a prompt that are reused together.

    Attributes:
        key: A hash of their ids and of the adapter that they are computed with.
        groups: How many they are.
    """

    key: bytes
    groups: int


@dataclass(eq=False)
class Edge:
    """Units between two places where prompts part company.

    Attributes:
        start: Groups before it.
        seen: Number of prompts that have passed it to its end.
        parts: Keys and values [L, Hkv, groups, ...] in host memory, None while they are not kept.
        used: When it was used last.
    """

    units: tuple[Unit, ...]
    start: int
    above: Edge | None
    seen: int = 0
    parts: tuple[Tensor, ...] | None = None
    used: int = 0
    below: dict[bytes, Edge] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return sum(unit.groups for unit in self.units)

    @property
    def end(self) -> int:
        return self.start + self.groups

    @property
    def nbytes(self) -> int:
        return 0 if self.parts is None else sum(part.nbytes for part in self.parts)


class Prefixes:
    """The tree of one model.

    Args:
        budget: bytes of keys and values to hold at most.

    Attributes:
        asked: Number of prompts noted.
        hits: Number of prompts that began with groups of the tree.
        reused: Number of groups that were not computed because of it.
        nbytes: Bytes of keys and values held.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.asked = self.hits = self.reused = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything but the counters."""
        self._root, self._clock = Edge((), 0, None), 0
        self.nbytes = self._units = 0

    def __len__(self) -> int:
        """Number of edges that hold keys and values."""
        return sum(edge.parts is not None for edge in self._edges())

    def note(self, units: Sequence[Unit], declared: int = 0) -> None:
        """A prompt is asked for, of which the first `declared` groups are shared with others."""
        self.asked += 1
        edge, rest, start = self._root, [*units], 0
        while rest:
            following = edge.below.get(rest[0].key)
            if following is None:
                edge = self._grown(edge, rest, start)
                break
            same = _common(following.units, rest)
            if same < len(following.units):
                self._split(following, same)
            edge, rest, start = following, rest[same:], following.end
            edge.seen += 1
            self._touch(edge)
        if declared:
            self._declare(units, declared)
        self._bound_units()

    def _declare(self, units: Sequence[Unit], declared: int) -> None:
        for edge in self._path(units):
            if edge.start < declared < edge.end:
                groups, count = edge.start, 0
                while groups < declared:
                    groups += edge.units[count].groups
                    count += 1
                if groups == declared:
                    self._split(edge, count)
            if edge.end <= declared:
                edge.seen = max(edge.seen, 2)

    def known(self, units: Sequence[Unit], most: int) -> int:
        """Groups at the beginning of a prompt whose keys and values are held, at most `most`."""
        end = 0
        for edge, count in self._held(units, most):
            end = edge.start + sum(unit.groups for unit in edge.units[:count])
        return end

    def missing(self, units: Sequence[Unit], declared: int = 0) -> list[Edge]:
        """What a prompt shares with others and nobody has computed yet, in order."""
        return [edge for edge in self._shared(units, declared) if edge.parts is None]

    def _shared(self, units: Sequence[Unit], declared: int) -> list[Edge]:
        """Edges that a prompt shares with others; none where they are not worth it."""
        shared = [*takewhile(lambda edge: edge.seen > 1, self._path(units))]
        end = shared[-1].end if shared else 0
        return shared if end >= SHORTEST or end <= declared else []

    def put(
        self, units: Sequence[Unit], state: DecodeState, slot: int, first: int, end: int
    ) -> None:
        """Writes groups first ... end - 1, which are `known`, into a slot."""
        for edge, _ in self._held(units, end):
            assert edge.parts is not None
            low, high = max(first, edge.start), min(end, edge.end)
            if low >= high:
                continue
            self._touch(edge)
            here = slice(low - edge.start, high - edge.start)
            for part, saved in zip(state.cache.parts, edge.parts, strict=True):
                part[:, slot, :, low:high].copy_(saved[:, :, here], non_blocking=True)
        state.lengths[slot] = end
        self.hits += 1
        self.reused += end - first

    def keep(
        self, units: Sequence[Unit], state: DecodeState, slot: int, end: int, declared: int = 0
    ) -> None:
        """Holds what a prompt shares with others of the first `end` groups, which a slot has."""
        for edge in self._shared(units, declared):
            if edge.end > end:
                break
            if edge.parts is None:
                cache = state.cache.parts
                edge.parts = tuple(
                    to_host(part[:, slot, :, edge.start : edge.end]) for part in cache
                )
                self.nbytes += edge.nbytes
            self._touch(edge)
        self._bound_bytes()

    def _path(self, units: Sequence[Unit]) -> Iterator[Edge]:
        """Edges that a prompt has whole, from the root."""
        edge, rest = self._root, units
        while rest and (following := edge.below.get(rest[0].key)) is not None:
            if _common(following.units, rest) < len(following.units):
                return
            yield following
            edge, rest = following, rest[len(following.units) :]

    def _held(self, units: Sequence[Unit], most: int) -> Iterator[tuple[Edge, int]]:
        """Edges with keys and values, and how many of their units a prompt has."""
        edge, rest = self._root, units
        while rest and (following := edge.below.get(rest[0].key)) is not None:
            if following.parts is None:
                return
            same, groups = 0, following.start
            for unit in following.units[: _common(following.units, rest)]:
                groups += unit.groups
                if groups > most:
                    break
                same += 1
            if same:
                yield following, same
            if same < len(following.units):
                return
            edge, rest = following, rest[same:]

    def _grown(self, above: Edge, units: Sequence[Unit], start: int) -> Edge:
        edge = Edge((*units,), start, above, seen=1)
        above.below[units[0].key] = edge
        self._units += len(units)
        self._touch(edge)
        return edge

    def _split(self, edge: Edge, count: int) -> None:
        """Makes the first `count` units of an edge one of its own, and the rest one below it."""
        rest = Edge(edge.units[count:], 0, edge, edge.seen, None, edge.used, edge.below)
        for each in rest.below.values():
            each.above = rest
        edge.units, edge.below = edge.units[:count], {rest.units[0].key: rest}
        rest.start = edge.end
        if edge.parts is not None:
            # Copies, so that either can be let go of.
            size, parts = edge.groups, edge.parts
            edge.parts = tuple(part[:, :, :size].clone() for part in parts)
            rest.parts = tuple(part[:, :, size:].clone() for part in parts)

    def _touch(self, edge: Edge) -> None:
        self._clock += 1
        edge.used = self._clock

    def _edges(self) -> Iterator[Edge]:
        waiting = [*self._root.below.values()]
        while waiting:
            edge = waiting.pop()
            waiting += edge.below.values()
            yield edge

    def _bound_bytes(self) -> None:
        """Lets keys and values go, of edges below which none are held, the oldest first."""
        while self.nbytes > self.budget:
            held = [edge for edge in self._edges() if edge.parts is not None]
            last = (
                edge for edge in held if all(each.parts is None for each in edge.below.values())
            )
            oldest = min(last, key=lambda edge: edge.used)
            self.nbytes -= oldest.nbytes
            oldest.parts = None

    def _bound_units(self) -> None:
        while self._units > UNITS:
            leaves = [edge for edge in self._edges() if not edge.below]
            for edge in sorted(leaves, key=lambda edge: edge.used)[: len(leaves) // 2 + 1]:
                assert edge.above is not None
                del edge.above.below[edge.units[0].key]
                self._units -= len(edge.units)
                self.nbytes -= edge.nbytes


def _common(units: Sequence[Unit], others: Sequence[Unit]) -> int:
    """Number of units that both begin with."""
    count = 0
    for one, other in zip(units, others, strict=False):
        if one.key != other.key:
            break
        count += 1
    return count
