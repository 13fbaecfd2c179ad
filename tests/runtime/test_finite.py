"""Weights and activations that are not finite: every reply and every recording that meets them ends
in an error that names the tensor, or the layer that overflows, and nothing beside it changes."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import (
    CODEC_TENSORS,
    GROUPS,
    LM_TENSORS,
    SAMPLED,
    broken_codec,
    broken_lm,
    by_kind,
    converse,
    prompt,
    recorded,
    recording,
    replaced,
    weights,
)
from helpers import KIT, altered_checkpoint
from replays import repeated
from replies import drawn
from torch import Tensor

import mimo_fast
from mimo_fast import LM, MimoAudio, NumericError
from mimo_fast.errors import AudioError
from mimo_fast.kernels.dispatch import ENVIRONMENT
from mimo_fast.quantization import QuantizationConfig, WeightSource
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.decode import Group, Limits
from mimo_fast.runtime.lm.executor import LayerByLayer
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.state import DecodeState

VALUES = ["nan", pytest.param("inf", marks=pytest.mark.slow)]
BACKENDS = ["native", pytest.param("torch", marks=pytest.mark.slow)]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv(ENVIRONMENT, "torch")
    return request.param


def held(name: str, value: float) -> str:
    return f"{name} holds 1 {'NaN' if math.isnan(value) else 'inf'}; "


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", by_kind(LM_TENSORS))
def test_a_tensor_of_the_language_model_is_named(
    model: MimoAudio, backend: str, name: str, value: str
) -> None:
    lm = broken_lm(model, name, float(value))
    assert isinstance(lm._executor.patch_decoder, LayerByLayer) == (backend == "torch")
    with pytest.raises(NumericError) as error:
        converse(lm, prompt(model))
    assert held(name, float(value)) in str(error.value)
    assert "load an intact copy of the checkpoint" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", by_kind(CODEC_TENSORS))
def test_a_tensor_of_the_codec_is_named(
    model: MimoAudio, backend: str, name: str, value: str
) -> None:
    codec, codes = broken_codec(model, name, float(value)), recorded(model.codec)

    def stream() -> None:
        chunks = codec.stream()
        chunks.push(codes)
        chunks.finish()

    encodes, decodes = name.startswith("encoder."), not name.startswith("encoder.")
    for call, fails in (
        (lambda: codec.encode(recording()), encodes),
        (lambda: codec.decode(codes), decodes or "codebook" in name),
        (stream, decodes or "codebook" in name),
    ):
        if fails:
            with pytest.raises(NumericError) as error:
                call()
            assert held(name, float(value)) in str(error.value)
        else:
            call()


def deaf(model: MimoAudio) -> tuple[LM, Tensor, Tensor]:
    """A model that one word drives mad, a prompt with the word and one without."""
    name = "model.embed_tokens.weight"
    mad = prompt(model)
    sane = mad.clone()
    word, other = int(mad[0, 0]), int(mad[0, 2 * model.lm.config.group_size])
    sane[0][sane[0] == word] = other
    source = replaced("lm", name, (word, slice(None)), math.nan)
    return LM(model.lm.config, model.lm.empty_id, source), mad, sane


class Alone:
    """Stands in for a conditional graph."""

    def __init__(self, step: Any, patch: Any, tokens: Tensor, slots: Tensor, *ids: int) -> None:
        self._parts, self._tokens = (step, patch), tokens

    def launch(self) -> None:
        for part in self._parts:
            part()

    def wait(self) -> list[int]:
        return self._tokens.tolist()


def engine_of(lm: LM, how: str, slots: int) -> Engine:
    """An engine on a CPU, or as a GPU's: graphs, codes that the host does not look at, prediction,
    and the next group launched before the last has been read."""
    engine = Engine(lm, slots, 2 * GROUPS)
    if how != "host":
        join = Alone if how == "joined graphs" else None
        engine.decoder.graphs = Graphs(lm, engine.state, repeated, join)
        engine.decoder.predict, engine.decoder.check_codes, engine.overlaps = True, False, True
    return engine


def start(engine: Engine, ids: Tensor, seed: int = 7) -> Any:
    sequence = engine.sequence(seed)
    sequence.add(ids)
    return engine.start(sequence, Limits(12), SAMPLED, ahead=None)


@pytest.mark.parametrize("how", ["host", "graphs", "joined graphs"])
def test_rows_beside_it_and_after_it_are_what_they_are_alone(model: MimoAudio, how: str) -> None:
    lm, mad, sane = deaf(model)
    alone = [drawn(list(start(engine_of(lm, how, 1), sane, seed))) for seed in (1, 2, 3)]
    engine = engine_of(lm, how, 3)
    first, lost, last = (start(engine, ids, seed) for ids, seed in ((sane, 1), (mad, 9), (sane, 2)))
    with pytest.raises(NumericError, match="logits of group 1 of the reply are not finite"):
        next(lost)
    slot = lost._request.sequence.slot
    assert drawn(list(first)) == alone[0]
    assert drawn(list(last)) == alone[1]
    # Its slot holds NaN, and the next one gets it.
    for reply in (lost, first, last):
        reply.close()
    later = [start(engine, sane, 3) for _ in range(3)]
    for reply in later:
        assert drawn(list(reply)) == alone[2]
    assert slot in {reply._request.sequence.slot for reply in later}
    assert not engine._requests


@pytest.mark.parametrize("how", ["graphs", "joined graphs"])
@pytest.mark.parametrize(
    "name",
    [
        "local_transformer.layers.1.self_attn.v_proj.weight",
        "local_transformer_lm_heads.5.weight",
        "hidden_states_downcast.weight",
    ],
)
def test_codes_that_the_host_does_not_see_show_in_the_next_group(
    model: MimoAudio, how: str, name: str
) -> None:
    lm = broken_lm(model, name)
    engine = engine_of(lm, how, 2)
    reply, groups = start(engine, prompt(model)), list[Group]()

    def read() -> None:
        for group in reply:
            groups.append(group)

    with pytest.raises(NumericError) as error:
        read()
    assert groups[-1].text == lm.empty_id
    assert (groups[-1].codes == -1).any()
    assert held(name, math.nan) in str(error.value)
    assert f"the codes of group {len(groups)} of the reply" in str(error.value)


def test_a_last_group_is_looked_at_where_it_is_returned(model: MimoAudio) -> None:
    """`generate` has the codes of a group that no other follows."""
    lm = broken_lm(model, "local_transformer.norm.weight")
    engine, ids = engine_of(lm, "graphs", 1), prompt(model)

    class Loaded:
        pass

    loaded = Loaded()
    loaded.lm, loaded.engine = lm, engine
    spoke = [group.text == lm.empty_id for group in start(engine_of(model.lm, "host", 1), ids)]
    first = spoke.index(True)

    def generated(count: int) -> Tensor:
        sampler = SAMPLED.text
        return mimo_fast.generate(loaded, ids, max_new_tokens=count, global_sampler=sampler, seed=7)

    assert not first or (generated(first)[1:] >= 0).all()
    with pytest.raises(NumericError) as error:
        generated(first + 1)
    assert held("local_transformer.norm.weight", math.nan) in str(error.value)


def test_a_prompt_with_speech_that_could_not_be_drawn_fails(model: MimoAudio) -> None:
    """As a dialogue whose last reply ended in it would."""
    engine = engine_of(model.lm, "graphs", 1)
    sequence = engine.sequence(1)
    sequence.add(prompt(model))
    codes = torch.zeros(model.lm.config.channels, model.lm.config.group_size, dtype=torch.int64)
    codes[2, 1] = -1
    sequence.append(model.lm.empty_id, codes)
    with pytest.raises(NumericError, match="the codes of an earlier reply are not finite"):
        list(engine.start(sequence, Limits(3), SAMPLED))


STREAMED = ["model.layers.0.self_attn.q_proj.bias", "local_transformer_lm_heads.0.weight"]


def pipeline_with(model: MimoAudio, **parts: Any) -> MimoAudio:
    """The kit's model with another language model or codec."""
    twin = copy.copy(model)
    for name, part in parts.items():
        setattr(twin, name, part)
    return twin


