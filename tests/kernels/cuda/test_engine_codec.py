"""The codec's decoder layers as phases of the persistent kernel, on a CPU: threads are fibers,
resumed in random order."""

import ctypes
from dataclasses import replace

import pytest
import torch
from engine_codecs import (
    DIM,
    SHARED,
    WINDOW,
    Chunk,
    decoder_of,
    error_word,
    random_stack,
)
from helpers import assert_as_exact_as_eager, slow_after

from mimo_fast.kernels.cuda.engine_launch import Grid, declared
from mimo_fast.kernels.cuda.engine_streams import MOST_STREAM_ROWS
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.runtime.codec.layers import (
    Norm,
)
from mimo_fast.runtime.codec.persistent import (
    MOST_FRAMES,
    PersistentDecoder,
    PersistentVocoder,
    refuses_decoder,
)
from mimo_fast.runtime.codec.state import BLOCK, decoder_context


@pytest.fixture(scope="module")
def library(emulated_cuda: ctypes.CDLL) -> ctypes.CDLL:
    return declared(emulated_cuda)


def check(chunk: Chunk, library: ctypes.CDLL, **how: int) -> None:
    got = chunk.by_engine(library, **how)
    eager, exact = chunk.by_torch(), chunk.by_torch(torch.float32)
    for parts in zip(got, eager, exact, strict=True):
        assert_as_exact_as_eager(*parts)
    # No other slot of the rings has changed.
    for before, after, wanted in zip((chunk.k, chunk.v), got[1:], eager[1:], strict=True):
        same = (wanted == before).all(-1)
        assert torch.equal(after[same], before[same])


SIZE = decoder_context((-1, -1)) + BLOCK


CHUNKS = {
    "the first": ([0], 8),
    "round the ring": ([SIZE - 3, 5], 8),
    "four streams": ([17, 0, 5000, 511], 8),
    "of three": ([2 * SIZE - 1], 3),
    "contexts that are full": ([512, 513], 8),
    "of days": ([2**33 + 5], 8),
    "all rows of one stream": ([40], 32),
    "of ten": ([3, SIZE - 16, 0], 10),
    "of one": ([1, 2, 3, 4, 5, 6, 7], 1),
    "of seventeen": ([300], 17),
}
"""First new positions of streams, and how many each has."""


@pytest.mark.parametrize("name", slow_after(4, [*CHUNKS]))
def test_layers(library, name):
    check(Chunk(random_stack(), *CHUNKS[name]), library)


@pytest.mark.parametrize("blocks", slow_after(1, [3, 1, 7]))
def test_the_published_width_of_a_layer(library, blocks):
    check(Chunk(random_stack(1280, 5120, 1), [700, 3], 8), library, blocks=blocks, threads=512)


@pytest.mark.slow
def test_a_card_with_little_shared_memory(library):
    """Half of the threads, and one stream a launch."""
    chunk = Chunk(random_stack(1280, 5120, 1), [700, 3], 8)
    much = chunk.by_engine(library, threads=512)
    little = chunk.by_engine(library, threads=256, shared=99 * 1024)
    assert all(map(torch.equal, much, little))


CARDS = {"H100": (132, 227), "A100": (108, 163), "RTX 4090": (128, 99), "RTX 5090": (170, 99)}
"""Multiprocessors, and KiB of shared memory that a block may have."""


@pytest.mark.parametrize(("card", "together"), [*zip(CARDS, [4, 4, 2, 2], strict=True)])
def test_the_published_codec_fits_on_cards(library, card, together):
    blocks, shared = CARDS[card]
    grid = Grid(blocks, shared * 1024)
    how = torch.bfloat16, grid, error_word(), library
    decoder, vocoder = random_stack(1280, 5120, 1), random_stack(256, 1024, 1)
    decoder = replace(decoder, layers=decoder.layers * 32)
    vocoder = replace(vocoder, layers=vocoder.layers * 16, heads=16, causal=False, window=WINDOW)
    assert PersistentDecoder(decoder, *how)._together(8) == together
    layers = PersistentVocoder(vocoder, *how)
    assert all(map(layers.takes, (160, 176, 248, 416)))
    assert not layers.takes(MOST_FRAMES + 1)


