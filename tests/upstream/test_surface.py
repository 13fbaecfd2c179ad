"""Upstream's public names are here, with signatures and results, or in docs/differences.md."""

import copy
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import AUDIO

import mimo_fast
import mimo_fast.upstream
from mimo_fast import MimoAudio, load_audio

NAMES = json.loads((Path(__file__).parent / "names.json").read_text(encoding="utf-8"))
CLASSES: dict[str, dict[str, Any]] = NAMES["classes"]
DOCUMENT = Path(__file__).parents[2] / "docs" / "differences.md"

OURS: dict[str, Callable[[MimoAudio], Any]] = {
    "MimoAudio": lambda model: model,
    "MiMoStopper": lambda model: mimo_fast.MiMoStopper(4, 8),
    "MiMoSampler": lambda model: mimo_fast.MiMoSampler(),
    "MiMoAudioConfig": lambda model: model.model.config,
    "MiMoAudioArguments": lambda model: model.model.args,
    "MiMoAudioForCausalLM": lambda model: model.model,
    "InputSegment": lambda model: mimo_fast.upstream.InputSegment(),
    "StreamingInputSegment": lambda model: mimo_fast.upstream.StreamingInputSegment(),
    "StreamingConfig": lambda model: mimo_fast.upstream.StreamingConfig(),
    "StreamingCache": lambda model: mimo_fast.upstream.StreamingCache(),
    "AudioEncoder": lambda model: model.mimo_audio_tokenizer.encoder,
    "MiMoAudioTokenizer": lambda model: model.mimo_audio_tokenizer,
    "MiMoAudioTokenizerConfig": lambda model: model.mimo_audio_tokenizer.config,
}
"""Where each of upstream's classes is."""


@pytest.fixture
def model(model: MimoAudio) -> MimoAudio:
    """The kit's, with a history of its own."""
    return copy.copy(model)


