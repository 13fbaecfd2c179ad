"""The parts of a language model that are small enough for one native call each.

`kernels/cpu/transformer.py` has the calls, and what they take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.cpu.transformer import (
    PatchDecoder,
    Transformer,
    takes_table,
    takes_transformer,
)
from mimo_fast.runtime.lm.transformer import TransformerWeights

if TYPE_CHECKING:
    from mimo_fast.runtime.lm.model import LM


@dataclass(frozen=True)
class SmallParts:
    """None for what is computed product by product."""

    backbone: Transformer | None
    patch_encoder: Transformer | None
    patch_decoder: PatchDecoder | None

    @classmethod
    def of(cls, lm: LM) -> SmallParts:
        config = lm.config
        decoder = _transformer(lm.patch_decoder, config.patch_decoder, lm.decoder_rope)
        patch_decoder = None
        if (
            decoder is not None
            and takes_table(lm.code_heads)
            and takes_table(lm.decoder_embeddings)
        ):
            steps = [step.heads for step in lm.code_steps]
            patch_decoder = PatchDecoder(
                decoder,
                lm.code_heads,
                lm.decoder_embeddings,
                steps,
                config.channels,
                config.group_size,
            )
        return cls(
            _transformer(lm.backbone, config.backbone, lm.backbone_rope),
            _transformer(lm.patch_encoder, config.patch_encoder, lm.encoder_rope),
            patch_decoder,
        )


def _transformer(
    weights: TransformerWeights, config: TransformerConfig, table: Tensor
) -> Transformer | None:
    layers = [
        (layer.attention_norm, layer.qkv, layer.out, layer.ffn_norm, layer.gate_up, layer.down)
        for layer in weights.layers
    ]
    if not takes_transformer(layers, weights.norm, table):
        return None
    return Transformer(layers, weights.norm, config.norm_eps, table, config.heads, config.kv_heads)
