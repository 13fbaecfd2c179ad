"""Every complaint about a config.json, and the published dimensions."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import KIT_PAIR, copy_tree, fault, kit_config
from hypothesis import given
from hypothesis import strategies as st

import mimo_fast
from mimo_fast.checkpoint.layout import codec_shapes, lm_shapes
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.errors import ConfigError

PRESETS = Path(mimo_fast.__file__).parent / "presets"

CONFIGS: dict[str, type[LMConfig] | type[CodecConfig]] = {"lm": LMConfig, "codec": CodecConfig}


def parsed(part: str, **changes: Any) -> Any:
    """The kit's config with these keys changed."""
    return CONFIGS[part].from_dict(kit_config(part) | changes)


def complaint(part: str, changes: dict[str, Any], without: str | None = None) -> str:
    """The one-line error that the kit's config gives once changed."""
    raw = kit_config(part) | changes
    if without is not None:
        del raw[without]
    message = fault(lambda: CONFIGS[part].from_dict(raw, "some/config.json"), ConfigError)
    assert message.startswith("some/config.json")
    return message


def keys(part: str, names: str) -> list[tuple[str, str]]:
    return [(part, name) for name in names.split()]


SIZES = [
    *keys("lm", "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size"),
    *keys("lm", "num_key_value_heads max_position_embeddings group_size audio_channels local_dim"),
    *keys("lm", "local_layers local_attn_heads local_ffn_dim input_local_layers"),
    *keys("codec", "sampling_rate n_mels nfft hop_length window_size max_audio_seconds d_model"),
    *keys("codec", "kernel_size stride_size avg_pooler num_quantizers"),
    *keys("codec", "encoder_layers encoder_attention_heads encoder_ffn_dim decoder_layers"),
    *keys("codec", "decoder_attention_heads decoder_ffn_dim decoder_kernel_size"),
    *keys("codec", "decoder_stride_size vocoder_dim vocoder_num_layers vocoder_attention_heads"),
    *keys("codec", "vocoder_intermediate_dim"),
]
OTHER_KEYS = [
    *keys("lm", "rms_norm_eps rope_theta speech_vocab_size speech_zeroemb_idx delay_pattern"),
    *keys("codec", "fmin fmax encoder_causal encoder_attn_window_size encoder_skip_layer_id"),
    *keys("codec", "decoder_causal decoder_attn_window_size vocoder_attn_window_size"),
    *keys("codec", "codebook_size rope_theta"),
]
LM_KEYS = [key for part, key in SIZES + OTHER_KEYS if part == "lm"]


@pytest.mark.parametrize(("part", "key"), SIZES + OTHER_KEYS)
def test_missing_key_is_named(part, key):
    assert f"no '{key}'" in complaint(part, {}, without=key)


@pytest.mark.parametrize(("part", "key"), SIZES)
def test_sizes_must_be_positive_integers(part, key):
    for value in (0, -1, 1.5, "8", True, None, [8]):
        message = complaint(part, {key: value})
        assert f"'{key}' must be a positive integer, not {value!r}" in message


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("lm", "hidden_act", "gelu"),
        ("lm", "use_sliding_window", True),
        ("lm", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("lm", "rope_scaling", {"type": "linear"}),
        ("codec", "activation_function", "relu"),
        ("codec", "position_embedding_type", "alibi"),
        ("codec", "kernel_size", 5),
        ("codec", "rope_type", "dynamic"),
        ("codec", "vocoder_padding", "center"),
        ("codec", "ln_type", "BatchNorm"),
    ],
)
def test_what_is_not_supported_is_refused(part, key, value):
    message = complaint(part, {key: value})
    assert f"'{key}' is {value!r}" in message


@pytest.mark.parametrize("key", ["ln_type", "rope_type", "fmin", "streaming_moments", "d_model"])
def test_values_that_no_json_holds_are_refused(key):
    for value in (np.ones((2, 2)), torch.ones(3), [np.ones(2)], object()):
        assert f"'{key}'" in complaint("codec", {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", None),
        ("use_sliding_window", None),
        ("use_sliding_window", False),
        ("rope_scaling", None),
        ("rope_scaling", {"rope_type": "default"}),
        ("rope_scaling", {}),
    ],
)
def test_defaults_spelled_out_are_accepted(key, value):
    assert parsed("lm", **{key: value}) == parsed("lm")


