"""Values of a foreign config.json, each checked for its kind and its range.

What a file may hold is anything that JSON can be, and a little more: the mapping may be a caller's.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeGuard, TypeVar

from mimo_fast.errors import ConfigError
from mimo_fast.json_files import shown

Choice = TypeVar("Choice", bound=str)

DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights are computed in, by torch's names."""

LAYERS, WIDTH, ROWS = (1, 4096), (1, 2**20), (1, 2**24)

RANGES: dict[str, tuple[float, float]] = {
    # Of the language model.
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "num_key_value_heads": WIDTH,
    "head_dim": WIDTH,
    "max_position_embeddings": ROWS,
    "local_dim": WIDTH,
    "local_ffn_dim": WIDTH,
    "local_layers": LAYERS,
    "local_attn_heads": WIDTH,
    "input_local_dim": WIDTH,
    "input_local_layers": LAYERS,
    "group_size": (1, 1024),
    "audio_channels": (1, 1024),
    "speech_vocab_size": ROWS,
    "speech_zeroemb_idx": (0, 2**24),
    "delay_pattern": (0, 1024),
    "rms_norm_eps": (1e-30, 1),
    "sentences_at_once": (0, 2**24),
    "words_at_once": (0, 2**24),
    "confidence": (-1e6, 1e6),
    "reply_limits": (0, 2**24),
    "seconds_at_once": (0, 2**24),
    # Of both.
    "rope_theta": (1, 1e12),
    # Of the codec.
    "sampling_rate": (1, 10**6),
    "n_mels": (1, 2**16),
    "nfft": ROWS,
    "hop_length": ROWS,
    "window_size": ROWS,
    "max_audio_seconds": ROWS,
    "d_model": WIDTH,
    "kernel_size": (1, 1024),
    "stride_size": (1, 1024),
    "avg_pooler": (1, 1024),
    "num_quantizers": (1, 1024),
    "codebook_size": ROWS,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": WIDTH,
    "encoder_ffn_dim": WIDTH,
    "encoder_skip_layer_id": LAYERS,
    "encoder_attn_window_size": (-1, 2**16),
    "decoder_layers": LAYERS,
    "decoder_attention_heads": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "decoder_kernel_size": (1, 1024),
    "decoder_stride_size": (1, 1024),
    "decoder_attn_window_size": (-1, 2**16),
    "vocoder_dim": WIDTH,
    "vocoder_num_layers": LAYERS,
    "vocoder_attention_heads": WIDTH,
    "vocoder_intermediate_dim": WIDTH,
    "vocoder_attn_window_size": (-1, 2**16),
    "fmin": (0, 10**6),
    "fmax": (0, 10**6),
    "streaming_moments": (-1e30, 1e30),
}
"""Smallest and largest value of every numeric key, of each item where it is a list.

They are far beyond what anybody trains; what a table of tensors, a cache or a stream would allocate
stays small. Within them, `checkpoint/layout.py` and the files' headers decide.
"""


