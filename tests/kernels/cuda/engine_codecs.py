"""Random layers of a codec, and chunks of streams that pass them by torch or by the persistent
kernel's source, compiled for the CPU."""

import copy
import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from mimo_fast.kernels.cuda.engine_launch import Grid
from mimo_fast.kernels.cuda.engine_streams import FRAME_HEAD, RING_HEAD
from mimo_fast.kernels.matmul.weight import Weight
from mimo_fast.runtime.codec.incremental import _rope_rows
from mimo_fast.runtime.codec.layers import (
    CodecLayer,
    CodecStack,
    LayerByLayer,
    Norm,
)
from mimo_fast.runtime.codec.persistent import (
    PersistentDecoder,
    PersistentVocoder,
    refuses_decoder,
    refuses_vocoder,
)
from mimo_fast.runtime.codec.state import BLOCK, decoder_context

SHARED = 200 * 1024
DIM, FFN = 256, 512
WINDOW = 40, 10
"""Of the published vocoder."""


def random_stack(
    dim: int = DIM, ffn: int = FFN, layers: int = 2, window: int = -1, shift: float = 0.0
) -> CodecStack:
    """shift: what is added to every bias, so that rows have a mean far from 0."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weight(n: int, k: int) -> Weight:
        matrix, bias = 1.5 / k**0.5 * random(n, k), 0.1 * random(n) + shift
        return Weight.stack([matrix.bfloat16()], [bias.bfloat16()])

    def norm() -> Norm:
        return Norm((1 + 0.1 * random(dim)).bfloat16(), 0.1 * random(dim).bfloat16())

    def layer() -> CodecLayer:
        parts = norm(), weight(3 * dim, dim), weight(dim, dim)
        return CodecLayer(*parts, norm(), weight(ffn, dim), weight(dim, ffn))

    made = tuple(layer() for _ in range(layers))
    return CodecStack(made, dim // RING_HEAD, 10000.0, True, (window, 0 if window >= 0 else -1))


def widened(stack: CodecStack, dtype: torch.dtype) -> CodecStack:
    def wide(weight: Weight) -> Weight:
        blocks, biases = weight.blocks, weight.biases
        return Weight.stack([x.to(dtype) for x in blocks], [x.to(dtype) for x in biases])

    def norm(of: Norm) -> Norm:
        return Norm(of.weight.to(dtype), of.bias.to(dtype))

    layers = tuple(
        CodecLayer(
            norm(each.attention_norm),
            wide(each.qkv),
            wide(each.out),
            norm(each.ffn_norm),
            wide(each.up),
            wide(each.down),
        )
        for each in stack.layers
    )
    return replace(stack, layers=layers)


class Chunk:
    """New positions of some streams, and their rings, which all computations begin with alike.

    Args:
        starts: first new position of each stream.
        each: new positions.
    """

    def __init__(self, stack: CodecStack, starts: list[int], each: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        count, (out, heads) = len(starts), (stack.layers[0].out, stack.heads)
        self.stack, self.starts = stack, torch.tensor(starts)
        self.x = torch.randn(count, each, out.shape[0], generator=generator).bfloat16()
        self.numbers = torch.randperm(count + 1, generator=generator)[:count]
        size = decoder_context(stack.window) + BLOCK
        rings = 2, count + 1, len(stack.layers), heads, size, RING_HEAD
        self.k, self.v = torch.randn(rings, generator=generator).bfloat16()
        self.positions = self.starts[:, None] + torch.arange(each)
        self.table = _rope_rows(stack, self.x.shape[2], self.positions)

    def by_torch(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        """x after the layers, and the rings, as `_decoder_block` has them."""
        size, positions = self.k.shape[3], self.positions
        newest, slots = positions[:, -1:], torch.arange(size)
        held = (newest - (newest - slots) % size)[:, None]
        past = positions[..., None] - held
        visible = (past >= 0) & (past <= decoder_context(self.stack.window)) & (held >= 0)
        stack = self.stack if dtype == torch.bfloat16 else widened(self.stack, dtype)
        k, v = self.k.to(dtype, copy=True), self.v.to(dtype, copy=True)
        how = positions % size, visible, self.numbers
        return LayerByLayer(stack).run_rows(self.x.to(dtype), self.table, k, v, *how), k, v

    def by_engine(
        self,
        library: ctypes.CDLL,
        blocks: int = 4,
        threads: int = 64,
        seed: int = 1,
        shared: int = SHARED,
        **grid: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        library.set_seed_of_fibers(seed)
        layers = decoder_of(self.stack, library, Grid(blocks, shared, threads=threads, **grid))
        k, v = self.k.clone(), self.v.clone()
        y = layers.run(self.x, self.table, k, v, self.numbers, self.starts)
        assert not int(layers.launcher.error)
        return y, k, v

    def alone(self, i: int) -> "Chunk":
        """Stream i, with the rings of all."""
        chunk = copy.copy(self)
        chunk.x, chunk.numbers = self.x[i : i + 1], self.numbers[i : i + 1]
        chunk.starts, chunk.table = self.starts[i : i + 1], self.table[:, i : i + 1]
        return chunk


def error_word() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def decoder_of(stack: CodecStack, library: ctypes.CDLL, grid: Grid) -> PersistentDecoder:
    assert refuses_decoder(stack, torch.bfloat16) == ""
    return PersistentDecoder(stack, torch.bfloat16, grid, error_word(), library)


def random_vocoder(layers: int = 2, window: tuple[int, int] = WINDOW) -> CodecStack:
    made = random_stack(128, 256, layers)
    return replace(made, heads=8, causal=False, window=window)


class Frames:
    """Frames of some streams, and the keys and values before them.

    Args:
        starts: position of each stream's first frame.
    """

    def __init__(self, stack: CodecStack, starts: list[int], frames: int, seed: int = 0) -> None:
        generator, count = torch.Generator().manual_seed(seed), len(starts)
        self.stack, self.starts = stack, torch.tensor(starts)
        self.x = torch.randn(count, frames, stack.heads * FRAME_HEAD, generator=generator)
        self.x = self.x.bfloat16()
        self.numbers = torch.randperm(count + 1, generator=generator)[:count]
        shape = 2, count + 1, len(stack.layers), stack.heads, stack.window[0], FRAME_HEAD
        self.k, self.v = torch.randn(shape, generator=generator).bfloat16()
        positions = self.starts[:, None] + torch.arange(frames)
        self.table = _rope_rows(stack, self.x.shape[2], positions)

    def by_torch(self, fresh: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
        """What `_vocoder_layers` has of them."""
        (left, right), (count, frames) = self.stack.window, self.x.shape[:2]
        steps = torch.arange(-left, frames)
        positions = self.starts[:, None] + steps
        queries = positions[:, left:]
        ahead = positions[:, None] - queries[..., None]
        side = (positions >= 0)[:, None] == (queries >= 0)[..., None]
        visible = (ahead >= -left) & (ahead <= right) & side
        k, v = (each[self.numbers].to(dtype) for each in (self.k, self.v))
        room = k.new_empty(*k.shape[:3], frames, k.shape[4])
        k, v = torch.cat((k, room), dim=3), torch.cat((v, room), dim=3)
        stack = self.stack if dtype == torch.bfloat16 else widened(self.stack, dtype)
        slots = steps[left:].add(left).expand(count, -1)
        y = LayerByLayer(stack).run_rows(self.x.to(dtype), self.table, k, v, slots, visible)
        return y, *(each[:, :, :, fresh : fresh + left] for each in (k, v))

    def by_engine(
        self, library: ctypes.CDLL, fresh: int, blocks: int = 20, threads: int = 32, seed: int = 1
    ) -> tuple[Tensor, ...]:
        library.set_seed_of_fibers(seed)
        assert refuses_vocoder(self.stack, torch.bfloat16) == ""
        grid = Grid(blocks, SHARED, threads=threads)
        how = self.stack, torch.bfloat16, grid, error_word(), library
        before = self.k.clone(), self.v.clone()
        where = self.table, self.k, self.v, self.numbers, self.starts
        made = PersistentVocoder(*how).run(self.x, *where, fresh)
        assert all(map(torch.equal, before, (self.k, self.v)))
        return made

    def alone(self, i: int) -> "Frames":
        frames = copy.copy(self)
        frames.x, frames.numbers = self.x[i : i + 1], self.numbers[i : i + 1]
        frames.starts, frames.table = self.starts[i : i + 1], self.table[:, i : i + 1]
        return frames
