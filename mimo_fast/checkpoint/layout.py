"""Names and shapes of every tensor in a checkpoint.

Loading, validation, writing and counting all use this table. Names are upstream's state-dict names,
so published checkpoints load unchanged.
"""

from mimo_fast.config import CodecConfig, LMConfig, TransformerConfig

Shapes = dict[str, tuple[int, ...]]

Counts = dict[str, tuple[str, int]]
"""Pattern of tensor names with a number in its group -> (key of config.json, how many it says)."""


JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules of a layer whose matrices are row blocks of one product, so of one format."""


def joined(name: str) -> tuple[str, ...]:
    """Names of the matrices that are computed as one with this one, itself among them."""
    head, _, module = name.removesuffix(".weight").rpartition(".")
    for modules in JOINED:
        if module in modules:
            return tuple(f"{head}.{each}.weight" for each in modules)
    return (name,)


def lm_counts(config: LMConfig) -> Counts:
    """What config.json counts: `lm_shapes` has entries for each, so they are compared first."""
    return {
        r"model\.layers\.(\d+)\.": ("num_hidden_layers", config.backbone.layers),
        r"local_transformer\.layers\.(\d+)\.": ("local_layers", config.patch_decoder.layers),
        r"input_local_transformer\.layers\.(\d+)\.": (
            "input_local_layers",
            config.patch_encoder.layers,
        ),
        r"speech_embeddings\.(\d+)\.": ("audio_channels", config.channels),
    }


def codec_counts(config: CodecConfig) -> Counts:
    """`lm_counts` of the audio tokenizer."""
    quantizers = "num_quantizers", len(config.codebook_sizes)
    return {
        r"encoder\.layers\.(\d+)\.": ("encoder_layers", config.encoder_layers),
        r"encoder\.quantizer\.vq\.layers\.(\d+)\.": quantizers,
        r"decoder\.layers\.(\d+)\.": ("decoder_layers", config.decoder_layers),
        r"decoder\.vocoder\.layers\.(\d+)\.": ("vocoder_num_layers", config.vocoder_layers),
    }


def lm_shapes(config: LMConfig) -> Shapes:
    """Every tensor of the language model, in upstream's naming (`MiMoAudioForCausalLM`)."""
    backbone, encoder, decoder = config.backbone, config.patch_encoder, config.patch_decoder
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, backbone.dim)}
    shapes |= _transformer("model", backbone)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, backbone.dim)
    shapes |= _transformer("local_transformer", decoder)
    shapes |= _transformer("input_local_transformer", encoder)
    for channel, size in enumerate(config.code_sizes):
        shapes[f"speech_embeddings.{channel}.weight"] = (size, encoder.dim)
        shapes[f"local_transformer_lm_heads.{channel}.weight"] = (size, decoder.dim)
    if encoder.dim != decoder.dim:
        shapes["speech_embeddings_to_local.weight"] = (decoder.dim, encoder.dim)
    shapes["speech_group_downcast.weight"] = (backbone.dim, encoder.dim * config.group_size)
    shapes["hidden_states_downcast.weight"] = (decoder.dim, backbone.dim)
    return shapes


def _transformer(prefix: str, config: TransformerConfig) -> Shapes:
    dim, ffn = config.dim, config.ffn_dim
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: Shapes = {}
    for i in range(config.layers):
        layer = f"{prefix}.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (dim,)
        for name, width in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)):
            shapes |= _biased(f"{layer}.self_attn.{name}_proj", width, dim)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (dim, q_dim)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (dim,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (ffn, dim)
        shapes[f"{layer}.mlp.up_proj.weight"] = (ffn, dim)
        shapes[f"{layer}.mlp.down_proj.weight"] = (dim, ffn)
    shapes[f"{prefix}.norm.weight"] = (dim,)
    return shapes


def codec_shapes(config: CodecConfig) -> Shapes:
    """Every tensor of the audio tokenizer that inference reads (`MiMoAudioTokenizer`)."""
    dim, norm = config.dim, config.norm
    shapes = _biased("encoder.conv1", dim, config.n_mels, config.kernel)
    shapes |= _biased("encoder.conv2", dim, dim, config.kernel)
    shapes |= _codec_layers("encoder.layers", config.encoder_layers, dim, config.encoder_ffn, norm)
    shapes |= _norm("encoder.layer_norm", dim, norm)
    if config.pool != 1:
        shapes["encoder.down_sample_layer.0.weight"] = (dim, dim, config.pool)
        shapes |= _norm("encoder.down_sample_norm", dim, norm)
        shapes |= _transposed_conv("decoder.dconv1", dim, dim, config.pool)
    for i, size in enumerate(config.codebook_sizes):
        shapes[f"encoder.quantizer.vq.layers.{i}._codebook.embed"] = (size, dim)
    shapes |= _codec_layers("decoder.layers", config.decoder_layers, dim, config.decoder_ffn, norm)
    shapes |= _norm("decoder.layer_norm", dim, norm)
    shapes |= _transposed_conv("decoder.dconv2", dim, config.n_mels, config.decoder_kernel)
    width = config.vocoder_dim
    shapes["decoder.vocoder.embeddings.weight"] = (width, config.n_mels)
    layers, ffn = config.vocoder_layers, config.vocoder_ffn
    shapes |= _codec_layers("decoder.vocoder.layers", layers, width, ffn, norm)
    shapes |= _norm("decoder.vocoder.layer_norm", width, norm)
    shapes |= _biased("decoder.vocoder.head.out", config.n_fft + 2, width)
    shapes["decoder.vocoder.head.istft.window"] = (config.n_fft,)
    return shapes


def codec_training_state(config: CodecConfig) -> Shapes:
    """Codebook statistics of published files, which only training reads: allowed, not required."""
    shapes: Shapes = {}
    for i, size in enumerate(config.codebook_sizes):
        codebook = f"encoder.quantizer.vq.layers.{i}._codebook"
        shapes |= {
            f"{codebook}.cluster_size": (size,),
            f"{codebook}.embed_avg": (size, config.dim),
            f"{codebook}.inited": (1,),
        }
    return shapes


def _codec_layers(prefix: str, layers: int, dim: int, ffn: int, norm: str) -> Shapes:
    shapes: Shapes = {}
    for i in range(layers):
        layer = f"{prefix}.{i}"
        shapes |= _norm(f"{layer}.self_attn_layer_norm", dim, norm)
        shapes |= _biased(f"{layer}.self_attn.q_proj", dim, dim)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (dim, dim)
        shapes |= _biased(f"{layer}.self_attn.v_proj", dim, dim)
        shapes |= _biased(f"{layer}.self_attn.out_proj", dim, dim)
        shapes |= _norm(f"{layer}.final_layer_norm", dim, norm)
        shapes |= _biased(f"{layer}.fc1", ffn, dim) | _biased(f"{layer}.fc2", dim, ffn)
    return shapes


def _biased(name: str, rows: int, *columns: int) -> Shapes:
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


def _norm(name: str, dim: int, kind: str) -> Shapes:
    return _biased(name, dim) if kind == "LayerNorm" else {f"{name}.weight": (dim,)}


def _transposed_conv(name: str, dim_in: int, dim_out: int, kernel: int) -> Shapes:
    conv: Shapes = {
        f"{name}.conv.weight": (dim_in, dim_out, kernel),
        f"{name}.conv.bias": (dim_out,),
    }
    return conv | _biased(f"{name}.norm", dim_out)