class ConfigReader:
    """Reads keys of one config file; every error names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source} holds a {type(raw).__name__}, not a JSON object")
        plain = {key: each if _is_plain(each) else _Foreign(each) for key, each in raw.items()}
        self.raw: Mapping[str, Any] = plain
        self.source = source

    def required(self, key: str) -> Any:
        if key not in self.raw:
            raise ConfigError(
                f"{self.source} has no '{key}', which decides a shape and so has no default"
            )
        return self.raw[key]

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; with a default the key may be missing or null."""
        value = self.required(key) if default is None else self.raw.get(key)
        if value is None and default is not None:
            return default
        if not _is_integer(value) or value < 1:
            raise self.wrong(key, "a positive integer")
        self._check_range(key, value)
        return int(value)

    def integers(self, key: str) -> list[int]:
        """A positive integer or a list of them."""
        value = self.required(key)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not values or not all(_is_integer(each) and each > 0 for each in values):
            raise self.wrong(key, "a positive integer or a list of them")
        self._check_range(key, *values)
        return values

    def number(self, key: str, default: float | None = None) -> float:
        """A number; with a default it may be null."""
        value = self.required(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        self._check_range(key, value)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false; with a default the key may be missing or null."""
        value = self.required(key) if default is None else self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def window(self, key: str) -> tuple[int, int]:
        value = self.required(key)
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(map(_is_integer, value)):
            raise self.wrong(key, "two integers, left and right")
        self._check_range(key, *value)
        return value[0], value[1]

    def moments(self, key: str) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Two pairs of mean and variance; the key is this project's, None if it is missing."""
        if (value := self.raw.get(key)) is None:
            return None
        with suppress(TypeError, ValueError, OverflowError):
            first, second = ((mean + 0.0, variance + 0.0) for mean, variance in value)
            self._check_range(key, *first, *second)
            if min(first[1], second[1]) > 0:
                return first, second
        raise self.wrong(key, "two pairs of mean and positive variance")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; empty if the key is missing."""
        value = self.raw.get(key) or []
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "a list of names")
        return tuple(value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object; the key is this project's, empty if it is missing."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.wrong(key, "an object")
        return value

    def texts(self, key: str) -> tuple[tuple[str, str], ...]:
        """Names and their texts; the key is this project's, empty if it is missing."""
        found = self.mapping(key)
        if not all(isinstance(text, str) and text.strip() for text in found.values()):
            raise self.wrong(key, "an object of texts")
        return tuple(found.items())

    def numbers(self, key: str, where: str, value: Any, count: int) -> tuple[float, ...]:
        """`count` numbers in a list below a key."""
        given = list(value) if isinstance(value, list | tuple) else []
        if len(given) != count or not all(map(_is_number, given)):
            raise self.wrong(key, f"{count} numbers for {where}")
        self._check_range(key, *given)
        return tuple(map(float, given))

    def limits(self, key: str) -> tuple[tuple[str, float, float], ...]:
        """Two numbers of each task; the key is this project's."""
        found = list[tuple[str, float, float]]()
        for task, value in self.mapping(key).items():
            first, second = self.numbers(key, f"'{task}'", value, 2)
            found.append((task, first, second))
        return tuple(found)

    def per_channel(self, key: str, channels: int) -> tuple[int, ...]:
        """A value for each channel, written '1025-129-...'; a single number applies to all."""
        value = self.required(key)
        try:
            if not _is_integer(value) and not isinstance(value, str):
                raise ValueError
            values = tuple(map(int, value.split("-") if isinstance(value, str) else [value]))
        except ValueError:
            raise self.wrong(key, "integers joined by '-', one a channel") from None
        values = values * channels if len(values) == 1 else values
        if len(values) != channels:
            raise ConfigError(
                f"{self.source}: '{key}' has {len(values)} values for {channels} audio_channels"
            )
        self._check_range(key, *values)
        return values

    def rope_theta(self) -> float:
        """rope_theta, which transformers 5 moves into rope_parameters."""
        nested = self.raw.get("rope_parameters") or {}
        if not isinstance(nested, Mapping):
            raise self.wrong("rope_parameters", "an object")
        return ConfigReader({**self.raw, **nested}, self.source).number("rope_theta")

    def dtype(self) -> str | None:
        """The dtype that is stated, by the key of transformers 5 or that of 4; None if it is not.

        A name that is no type of weights is as good as none.
        """
        for key in ("dtype", "torch_dtype"):
            if (value := self.raw.get(key)) in DTYPES:
                return str(value)
        return None

    def one_of(self, key: str, known: tuple[Choice, ...]) -> Choice | None:
        """One of some names; the key is this project's, None if it is missing."""
        value = self.raw.get(key)
        for name in known:
            if isinstance(value, str) and value == name:
                return name
        if value is None:
            return None
        raise self.wrong(key, " or ".join(map(repr, known)))

    def wrong(self, key: str, expected: str) -> ConfigError:
        """The error of a key whose value is something else."""
        found = shown(self.raw[key])
        return ConfigError(f"{self.source}: '{key}' must be {expected}, not {found}")

    def _check_range(self, key: str, *values: float) -> None:
        """Refuses what is outside of `RANGES`, NaN too."""
        low, high = RANGES[key]
        for value in values:
            # Written so that NaN is refused.
            if not low <= value <= high:
                raise ConfigError(
                    f"{self.source}: '{key}' must be between {low} and {high}, not {shown(value)}"
                )

    def only(self, key: str, name: str) -> None:
        self.refuse(key, lambda value: value != name, f"only {name!r} is supported")

    def refuse(self, key: str, unsupported: Any, reason: str) -> None:
        value = self.raw.get(key)
        if value is not None and unsupported(value):
            raise ConfigError(f"{self.source}: '{key}' is {shown(value)}: {reason}")


class _Foreign:
    """In place of what no JSON file holds, such as an array, which has no one answer to `==`."""

    def __init__(self, value: Any) -> None:
        self._shown = shown(value)

    def __repr__(self) -> str:
        return self._shown


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value could come from JSON, as deep as anything that is read."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(each, depth - 1) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
