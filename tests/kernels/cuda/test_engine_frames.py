"""The codec's vocoder layers as phases of the persistent kernel, on a CPU: threads are fibers,
resumed in random order."""

import ctypes
from dataclasses import replace

import pytest
import torch
from engine_codecs import (
    Frames,
    random_vocoder,
)
from helpers import assert_as_exact_as_eager, slow_after

from mimo_fast.kernels.cuda.engine_launch import declared
from mimo_fast.runtime.codec.persistent import (
    refuses_vocoder,
)


@pytest.fixture(scope="module")
def library(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    return declared(emulated_cuda)


BLOCKS_OF_FRAMES = {
    "one group": ([100], 20, 4),
    "six groups": ([500], 176, 16),
    "before frame 0": ([-160, -25], 120, 60),
    "none is new": ([7, 90], 50, 0),
    "most are new": ([-3], 100, 90),
    "groups of 17": ([1000, 0, 2], 33, 33),
}
"""First positions of streams, frames of each, and how many of them are new."""


@pytest.mark.parametrize("name", slow_after(3, [*BLOCKS_OF_FRAMES]))
def test_frames(library, name):
    starts, count, fresh = BLOCKS_OF_FRAMES[name]
    frames = Frames(random_vocoder(), starts, count)
    got = frames.by_engine(library, fresh)
    eager, exact = frames.by_torch(fresh), frames.by_torch(fresh, torch.float32)
    for parts in zip(got, eager, exact, strict=True):
        assert_as_exact_as_eager(*parts)


@pytest.mark.slow
@pytest.mark.parametrize("window", [(1, 0), (12, 3), (3, 30), (64, 0)])
def test_windows_of_frames(library, window):
    frames = Frames(random_vocoder(window=window), [-20, 400], 70)
    got, eager = frames.by_engine(library, 9), frames.by_torch(9)
    for parts in zip(got, eager, frames.by_torch(9, torch.float32), strict=True):
        assert_as_exact_as_eager(*parts)


@pytest.mark.parametrize("seed", slow_after(1, [*range(4)]))
def test_frames_have_the_same_bits_in_any_company_and_grid(library, seed):
    frames = Frames(random_vocoder(), [9, -40, 570], 70, seed)
    made = frames.by_engine(library, 8, 20, 32, seed)
    for blocks, threads in ((3, 64), (47, 32)):
        again = frames.by_engine(library, 8, blocks, threads, seed + 1)
        assert all(map(torch.equal, made, again))
    for i in range(len(frames.x)):
        lone = frames.alone(i).by_engine(library, 8, 11, 96, seed + 2)
        assert all(
            torch.equal(one, of_all[i : i + 1]) for one, of_all in zip(lone, made, strict=True)
        )


def test_what_it_refuses_of_a_vocoder():
    stack = random_vocoder()
    assert refuses_vocoder(stack, torch.bfloat16) == ""
    for changed in (
        replace(stack, causal=True),
        replace(stack, window=(-1, -1)),
        replace(stack, window=(60, 10)),
        replace(stack, heads=4),
    ):
        assert refuses_vocoder(changed, torch.bfloat16)