@pytest.mark.parametrize("key", ["speech_vocab_size", "speech_zeroemb_idx", "delay_pattern"])
def test_wrong_channel_count(key):
    message = complaint("lm", {key: "1-2-3"})
    assert f"'{key}' has 3 values for 8 audio_channels" in message


def test_one_value_holds_for_every_channel():
    for size in (65, "65"):
        config = parsed("lm", speech_vocab_size=size, speech_zeroemb_idx=64)
        assert config.code_sizes == (65,) * 8
        assert config.empty_codes == (64,) * 8


@pytest.mark.parametrize("empty", ["65-65-17-17-17-17-17-17", "64-64-16-16-16-16-16-17"])
def test_empty_code_outside_its_channel(empty):
    assert "speech_zeroemb_idx" in complaint("lm", {"speech_zeroemb_idx": empty})


def test_negative_delay():
    assert "'delay_pattern' must be between 0 and" in complaint("lm", {"delay_pattern": -1})


def test_heads_that_do_not_divide():
    assert "num_key_value_heads" in complaint("lm", {"num_key_value_heads": 3})
    assert "local_attn_heads 5" in complaint("lm", {"local_attn_heads": 5})
    assert "local width 48" in complaint("lm", {"local_attn_heads": 32})
    for key, value in (
        ("encoder_attention_heads", 3),
        ("decoder_attention_heads", 64),
        ("vocoder_attention_heads", 5),
    ):
        assert f"{value} heads" in complaint("codec", {key: value})


@pytest.mark.parametrize("changes", [{"head_dim": 15}, {"local_attn_heads": 16}])
def test_odd_heads_cannot_be_rotated(changes):
    """local_attn_heads 16 cuts input_local_dim 48 into heads of 3."""
    assert "even" in complaint("lm", changes)


MALFORMED: list[tuple[str, str, Any]] = [
    ("lm", "speech_vocab_size", "65-x-17-17-17-17-17-17"),
    ("lm", "speech_vocab_size", ""),
    ("lm", "speech_vocab_size", None),
    ("lm", "delay_pattern", "0-1-2-3-4-5-6-"),
    ("lm", "delay_pattern", [0] * 8),
    ("lm", "rms_norm_eps", None),
    ("lm", "rms_norm_eps", "small"),
    ("lm", "rope_theta", None),
    ("lm", "rope_theta", "many"),
    ("lm", "head_dim", "16"),
    ("lm", "input_local_dim", "wide"),
    ("lm", "head_dim", -16),
    ("lm", "rope_parameters", [1]),
    ("lm", "rope_scaling", "yarn"),
    ("codec", "encoder_attn_window_size", 40),
    ("codec", "encoder_attn_window_size", [40]),
    ("codec", "decoder_attn_window_size", None),
    ("codec", "vocoder_attn_window_size", ["a", "b"]),
    ("codec", "codebook_size", "64"),
    ("codec", "codebook_size", []),
    ("codec", "codebook_size", [64, 0]),
    ("codec", "codebook_size", [64, None]),
    ("codec", "fmin", "low"),
    ("codec", "fmax", [12000]),
    ("codec", "encoder_skip_layer_id", "two"),
    ("codec", "rope_theta", None),
]


@pytest.mark.parametrize(("part", "key", "value"), MALFORMED)
def test_malformed_value_is_a_config_error_that_names_its_key(part, key, value):
    assert f"'{key}'" in complaint(part, {key: value})


def test_rope_theta_may_be_nested():
    raw = kit_config("lm")
    del raw["rope_theta"]
    raw["rope_parameters"] = {"rope_theta": 123.0, "rope_type": "default"}
    assert LMConfig.from_dict(raw).backbone.rope_theta == 123.0


def test_optional_keys():
    raw = kit_config("lm")
    for key in ("head_dim", "input_local_dim", "input_full_attention", "tie_word_embeddings"):
        del raw[key]
    config = LMConfig.from_dict(raw)
    assert config.backbone.head_dim == 64 // 4
    assert config.patch_encoder.dim == config.patch_decoder.dim == 32
    assert config.patch_encoder_causal
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("sizes", "want"),
    [
        (32, (32, 32, 32)),
        ([64, 16], (64, 16, 16)),
        ([64, 32, 16], (64, 32, 16)),
        ([64, 32, 16, 8], (64, 32, 16)),
    ],
)
def test_the_last_codebook_size_repeats(sizes, want):
    assert parsed("codec", num_quantizers=3, codebook_size=sizes).codebook_sizes == want


