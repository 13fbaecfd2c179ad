"""Dimensions of the language model and the codec, read once from a checkpoint's config.json.

There are no class defaults: upstream's are wrong for the published tokenizer, so a key that
determines a shape must be in the file. Keys are upstream's (`MiMoAudioConfig`,
`MiMoAudioTokenizerConfig`); field names are this project's.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from mimo_fast.architectures import MIMO_AUDIO, Architecture, architecture_of
from mimo_fast.arguments import checked
from mimo_fast.config_reader import ConfigReader
from mimo_fast.errors import ConfigError
from mimo_fast.json_files import read_json as read_json

PathLike = str | os.PathLike[str]

OFFLOADABLE = ("text_embeddings", "codec_encoder")
"""Parts that may stay in host memory: a step reads one embedding row, a prompt encodes once."""

ADAPTERS_KEY = "merged_adapters"
"""Key of a language model's config.json: digests of the adapters merged into its weights."""

GROUP_SECONDS = 0.16
"""Duration of a group of speech."""


@dataclass(frozen=True)
class TransformerConfig:
    """One Qwen2-style stack: RMSNorm, biased q/k/v, RoPE, grouped-query attention, SwiGLU."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True)
class Calibration:
    """How confident a checkpoint is of its replies in a task, see `runtime/confidence.py`.

    Fields are keys of an object in config.json: three factors, a bias, and the confidence below
    which a reply comes with a warning.
    """

    task: str
    entropy: float
    surprise: float
    loss: float
    bias: float
    warns_below: float


@checked
@dataclass(frozen=True)
class LMConfig:
    """The language model: patch encoder -> backbone -> text head and patch decoder."""

    vocab_size: int
    backbone: TransformerConfig
    patch_encoder: TransformerConfig
    patch_decoder: TransformerConfig
    patch_encoder_causal: bool
    group_size: int
    channels: int
    code_sizes: tuple[int, ...]
    empty_codes: tuple[int, ...]
    delays: tuple[int, ...]
    max_positions: int
    tie_embeddings: bool
    greedy_tasks: tuple[str, ...] = ()
    """Keys of `sampling.TASK_SAMPLERS` that are greedy by default for this checkpoint."""
    # What follows is no part of `repr`, which identifies the model of a saved session.
    sentences_at_once: int = field(default=0, repr=False)
    """Sentences that it says well in one reply; 0 where the checkpoint states nothing."""
    words_at_once: int = field(default=0, repr=False)
    """Words that it says well in one reply; 0 where the checkpoint states nothing."""
    seconds_at_once: int = field(default=0, repr=False)
    """Seconds of speech that it transcribes well at once; 0 where the checkpoint states nothing."""
    trained_tasks: tuple[str, ...] = field(default=(), repr=False)
    """Tasks that it was trained for, "tts_sft", and their options, "tts_sft.instruct"; empty where
    the checkpoint states nothing, which means all of them."""
    confidence: tuple[Calibration, ...] = field(default=(), repr=False)
    """Of tasks, by keys of `sampling.TASK_SAMPLERS`; without one a reply has no confidence."""
    reply_limits: tuple[tuple[str, float, float], ...] = field(default=(), repr=False)
    """A task, by the same keys; groups; and groups more a second that is heard: where a reply ends
    by default. Without one it is where the context does."""
    example_instructions: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Names and texts of the instructions that it was trained with to convert speech by example;
    empty where the checkpoint states nothing, see `text.templates.CONVERSIONS`."""
    architecture: Architecture = field(default=MIMO_AUDIO, repr=False)
    dtype: str | None = field(default=None, repr=False)
    """That its weights are to be computed in, as the checkpoint states."""
    adapters: tuple[str, ...] = field(default=(), repr=False)
    """Digests of the adapters that are merged into the weights, see `checkpoint/adapters.py`."""

    @property
    def patch_steps(self) -> int:
        """Patch-decoder steps of a patch; the last channel starts max(delays) steps late."""
        return self.group_size + max(self.delays)

    @property
    def row_width(self) -> int:
        """Ids per group in upstream's flattened layout."""
        return (self.channels + 1) * self.group_size

    @classmethod
    def from_dict(cls, raw: Any, source: str = "LM config") -> "LMConfig":
        """Reads a config.json's object; whatever else it holds is a ConfigError."""
        read = ConfigReader(raw, source)
        read.only("hidden_act", "silu")
        read.refuse("use_sliding_window", bool, "a sliding window in the backbone is not supported")
        plain = "only plain RoPE is supported"
        read.refuse("rope_scaling", lambda scaling: _rope_kind(scaling) != "default", plain)
        channels, group_size = read.integer("audio_channels"), read.integer("group_size")
        theta, eps = read.rope_theta(), read.number("rms_norm_eps")
        heads, dim = read.integer("num_attention_heads"), read.integer("hidden_size")

        def local(width: int, layers: int, ffn: int) -> TransformerConfig:
            local_heads = read.integer("local_attn_heads")
            if width % (2 * local_heads):
                raise ConfigError(
                    f"{source}: local width {width} does not split into local_attn_heads "
                    f"{local_heads} of an even size"
                )
            return TransformerConfig(
                width, layers, local_heads, local_heads, width // local_heads, ffn, theta, eps
            )

        local_dim, local_ffn = read.integer("local_dim"), read.integer("local_ffn_dim")
        input_dim = read.integer("input_local_dim", default=local_dim)
        architecture = architecture_of(read.names("architectures"))
        config = cls(
            vocab_size=read.integer("vocab_size"),
            backbone=TransformerConfig(
                dim,
                read.integer("num_hidden_layers"),
                heads,
                read.integer("num_key_value_heads"),
                read.integer("head_dim", default=max(1, dim // heads)),
                read.integer("intermediate_size"),
                theta,
                eps,
            ),
            patch_encoder=local(input_dim, read.integer("input_local_layers"), 4 * input_dim),
            patch_decoder=local(local_dim, read.integer("local_layers"), local_ffn),
            patch_encoder_causal=not read.flag("input_full_attention", default=False),
            group_size=group_size,
            channels=channels,
            code_sizes=read.per_channel("speech_vocab_size", channels),
            empty_codes=read.per_channel("speech_zeroemb_idx", channels),
            delays=read.per_channel("delay_pattern", channels),
            max_positions=read.integer("max_position_embeddings"),
            tie_embeddings=read.flag("tie_word_embeddings", default=False),
            greedy_tasks=read.names("greedy_tasks"),
            sentences_at_once=read.integer("sentences_at_once", default=0),
            words_at_once=read.integer("words_at_once", default=0),
            seconds_at_once=read.integer("seconds_at_once", default=0),
            trained_tasks=read.names("trained_tasks") or architecture.tasks,
            confidence=_calibrations(read, "confidence"),
            reply_limits=read.limits("reply_limits"),
            example_instructions=read.texts("example_instructions"),
            architecture=architecture,
            dtype=read.dtype(),
            adapters=read.names(ADAPTERS_KEY),
        )
        config._check(source)
        return config

    def is_trained(self, task: str, option: str | None = None) -> bool:
        """Whether it was trained for a task, or for an option of it, as far as it states."""
        name = task if option is None else f"{task}.{option}"
        return not self.trained_tasks or name in self.trained_tasks

    def calibration(self, task: str | None) -> Calibration | None:
        """The calibration of a task; None where the checkpoint states none."""
        return next((each for each in self.confidence if each.task == task), None)

    def longest_reply(self, task: str | None, groups_heard: int) -> int | None:
        """Groups at which a reply to so many groups of speech ends by default; None: nothing."""
        for name, groups, rate in self.reply_limits:
            if name == task:
                return max(1, round(groups + rate * groups_heard * GROUP_SECONDS))
        return None

    def _check(self, source: str) -> None:
        if self.backbone.heads % self.backbone.kv_heads:
            problem = "num_attention_heads is not a multiple of num_key_value_heads"
            raise ConfigError(f"{source}: {problem}")
        if self.backbone.head_dim % 2:
            problem = f"head_dim {self.backbone.head_dim} is not even, as RoPE needs it to be"
            raise ConfigError(f"{source}: {problem}")
        codes = zip(self.code_sizes, self.empty_codes, strict=True)
        for channel, (size, empty) in enumerate(codes):
            if not 0 <= empty < size:
                problem = f"speech_zeroemb_idx {empty} of channel {channel} is outside"
                raise ConfigError(f"{source}: {problem} 0..{size - 1}")


def _calibrations(read: ConfigReader, key: str) -> tuple[Calibration, ...]:
    """Of each task the fields of `Calibration`, by name."""
    names, found = [each.name for each in fields(Calibration)][1:], list[Calibration]()
    for task, value in read.mapping(key).items():
        if not isinstance(value, Mapping) or not {*names} <= {*value}:
            raise read.wrong(key, f"an object of {', '.join(names)} for '{task}'")
        given = [value[name] for name in names]
        found.append(Calibration(task, *read.numbers(key, f"'{task}'", given, len(names))))
    return tuple(found)


def _rope_kind(scaling: Any) -> str:
    if isinstance(scaling, Mapping):
        return str(scaling.get("rope_type", scaling.get("type", "default")))
    return str(scaling)


RopeFrequencies = Literal["exact", "bfloat16"]
"""Rotary frequencies of a codec: as computed in float32, or rounded to bfloat16.

Upstream casts its codec to bfloat16 with its buffers, so its published figures are those of rounded
frequencies, whatever the arithmetic after them is.
"""

ROPE_FREQUENCIES: tuple[RopeFrequencies, ...] = get_args(RopeFrequencies)


def _key(name: str) -> Any:
    """A field that is read from this key of the file, by its type; it has no default."""
    return field(metadata={"key": name})


@checked
@dataclass(frozen=True)
class CodecConfig:
    """The audio tokenizer: log-mel -> encoder -> RVQ -> decoder -> vocoder -> waveform."""

    f_min: float
    f_max: float
    skip_layer: int | None
    codebook_sizes: tuple[int, ...]
    norm: str
    sample_rate: int = _key("sampling_rate")
    n_mels: int = _key("n_mels")
    n_fft: int = _key("nfft")
    hop: int = _key("hop_length")
    window: int = _key("window_size")
    max_seconds: int = _key("max_audio_seconds")
    dim: int = _key("d_model")
    kernel: int = _key("kernel_size")
    stride: int = _key("stride_size")
    pool: int = _key("avg_pooler")
    encoder_layers: int = _key("encoder_layers")
    encoder_heads: int = _key("encoder_attention_heads")
    encoder_ffn: int = _key("encoder_ffn_dim")
    encoder_causal: bool = _key("encoder_causal")
    encoder_window: tuple[int, int] = _key("encoder_attn_window_size")
    decoder_layers: int = _key("decoder_layers")
    decoder_heads: int = _key("decoder_attention_heads")
    decoder_ffn: int = _key("decoder_ffn_dim")
    decoder_causal: bool = _key("decoder_causal")
    decoder_window: tuple[int, int] = _key("decoder_attn_window_size")
    decoder_kernel: int = _key("decoder_kernel_size")
    decoder_stride: int = _key("decoder_stride_size")
    vocoder_dim: int = _key("vocoder_dim")
    vocoder_layers: int = _key("vocoder_num_layers")
    vocoder_heads: int = _key("vocoder_attention_heads")
    vocoder_ffn: int = _key("vocoder_intermediate_dim")
    vocoder_window: tuple[int, int] = _key("vocoder_attn_window_size")
    rope_theta: float = _key("rope_theta")
    moments: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Norm statistics for streaming: (mean, variance) of the unpooling and the to-mel norm."""
    # No part of `repr`, which identifies the codec of a saved session.
    rope_frequencies: RopeFrequencies = field(default="exact", repr=False)
    """As config.json states; where it does not, "bfloat16" for the published dimensions."""

    @property
    def samples_per_frame(self) -> int:
        """Waveform samples per code frame (960 at 24 kHz: 25 Hz)."""
        return self.pool * self.decoder_stride * self.hop

    @classmethod
    def from_dict(cls, raw: Any, source: str = "codec config") -> "CodecConfig":
        """Reads a config.json's object; whatever else it holds is a ConfigError."""
        read = ConfigReader(raw, source)
        read.only("activation_function", "gelu")
        read.only("position_embedding_type", "rope")
        read.only("rope_type", "default")
        read.only("vocoder_padding", "same")
        norms = ("LayerNorm", "RMSNorm")
        read.refuse("ln_type", lambda name: name not in norms, "use 'LayerNorm' or 'RMSNorm'")
        readers: dict[Any, Callable[[str], Any]] = {
            int: read.integer,
            float: read.number,
            bool: read.flag,
            tuple[int, int]: read.window,
        }
        keyed = {each.name: each.metadata["key"] for each in fields(cls) if each.metadata}
        quantizers, sizes = read.integer("num_quantizers"), read.integers("codebook_size")
        skip = read.required("encoder_skip_layer_id")
        config = cls(
            **{name: readers[cls.__annotations__[name]](key) for name, key in keyed.items()},
            f_min=read.number("fmin", default=0),
            f_max=read.number("fmax", default=read.integer("sampling_rate") / 2),
            skip_layer=None if skip is None else read.integer("encoder_skip_layer_id"),
            codebook_sizes=tuple((sizes + sizes[-1:] * quantizers)[:quantizers]),
            norm=str(raw.get("ln_type", "LayerNorm")),
            moments=read.moments("streaming_moments"),
        )
        config._check(source)
        stated = read.one_of("rope_frequencies", ROPE_FREQUENCIES)
        return replace(config, rope_frequencies=stated or config._unstated())

    def _unstated(self) -> RopeFrequencies:
        """Rotary frequencies of a codec whose config.json does not state them.

        Upstream's format has no word for it, so sizes must tell: the published weights, and what is
        tuned from them, are run by upstream with rounded ones.
        """
        published = all(getattr(self, name) == size for name, size in PUBLISHED_SIZES.items())
        return "bfloat16" if published else "exact"

    def _check(self, source: str) -> None:
        config = self
        if config.kernel != 3:
            raise ConfigError(f"{source}: 'kernel_size' is {config.kernel}: only 3 is supported")
        # Each pair is (name, value, name of its bound, bound).
        for name, value, of, bound in (
            ("hop_length", config.hop, "window_size", config.window),
            ("window_size", config.window, "nfft", config.n_fft),
            ("stride_size", config.stride, "kernel_size", config.kernel),
            (
                "decoder_stride_size",
                config.decoder_stride,
                "decoder_kernel_size",
                config.decoder_kernel,
            ),
            ("fmin", config.f_min, "fmax", config.f_max),
            ("fmax", config.f_max, "half of sampling_rate", config.sample_rate / 2),
        ):
            if value > bound or (name == "fmin" and value == bound):
                raise ConfigError(f"{source}: '{name}' {value} is beyond '{of}' {bound}")
        widths = config.dim, config.dim, config.vocoder_dim
        counts = config.encoder_heads, config.decoder_heads, config.vocoder_heads
        for width, heads in zip(widths, counts, strict=True):
            if width % heads or (width // heads) % 2:
                raise ConfigError(
                    f"{source}: width {width} does not split into {heads} heads of an even size"
                )


PUBLISHED_SIZES: dict[str, Any] = {
    "dim": 1280,
    "encoder_layers": 32,
    "decoder_layers": 32,
    "vocoder_dim": 256,
    "vocoder_layers": 16,
    "codebook_sizes": (1024, 1024) + (128,) * 18,
}
"""Fields of `CodecConfig` by which MiMo-Audio-Tokenizer, and what is tuned from it, is known."""

Moments = tuple[tuple[float, float], tuple[float, float]]
"""Mean and variance of each of a codec's two norms over time."""

CALIBRATION = "streaming_moments.json"
"""A file beside a codec's config.json: what its norms' statistics are like in speech, measured."""


def read_calibration(directory: Path) -> Moments | None:
    """The moments in CALIBRATION; None where there is no such file.

    Raises:
        ConfigError: it is not such a file.
    """
    path = directory / CALIBRATION
    if not path.exists():
        return None
    moments = ConfigReader(read_json(path), str(path)).moments("streaming_moments")
    if moments is None:
        raise ConfigError(f"{path}: 'streaming_moments' is missing: calibrate again")
    return moments
