"""Tests of the tests: bugs in the source of the codec's persistent kernels that runs in several
orders and grids find."""

import ctypes

import pytest
import torch
from engine_codecs import Chunk, Frames, random_stack, random_vocoder
from engine_launches import faulty_build

FOUND_WITHIN = 12
"""Seeds in each of which both kernels run in all grids."""

BUGS = {
    "columns of x in the place of those that are multiplied": (
        "if (!first) __syncthreads();",
        "if (!ON && !first) __syncthreads();",
    ),
    "x is normed before all of it is there": (
        "if (!together()) return false;\n    if (!phase.layer_norm) return true;",
        "if (!ON && !together()) return false;\n    if (!phase.layer_norm) return true;",
    ),
    "a copy is read too early": (
        "cp_async_wait_group<DEPTH - PARTS>();",
        "if (ON) cp_async_wait_group<DEPTH - PARTS + 1>();\n"
        "    else cp_async_wait_group<DEPTH - PARTS>();",
    ),
    "sums are read before all are there": (
        "// All sums are there.\n        __syncthreads();",
        "if (!ON) __syncthreads();",
    ),
    "sums in the place of those that are published": (
        "and the next phase's, take their place.\n        __syncthreads();",
        "and the next phase's, take their place.\n        if (!ON) __syncthreads();",
    ),
    "sums of the class's first unit are not its first": (
        "with_unit(first ? 0 : sum",
        "with_unit(first && !ON ? 0 : sum",
    ),
    "a key in the next slot": (
        "return of + int64_t((next + i) % size) * RING_HEAD;",
        "return of + int64_t((next + i + (ON ? 1 : 0)) % size) * RING_HEAD;",
    ),
    "keys of another row's group": (
        "return p.exchanged + apart * p.group_values +",
        "return p.exchanged + (ON ? 0 : apart) * p.group_values +",
    ),
    "a group keeps nothing of those before": (
        "(row < first && (first || row < -p.context))",
        "(row < first && (ON || first || row < -p.context))",
    ),
}
"""What is wrong -> text of the source, and what stands in its place, where ON is whether it is."""

GRIDS = ({"blocks": 4, "threads": 64}, {"blocks": 9, "threads": 96})


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A build with all bugs, of which one at most is on."""
    return faulty_build(tmp_path_factory.mktemp("faulty"), BUGS)


@pytest.mark.parametrize("bug", [None, *BUGS])
@pytest.mark.slow
def test_that_these_bugs_are_found(faulty, bug):
    chunk = Chunk(random_stack(ffn=1024), [9, 570], 8)
    frames = Frames(random_vocoder(), [-12], 70)
    faulty.set_bug(0)
    want = [*chunk.by_engine(faulty, 1, 32), *frames.by_engine(faulty, 9, 3, 32)]
    faulty.set_bug(0 if bug is None else 1 + list(BUGS).index(bug))

    def found(seed: int) -> bool:
        for grid in GRIDS:
            try:
                columns = {"x_columns": 256}
                made = chunk.by_engine(faulty, seed=seed, **grid, **columns)
                got = [*made, *frames.by_engine(faulty, 9, seed=seed, **grid)]
            except RuntimeError:
                return True
            if not all(map(torch.equal, got, want)):
                return True
        return False

    assert any(found(seed) for seed in range(1, 1 + FOUND_WITHIN)) == (bug is not None)
