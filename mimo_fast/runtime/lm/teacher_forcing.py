"""Teacher forcing: hidden states and logits of whole sequences whose groups are known.

Training and the comparison of models use it. The layers are those of decoding, over all positions
instead of a KV cache, and on the plain torch path they are differentiable. Of a model whose rows
choose their adapter `LM.variant` is what has one.
"""

import torch
from torch import Tensor

from mimo_fast.kernels.matmul.product import Weight, matmul
from mimo_fast.kernels.patch_embed import patch_embed
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.transformer import Attend, self_attend, transformer


def hidden_states(
    lm: LM, text: Tensor, codes: Tensor, projections: list[Tensor] | None = None
) -> Tensor:
    """Backbone over B sequences: text [B, T] (one id a group), codes [B, T, C, G] -> [B, T, D].

    Group t + 1 is drawn from row t. Shorter sequences are padded at their end, where causal
    attention does not see the padding.

    Args:
        projections: collects each layer's queries, keys and values [B, T, (H + 2 Hkv) Dh], before
            RoPE.
    """
    config = lm.config.backbone
    x = lm.embed(text.flatten(), codes.flatten(0, 1)).unflatten(0, text.shape)
    attend = self_attend(config, lm.backbone_rope, causal=True)
    return transformer(x, lm.backbone, config.norm_eps, _collecting(attend, projections))


def _collecting(attend: Attend, projections: list[Tensor] | None) -> Attend:
    if projections is None:
        return attend

    def collect(layer: int, qkv: Tensor) -> Tensor:
        projections.append(qkv)
        return attend(layer, qkv)

    return collect


def patch_inputs(lm: LM, hidden: Tensor, codes: Tensor) -> Tensor:
    """Inputs of the patch decoder: hidden [N, D], codes [N, C, G] -> [N, steps, D of it]."""
    config = lm.config
    # The codes drawn at each step: frames of channel c from step delays[c] on, the empty code
    # elsewhere.
    drawn = lm.empty_codes.repeat(len(codes), config.patch_steps, 1).transpose(1, 2)
    for channel, delay in enumerate(config.delays):
        drawn[:, channel, delay : delay + config.group_size] = codes[:, channel]
    fed = patch_embed(drawn, lm.decoder_embeddings, lm.code_offsets, lm.empty_codes)
    return torch.cat((lm.local_hidden(hidden)[:, None], fed[:, :-1]), dim=1)


def code_logits(lm: LM, hidden: Tensor, codes: Tensor) -> list[Tensor]:
    """Patch decoder over N patches: hidden [N, D], codes [N, C, G] -> logits [N, G, V_c] a channel.

    The logits include the empty code, which is never drawn.
    """
    config = lm.config
    decoder, x = config.patch_decoder, patch_inputs(lm, hidden, codes)
    attend = self_attend(decoder, lm.decoder_rope, causal=True)
    out = transformer(x, lm.patch_decoder, decoder.norm_eps, attend)
    heads = lm.code_heads.split(config.code_sizes)
    return [
        matmul(out[:, delay : delay + config.group_size], Weight.stack([head]))
        for delay, head in zip(config.delays, heads, strict=True)
    ]
