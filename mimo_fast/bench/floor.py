"""The floor of each piece of a reply, from shapes: bytes of weights and cache, and arithmetic.

Every weight counts once for all rows of a batch, except the patch decoder's, which every one of its
steps needs. The part of them that a last-level cache can keep between steps has to be read only
once: nearly nothing of 269 MB (int8) or 143 MB (int4) with a cache of 50 MB, a fourth to two thirds
with 72 or 96 MB. `Work.cached` are those bytes. They count in `Work.bytes`, which is what kernels
read that do not plan for the cache, and not in a floor. Norms, biases of the heads, single rows of
tables and activations are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.timing import cache_bytes
from mimo_fast.kernels.matmul.product import AnyWeight
from mimo_fast.runtime.codec.geometry import PATCH_FRAMES, patch_rows
from mimo_fast.runtime.codec.layers import CodecStack
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import kv_bytes
from mimo_fast.runtime.lm.transformer import TransformerWeights


@dataclass(frozen=True)
class Work:
    """Bytes read, by what they are, and FLOP.

    cached: bytes of them that a cache can have kept since they were last read.
    """

    bytes: dict[str, int]
    flop: int
    cached: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.bytes.values())

    def floor(self, ceiling: Ceiling, dtype: torch.dtype) -> float:
        """The least seconds, with activations of a dtype."""
        return ceiling.floor_seconds(self.total - self.cached, self.flop, dtype)

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes | other.bytes, self.flop + other.flop, self.cached + other.cached)


def word_work(lm: LM, positions: int, rows: int = 1, quantized_cache: bool = False) -> Work:
    """A text group for `rows` rows, each with so many cached positions.

    It takes the backbone and the text head.
    """
    config = lm.config.backbone
    matrices = [*_matrices(lm.backbone), lm.text_head]
    cache = kv_bytes(config, rows, positions, lm.dtype, quantized_cache)
    attended = 4 * config.layers * config.heads * config.head_dim * positions
    read = {"backbone": stack_bytes(lm.backbone), "text head": lm.text_head.nbytes, "cache": cache}
    return Work(read, rows * (2 * _values(matrices) + attended))


def patch_work(
    lm: LM, positions: int, rows: int = 1, quantized_cache: bool = False, cache: int = 0
) -> Work:
    """A speech group: a text group, the patch decoder at each of its steps, and the patch encoder.

    cache: bytes of the device's last-level cache.
    """
    config, steps = lm.config, lm.config.patch_steps
    decoder, encoder = list(_matrices(lm.patch_decoder)), list(_matrices(lm.patch_encoder))
    joints = [lm.patch_to_backbone, lm.backbone_to_patch]
    layers, heads = stack_bytes(lm.patch_decoder), lm.code_heads.nbytes
    # A step needs every layer, and the heads of the codebooks that are active at it.
    kept = min(cache, layers)
    cached = kept * (steps - 1) + min(cache - kept, heads) * (config.group_size - 1)
    read = {
        "patch decoder": layers * steps + heads * config.group_size,
        "patch encoder": stack_bytes(lm.patch_encoder) + sum(joint.nbytes for joint in joints),
    }
    values = (
        steps * _values(decoder)
        + config.group_size * (_values(encoder) + lm.code_heads.numel())
        + _values(joints)
    )
    return word_work(lm, positions, rows, quantized_cache) + Work(read, rows * 2 * values, cached)


def prompt_work(lm: LM, positions: int) -> Work:
    """A prompt of so many groups: the backbone's bytes once, its arithmetic for each group."""
    matrices = list(_matrices(lm.backbone))
    return Work({"backbone": stack_bytes(lm.backbone)}, 2 * positions * _values(matrices))


