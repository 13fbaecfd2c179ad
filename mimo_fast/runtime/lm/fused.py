"""The parts of a language model that are small enough for one native call each, from their weights.

`kernels/cpu/transformer.py` has the calls, and what they take.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.kernels.cpu.transformer import (
    PatchDecoder,
    Transformer,
    takes_table,
    takes_transformer,
)
from mimo_fast.kernels.sample_codes import CodeStep
from mimo_fast.runtime.lm.transformer import TransformerWeights


@dataclass(frozen=True)
class SmallParts:
    """None for what is computed product by product."""

    backbone: Transformer | None
    patch_encoder: Transformer | None
    patch_decoder: PatchDecoder | None


def small_transformer(
    weights: TransformerWeights, config: TransformerConfig, rope: Tensor
) -> Transformer | None:
    """A whole stack in one call, with its rows of `rope_table`; None where it is not small."""
    layers = [
        (layer.attention_norm, layer.qkv, layer.out, layer.ffn_norm, layer.gate_up, layer.down)
        for layer in weights.layers
    ]
    if not takes_transformer(layers, weights.norm, rope):
        return None
    return Transformer(layers, weights.norm, config.norm_eps, rope, config.heads, config.kv_heads)


def small_patch_decoder(
    weights: TransformerWeights,
    config: LMConfig,
    rope: Tensor,
    heads: Tensor,
    embeddings: Tensor,
    steps: Sequence[CodeStep],
) -> PatchDecoder | None:
    """All steps of a patch in one call, sampling included; None where the decoder is not small.

    Args:
        heads, embeddings: of all codebooks, one below the other [rows, D].
    """
    transformer = small_transformer(weights, config.patch_decoder, rope)
    if transformer is None or not (takes_table(heads) and takes_table(embeddings)):
        return None
    active = [step.heads for step in steps]
    return PatchDecoder(transformer, heads, embeddings, active, config.channels, config.group_size)
