"""nano in upstream's form: what upstream's own code reads of a checkpoint, and how.

Upstream cannot be imported here. Its expectations are written down: the names and shapes that its
classes build from the dimensions in their configs, the keys of both configs, and a tokenizer that
transformers loads by `AutoTokenizer`.
"""

import json
from itertools import chain

import pytest
import torch
from helpers import fault

import mimo_fast
from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES
from mimo_fast.text.tokenizer import MODEL_TOKENS, Tokenizer
from training import domain

LM_KEYS = """
    vocab_size hidden_size num_hidden_layers intermediate_size num_attention_heads
    num_key_value_heads head_dim hidden_act rope_theta rms_norm_eps max_position_embeddings
    tie_word_embeddings speech_vocab_size speech_zeroemb_idx delay_pattern group_size
    audio_channels local_dim local_layers local_attn_heads local_ffn_dim local_attn_dropout
    input_local_layers input_local_dim input_full_attention
""".split()  # noqa: SIM905
"""Of upstream's `MiMoAudioConfig` and of `Qwen2Config` below it."""

CODEC_KEYS = """
    max_audio_seconds stride_size avg_pooler d_model scale_embedding kernel_size
    activation_function encoder_layers encoder_skip_layer_id encoder_attention_heads
    encoder_ffn_dim encoder_causal encoder_attn_window_size decoder_layers
    decoder_attention_heads decoder_ffn_dim decoder_kernel_size decoder_stride_size
    decoder_causal decoder_attn_window_size nfft vocoder_dim vocoder_intermediate_dim
    vocoder_num_layers n_mels sampling_rate hop_length window_size vocoder_padding fmin fmax
    num_quantizers codebook_size threshold_ema_dead_code position_embedding_type rope_theta
    rope_type ln_type vocoder_attention_heads vocoder_attn_window_size
""".split()  # noqa: SIM905
"""Of upstream's `MiMoAudioTokenizerConfig`, whose defaults are those of another codec."""

TEXTS = [
    *ASR_TEMPLATES,
    *chain(*TTS_TEMPLATES.values()),
    *("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n<|sostm|>", "<think>\n"),
    *("<|im_start|>assistant\n<think>\n\n</think>\n", "<|empty|> x <|eot|>y<|eostm|>"),
    *("seven forty two", " seven", "Tomorrow is TUESDAY, December 25.", "a", " a", "", " ", "\n"),
    *("Please convert this text to speech: The cat", "hello  world\n\nx 42\t!", "don't it's"),
    *("你好 é ﬁ e\u0301", "\U0001f600 42", *domain.vocabulary(), *list(domain.dialogue())[:20]),
]


def config(part: str) -> dict[str, object]:
    return json.loads((NANO / part / "config.json").read_text(encoding="utf-8"))