def test_fmax_defaults_to_half_the_rate():
    assert parsed("codec", fmax=None, fmin=None).f_max == 12000
    assert parsed("codec", fmax=8000, fmin=20).f_min == 20


def test_moments_of_a_codec_that_states_them():
    assert parsed("codec").moments is None
    stated = parsed("codec", streaming_moments=[[0, 1], [-0.5, 2]])
    assert stated.moments == ((0.0, 1.0), (-0.5, 2.0))
    wrong: list[Any] = [[[0, 1]], [[0, 1], [0, 0]], [[0, "x"], [0, 1]], [[0, 1]] * 3]
    for moments in (*wrong, "moments", 3):
        message = complaint("codec", {"streaming_moments": moments})
        assert "two pairs of mean and positive variance" in message


NOT_JSON = [b"", b"{", b"{'a': 1}", b'{"a": 1,}', b"\x00", b'{"a": 1} x', b"\xff\xfe\x00{"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        *((content, "is not valid JSON") for content in NOT_JSON),
        (b"[1]", "holds a list, not a JSON object"),
        (b'"text"', "holds a str, not a JSON object"),
        (b"3", "holds a int, not a JSON object"),
        (b"null", "holds a NoneType, not a JSON object"),
    ],
)
def test_not_an_object_in_json(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = fault(lambda: read_json(path), ConfigError)
    assert problem in message
    assert str(path) in message


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        assert "cannot read" in fault(lambda path=path: read_json(path), ConfigError)


def test_the_error_reaches_load(tmp_path):
    raw = kit_config("lm")
    del raw["group_size"]
    copy_tree(KIT_PAIR[0], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="has no 'group_size'"):
        mimo_fast.load(tmp_path, KIT_PAIR[1], device="cpu")


@given(
    st.dictionaries(
        st.sampled_from(LM_KEYS), st.none() | st.integers(-9, 9) | st.text("129-x", max_size=4)
    )
)
def test_any_replaced_values_parse_or_raise_a_config_error(changes):
    with suppress(ConfigError):
        LMConfig.from_dict(kit_config("lm") | changes)


def preset(part: str) -> Any:
    return CONFIGS[part].from_dict(read_json(PRESETS / f"7b-{part}.json"))


def parameters(shapes: dict[str, tuple[int, ...]]) -> float:
    return sum(math.prod(shape) for shape in shapes.values())


def test_published_language_model():
    """MiMo-Audio-7B: the report's table of dimensions."""
    config = preset("lm")
    parts = (config.backbone, config.patch_encoder, config.patch_decoder)
    assert [(p.layers, p.dim, p.ffn_dim, p.heads, p.kv_heads, p.head_dim) for p in parts] == [
        (36, 4096, 11008, 32, 8, 128),
        (6, 1024, 4096, 64, 64, 16),
        (16, 1024, 4096, 64, 64, 16),
    ]
    assert (config.vocab_size, config.group_size, config.channels) == (151680, 4, 8)
    assert config.code_sizes == (1025, 1025, *[129] * 6)
    assert config.empty_codes == (1024, 1024, *[128] * 6)
    assert config.delays == tuple(range(8))
    assert not config.patch_encoder_causal
    assert (config.patch_steps, config.row_width) == (11, 36)
    assert (config.backbone.rope_theta, config.max_positions) == (640000, 8192)


def test_published_codec():
    config = preset("codec")
    layers = (config.encoder_layers, config.decoder_layers, config.vocoder_layers)
    assert (config.dim, *layers) == (1280, 32, 32, 16)
    assert (config.vocoder_dim, config.vocoder_window, config.skip_layer) == (256, (40, 10), 3)
    assert config.codebook_sizes == (1024, 1024, *[128] * 18)
    assert (config.sample_rate, config.hop, config.samples_per_frame) == (24000, 240, 960)
    assert (config.n_mels, config.f_min, config.f_max) == (128, 0, 12000)
    assert (config.encoder_causal, config.decoder_causal) == (False, True)


def test_published_numbers_of_parameters():
    language_model = lm_shapes(preset("lm"))
    assert parameters(language_model) / 1e9 == pytest.approx(8.0, abs=0.05)
    assert parameters(codec_shapes(preset("codec"))) / 1e9 == pytest.approx(1.29, abs=0.005)
    backbone = {
        name: shape
        for name, shape in language_model.items()
        if name.startswith(("model.layers", "lm_head"))
    }
    assert parameters(backbone) / 1e9 == pytest.approx(7.0, abs=0.05)


def test_what_a_checkpoint_states_of_its_training():
    config = parsed("lm")
    assert (config.sentences_at_once, config.words_at_once, config.trained_tasks) == (0, 0, ())
    assert config.is_trained("asr_sft")
    assert config.is_trained("tts_sft", "prompt_speech")
    stated = {
        "sentences_at_once": 1,
        "words_at_once": 12,
        "trained_tasks": ["tts_sft", "tts_sft.x"],
    }
    config = parsed("lm", **stated)
    assert (config.sentences_at_once, config.words_at_once) == (1, 12)
    assert config.is_trained("tts_sft", "x")
    assert not config.is_trained("tts_sft", "y")
    assert not config.is_trained("asr_sft")
    # A session belongs to the weights, whatever is stated of them.
    assert repr(config) == repr(parsed("lm"))
    for key, wrong in (("sentences_at_once", -1), ("words_at_once", 1.5), ("trained_tasks", [1])):
        with pytest.raises(ConfigError, match=f"'{key}' must be"):
            parsed("lm", **{key: wrong})


def test_example_instructions_are_texts_by_name():
    assert parsed("lm").example_instructions == ()
    found = parsed("lm", example_instructions={"voice": "Say it again", "answer": "Answer"})
    assert found.example_instructions == (("voice", "Say it again"), ("answer", "Answer"))
    for wrong in (["voice"], {"voice": 1}, {"voice": " "}, "voice"):
        with pytest.raises(ConfigError, match="'example_instructions' must be an object"):
            parsed("lm", example_instructions=wrong)


def test_greedy_tasks_are_names():
    assert parsed("lm").greedy_tasks == ()
    assert parsed("lm", greedy_tasks=["tts"]).greedy_tasks == ("tts",)
    with pytest.raises(ConfigError, match="'greedy_tasks' must be a list of names, not 'tts'"):
        parsed("lm", greedy_tasks="tts")


BEYOND: list[tuple[str, str, Any]] = [
    *((part, key, value) for part, key in SIZES for value in (10**9, 2**63, 10**30)),
    *(("lm", "rope_theta", value) for value in (-1, 0, 1e-45, math.nan, math.inf, 10**400)),
    *(("codec", "rope_theta", value) for value in (-1, math.nan)),
    *(("lm", "rms_norm_eps", value) for value in (0, -1e-6, math.nan, math.inf, 2)),
    *(("codec", "fmin", value) for value in (-1, math.nan, math.inf, 20000)),
    *(("codec", "fmax", value) for value in (0, -1, math.nan, math.inf, 12001)),
    ("lm", "speech_vocab_size", "65-65-17-17-17-17-17-1000000000"),
    ("lm", "speech_zeroemb_idx", -1),
    ("lm", "delay_pattern", 10**6),
    ("codec", "codebook_size", [64, 10**12]),
    *(("codec", f"{part}_attn_window_size", [40, 10**9]) for part in ("encoder", "vocoder")),
    ("codec", "decoder_attn_window_size", [-2, 0]),
    ("codec", "encoder_skip_layer_id", 10**9),
    ("codec", "hop_length", 961),
    ("codec", "window_size", 961),
    ("codec", "stride_size", 4),
    ("codec", "decoder_stride_size", 4),
    *(("codec", "streaming_moments", [[0, 1], [x, 1]]) for x in (math.nan, math.inf, 10**400)),
]


@pytest.mark.parametrize(("part", "key", "value"), BEYOND)
def test_a_value_beyond_its_range_is_refused(part, key, value):
    message = complaint(part, {key: value})
    assert f"'{key}'" in message
    assert len(message) < 400


FLAGS = [("lm", "tie_word_embeddings"), ("lm", "input_full_attention")]
FLAGS += [("codec", "encoder_causal"), ("codec", "decoder_causal")]


@pytest.mark.parametrize(("part", "key"), FLAGS)
@pytest.mark.parametrize("value", ["false", 1, {"id": 0}, [True]])
def test_flags_are_true_or_false(part, key, value):
    assert f"'{key}' must be true or false" in complaint(part, {key: value})


@pytest.mark.parametrize("raw", [0.5, None, "x", [1], 3])
@pytest.mark.parametrize("part", CONFIGS)
def test_a_config_is_a_mapping(part, raw):
    message = fault(lambda: CONFIGS[part].from_dict(raw, "here"), ConfigError)
    assert message == f"here holds a {type(raw).__name__}, not a JSON object"


def test_an_error_shows_a_huge_value_in_one_short_line():
    for value in ("x\n" * 100_000, [["y" * 1000] * 1000], {"a": {str(i): i for i in range(9999)}}):
        assert len(complaint("lm", {"vocab_size": value})) < 400


BOMBS = {
    b"[" * 100_000: "nested too deeply",
    b'{"a":' * 100_000: "nested too deeply",
    b'{"a":' * 60 + b"1" + b"}" * 60: "nested deeper than",
    b'{"a": ' + b"[" * 400 + b"]" * 400 + b"}": "nested deeper than",
    b'{"a": 1, "b": {"vocab_size": 1, "vocab_size": 2}}': "'vocab_size' is given twice",
    b'{"a": 1' + b"0" * 5000 + b"}": "is not valid JSON",
    b"\xef\xbb\xbf{}": "is not valid JSON",
}


@pytest.mark.parametrize(("content", "problem"), BOMBS.items())
def test_json_that_would_hurt_its_reader(tmp_path, content, problem):
    (tmp_path / "config.json").write_bytes(content)
    assert problem in fault(lambda: read_json(tmp_path / "config.json"), ConfigError)


def test_what_is_no_file_is_not_opened(tmp_path):
    made = {"FIFO": os.mkfifo, "folder": Path.mkdir}
    for name, make in made.items():
        make(tmp_path / name)
        assert f"it is a {name}" in fault(lambda name=name: read_json(tmp_path / name), ConfigError)
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "it is a device" in fault(lambda: read_json(tmp_path / "zero"), ConfigError)
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot read" in fault(lambda: read_json(tmp_path / "loop"), ConfigError)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path):
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 2**30)
    assert "1073741824 bytes" in fault(lambda: read_json(tmp_path / "hole"), ConfigError)