@pytest.mark.slow
def test_a_window_shorter_than_the_ring(library):
    check(Chunk(random_stack(window=24), [100, 5, 23], 8), library)


@pytest.mark.slow
def test_rows_whose_mean_is_far_from_0(library):
    check(Chunk(random_stack(shift=40.0), [0, 100], 8), library)


@pytest.mark.parametrize("seed", slow_after(1, [*range(6)]))
def test_a_stream_has_the_same_bits_in_any_company_and_grid(library, seed):
    chunk = Chunk(random_stack(), [9, 0, 570, 1200, 64], 8, seed)
    y, k, v = chunk.by_engine(library, 4, 64, seed)
    for blocks, threads in ((1, 32), (7, 128)):
        again = chunk.by_engine(library, blocks, threads, seed + 1)
        assert all(map(torch.equal, (y, k, v), again))
    for i in range(len(chunk.x)):
        lone = chunk.alone(i).by_engine(library, 5, 96, seed + 2)
        assert torch.equal(lone[0], y[i : i + 1])
        for ring, of_all in zip(lone[1:], (k, v), strict=True):
            assert torch.equal(ring[chunk.numbers[i]], of_all[chunk.numbers[i]])


@pytest.mark.slow
@pytest.mark.parametrize("depth", [4, 8])
@pytest.mark.parametrize("x_columns", [256, 384, 512])
def test_columns_at_a_time_and_depths_do_not_change_a_bit(library, depth, x_columns):
    chunk = Chunk(random_stack(ffn=1024), [9, 600, 77], 8)
    wanted = chunk.by_engine(library)
    got = chunk.by_engine(library, depth=depth, x_columns=x_columns)
    assert all(map(torch.equal, got, wanted))


def test_rows_that_pass_one_by_one_have_the_bits_of_a_chunk(library):
    """But for the order of sums of attention, which goes by the chunk's first position."""
    chunk = Chunk(random_stack(layers=1), [0], 8)
    chunk.k.zero_(), chunk.v.zero_()
    _, k, v = chunk.by_engine(library)
    layers = decoder_of(chunk.stack, library, Grid(3, SHARED, threads=64))
    one_k, one_v = chunk.k.clone(), chunk.v.clone()
    for i in range(8):
        table = chunk.table[:, :, i : i + 1]
        layers.run(chunk.x[:, i : i + 1], table, one_k, one_v, chunk.numbers, chunk.starts + i)
    assert torch.equal(one_k, k)
    assert torch.equal(one_v, v)


def test_what_it_refuses(library):
    stack = random_stack(layers=1)
    (layer,) = stack.layers
    assert refuses_decoder(stack, torch.bfloat16) == ""
    assert refuses_decoder(stack, torch.float32)
    assert refuses_decoder(stack, torch.float16)
    assert refuses_decoder(replace(stack, causal=False), torch.bfloat16)
    assert refuses_decoder(replace(stack, heads=8), torch.bfloat16)
    norm = Norm(layer.ffn_norm.weight, None)
    for changed in (
        replace(layer, ffn_norm=norm),
        replace(layer, up=Weight.stack([layer.up.blocks[0].float()], layer.up.biases)),
        replace(layer, qkv=Weight.stack(layer.qkv.blocks[0].split(DIM))),
    ):
        assert refuses_decoder(replace(stack, layers=(changed,)), torch.bfloat16)
    assert refuses_decoder(replace(stack, layers=()), torch.bfloat16)
    layers = decoder_of(stack, library, Grid(2, SHARED, threads=64))
    assert [layers.takes(n) for n in (0, 1, MOST_STREAM_ROWS, MOST_STREAM_ROWS + 1)] == [
        *(False, True, True, False)
    ]
