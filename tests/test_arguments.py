"""Unknown names are refused, with the near one; those of foreign objects warn once."""

import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import KIT_PAIR, fault

import mimo_fast
from mimo_fast import generation
from mimo_fast.arguments import names_of, suggestion
from mimo_fast.audio.files import DecodeLimits
from mimo_fast.generation import config_options
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.text.tasks import TASKS

CLASSES = (
    *(mimo_fast.MimoAudio, mimo_fast.Session, mimo_fast.Codec, mimo_fast.LM),
    *(mimo_fast.CodecConfig, mimo_fast.LMConfig, mimo_fast.MiMoSampler, mimo_fast.MiMoStopper),
    DecodeLimits,
)
FUNCTIONS = (
    *(mimo_fast.load, mimo_fast.generate, mimo_fast.accelerate),
    *(mimo_fast.load_audio, mimo_fast.save_wav),
)
RESULTS = {"Chunk", "ReplyText", "Timing"}
"""Public classes that callers get and do not make."""


def public_calls() -> dict[str, tuple[object, int]]:
    """Every public function, constructor and method: how to call it, and positions to leave out."""
    calls: dict[str, tuple[object, int]] = {each.__name__: (each, 0) for each in FUNCTIONS}
    for cls in CLASSES:
        calls[cls.__name__] = (cls.__init__, 1)
        for name, member in inspect.getmembers(cls):
            if inspect.ismethod(member):
                calls[f"{cls.__name__}.{name}"] = (member, 0)
            elif inspect.isfunction(member) and not name.startswith("_"):
                calls[f"{cls.__name__}.{name}"] = (member, 1)
    return calls


CALLS = public_calls()
OPEN = {"MimoAudio.stream", "MimoAudio.astream", "Session.astream"}
"""Those that take the arguments of others, and are tried on a model."""


def test_every_public_name_is_tried():
    tried = {each.__name__ for each in (*CLASSES, *FUNCTIONS)}
    errors = {name for name in mimo_fast.__all__ if name.endswith("Error")}
    assert tried - {"DecodeLimits"} == set(mimo_fast.__all__) - errors - RESULTS


@pytest.mark.parametrize("where", sorted(CALLS.keys() - OPEN))
def test_a_misspelt_name_is_refused_with_the_right_one(where):
    call, bound = CALLS[where]
    names = names_of(call, bool(bound))  # type: ignore[arg-type]
    assert names is not None, f"{where} takes any name"
    for name in names:
        wrong = f"{name}_x"
        message = fault(lambda wrong=wrong: call(*[None] * bound, **{wrong: 1}), TypeError)  # type: ignore
        assert f"{wrong!r}: did you mean {name!r}?" in message
    if not names:
        assert "it takes none" in fault(lambda: call(*[None] * bound, x=1), TypeError)  # type: ignore


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_seq_length", "max_seq_len"),
        ("kvcache", "kv_cache"),
        ("batch", "max_batch"),
        ("quantisation", "quantization"),
        ("local_files", "local_files_only"),
    ],
)
def test_options_of_load(wrong, right):
    for load in (mimo_fast.load, mimo_fast.MimoAudio):
        message = fault(lambda load=load: load(*KIT_PAIR, **{wrong: 64}), TypeError)
        assert f"has no argument {wrong!r}: did you mean {right!r}?" in message


@pytest.mark.parametrize("task", TASKS)
def test_arguments_of_streamed_tasks(model, task):
    for name in names_of(TASKS[task].prompt, bound=True) or ():
        for stream in (model.stream, model.astream):
            wrong = {f"{name}z": None}
            message = fault(lambda stream=stream, wrong=wrong: stream(task, **wrong), TypeError)
            assert f"did you mean {name!r}?" in message
    message = fault(lambda: model.stream(task, max_tokens=3), TypeError)
    assert message.endswith("did you mean 'max_new_tokens'?")


def test_arguments_of_a_dialogue(model):
    session = model.session()
    for stream in (session.stream, session.astream):
        message = fault(lambda stream=stream: stream(torch.zeros(9600), max_tokens=3), TypeError)
        assert message.endswith("did you mean 'max_new_tokens'?")
    assert session.turns == 0


def test_right_names_still_work(model, tmp_path):
    text = model.tts_sft("seven", tmp_path / "a.wav", max_new_tokens=2, seed=1)
    assert isinstance(text, str)
    assert mimo_fast.MiMoSampler(do_sample=True, top_k=3).top_k == 3
    signature = inspect.signature(mimo_fast.MimoAudio.tts_sft)
    assert list(signature.parameters)[:3] == ["self", "text", "output_path"]


def test_quantization():
    assert "did you mean 'backbone'?" in fault(
        lambda: QuantizationConfig.parse({"bakbone": "int4"}), ValueError
    )
    assert "did you mean 'int4" in fault(lambda: QuantizationConfig.parse("int-4"), ValueError)
    assert "did you mean 'int4-g64'?" in fault(
        lambda: QuantizationConfig.parse({"backbone": "int4-64"}), ValueError
    )
    assert "not 4" in fault(lambda: QuantizationConfig.parse(4), TypeError)  # type: ignore[arg-type]
    assert "did you mean 'text_embeddings'?" in fault(
        lambda: mimo_fast.load(*KIT_PAIR, offload=["text_embedding"]), ValueError
    )


def test_a_suggestion_is_near_or_lists_what_there_is():
    assert suggestion("temp", ["temperature", "top_k"]) == "did you mean 'temperature'?"
    assert suggestion("qqq", ["seed", "text"]) == "there are seed, text"


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(generation, "_warned", set())


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("form", [dict, SimpleNamespace])
def test_options_of_a_generation_config_warn_once(form):
    config = form(max_length=9, num_beams=4, repetition_penalty=None, eos_token_id=3)
    with pytest.warns(UserWarning, match="ignores the option 'num_beams'") as caught:
        assert config_options(config)["max_length"] == 9
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_options(config)


@pytest.mark.usefixtures("unwarned")
def test_transformers_own_config_warns_of_what_differs_from_its_defaults():
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_options(transformers.GenerationConfig(max_length=9, pad_token_id=1, eos_token_id=2))
    with pytest.warns(UserWarning, match="repetition_penalty"):
        config_options(transformers.GenerationConfig(max_length=9, repetition_penalty=1.3))
