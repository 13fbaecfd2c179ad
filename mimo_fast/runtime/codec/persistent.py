"""The layers of a codec's decoder and of its vocoder as a persistent kernel each.

    decoder    chunks of a few positions; several streams together, as many as have MOST_STREAM_ROWS
               rows, and their weights are read once
    vocoder    all frames of a block, in groups of neighbours
    outside    transposed convolutions, norms over time, products around the vocoder, inverse STFT

A stream's bits do not depend on the others.

A launch that is refused, or whose blocks wait for one another in vain, leaves NaN, and so NaN
samples, of which the runtime says so; `gave_up` tells why. From then on the layers are computed as
if there were none of this.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from mimo_fast.kernels.cuda import engine_launch as cuda
from mimo_fast.kernels.cuda.engine_launch import ErrorWord, Grid, Launcher
from mimo_fast.kernels.cuda.engine_streams import FRAME_HEAD, MOST_STREAM_ROWS, RING_HEAD
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.runtime.codec.layers import CodecStack
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.programs import decoder_tables, vocoder_tables

PERSISTENT = "_persistent"
"""Attribute of a codec that holds them; a copy with other layers makes its own."""

MOST_FRAMES = 768
"""Rows of a stream that the vocoder's kernel takes."""

BLOCKS_OF_GROUP = 4
"""Multiprocessors that a group of frames has at least, where there are so many."""


