"""What the three transformers are computed with, however that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.kernels.matmul.product import AnyWeight
from mimo_fast.kernels.sample_codes import CodeStep
from mimo_fast.runtime.lm.transformer import TransformerWeights


@dataclass(frozen=True)
class Network:
    """Weights and tables of the three transformers.

    Args:
        backbone_rope, encoder_rope, decoder_rope: of `rope_table`.
        code_heads, decoder_embeddings: of all codebooks, one below the other [rows, D].
    """

    config: LMConfig
    backbone: TransformerWeights
    patch_encoder: TransformerWeights
    patch_decoder: TransformerWeights
    backbone_rope: Tensor
    encoder_rope: Tensor
    decoder_rope: Tensor
    code_heads: Tensor
    decoder_embeddings: Tensor
    code_steps: Sequence[CodeStep]
    patch_to_backbone: AnyWeight
    backbone_to_patch: AnyWeight
    text_head: AnyWeight
