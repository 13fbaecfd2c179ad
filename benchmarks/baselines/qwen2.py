"""transformers' Qwen2 modules over the tensors of a dense `LM`: nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.runtime.lm.transformer import LayerWeights, TransformerWeights


def qwen2_model(
    config: TransformerConfig,
    weights: TransformerWeights,
    embeddings: Tensor | None = None,
    longest: int = 64,
) -> Qwen2Model:
    """A stack as transformers runs it, with scaled_dot_product_attention.

    Args:
        embeddings: of text, [V, D]; None for a stack that is fed vectors alone.
        longest: positions it is used with.

    Raises:
        TypeError: the weights are quantized.
    """
    device = weights.norm.device
    rows = 1 if embeddings is None else len(embeddings)
    wanted = Qwen2Config(
        vocab_size=rows,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=longest,
        rms_norm_eps=config.norm_eps,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = Qwen2Model(wanted)
    state = {"norm.weight": weights.norm}
    table = weights.norm.new_zeros(1, config.dim) if embeddings is None else embeddings
    state["embed_tokens.weight"] = table
    for i, layer in enumerate(weights.layers):
        state |= {f"layers.{i}.{name}": tensor for name, tensor in _layer(config, layer).items()}
    model.load_state_dict(state, strict=True, assign=True)
    # Computed from the config and no part of a state: it is still on the meta device.
    model.rotary_emb = Qwen2RotaryEmbedding(wanted).to(device)
    return model.eval().requires_grad_(False)


def _layer(config: TransformerConfig, layer: LayerWeights) -> dict[str, Tensor]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, mlp = "self_attn.{}_proj".format, "mlp.{}_proj".format
    parts: list[tuple[Any, tuple[str, ...], tuple[int, ...]]] = [
        (layer.qkv, tuple(map(attention, "qkv")), (q, kv, kv)),
        (layer.out, (attention("o"),), (config.dim,)),
        (layer.gate_up, (mlp("gate"), mlp("up")), (config.ffn_dim, config.ffn_dim)),
        (layer.down, (mlp("down"),), (config.dim,)),
    ]
    named = {
        "input_layernorm.weight": layer.attention_norm,
        "post_attention_layernorm.weight": layer.ffn_norm,
    }
    for weight, names, rows in parts:
        if not isinstance(weight, Weight):
            raise TypeError("the baselines run dense weights: use bf16 or float32")
        # On a GPU the blocks have been joined.
        matrices = weight.blocks if len(weight.blocks) > 1 else weight.blocks[0].split(rows)
        biases = (
            weight.biases
            if len(weight.biases) > 1
            else ((None,) * len(rows) if weight.biases[0] is None else weight.biases[0].split(rows))
        )
        named |= {f"{name}.weight": matrix for name, matrix in zip(names, matrices, strict=True)}
        named |= {
            f"{name}.bias": bias
            for name, bias in zip(names, biases, strict=True)
            if bias is not None
        }
    return named