def table(title: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    text = DOCUMENT.read_text(encoding="utf-8")
    part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


ABSENT, DIFFERENT = table("Not there"), table("There, and different")

METHODS = [(kind, method) for kind, members in CLASSES.items() for method in members["methods"]]
ATTRIBUTES = [(kind, name) for kind, members in CLASSES.items() for name in members["attributes"]]


def named() -> Iterator[str]:
    """Every name of upstream's that the tables may have."""
    for names in NAMES["modules"].values():
        yield from names
    for kind, name in (*METHODS, *ATTRIBUTES):
        yield f"{kind}.{name}"


def test_the_tables_name_upstreams_names_once():
    assert len(ABSENT) > 40
    assert len(DIFFERENT) > 30
    assert not ABSENT & DIFFERENT
    assert set(named()) >= ABSENT | DIFFERENT


@pytest.mark.parametrize("module", NAMES["modules"])
def test_what_a_module_defines(module):
    for name in NAMES["modules"][module]:
        here = name in CLASSES or hasattr(mimo_fast.upstream, name)
        assert here != (name in ABSENT), name
    for name, members in CLASSES.items():
        assert name in NAMES["modules"][members["file"]]
    assert set(OURS) == set(CLASSES)


def given(thing: Any, method: str) -> Any:
    """A method, or for a constructor the class."""
    return type(thing) if method == "__init__" else getattr(thing, method, None)


def same_default(ours: Any, theirs: str | None) -> bool:
    """Whether a parameter that may be left out upstream may be left out here, with that value."""
    if theirs is None:
        return True
    if theirs.endswith("()"):
        return type(ours).__name__ == theirs[:-2]
    return bool(ours == eval(theirs)) and type(ours) is type(eval(theirs))


def takes(function: Any, wanted: list[list[Any]]) -> bool:
    """Whether a function takes upstream's parameters, in order, and needs no other."""
    parameters = [
        each
        for each in inspect.signature(function).parameters.values()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    ours = parameters[: len(wanted)]
    return (
        [each.name for each in ours] == [name for name, _ in wanted]
        and all(same_default(p.default, d) for p, (_, d) in zip(ours, wanted, strict=True))
        and all(each.default is not each.empty for each in parameters[len(wanted) :])
    )


@pytest.mark.parametrize(("kind", "method"), METHODS)
def test_a_method_is_there_with_upstreams_parameters(model, kind, method):
    wanted, found = CLASSES[kind]["methods"][method], given(OURS[kind](model), method)
    fits = found is not None and callable(found) and takes(found, wanted)
    name = f"{kind}.{method}"
    if name in ABSENT:
        assert not fits, f"{name} is here: the table is wrong"
    else:
        assert found is not None, f"{name} is neither here nor in the table"
        assert fits or name in DIFFERENT, f"{name}{inspect.signature(found)}, not {wanted}"


@pytest.mark.parametrize(("kind", "name"), ATTRIBUTES)
def test_an_attribute_is_there(model, kind, name):
    thing = OURS[kind](model)
    # Upstream's config stands beside a method of the same name.
    there = hasattr(thing, name)
    assert there != (f"{kind}.{name}" in ABSENT), f"{kind}.{name}"


def test_signatures_that_differ_are_few(model):
    """The second table is about behaviour: of signatures it excuses this one."""
    differ = [
        f"{kind}.{method}"
        for kind, method in METHODS
        if f"{kind}.{method}" not in ABSENT
        and not takes(given(OURS[kind](model), method), CLASSES[kind]["methods"][method])
    ]
    assert differ == ["MiMoAudioTokenizer.streaming_decode"]


@pytest.mark.parametrize(
    "wanted",
    [
        [["b", None], ["a", "1"]],
        [["a", None], ["b", "2"]],
        [["a", None], ["b", "1"], ["c", None]],
        [["a", None], ["b", "True"]],
        [["a", "1"], ["b", "1"]],
    ],
)
def test_the_check_of_signatures_can_fail(wanted):
    def ours(a: int, b: int = 1, *, more: int = 2, **rest: int) -> None: ...

    assert takes(ours, [["a", None], ["b", "1"]])
    assert not takes(ours, wanted)


def tensor(dtype: torch.dtype, *shape: int) -> Callable[[Any], bool]:
    """Of this dtype and shape, where -1 is any size."""

    def fits(value: Any) -> bool:
        alike = isinstance(value, torch.Tensor) and value.dtype == dtype
        sizes = zip(shape, value.shape, strict=False)
        return alike and value.ndim == len(shape) and all(w in (-1, n) for w, n in sizes)

    return fits


def of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


Result = tuple[Callable[..., Any], Callable[[Any], bool]]
LONG, INT, REAL = torch.int64, torch.int32, torch.float32
SPEECH = load_audio(AUDIO, 24000)[:24000]
MEL = torch.randn(101, 128, generator=torch.Generator().manual_seed(0)) - 4
TURN = {"role": "user", "content": SPEECH}
EXAMPLE = {"input_audio": SPEECH, "output_audio": SPEECH, "output_transcription": "hello"}
CODES = torch.zeros(8, 5, dtype=LONG)
ROWS = torch.tensor([60, 41])

RESULTS: dict[str, Result] = {
    "get_task_sampler": (lambda m: m.get_task_sampler("tts"), of(dict)),
    "wav2mel": (lambda m: m.wav2mel(SPEECH), tensor(REAL, 128, 101)),
    "mel_transform": (lambda m: m.mel_transform(SPEECH[None]), tensor(REAL, 1, 128, 101)),
    "resample": (lambda m: m.resample_audio_if_needed(SPEECH, 16000), tensor(REAL, 36000)),
    "resample channels": (
        lambda m: m.resample_audio_if_needed(SPEECH[None], 48000),
        tensor(REAL, 1, 12000),
    ),
    "the same rate": (
        lambda m: m.resample_audio_if_needed(SPEECH, 24000),
        lambda value: value is SPEECH,
    ),
    "group_by_length": (lambda m: m.group_by_length(MEL, ROWS, 70), of(tuple)),
    "encode_batch": (lambda m: m.encode_batch(MEL, ROWS), tensor(LONG, 12, 26)),
    "preprocess_input": (lambda m: m.preprocess_input(SPEECH), tensor(LONG, 28 * 8)),
    "preprocess_input of a text": (lambda m: m.preprocess_input("hi"), "Hi".__eq__),
    "asr prompt": (lambda m: m.get_asr_sft_prompt(SPEECH), tensor(LONG, 9, -1)),
    "tts prompt": (lambda m: m.get_tts_sft_prompt("hi"), tensor(INT, 9, -1)),
    "cloning prompt": (
        lambda m: m.get_tts_sft_prompt("hi", "fast", True, SPEECH),
        tensor(LONG, 9, -1),
    ),
    "understanding prompt": (
        lambda m: m.get_audio_understanding_sft_prompt(SPEECH, "hi"),
        tensor(LONG, 9, -1),
    ),
    "dialogue prompt": (lambda m: m.get_spoken_dialogue_sft_prompt(SPEECH), tensor(LONG, 9, -1)),
    "dialogue of turns prompt": (
        lambda m: m.get_spoken_dialogue_sft_multiturn_prompt([TURN]),
        tensor(LONG, 9, -1),
    ),
    "s2t prompt": (lambda m: m.get_s2t_dialogue_sft_prompt(SPEECH), tensor(LONG, 9, -1)),
    "s2t of turns prompt": (
        lambda m: m.get_s2t_dialogue_sft_multiturn_prompt([TURN]),
        tensor(LONG, 9, -1),
    ),
    "text prompt": (lambda m: m.get_text_dialogue_sft_prompt("hi"), tensor(INT, 9, -1)),
    "text of turns prompt": (
        lambda m: m.get_text_dialogue_sft_multiturn_prompt([TURN | {"content": "hi"}]),
        tensor(INT, 9, -1),
    ),
    "by example prompt": (
        lambda m: m.get_in_context_learning_s2s_prompt("say", [EXAMPLE], SPEECH),
        tensor(LONG, 9, -1),
    ),
    "get_input_ids": (
        lambda m: m.get_input_ids([mimo_fast.upstream.InputSegment("hi", speech_zeroemb_idx=16)]),
        tensor(INT, 9, 8),
    ),
    "forward": (
        lambda m: m.forward(m.get_text_dialogue_sft_prompt("hi"), max_new_tokens=2),
        of(str),
    ),
    "forward with audio": (
        lambda m: m.forward(m.get_tts_sft_prompt("hi"), True, max_new_tokens=12, task_name="tts"),
        tensor(REAL, 1, 1, -1),
    ),
    "history": (lambda m: m.history, tensor(LONG, 1, -1)),
    "generate": (
        lambda m: m.model.generate(
            m.get_text_dialogue_sft_prompt("hi").T.reshape(1, -1), {"max_length": 30}
        ),
        tensor(LONG, 1, 30 * 36),
    ),
    "codes": (
        lambda m: m.mimo_audio_tokenizer.encoder.encode(MEL, ROWS, return_codes_only=True)[0],
        tensor(LONG, 12, 26),
    ),
    "code lengths": (
        lambda m: m.mimo_audio_tokenizer.encoder.encode(MEL, ROWS, return_codes_only=True)[1],
        tensor(LONG, 2),
    ),
    "states": (lambda m: m.mimo_audio_tokenizer.encode(MEL, ROWS)[0], tensor(REAL, 2, 15, 64)),
    "packed states": (lambda m: m.mimo_audio_tokenizer.encode(MEL, ROWS)[1], tensor(REAL, 26, 64)),
    "decode_vq": (lambda m: m.mimo_audio_tokenizer.encoder.decode_vq(CODES), tensor(REAL, 5, 64)),
    "decode": (lambda m: m.mimo_audio_tokenizer.decode(CODES), tensor(REAL, 1, 1, 4800)),
    "streaming_decode": (
        lambda m: m.mimo_audio_tokenizer.streaming_decode(CODES, [5], last_chunk=True)[0][0],
        tensor(REAL, 1, 4800),
    ),
    "nothing final yet": (
        lambda m: m.mimo_audio_tokenizer.streaming_decode(CODES, [5])[0],
        [None].__eq__,
    ),
    "clear_history": (lambda m: m.clear_history(), lambda value: value is None),
}
"""What upstream's own class returned for the same call (transformers 4.49, CPU; its codec's states
in bfloat16)."""


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_upstreams_kind(model, name):
    call, fits = RESULTS[name]
    if name == "history":
        model.text_dialogue_sft("hi", max_new_tokens=2)
    value = call(model)
    shape = getattr(value, "shape", value)
    assert fits(value), f"{type(value).__name__} {getattr(value, 'dtype', '')} {shape}"


def test_the_document_is_linked():
    root = DOCUMENT.parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    table = readme.split("| upstream | mimo-fast |")[1].split("\n\n")[0]
    assert "docs/differences.md" in table
    assert "differences.md" in (root / "docs/index.md").read_text(encoding="utf-8")