@pytest.mark.parametrize("name", STREAMED)
def test_streams_end_with_the_error(model: MimoAudio, name: str) -> None:
    broken = pipeline_with(model, lm=broken_lm(model, name))
    with pytest.raises(NumericError, match=name):
        list(broken.stream("tts", "Hello there.", seed=1, max_new_tokens=60))
    with pytest.raises(NumericError, match=name):
        broken.tts_sft("Hello there.", None, seed=1, max_new_tokens=60)


def test_streams_of_a_broken_codec_end_with_the_error(model: MimoAudio) -> None:
    name = "decoder.vocoder.layers.1.fc1.bias"
    broken = pipeline_with(model, codec=broken_codec(model, name))
    with pytest.raises(NumericError, match=f"the codec's samples are not finite: {name}"):
        list(broken.stream("tts", "Hello there.", seed=1, max_new_tokens=60))
    name = "encoder.layers.1.fc1.bias"
    broken = pipeline_with(model, codec=broken_codec(model, name))
    with pytest.raises(NumericError, match=f"encoder gives values that are not finite: {name}"):
        broken.asr_sft(KIT / "audio" / "en_m_24k.wav", max_new_tokens=4)


def test_a_waveform_that_is_not_finite_is_the_caller_s_fault(model: MimoAudio) -> None:
    wav = recording().clone()
    wav[700] = math.nan
    with pytest.raises(AudioError, match="the waveform holds NaN"):
        model.codec.encode(wav)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1"),
        ("model.layers.0.self_attn.o_proj.weight", "model.layers.0"),
        (
            "input_local_transformer.layers.1.mlp.down_proj.weight",
            "input_local_transformer.layers.1",
        ),
        ("local_transformer.layers.0.mlp.down_proj.weight", "local_transformer.layers.0"),
        ("local_transformer_lm_heads.1.weight", "local_transformer_lm_heads.1"),
        ("speech_group_downcast.weight", "speech_group_downcast"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_a_layer_that_overflows_float16_is_named(model: MimoAudio, name: str, layer: str) -> None:
    tensors = dict(weights("lm"))
    tensors[name] = tensors[name] / tensors[name].abs().max() * 60000
    lm = LM(
        model.lm.config,
        model.lm.empty_id,
        WeightSource(tensors.__getitem__, torch.float16),
    )
    with pytest.raises(NumericError) as error:
        converse(lm, prompt(model))
    told = f"the result of {layer} is the first that is not finite in float16"
    assert told in str(error.value)
    assert "every weight is finite" in str(error.value)
    assert "load it with dtype='bfloat16' or 'float32'" in str(error.value)


def test_a_weight_beyond_float16_is_infinite_as_loaded(model: MimoAudio) -> None:
    source = replaced("lm", "model.layers.0.mlp.up_proj.weight", (3, 5), 1e6)
    source = WeightSource(source._read, torch.float16)
    with pytest.raises(NumericError, match=r"up_proj.weight holds 1 inf; .*dtype='bfloat16'"):
        converse(LM(model.lm.config, model.lm.empty_id, source), prompt(model))


@pytest.mark.parametrize("part", ["decoder.layers.1.fc2.weight", "encoder.layers.0.fc2.weight"])
def test_a_layer_of_the_codec_that_overflows_is_named(model: MimoAudio, part: str) -> None:
    tensors = dict(weights("codec"))
    tensors[part] = tensors[part] / tensors[part].abs().max() * 60000
    source = WeightSource(tensors.__getitem__, torch.float16)
    codec = Codec(model.codec.config, source, WeightSource(tensors.__getitem__, torch.float32))
    layer = part.removesuffix(".fc2.weight")
    with pytest.raises(NumericError, match=f"the result of {layer} is the first that is not"):
        codec.decode(recorded(model.codec)) if "decoder" in part else codec.encode(recording())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("int8", "scales"), ("int4", "scales"), ("nf4", "scales")),
        *(("int4", "zeros"), ("int4-g32", "zeros")),
    ],
)
def test_scales_of_a_quantized_matrix_are_named(
    model: MimoAudio, kind: str, dtype: torch.dtype, field: str
) -> None:
    """One of a row of the second of three joined matrices."""
    chosen = QuantizationConfig.parse({"backbone": kind})
    assert chosen is not None
    source = WeightSource(weights("lm").__getitem__, dtype, requested=chosen)
    lm = LM(model.lm.config, model.lm.empty_id, source)
    qkv: Any = lm.backbone.layers[1].qkv
    row = model.lm.config.backbone.heads * model.lm.config.backbone.head_dim + 3
    getattr(qkv, field)[row, 0] = math.nan
    if qkv.torch_scales is not None:
        qkv.torch_scales[row if qkv.bits == 8 else (0, row)] = math.nan
    with pytest.raises(NumericError) as error:
        converse(lm, prompt(model))
    assert f"model.layers.1.self_attn.k_proj.weight.{field} holds 1 NaN" in str(error.value)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_matrix_that_cannot_be_quantized_is_named(
    model: MimoAudio, kind: str, value: float
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    source = replaced("lm", name, (3, 5), value)
    requested = QuantizationConfig.parse(kind)
    source = WeightSource(source._read, torch.float32, requested=requested)
    with pytest.raises(ValueError, match=f"{name} holds values that are not finite"):
        LM(model.lm.config, model.lm.empty_id, source)


def test_what_does_not_recur_is_said(model: MimoAudio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that errs once: all weights are finite, and so are the results when repeated."""
    step, steps = LM.step, [0]

    def erring(lm: LM, state: DecodeState, slots: Tensor) -> None:
        step(lm, state, slots)
        steps[0] += 1
        if steps[0] == 3:
            state.hidden[slots] = math.nan

    monkeypatch.setattr(LM, "step", erring)
    with pytest.raises(NumericError) as error:
        converse(model.lm, prompt(model))
    assert "group 4 of the reply" in str(error.value)
    assert "so are the results when computed again" in str(error.value)


def test_the_command_line_fails(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    lm, codec = altered_checkpoint(tmp_path / "pair", "lm", name, (1, 2), math.nan)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mimo_fast", "asr", KIT / "audio" / "en_m_24k.wav"),
            *("--model", lm, "--codec", codec, "--device", "cpu", "--max-tokens", "4"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("mimo-fast: error: ")
    assert f"{name} holds NaN or infinite values" in last
