"""Configs by upstream's names, made of ours; a key that nothing here reads is not there."""

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from mimo_fast.config import CodecConfig, LMConfig


class ConfigView(SimpleNamespace):
    """Values by the keys of a config.json, as attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class LanguageModelConfig(ConfigView):
    """Upstream's `MiMoAudioConfig`."""

    @classmethod
    def of(cls, config: LMConfig) -> "LanguageModelConfig":
        backbone, decoder, encoder = config.backbone, config.patch_decoder, config.patch_encoder
        return cls(
            model_type="qwen2",
            vocab_size=config.vocab_size,
            hidden_size=backbone.dim,
            intermediate_size=backbone.ffn_dim,
            num_hidden_layers=backbone.layers,
            num_attention_heads=backbone.heads,
            num_key_value_heads=backbone.kv_heads,
            head_dim=backbone.head_dim,
            hidden_act="silu",
            rms_norm_eps=backbone.norm_eps,
            rope_theta=backbone.rope_theta,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=config.tie_embeddings,
            group_size=config.group_size,
            audio_channels=config.channels,
            speech_vocab_size=_joined(config.code_sizes),
            speech_zeroemb_idx=_joined(config.empty_codes),
            delay_pattern=_joined(config.delays),
            local_dim=decoder.dim,
            local_layers=decoder.layers,
            local_attn_heads=decoder.heads,
            local_ffn_dim=decoder.ffn_dim,
            input_local_dim=encoder.dim,
            input_local_layers=encoder.layers,
            input_full_attention=not config.patch_encoder_causal,
        )

    def parsed_speech_empty_ids(self) -> list[int]:
        return _split(self.speech_zeroemb_idx)

    def parsed_speech_vocab_sizes(self) -> list[int]:
        return _split(self.speech_vocab_size)

    def parsed_delay_pattern(self) -> list[int]:
        return _split(self.delay_pattern)


class TokenizerConfig(ConfigView):
    """Upstream's `MiMoAudioTokenizerConfig`."""

    @classmethod
    def of(cls, config: CodecConfig) -> "TokenizerConfig":
        keyed = {
            each.metadata["key"]: getattr(config, each.name)
            for each in fields(config)
            if each.metadata
        }
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in keyed.items()}
        return cls(
            model_type="mimo_audio_tokenizer",
            **values,
            fmin=config.f_min,
            fmax=config.f_max,
            encoder_skip_layer_id=config.skip_layer,
            codebook_size=list(config.codebook_sizes),
            num_quantizers=len(config.codebook_sizes),
            ln_type=config.norm,
            activation_function="gelu",
            position_embedding_type="rope",
            rope_type="default",
            vocoder_padding="same",
        )


@dataclass(frozen=True)
class LanguageModelArguments:
    """Upstream's `MiMoAudioArguments`: where the model lies, and ids of its special tokens."""

    model_name_or_path: str
    sosp_idx: int
    eosp_idx: int
    sostm_idx: int
    eostm_idx: int
    eot_idx: int
    empty_idx: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def _joined(values: tuple[int, ...]) -> str:
    return "-".join(map(str, values))


def _split(value: str) -> list[int]:
    return [int(part) for part in value.split("-")]
