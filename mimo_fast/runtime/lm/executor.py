"""What computes a model's transformers, chosen when the model is constructed.

    LayerByLayer    every product, attention and draw is an op of its own
    Fused           a whole step, patch encoder or patch decoder is one native call: in small models
                    it is calls that take the time (`kernels/cpu/transformer.py` has what it takes)
    Persistent      the same as one CUDA kernel, for the groups of a few rows (`persistent.py`)

An `Executor` has one of the first two for each of the three transformers, and perhaps the last
beside them. The choice follows from sizes, dtype, device and MIMO_FAST_KERNELS at that time.
Weights and tables are read where they lie: they may change in place, and a copy of a model reads
its own; who replaces one makes another executor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.transformer import (
    PatchDecoder,
    Product,
    Transformer,
    takes_parts,
    takes_table,
    takes_transformer,
)
from mimo_fast.kernels.matmul.product import AdaptedWeight, AnyWeight, Weight, matmul
from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.kernels.sample_codes import patch_noise, sample_codes
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.persistent import Persistent, persistent
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.runtime.lm.transformer import (
    TransformerWeights,
    cached_attend,
    self_attend,
    transformer,
)

Made = TypeVar("Made")


class LayerByLayer:
    """Every product, attention and draw as an op of its own, on any device."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def step(self, x: Tensor, state: DecodeState, slots: Tensor, starts: Tensor) -> Tensor:
        """One new position of R rows: x [R, D] -> normed hidden states [R, D].

        Row r appends to position starts[r] of slot slots[r].
        """
        own, config = self._network, self._network.config.backbone
        place = state.cache, slots, starts, state.capacity
        attend = cached_attend(config, own.backbone_rope, *place)
        return transformer(x[:, None], own.backbone, config.norm_eps, attend)[:, 0]

    def encode(self, frames: Tensor) -> Tensor:
        """Patch encoder: frames [N, G, D] -> normed hidden states [N, G, D]."""
        own, config = self._network, self._network.config
        encoder = config.patch_encoder
        attend = self_attend(encoder, own.encoder_rope, config.patch_encoder_causal)
        return transformer(frames, own.patch_encoder, encoder.norm_eps, attend)

    def decode(
        self, local: Tensor, state: DecodeState, slots: Tensor, settings: SamplerTensors
    ) -> Tensor:
        """Patch decoder: local [R, D of the patch decoder] -> codes int64 [R, C, G], drawn."""
        own, config, rows = self._network, self._network.config, len(slots)
        noise = None
        if not settings.all_greedy:
            draws = state.seeds[slots], state.draws[slots] - 1
            noise = patch_noise(*draws, config.group_size, sum(config.code_sizes))
        shape = (rows, config.channels, config.group_size)
        codes = torch.empty(shape, dtype=torch.int64, device=local.device)
        x, decoder = local, config.patch_decoder
        for step, starts in zip(own.code_steps, state.patch_starts[:, :rows], strict=True):
            place = state.patch_cache, state.rows[:rows], starts, config.patch_steps
            attend = cached_attend(decoder, own.decoder_rope, *place, fixed=True)
            hidden = transformer(x[:, None], own.patch_decoder, decoder.norm_eps, attend)[:, 0]
            drawn = settings, noise, codes
            x = sample_codes(hidden, step, own.code_heads, *drawn, own.decoder_embeddings)
        return codes


class AnyProduct:
    """`matmul` with one weight."""

    def __init__(self, weight: AnyWeight) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


class FusedBackbone:
    """`step` and `prefill` as one native call each, but for an int8 cache."""

    def __init__(self, native_form: Transformer, otherwise: LayerByLayer) -> None:
        self._native, self._otherwise = native_form, otherwise

    def step(self, x: Tensor, state: DecodeState, slots: Tensor, starts: Tensor) -> Tensor:
        cache = state.cache
        if cache.k_scales is not None:
            return self._otherwise.step(x, state, slots, starts)
        return self._native.step(x, cache.k, cache.v, slots, starts)

    def prefills(self, state: DecodeState) -> bool:
        """Whether `prefill` takes prompts of this state."""
        return state.cache.k_scales is None

    def prefill(self, x: Tensor, state: DecodeState, slots: Tensor, starts: Tensor) -> Tensor:
        """Positions of prompts: x [R, D] -> normed hidden states [R, D].

        Row r is position starts[r] of slot slots[r]; positions of a slot follow one another.
        """
        return self._native.step(x, state.cache.k, state.cache.v, slots, starts)


