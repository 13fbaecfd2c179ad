"""The tables of the persistent kernel (kernels/cuda/engine.py) for each of the three transformers.

Phases of a layer, as the operations of `layer_outputs`:

    qkv       norm, product, bias           patch decoder, encoder: attention follows at once
    attend    backbone: over the cache, in parts
    out       product, residual             y
    gate_up   norm, product, SwiGLU
    down      product, residual y           x of the next layer
"""

from collections.abc import Callable

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.cuda.engine import Order, Tables, Vector, job_columns
from mimo_fast.kernels.matmul.product import AnyWeight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.sample_text import TEXT_SLOT
from mimo_fast.runtime.lm.network import Network
from mimo_fast.runtime.lm.transformer import TransformerWeights

Place = Vector | str
"""Where a phase's x is: a vector, or an input of the launch by its name."""

Attended = Callable[[int, AnyWeight, Place, RMSNorm], Vector]
"""Adds qkv and attention of a layer: (layer, weight of qkv, x, norm) -> attended [rows, H Dh]."""


def patch_decoder_tables(network: Network, blocks: int, kept_bytes: int = 0) -> Tables:
    """All steps of a patch: hidden [R, D of the backbone] -> codes."""
    config, decoder = network.config, network.config.patch_decoder
    tables = Tables(network.code_heads.dtype, blocks, kept_bytes)
    # The first step's is made before the loop, that of each other step by the one before.
    x = tables.vector(decoder.dim, looped=True)
    tables.product(network.backbone_to_patch, "hidden", to=x)
    active = max(step.last - step.first for step in network.code_steps)
    with tables.repeated(config.patch_steps):
        y = _layers(tables, network.patch_decoder, decoder, x, _own_attention(tables, decoder))
        norm, width = RMSNorm(network.patch_decoder.norm, decoder.norm_eps), -(-active // 8) * 8
        logits = tables.product(network.code_heads, y, norm=norm, order=Order.ACTIVE, width=width)
        tables.embed(tables.draw(logits), to=x)
    tables.code_steps = network.code_steps
    tables.set(
        **_shape(decoder),
        rope=network.decoder_rope,
        positions=network.decoder_rope.shape[1],
        together=1,
        causal=1,
        cached=1,
        embeddings=network.decoder_embeddings,
        table_rows=len(network.decoder_embeddings),
        embed_dim=network.decoder_embeddings.shape[1],
        channels=config.channels,
        frames=config.group_size,
    )
    return tables


def patch_encoder_tables(network: Network, blocks: int) -> Tables:
    """Patches of G rows: frames [N G, D] -> patches [N, D of the backbone]."""
    config, encoder = network.config, network.config.patch_encoder
    tables = Tables(network.code_heads.dtype, blocks)
    attended = _own_attention(tables, encoder)
    x = _layers(tables, network.patch_encoder, encoder, "frames", attended)
    normed = tables.normalize(x, RMSNorm(network.patch_encoder.norm, encoder.norm_eps))
    tables.deliver(network.patch_to_backbone, normed, "patches", fold=config.group_size)
    tables.set(
        **_shape(encoder),
        rope=network.encoder_rope,
        positions=network.encoder_rope.shape[1],
        together=config.group_size,
        causal=int(config.patch_encoder_causal),
    )
    return tables


def backbone_tables(network: Network, blocks: int) -> Tables:
    """One new position of each row: x [R, D] -> hidden [R, D], logits [R, vocabulary] and, if they
    are asked for, text tokens [R]."""
    backbone = network.config.backbone
    tables = Tables(network.code_heads.dtype, blocks)

    def attended(layer: int, qkv: AnyWeight, x: Place, norm: RMSNorm) -> Vector:
        projected = tables.product(qkv, x, norm=norm, layer=layer)
        heads = backbone.heads, backbone.kv_heads, backbone.head_dim
        return tables.attend(projected, *heads, layer)

    x = _layers(tables, network.backbone, backbone, "x", attended)
    norm = RMSNorm(network.backbone.norm, backbone.norm_eps)
    normed = tables.normalize(x, norm, output="hidden")
    logits = tables.product(network.text_head, normed, output="logits")
    tables.text(logits, network.text_head.shape[0], TEXT_SLOT)
    rope = network.backbone_rope
    tables.set(**_shape(backbone), rope=rope, positions=rope.shape[1])
    return tables


def _layers(
    tables: Tables,
    weights: TransformerWeights,
    config: TransformerConfig,
    x: Place,
    attended: Attended,
) -> Vector:
    """The layers; what the last one makes."""
    eps = config.norm_eps
    made: Vector | None = None
    for i, layer in enumerate(weights.layers):
        heads = attended(i, layer.qkv, x, RMSNorm(layer.attention_norm, eps))
        y = tables.product(layer.out, heads, residual=x)
        norm = RMSNorm(layer.ffn_norm, eps)
        gated = tables.product(layer.gate_up, y, norm=norm, order=Order.GATED)
        x = made = tables.product(layer.down, gated, residual=y)
    assert made is not None
    return made


def _own_attention(tables: Tables, config: TransformerConfig) -> Attended:
    """Of few positions, within the product."""
    job = job_columns(config.head_dim)

    def attended(layer: int, qkv: AnyWeight, x: Place, norm: RMSNorm) -> Vector:
        return tables.product(qkv, x, norm=norm, order=Order.HEADS, job=job, layer=layer)

    return attended


def _shape(config: TransformerConfig) -> dict[str, int]:
    return {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
    }
