"""Unknown names and values of other types are refused; names of foreign objects warn once."""

import inspect
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import KIT_PAIR, fault

import mimo_fast
from mimo_fast import generation
from mimo_fast.arguments import UNFIT, _described, _Rules, names_of, suggestion
from mimo_fast.audio.files import DecodeLimits
from mimo_fast.audio.resample import check_rate
from mimo_fast.errors import AudioError
from mimo_fast.generation import config_options
from mimo_fast.quantization import QuantizationConfig
from mimo_fast.sampling import check_seed
from mimo_fast.text.tasks import TASKS, find_task

CLASSES = (
    mimo_fast.DecodeLimits,
    *(mimo_fast.MimoAudio, mimo_fast.Session, mimo_fast.Codec, mimo_fast.LM, mimo_fast.Converter),
    *(mimo_fast.CodecConfig, mimo_fast.LMConfig, mimo_fast.MiMoSampler, mimo_fast.MiMoStopper),
    DecodeLimits,
)
FUNCTIONS = (
    *(mimo_fast.load, mimo_fast.generate, mimo_fast.accelerate),
    *(mimo_fast.load_audio, mimo_fast.prepare_speech, mimo_fast.save_wav, mimo_fast.batch),
    mimo_fast.convert,
)
RESULTS = {"BatchResult", "Chunk", "Conversion", "ReplyText", "Timing"}
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
OPEN = {"MimoAudio.stream", "MimoAudio.astream", "Session.astream", "batch"}
"""Those that take the arguments of others, and are tried on a model."""


def test_every_public_name_is_tried():
    tried = {each.__name__ for each in (*CLASSES, *FUNCTIONS)}
    errors = {name for name in mimo_fast.__all__ if name.endswith("Error")}
    assert tried == set(mimo_fast.__all__) - errors - RESULTS


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
        ("rope", "codec_rope"),
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