class PersistentDecoder:
    """Causal layers whose keys and values lie in rings."""

    def __init__(
        self,
        stack: CodecStack,
        dtype: torch.dtype,
        grid: Grid,
        error: Tensor,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        tables = decoder_tables(stack, dtype, grid.blocks)
        self.launcher = Launcher(tables, grid, error, loaded)
        self._held = dict[int, int]()

    def takes(self, positions: int) -> bool:
        """Whether it computes so many new positions of a stream."""
        return 1 <= positions <= MOST_STREAM_ROWS and self._together(positions) > 0

    def _together(self, each: int) -> int:
        """Streams of a launch, by what shared memory holds."""
        if each not in self._held:
            counts = range(MOST_STREAM_ROWS // each, 0, -1)
            held = (
                count for count in counts if self.launcher.holds(count * each, stream_rows=each)
            )
            self._held[each] = next(held, 0)
        return self._held[each]

    def run(
        self, x: Tensor, table: Tensor, k: Tensor, v: Tensor, rows: Tensor, starts: Tensor
    ) -> Tensor:
        """The next n positions of N streams, x [N, n, D] -> [N, n, D].

        Position p of stream i has its key and value in slot p % S of row rows[i] of k and v
        [R, L, H, S, Dh]; S is at least `decoder_context` + n.

        Args:
            table: rows of `rope_table` [2, N, n, Dh / 2].
            rows: int64 [N].
            starts: int64 [N], each stream's first new position.
        """
        each, made = x.shape[1], torch.empty_like(x, memory_format=torch.contiguous_format)
        together = self._together(each)
        parts = (part.split(together) for part in (x.contiguous(), made, rows, starts))
        for part, y, numbers, firsts, angles in zip(
            *parts, table.split(together, dim=1), strict=True
        ):
            self.launcher.attempt(
                len(part) * each,
                {"x": part, "y": y},
                [y],
                stream_rows=each,
                rope=angles.contiguous(),
                positions=len(part) * each,
                capacity=k.shape[3],
                slots=numbers.contiguous(),
                starts=firsts.contiguous(),
                **_cache(k, v),
            )
        return made


class PersistentVocoder:
    """Layers whose rows attend to those near them."""

    def __init__(
        self,
        stack: CodecStack,
        dtype: torch.dtype,
        grid: Grid,
        error: Tensor,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        tables = vocoder_tables(stack, dtype)
        self.launcher, self._blocks = Launcher(tables, grid, error, loaded), grid.blocks
        self._divided = dict[int, int]()

    def takes(self, frames: int) -> bool:
        """Whether it computes so many frames of a stream at once."""
        return 1 <= frames <= MOST_FRAMES and self._groups(frames) > 0

    def _holds(self, rows: int, frames: int, groups: int) -> bool:
        return self.launcher.holds(rows, stream_rows=frames, groups=groups)

    def _groups(self, frames: int) -> int:
        """Groups of a stream: as few as there may be, or 0 where shared memory holds none."""
        if frames not in self._divided:
            found = 0
            for groups in range(-(-frames // MOST_STREAM_ROWS), min(frames, self._blocks) + 1):
                rows = -(-frames // groups)
                # None is without rows.
                if (groups - 1) * rows < frames and self._holds(rows, frames, groups):
                    found = groups
                    break
            self._divided[frames] = found
        return self._divided[frames]

    def run(
        self,
        x: Tensor,
        table: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        starts: Tensor,
        fresh: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Frames of N streams x [N, n, D] -> [N, n, D], and the keys and values to keep.

        Before the first frame of stream i there are W keys and values, those of row rows[i] of k
        and v [R, L, H, W, Dh]. W is the window's left side.

        Args:
            table: rows of `rope_table` [2, N, n, Dh / 2].
            rows: int64 [N].
            starts: int64 [N], each stream's position of its first frame.
            fresh: frames after which the next call's first one is.

        Returns:
            Keys and values [N, L, H, W, Dh] each of the W frames before that one.
        """
        (count, frames), made = (
            x.shape[:2],
            torch.empty_like(x, memory_format=torch.contiguous_format),
        )
        kept = [x.new_empty(count, *each.shape[1:]) for each in (k, v)]
        groups = self._groups(frames)
        together = max(1, self._blocks // BLOCKS_OF_GROUP // groups)
        parts = (part.split(together) for part in (x.contiguous(), made, rows, starts, *kept))
        for part, y, numbers, firsts, keys, values, angles in zip(
            *parts, table.split(together, dim=1), strict=True
        ):
            self.launcher.attempt(
                -(-frames // groups),
                {"x": part, "y": y},
                [y],
                stream_rows=frames,
                groups=len(part) * groups,
                stream_groups=groups,
                rope=angles.contiguous(),
                positions=len(part) * frames,
                slots=numbers.contiguous(),
                starts=firsts.contiguous(),
                kept_keys=keys,
                kept_values=values,
                fresh=fresh,
                **_cache(k, v),
            )
        return made, kept[0], kept[1]


def _cache(k: Tensor, v: Tensor) -> dict[str, int | Tensor]:
    """Fields of `Program` for keys and values [R, L, H, S, Dh]."""
    strides = dict(zip(("slot_stride", "layer_stride", "head_stride"), k.stride(), strict=False))
    return {"keys": k, "values": v, **strides}


class Persistent:
    """Those of the two that the persistent kernel takes.

    Args:
        grid: how the device is divided; by default as it is.
        loaded: another build of the library than the package's.

    Attributes:
        decoder, vocoder: None where it is refused.
        error: What launches tell when they give up.
    """

    def __init__(
        self,
        decoder: CodecStack,
        vocoder: CodecStack,
        dtype: torch.dtype,
        device: torch.device,
        grid: Grid | None = None,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        self._arguments = decoder, vocoder, dtype, device, grid, loaded
        warning = "the codec's persistent kernel gave up; streams go on without it"
        self.error = ErrorWord(device, warning)
        how = dtype, grid or Grid.of(device), self.error.word, loaded
        refused = refuses_decoder(decoder, dtype), refuses_vocoder(vocoder, dtype)
        self.decoder = None if refused[0] else PersistentDecoder(decoder, *how)
        self.vocoder = None if refused[1] else PersistentVocoder(vocoder, *how)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy reads the copied weights.
        return type(self), self._arguments

    def gave_up(self) -> bool:
        """`ErrorWord.gave_up`; nothing is taken from then on."""
        return self.error.gave_up()


def persistent(codec: CodecNetwork) -> Persistent | None:
    """A codec's layers as persistent kernels, where that is wanted and they take any.

    They are made once for the layers that the codec has.
    """
    stacks = codec.decoder, codec.vocoder
    held = vars(codec).get(PERSISTENT)
    if held is None or any(a is not b for a, b in zip(held[0], stacks, strict=True)):
        held = vars(codec)[PERSISTENT] = stacks, _made(codec)
    found: Persistent | None = held[1]
    return found


def _made(codec: CodecNetwork) -> Persistent | None:
    if not enabled(NewPath.ENGINE, codec.device) or cuda.refuses_device(codec.device):
        return None
    made = Persistent(codec.decoder, codec.vocoder, codec.dtype, codec.device)
    return made if made.decoder or made.vocoder else None


def decoder_of(codec: CodecNetwork, positions: int) -> PersistentDecoder | None:
    """What computes so many new positions of a stream in one launch, if anything does."""
    found = persistent(codec)
    layers = found.decoder if found is not None and found.error.on else None
    return layers if layers is not None and layers.takes(positions) else None


def vocoder_of(codec: CodecNetwork, frames: int) -> PersistentVocoder | None:
    """What computes so many frames of a stream in one launch, if anything does."""
    found = persistent(codec)
    layers = found.vocoder if found is not None and found.error.on else None
    return layers if layers is not None and layers.takes(frames) else None


def refuses_decoder(stack: CodecStack, dtype: torch.dtype) -> str:
    """Why a decoder's layers are no persistent kernel, or "" where they can be one."""
    return _refuses_layers(stack, dtype, RING_HEAD) if stack.causal else "they look ahead"


def refuses_vocoder(stack: CodecStack, dtype: torch.dtype) -> str:
    """Why a vocoder's layers are no persistent kernel, or "" where they can be one."""
    left, right = stack.window
    if stack.causal or left < 1 or right < 0 or left + right > 64:
        return f"a window of {left} and {right}"
    return _refuses_layers(stack, dtype, FRAME_HEAD)


def _refuses_layers(stack: CodecStack, dtype: torch.dtype, head_dim: int) -> str:
    if dtype != torch.bfloat16:
        return f"they are {dtype}, not bfloat16"
    if not isinstance(stack.layers, tuple) or not stack.layers:
        return "they are not on the device, or there are none"
    for layer in stack.layers:
        for weight in (layer.qkv, layer.out, layer.up, layer.down):
            if reason := cuda.refuses_weight(weight, dtype):
                return reason
        width = layer.out.shape[1]
        if width != stack.heads * head_dim:
            return f"heads of {width // stack.heads}"
        for norm in (layer.attention_norm, layer.ffn_norm):
            if norm.bias is None or norm.weight.dtype != dtype:
                return "they have other norms than LayerNorm in their dtype"
    return ""