def linear(name: str, rows: int, columns: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def qwen2(
    prefix: str, width: int, layers: int, ffn: int, heads: int, kv_heads: int, head: int
) -> dict[str, tuple[int, ...]]:
    """Tensors of transformers' `Qwen2Model` without its embeddings."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.norm.weight": (width,)}
    for i in range(layers):
        layer = f"{prefix}.layers.{i}"
        attention = f"{layer}.self_attn"
        shapes |= linear(f"{attention}.q_proj", heads * head, width, bias=True)
        shapes |= linear(f"{attention}.k_proj", kv_heads * head, width, bias=True)
        shapes |= linear(f"{attention}.v_proj", kv_heads * head, width, bias=True)
        shapes |= linear(f"{attention}.o_proj", width, heads * head)
        for name in ("gate_proj", "up_proj"):
            shapes |= linear(f"{layer}.mlp.{name}", ffn, width)
        shapes |= linear(f"{layer}.mlp.down_proj", width, ffn)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (width,)
    return shapes


def upstream_lm(raw: dict) -> dict[str, tuple[int, ...]]:
    """Tensors that upstream's `MiMoAudioForCausalLM` builds from a config."""
    width, local, inner = raw["hidden_size"], raw["local_dim"], raw["input_local_dim"]
    heads = raw["local_attn_heads"]
    own = (raw["num_attention_heads"], raw["num_key_value_heads"], raw["head_dim"])
    sizes = [int(size) for size in raw["speech_vocab_size"].split("-")]
    shapes = qwen2("model", width, raw["num_hidden_layers"], raw["intermediate_size"], *own)
    split = (heads, heads)
    decoder = (local, raw["local_layers"], raw["local_ffn_dim"], *split, local // heads)
    encoder = (inner, raw["input_local_layers"], 4 * inner, *split, inner // heads)
    shapes |= qwen2("local_transformer", *decoder) | qwen2("input_local_transformer", *encoder)
    shapes |= linear("model.embed_tokens", raw["vocab_size"], width)
    shapes |= linear("lm_head", raw["vocab_size"], width)
    for i, size in enumerate(sizes):
        shapes |= linear(f"local_transformer_lm_heads.{i}", size, local)
        shapes |= linear(f"speech_embeddings.{i}", size, inner)
    shapes |= linear("speech_embeddings_to_local", local, inner)
    shapes |= linear("speech_group_downcast", width, inner * raw["group_size"])
    return shapes | linear("hidden_states_downcast", local, width)


def upstream_codec(raw: dict) -> dict[str, tuple[int, ...]]:
    """Tensors of upstream's `MiMoAudioTokenizer`, without the codebooks' training statistics."""
    width, mel, vocoder = raw["d_model"], raw["n_mels"], raw["vocoder_dim"]
    shapes: dict[str, tuple[int, ...]] = {"decoder.vocoder.head.istft.window": (raw["nfft"],)}

    def biased(name: str, rows: int, *columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)

    def layers(prefix: str, count: int, dim: int, ffn: int) -> None:
        for i in range(count):
            layer = f"{prefix}.{i}"
            for name in ("q_proj", "v_proj", "out_proj"):
                biased(f"{layer}.self_attn.{name}", dim, dim)
            shapes[f"{layer}.self_attn.k_proj.weight"] = (dim, dim)
            biased(f"{layer}.self_attn_layer_norm", dim)
            biased(f"{layer}.final_layer_norm", dim)
            biased(f"{layer}.fc1", ffn, dim)
            biased(f"{layer}.fc2", dim, ffn)

    biased("encoder.conv1", width, mel, raw["kernel_size"])
    biased("encoder.conv2", width, width, raw["kernel_size"])
    layers("encoder.layers", raw["encoder_layers"], width, raw["encoder_ffn_dim"])
    biased("encoder.layer_norm", width)
    shapes["encoder.down_sample_layer.0.weight"] = (width, width, raw["avg_pooler"])
    biased("encoder.down_sample_norm", width)
    for i, size in enumerate(raw["codebook_size"]):
        shapes[f"encoder.quantizer.vq.layers.{i}._codebook.embed"] = (size, width)
    for name, out, kernel in (
        ("decoder.dconv1", width, raw["avg_pooler"]),
        ("decoder.dconv2", mel, raw["decoder_kernel_size"]),
    ):
        shapes[f"{name}.conv.weight"], shapes[f"{name}.conv.bias"] = (width, out, kernel), (out,)
        biased(f"{name}.norm", out)
    layers("decoder.layers", raw["decoder_layers"], width, raw["decoder_ffn_dim"])
    biased("decoder.layer_norm", width)
    shapes["decoder.vocoder.embeddings.weight"] = (vocoder, mel)
    depth, ffn = raw["vocoder_num_layers"], raw["vocoder_intermediate_dim"]
    layers("decoder.vocoder.layers", depth, vocoder, ffn)
    biased("decoder.vocoder.layer_norm", vocoder)
    biased("decoder.vocoder.head.out", raw["nfft"] + 2, vocoder)
    return shapes


@pytest.mark.parametrize(("part", "expected"), [("lm", upstream_lm), ("codec", upstream_codec)])
def test_every_tensor_that_upstream_builds_is_there_and_no_other(part, expected):
    stored = open_weights(NANO / part)
    found = {name: tuple(stored.get(name).shape) for name in stored.names()}
    assert found == expected(config(part))
    assert {stored.dtype(name) for name in stored.names()} == {torch.float16}


def test_the_head_is_the_embeddings_written_out():
    stored = open_weights(NANO / "lm")
    assert torch.equal(stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight"))


@pytest.mark.parametrize(("part", "keys"), [("lm", LM_KEYS), ("codec", CODEC_KEYS)])
def test_no_key_is_left_to_upstreams_defaults(part, keys):
    raw = config(part)
    assert not {*keys} - {*raw}
    if part == "lm":
        assert raw["tie_word_embeddings"] is False, "upstream has no tied head"
        assert raw["model_type"] != "qwen2", "transformers 5 would take Qwen2's tokenizer for it"


@pytest.mark.slow
def test_the_tokenizer_is_the_same_by_autotokenizer():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(NANO / "lm", local_files_only=True)
    ours = Tokenizer.from_directory(NANO / "lm")
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    assert len(theirs) == ours.vocab_size, "and upstream adds no token"
    assert {token: theirs.convert_tokens_to_ids(token) for token in MODEL_TOKENS.values()} == {
        token: ours.id(token) for token in MODEL_TOKENS.values()
    }
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id)


def test_transformers_4_is_told_of_the_prefix_space():
    """It replaces the pre-tokenizer's own setting by this key, and a missing one is false."""
    stated = json.loads((NANO / "lm" / "tokenizer_config.json").read_text(encoding="utf-8"))
    file = json.loads((NANO / "lm" / "tokenizer.json").read_text(encoding="utf-8"))
    assert stated["add_prefix_space"] is file["pre_tokenizer"]["add_prefix_space"] is True


@pytest.mark.parametrize(
    "names", [("nano", "nano"), (NANO / "lm", "nano"), ("nano", NANO / "codec")]
)
def test_upstreams_class_takes_the_name(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = mimo_fast.MimoAudio(*names, "cpu")
    assert (model.path, model.mimo_audio_tokenizer_path) == (str(NANO / "lm"), str(NANO / "codec"))


@pytest.mark.parametrize("load", [mimo_fast.load, mimo_fast.MimoAudio])
def test_a_name_that_is_none_says_which_there_is(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fault(lambda: load("nanno", "nano", "cpu"))
    assert "no directory nanno" in message
    assert "'nano' is the small model" in message
