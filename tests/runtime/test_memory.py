"""The memory planner: figures from shapes, and errors that name what would fit."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers import ADAPTERS, KIT_PAIR, fault

import mimo_fast
from mimo_fast.bench.machine import describe_checkpoint
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.memory import GB, OFFLOADABLE, Setup, check_memory, fitting, largest_batch


def preset(quantization: str | None = None, **options: object) -> Setup:
    """The published dimensions in bfloat16."""
    folder = Path(str(files("mimo_fast") / "presets"))
    lm = LMConfig.from_dict(read_json(folder / "7b-lm.json"))
    codec = CodecConfig.from_dict(read_json(folder / "7b-codec.json"))
    chosen = QuantizationConfig.parse(quantization)
    formats = chosen.formats(lm_shapes(lm)) if chosen else {}
    return Setup(lm, codec, torch.bfloat16, torch.bfloat16, formats, **options)


def test_the_published_model_fits_small_cards():
    smallest = {"kv_cache": "int8", "offload": frozenset(OFFLOADABLE)}
    assert preset("int4", graphs=True).total <= 10 * GB
    assert preset("int4", graphs=True, **smallest).total <= 8 * GB


def test_the_cache_is_counted_to_the_byte(model):
    config = model.lm.config
    for slots, quantized in ((1, False), (3, True)):
        state = model.lm.new_state([0] * slots, 40, quantized)
        counted = replace(
            model.setup, max_batch=slots, max_seq_len=40, kv_cache="int8" if quantized else None
        ).bytes()["cache"]
        held = state.cache.nbytes + state.patch_cache.nbytes
        held += state.banned.nbytes + 2 * state.hidden.nbytes
        assert counted - held == 40 * config.backbone.head_dim * 4


def test_the_states_of_streams_are_counted_to_the_byte_where_they_are_kept(model):
    setup, codec = replace(model.setup, max_batch=3), model.codec
    # Here an exact stream holds back ten patches and an elastic one two: each has its own pool, and
    # in it a row more, which pads graphs.
    held = 4 * (codec.stream().nbytes + codec.stream("elastic").nbytes)
    assert replace(setup, graphs=True).total - setup.total == held
    assert not setup.graphs
    assert preset(max_batch=4, graphs=True).total - preset(max_batch=4).total == 5 * 95_650_112
    endless = replace(setup, codec=replace(setup.codec, decoder_causal=False))
    assert replace(endless, graphs=True).total == endless.total


@pytest.mark.parametrize("free", [22, 16, 12, 9, 7.2])
def test_the_settings_named_do_fit_and_none_is_idle(free):
    setup = preset(max_batch=4)
    message = fault(lambda: check_memory(setup, int(free * GB), "the GPU"), DeviceMemoryError)
    assert f"the GPU has {free:.1f} GB free" in message
    named = fitting(setup, int(free * GB))
    assert f"{', '.join(named)} would fit" in message

    def total(names: list[str]) -> int:
        changed = setup
        for name in names:
            key, value = name.split("=")
            value = eval(value)
            if key == "quantization":
                key, value = "formats", QuantizationConfig.parse(value).formats(lm_shapes(setup.lm))
            changed = replace(changed, **{key: frozenset(value) if key == "offload" else value})
        return changed.total

    assert named
    assert total(named) <= free * GB
    for name in named:
        assert total([other for other in named if other != name]) > free * GB


def test_a_device_far_too_small():
    with pytest.raises(DeviceMemoryError, match="no setting would fit"):
        check_memory(preset(), 2 * GB, "the GPU")


def test_as_many_slots_as_fit():
    setup = preset("int4")
    batches = [largest_batch(setup, int(free * GB)) for free in (5, 9.5, 11, 12.2, 40)]
    assert batches == [1, 1, 2, 3, 4]


def test_options_reach_the_engine():
    options = {"max_batch": 2, "max_seq_len": 50, "kv_cache": "int8", "offload": OFFLOADABLE}
    model = mimo_fast.load(*KIT_PAIR, device="cpu", **options)
    state = model.engine.state
    assert (state.slots, state.capacity, state.cache.k.dtype) == (2, 50, torch.int8)
    with pytest.raises(mimo_fast.PromptError, match="the model's context is 50"):
        model.session().stream(torch.zeros(24000 * 10))
    assert model.warmup(progress=False).keys() == {"weights", "codec", "cache", "work"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 100000}, r"the model's 8192 groups \(1310.7 s\), not 100000"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"kv_cache": "fp4"}, "kv_cache must be 'int8' or None, not 'fp4'"),
        ({"offload": ["everything"]}, "nothing called everything to offload"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        mimo_fast.load(*KIT_PAIR, device="cpu", **options)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr("mimo_fast.runtime.loading.free_bytes", lambda _: 10**6)
    monkeypatch.setattr("mimo_fast.runtime.loading.LM", None)
    with pytest.raises(DeviceMemoryError, match=r"the machine has 0\.0 GB free"):
        mimo_fast.load(*KIT_PAIR, device="cpu")


def test_an_int8_cache_changes_little(model):
    prompt = model.pack(["The quick brown fox."])
    engines = [Engine(model.lm, 1, 64, quantized_cache=quantized) for quantized in (False, True)]
    hidden = []
    for engine in engines:
        model.lm.prefill(prompt, engine.state, 0)
        model.lm.stage(engine.state, 0, 5, model.lm.empty_codes[:, None].expand(-1, 4))
        model.lm.step(engine.state, engine.state.rows[:1])
        hidden.append(engine.state.hidden[0])
    error = (hidden[1] - hidden[0]).norm() / hidden[0].norm()
    assert 0 < error < 0.02


def test_graphs_are_planned_where_they_are_captured():
    plain = preset("int4")
    assert "graphs" not in plain.bytes()
    captured = [
        replace(plain, graphs=True, prompt_graphs=prompts, encoder_graphs=encoder).bytes()["graphs"]
        for prompts, encoder in ((False, False), (True, False), (False, True), (True, True))
    ]
    assert captured[0] == 0
    assert captured[3] == captured[1] + captured[2]
    assert GB / 10 < captured[1] < GB
    # 16 s of speech: 800 rows of 15,360 values, of two bytes, and what precedes them.
    assert 800 * 15360 * 2 < captured[2] < GB / 8
    off = replace(plain, graphs=True, encoder_graphs=True, offload=frozenset({"codec_encoder"}))
    assert off.bytes()["graphs"] == 0


def test_info_says_what_graphs_may_take(kit):
    for kind, text in (("lm", "in 10 s and 1,000 MB"), ("codec", "of up to 16 s")):
        *_, line = describe_checkpoint(kit / "checkpoint" / kind, kind, {})
        assert text in line


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("kind", ["qkvo", "dora_rslora", "all_linear_saved", "heads_embeddings"])
def test_adapters_are_counted(kind, quantization):
    """What a variant holds of its own; of a matrix that is stacked with others all of it."""
    options = {"adapters": {kind: ADAPTERS / kind}, "merge_adapters": False, "device": "cpu"}
    with mimo_fast.load(*KIT_PAIR, quantization=quantization, **options) as model:
        parts, held = model.setup.bytes(), model.lm.adapter_nbytes
        assert held <= parts["adapters"] <= 1.1 * held + 4096
        plain = replace(model.setup, adapters=())
        assert "adapters" not in plain.bytes()
        assert model.setup.total - plain.total == parts["adapters"]


def test_an_adapter_that_does_not_fit_is_said(model, tuned):
    setup = tuned.setup
    message = fault(lambda: check_memory(setup, setup.total - 1, "here"), DeviceMemoryError)
    assert ", adapters 0.0, codec " in message
    assert "adapters" not in model.setup.bytes()