class FusedEncoder:
    """`encode` as one native call."""

    def __init__(self, native_form: Transformer, causal: bool) -> None:
        self.native, self._causal = native_form, causal

    def encode(self, frames: Tensor) -> Tensor:
        return self.native.encode(frames, self._causal)


class FusedDecoder:
    """All steps of a patch as one native call, sampling included."""

    def __init__(self, native_form: PatchDecoder) -> None:
        self._native = native_form

    def decode(
        self, local: Tensor, state: DecodeState, slots: Tensor, settings: SamplerTensors
    ) -> Tensor:
        return self._native.decode(local, settings, state.seeds[slots], state.draws[slots] - 1)


@dataclass(frozen=True)
class Executor:
    """The three transformers as `LM` runs them, and the products between them, x [..., K] ->
    [..., N].

    Args:
        persistent: takes the place of those that it has, for the states that it takes.
    """

    backbone: LayerByLayer | FusedBackbone
    patch_encoder: LayerByLayer | FusedEncoder
    patch_decoder: LayerByLayer | FusedDecoder
    patch_to_backbone: AnyProduct | Product
    backbone_to_patch: AnyProduct | Product
    text_head: AnyProduct | Product
    persistent: Persistent | None = None

    def persistent_of(self, state: DecodeState) -> Persistent | None:
        """`persistent` if it takes a state."""
        taken = self.persistent is not None and self.persistent.takes(state)
        return self.persistent if taken else None

    def threads(self) -> AbstractContextManager[None]:
        """The threads that its operations use: one for a small model on a CPU, else torch's."""
        return native.one_thread() if isinstance(self.backbone, FusedBackbone) else nullcontext()


def layer_by_layer(network: Network) -> Executor:
    """The executor of models of any size on any device."""
    each = LayerByLayer(network)
    return Executor(each, each, each, *_between(network, AnyProduct))


def choose(network: Network) -> Executor:
    """For each transformer the fused form where it takes it and is faster."""
    config, plain = network.config, LayerByLayer(network)
    backbone = _native(network.backbone, config.backbone, network.backbone_rope)
    encoder = _native(network.patch_encoder, config.patch_encoder, network.encoder_rope)
    decoder = _native(network.patch_decoder, config.patch_decoder, network.decoder_rope)
    fused: FusedDecoder | None = None
    tables = network.code_heads, network.decoder_embeddings
    if decoder and all(map(takes_table, tables)):
        active = [step.heads for step in network.code_steps]
        fused = FusedDecoder(
            PatchDecoder(decoder, *tables, active, config.channels, config.group_size)
        )
    return Executor(
        FusedBackbone(backbone, plain) if backbone else plain,
        FusedEncoder(encoder, config.patch_encoder_causal) if encoder else plain,
        fused or plain,
        *_between(network, _product),
        persistent(network),
    )


def _between(network: Network, product: Callable[[AnyWeight], Made]) -> tuple[Made, Made, Made]:
    """The products between the transformers, and that with the text head."""
    return (
        product(network.patch_to_backbone),
        product(network.backbone_to_patch),
        product(network.text_head),
    )


def _product(weight: AnyWeight) -> AnyProduct | Product:
    """A native product where the matrix is small; its rows have the bits that they have alone."""
    # One that is quantized has a native product of its own.
    if isinstance(weight, Weight | AdaptedWeight) and takes_parts([weight]):
        return Product(weight)
    return AnyProduct(weight)


def _native(
    weights: TransformerWeights, config: TransformerConfig, rope: Tensor
) -> Transformer | None:
    """A whole transformer in one call; None where it is not small."""
    layers = [
        (layer.attention_norm, layer.qkv, layer.out, layer.ffn_norm, layer.gate_up, layer.down)
        for layer in weights.layers
    ]
    if not takes_transformer(layers, weights.norm, rope):
        return None
    return Transformer(layers, weights.norm, config.norm_eps, rope, config.heads, config.kv_heads)