def published_codec(**changes: Any) -> dict[str, Any]:
    """The published codec's config.json, which states nothing of its rotary frequencies."""
    raw = read_json(PRESETS / "7b-codec.json") | changes
    del raw["rope_frequencies"]
    return raw


def test_the_published_codec_has_rounded_frequencies():
    assert CodecConfig.from_dict(published_codec()).rope_frequencies == "bfloat16"
    tuned = published_codec(max_audio_seconds=60, torch_dtype="float32")
    assert CodecConfig.from_dict(tuned).rope_frequencies == "bfloat16"
    for key, size in (("encoder_layers", 31), ("vocoder_dim", 512), ("num_quantizers", 8)):
        other = CodecConfig.from_dict(published_codec(**{key: size}))
        assert other.rope_frequencies == "exact", key


def test_what_states_its_frequencies_has_them():
    """So do all of ours: nano, its source, presets of other weights in the published dimensions."""
    training = Path(__file__).parents[1] / "training" / "nano"
    nano = PRESETS.parent / "assets" / "nano" / "codec" / "config.json"
    for path in (nano, PRESETS / "7b-codec.json", *training.glob("codec*.json")):
        assert read_json(path)["rope_frequencies"] == "exact", path
        assert CodecConfig.from_dict(read_json(path)).rope_frequencies == "exact"
    for stated in ("exact", "bfloat16"):
        for raw in (kit_config("codec"), published_codec()):
            config = CodecConfig.from_dict(raw | {"rope_frequencies": stated})
            assert config.rope_frequencies == stated
    # The kit states nothing, and null is nothing.
    assert parsed("codec").rope_frequencies == "exact"
    assert parsed("codec", rope_frequencies=None).rope_frequencies == "exact"
    assert CodecConfig.from_dict(published_codec() | {"rope_frequencies": None}) == (
        CodecConfig.from_dict(published_codec())
    )


@pytest.mark.parametrize("value", ["bf16", "", "Exact", True, 16, ["exact"], {"exact": 1}, [[2.5]]])
def test_frequencies_are_one_of_two_words(value):
    message = complaint("codec", {"rope_frequencies": value})
    assert "'rope_frequencies' must be 'exact' or 'bfloat16', not " in message


def test_frequencies_do_not_identify_a_codec():
    """Sessions that were saved before the field was there, or with the other ones, go on."""
    assert "rope_frequencies" not in repr(parsed("codec", rope_frequencies="bfloat16"))