def codec_work(codec: Codec, patches: int = 0) -> Work:
    """The audio of a patch of one stream, after so many others: each frame is computed once.

    Convolutions, the layers of the decoder and the vocoder with their attention, and the head. The
    inverse STFT is left out.
    """
    config, mel = codec.config, patch_rows(codec.config)
    rows = PATCH_FRAMES * config.pool
    past = max(0, patches) * rows
    reach = config.decoder_window[0]
    back, ahead = config.vocoder_window
    seen = past if reach < 0 else min(past, reach)
    heard = mel + (past if min(back, ahead) < 0 else back + ahead)
    products = rows * _codec_values(codec.decoder) + mel * _codec_values(codec.vocoder)
    products += rows * codec.to_mel.weight.numel()
    products += PATCH_FRAMES * (0 if codec.unpool is None else codec.unpool.weight.numel())
    products += mel * (_values([codec.vocoder_in]) + _values([codec.vocoder_out]))
    attended = config.decoder_layers * config.dim * rows * (seen + rows)
    attended += config.vocoder_layers * config.vocoder_dim * mel * heard
    return Work({"codec": codec_bytes(codec)}, 2 * products + 4 * attended)


@dataclass(frozen=True)
class GroupWork:
    """Work of a prompt, and of a group of text and of speech for all rows of a batch."""

    prefill: Work
    text: Work
    audio: Work
    dtype: torch.dtype

    @classmethod
    def of(
        cls, lm: LM, batch: int, prompt: int, groups: int = 0, quantized_cache: bool = False
    ) -> GroupWork:
        """The work in the middle of `groups` groups, after prompts of `prompt` groups."""
        middle = prompt + groups // 2
        cache = 0 if lm.device.type == "meta" else cache_bytes(lm.device)
        text = word_work(lm, middle, batch, quantized_cache)
        audio = patch_work(lm, middle, batch, quantized_cache, cache)
        return cls(prompt_work(lm, prompt), text, audio, lm.dtype)

    def floors(self, ceiling: Ceiling) -> tuple[float, float, float]:
        """The floor of each, in seconds."""
        works = self.prefill, self.text, self.audio
        prefill, text, audio = (work.floor(ceiling, self.dtype) for work in works)
        return prefill, text, audio

    def describe(self, ceiling: Ceiling) -> str:
        """A line to be printed before the measurement."""
        prefill, text, audio = (1e3 * seconds for seconds in self.floors(ceiling))
        return (
            f"floor: the prompt {prefill:,.1f} ms; "
            f"a group of text reads {self.text.total / 1e6:,.1f} MB, {text:.2f} ms; "
            f"a group of speech reads {self.audio.total / 1e6:,.1f} MB "
            f"({self.audio.cached / 1e6:,.1f} of them again, from the cache), {audio:.2f} ms"
        )


def request_floor(
    ceiling: Ceiling,
    lm: LM,
    codec: Codec | None,
    batch: int,
    prompt: int,
    words: float,
    patches: float,
    quantized_cache: bool = False,
) -> float:
    """The least seconds of so many equal requests at once.

    Prompts run one by one, groups and audio together.
    """
    work = GroupWork.of(lm, batch, prompt, round(words + patches), quantized_cache)
    prefill, text, audio = work.floors(ceiling)
    vocoded = 0.0 if codec is None else ceiling.floor_seconds(codec_bytes(codec))
    return batch * prefill + words * text + patches * (audio + vocoded)


def _codec_values(stack: CodecStack) -> int:
    return _values(w for x in stack.layers for w in (x.qkv, x.out, x.up, x.down))


def codec_bytes(codec: Codec) -> int:
    """Bytes of the decoder and vocoder layers, which each chunk of a stream reads."""
    stacks: tuple[CodecStack, ...] = (codec.decoder, codec.vocoder)
    layers = [layer for stack in stacks for layer in stack.layers]
    return sum(w.nbytes for x in layers for w in (x.qkv, x.out, x.up, x.down))


def stack_bytes(stack: TransformerWeights) -> int:
    """Bytes of a stack's matrices."""
    return sum(matrix.nbytes for matrix in _matrices(stack))


def _matrices(stack: TransformerWeights) -> Iterable[AnyWeight]:
    return (w for layer in stack.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down))


def _values(matrices: Iterable[AnyWeight]) -> int:
    """Number of weights in a product."""
    return sum(math.prod(matrix.shape) for matrix in matrices)
