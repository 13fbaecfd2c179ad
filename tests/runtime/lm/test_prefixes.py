"""The tree of prefixes by itself: against a dictionary of every beginning, within its bounds."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.runtime.lm import prefixes as module
from mimo_fast.runtime.lm.prefixes import SHORTEST, Prefixes, Unit


@dataclass
class Cache:
    parts: tuple[Tensor, ...]


@dataclass
class State:
    """Slots of a cache of two layers and one head: [2, B, 1, S, 3] and scales [2, B, 1, S]."""

    cache: Cache
    lengths: Tensor

    @classmethod
    def of(cls, slots: int = 2, capacity: int = 64) -> Any:
        shape = (2, slots, 1, capacity)
        parts = torch.full((*shape, 3), torch.nan), torch.full(shape, torch.nan)
        return cls(Cache(parts), torch.zeros(slots, dtype=torch.int64))


BYTES = 2 * (3 + 1) * 4
"""Of one group."""


def units(text: str, sizes: dict[str, int] | None = None) -> list[Unit]:
    """A unit a letter, of one group each unless `sizes` says otherwise."""
    return [Unit(letter.encode(), (sizes or {}).get(letter, 1)) for letter in text]


def computed(state: Any, slot: int, prompt: list[Unit]) -> None:
    """Fills a slot as a prefill does: each position depends on all units before it."""
    position, seen = 0, b""
    for unit in prompt:
        for i in range(unit.groups):
            seen += unit.key + bytes([i])
            values = torch.Generator().manual_seed(hash_of(seen))
            for part in state.cache.parts:
                shape = part[:, slot, :, position].shape
                part[:, slot, :, position] = torch.randn(shape, generator=values)
            position += 1


def hash_of(data: bytes) -> int:
    return int.from_bytes(data[-7:].rjust(7, b"\0"), "big") ^ (len(data) << 40)


def run(tree: Prefixes, text: str, declared: int = 0, sizes: dict[str, int] | None = None) -> int:
    """A prompt from note to keep; checks what it reuses -> number of groups of it."""
    state, prompt = State.of(), units(text, sizes)
    length = sum(unit.groups for unit in prompt)
    computed(state, 0, prompt)
    tree.note(prompt, declared)
    known = tree.known(prompt, length - 1)
    if known:
        tree.put(prompt, state, 1, 0, known)
        assert int(state.lengths[1]) == known
        for part in state.cache.parts:
            assert torch.equal(part[:, 1, :, :known], part[:, 0, :, :known])
            assert bool(part[:, 1, :, known:].isnan().all())
    tree.keep(prompt, state, 0, length, declared)
    return known


def test_what_two_prompts_share_is_kept_when_the_second_has_computed_it():
    tree = Prefixes(2**20)
    assert run(tree, "abcdefghijXY") == 0
    assert (len(tree), tree.nbytes) == (0, 0)
    assert run(tree, "abcdefghijPQ") == 0
    assert (len(tree), tree.nbytes) == (1, 10 * BYTES)
    assert run(tree, "abcdefghijZ") == 10
    # Part of an edge, too.
    assert run(tree, "abcdefghW") == 8
    assert (tree.asked, tree.hits, tree.reused) == (4, 2, 18)


def test_what_is_declared_is_kept_at_once():
    tree = Prefixes(2**20)
    assert run(tree, "abcX", declared=3) == 0
    assert run(tree, "abcY") == 3


def test_a_template_is_not_worth_it():
    tree = Prefixes(2**20)
    shared = "abcdefgh"[: SHORTEST - 1]
    for end in "XYZ":
        assert run(tree, shared + end) == 0
    assert len(tree) == 0


def test_units_are_reused_whole():
    """Chunks of a model whose bits depend on them."""
    tree, sizes = Prefixes(2**20), {"a": 10, "b": 10, "c": 5, "d": 7}
    for text in ("abc", "abd"):
        assert run(tree, text, sizes=sizes) == 0
    assert run(tree, "abc", sizes=sizes) == 20
    # Its last group is computed in any case, and with it the chunk that it ends.
    assert run(tree, "ab", sizes=sizes) == 10


def test_the_least_recently_used_goes_first():
    tree = Prefixes(40 * BYTES)
    one, two, three = ("abcdefghijkl", "mnopqrstuvwx", "ABCDEFGHIJKL")
    for text in (one, two):
        for end in "12":
            run(tree, text + end)
    assert tree.nbytes == 24 * BYTES
    assert run(tree, one + "3") == 12
    tree.budget = 30 * BYTES
    for end in "12":
        run(tree, three + end)
    assert tree.nbytes <= tree.budget
    assert run(tree, one + "4") == 12
    assert run(tree, three + "4") == 12
    assert run(tree, two + "4") == 0
    # It is computed and kept again.
    assert run(tree, two + "5") == 12


def test_what_is_larger_than_the_budget_is_not_held():
    tree = Prefixes(5 * BYTES)
    for end in "1234":
        assert run(tree, "abcdefghijkl" + end) == 0
    assert tree.nbytes == 0


def test_units_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "UNITS", 60)
    tree, rng = Prefixes(2**20), random.Random(1)
    for _ in range(50):
        run(tree, "".join(rng.choices("abcdefghijklmnop", k=20)))
        assert tree._units <= 60
        assert tree._units == sum(len(edge.units) for edge in tree._edges())


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab", min_size=1, max_size=14), st.integers(0, 6)),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from([40, 200, 2**20]),
)
def test_any_prompts_get_the_bits_that_they_would_compute(prompts, groups):
    """And the tree stays one: edges join, sums are right, nothing is beyond its bounds."""
    tree = Prefixes(groups * BYTES)
    for text, declared in prompts:
        run(tree, text, min(declared, len(text)))
        edges = [*tree._edges()]
        assert tree.nbytes == sum(edge.nbytes for edge in edges) <= tree.budget
        assert tree._units == sum(len(edge.units) for edge in edges)
        for edge in edges:
            assert edge.units
            assert edge.above.end == edge.start
            assert edge.above.below[edge.units[0].key] is edge
            if edge.parts is not None:
                assert {part.shape[2] for part in edge.parts} == {edge.groups}


def test_with_room_for_all_the_longest_shared_beginning_is_known():
    rng, tree, before = random.Random(5), Prefixes(2**20), list[str]()
    for _ in range(60):
        text = "".join(rng.choices("ab", k=20))
        text = rng.choice(before)[: rng.randrange(8, 20)] + text if before else text
        known = run(tree, text[:40])
        # What two earlier ones have in common, and one of them has computed after the other.
        best = 0
        for i, one in enumerate(before):
            for other in before[:i]:
                size = 0
                while one[: size + 1] == other[: size + 1] == text[: size + 1] and size < 39:
                    size += 1
                best = max(best, size if size >= SHORTEST else 0)
        assert known >= min(best, len(text[:40]) - 1)
        before.append(text[:40])