IDS = torch.zeros(9, 8, dtype=torch.int64)
NOISE = torch.zeros(9600)
WRONG = {
    "text": (lambda m: m.tts_sft(5, None), "MimoAudio.tts_sft: text must be a str, not 5"),
    "option": (
        lambda m: m.tts_sft("a", None, max_new_tokens="many"),
        "MimoAudio.tts_sft: max_new_tokens must be an int or None, not 'many'",
    ),
    "flag": (
        lambda m: m.text_dialogue_sft("a", "yes"),
        "MimoAudio.text_dialogue_sft: thinking must be True or False, not 'yes'",
    ),
    "two": (
        lambda m: m.text_dialogue_sft("a", 2),
        "MimoAudio.text_dialogue_sft: thinking must be True or False, not 2",
    ),
    "streamed": (lambda m: m.stream("tts", 3), "stream('tts'): input must be a str, not 3"),
    "streamed name": (lambda m: m.stream(3, "a"), "MimoAudio.stream: task must be a str, not 3"),
    "messages": (
        lambda m: m.text_dialogue_sft_multiturn(["a"]),
        "message_list must be a Sequence of Mapping, not a list of str",
    ),
    "segments": (
        lambda m: m.pack(["a", None]),
        "segments must be an Iterable of str or UserText or Joined or Speech or SpokenReply, "
        "not a list of str, NoneType",
    ),
    "ids": (lambda m: m.forward(None), "MimoAudio.forward: input_ids must be a Tensor, not None"),
    "lists": (
        lambda m: mimo_fast.generate(m, [[1, 2], [3, 4]]),
        "input_ids must be a Tensor or a Sequence of Tensor, not a list of list",
    ),
    "sampler": (
        lambda m: mimo_fast.generate(m, IDS, global_sampler={"top_k": 3}),
        "generate: global_sampler must be a Sampler or None, not a dict of str",
    ),
    "stop ids": (
        lambda m: m.decode(m.conversation(), "tts", frozenset(["a"])),
        "stop_ids must be a frozenset of int, not a frozenset of str",
    ),
    "voice": (
        lambda m: m.session(system_prompt=["a"]),
        "MimoAudio.session: system_prompt must be a str or None, not a list of str",
    ),
    "played": (
        lambda m: m.session().interrupt("all"),
        "Session.interrupt: played_ms must be a number, not 'all'",
    ),
    "path": (
        lambda m: m.restore_session(3),
        "MimoAudio.restore_session: path must be a str or a path, not 3",
    ),
    "rate": (
        lambda m: mimo_fast.load_audio(NOISE, 24000.0),
        "load_audio: sample_rate must be an int, not 24000.0",
    ),
    "source rate": (
        lambda m: mimo_fast.load_audio(NOISE, 24000, source_rate="1"),
        "load_audio: source_rate must be an int or None, not '1'",
    ),
    "limits": (
        lambda m: mimo_fast.load_audio(NOISE, 24000, limits=3),
        "load_audio: limits must be a DecodeLimits, not 3",
    ),
    "output": (lambda m: m.tts_sft("a", 3), "an object of type int; pass a path"),
    "loaded": (
        lambda m: mimo_fast.load(*KIT_PAIR, max_batch=1.5),
        "load: max_batch must be an int or None, not 1.5",
    ),
    "moments": (
        lambda m: m.codec.stream(2, (1, 2)),
        "Codec.stream: moments must be a NormStatistics or None, not a tuple of int",
    ),
    "a tensor": (
        lambda m: m.tts_sft(NOISE, None),
        "MimoAudio.tts_sft: text must be a str, not a Tensor",
    ),
    "missing": (lambda m: m.asr_sft(), "MimoAudio.asr_sft: missing a required argument: 'audio'"),
    "many": (lambda m: m.conversation(1, "a", 2), "MimoAudio.conversation: too many positional"),
    "twice": (
        lambda m: m.conversation(1, seed=2),
        "MimoAudio.conversation: multiple values for argument 'seed'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_another_type_is_refused(model, case):
    call, message = WRONG[case]
    assert message in fault(lambda: call(model), TypeError)


def test_a_broken_reply_is_not_stopped_at_no_number(model):
    with pytest.raises(ValueError, match="not NaN"):
        model.session().interrupt(float("nan"))


def test_values_of_numpy_and_of_tensors_are_pythons(model):
    take = partial(model.stream, "text_dialogue", "a")
    said = [chunk.text for chunk in take(max_new_tokens=3, seed=1)]
    for three in (np.int32(3), np.uint8(3), torch.tensor(3)):
        for add_history in (np.bool_(False), 0, np.int64(0)):
            given = take(max_new_tokens=three, seed=1, add_history=add_history)
            assert [chunk.text for chunk in given] == said
    assert mimo_fast.MiMoSampler(np.bool_(True), np.float32(0.5), np.int8(3), 1).temperature == 0.5
    assert type(mimo_fast.MiMoSampler(temperature=np.float32(0.5)).temperature) is float
    assert mimo_fast.MiMoStopper(4, 8, torch.tensor([1, 2])).stop_token_ids == {1, 2}
    assert mimo_fast.MiMoStopper(4, 8, iter([1, 2])).stop_token_ids == {1, 2}


def test_every_public_annotation_can_be_read():
    """One that cannot would be found by the first caller only."""
    for where, (call, bound) in CALLS.items():
        rules = _Rules(call, where, bool(bound))  # type: ignore[arg-type]
        for name, (convert, hint) in rules.converters.items():
            assert convert(odd := object()) is UNFIT, f"{where} takes any {name}"
            assert _described(hint), odd


def test_right_names_still_work(model, tmp_path):
    text = model.tts_sft("seven", tmp_path / "a.wav", max_new_tokens=30, min_new_tokens=30, seed=1)
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


def test_a_message_shows_a_foreign_value_in_one_short_line():
    """An array's repr has as many lines as rows."""
    vast = np.ones((9, 9), dtype=np.int64)
    calls = [
        lambda: mimo_fast.load(*KIT_PAIR, device="cpu", quantization=vast),
        lambda: mimo_fast.load(*KIT_PAIR, device="cpu", quantization="int4" * 1000),
        lambda: mimo_fast.load(*KIT_PAIR, device="cpu", dtype="int4" * 1000),
        lambda: check_seed(vast),
        lambda: find_task("asr" * 1000),
        lambda: check_rate(vast),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError, AudioError)) as caught:
            call()
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)
