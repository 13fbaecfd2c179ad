"""`adapter=` of the API: every task with it replies as the model does with that adapter merged."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ADAPTERS, AUDIO, KIT_PAIR, THREE, fault, refuses
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mimo_fast
from mimo_fast import MimoAudio

QKVO = {"qkvo": ADAPTERS / "qkvo"}
LIMITS: dict[str, Any] = {"seed": 3, "max_new_tokens": 6}
GOLDEN = load_file(ADAPTERS / "golden.safetensors")
UNKNOWN = r"no adapter 'qkv': did you mean 'qkvo'"

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def merged() -> Iterator[MimoAudio]:
    with mimo_fast.load(*KIT_PAIR, device="cpu", adapters=QKVO) as merged:
        assert merged.adapters == ()
        yield merged


def said(model: MimoAudio, chunks: Any) -> tuple[str, torch.Tensor]:
    found = list(chunks)
    return "".join(each.text for each in found), torch.cat([each.audio for each in found])


def example() -> dict[str, Any]:
    named = {"input_audio": str(AUDIO), "output_audio": str(AUDIO)}
    return named | {"output_transcription": "hello"}


TASKS: dict[str, Call] = {
    "asr_sft": lambda m, **o: m.asr_sft(str(AUDIO), **o),
    "tts_sft": lambda m, **o: m.tts_sft("hello", None, **o),
    "audio_understanding_sft": lambda m, **o: m.audio_understanding_sft(str(AUDIO), "what?", **o),
    "spoken_dialogue_sft": lambda m, **o: m.spoken_dialogue_sft(str(AUDIO), **o),
    "speech2text_dialogue_sft": lambda m, **o: m.speech2text_dialogue_sft(str(AUDIO), **o),
    "text_dialogue_sft": lambda m, **o: m.text_dialogue_sft("hello", **o),
    "text_dialogue_sft_multiturn": lambda m, **o: m.text_dialogue_sft_multiturn(
        [{"role": "user", "content": "hello"}], **o
    ),
    "in_context_learning_s2s": lambda m, **o: m.in_context_learning_s2s(
        "again", [example()], str(AUDIO), **o
    ),
    "speech_continuation": lambda m, **o: m.speech_continuation(str(AUDIO), **o),
    "forward": lambda m, **o: m.forward(m.get_tts_sft_prompt("hello", seed=1), True, **o).tolist(),
    "transcribe": lambda m, **o: m.transcribe(str(AUDIO), **o).text,
    "stream": lambda m, **o: said(m, m.stream("tts", "hello", split=True, **o))[0],
    "generate": lambda m, **o: mimo_fast.generate(
        m, m.get_text_dialogue_sft_prompt("hello"), **o
    ).tolist(),
    "upstream's generate": lambda m, **o: m.model.generate(
        m.get_text_dialogue_sft_prompt("hello"), **o
    ).tolist(),
    "convert": lambda m, **o: mimo_fast.convert(m, AUDIO, [example()], **o).text,
    "converter": lambda m, adapter=None, **o: [
        each.audio.tolist() for each in m.converter([example()], adapter=adapter).stream(AUDIO, **o)
    ],
    "batch convert": lambda m, **o: [
        each.text
        for each in mimo_fast.batch(
            m, "convert", [AUDIO], progress=False, examples=[example()], **o
        )
    ],
    "batch": lambda m, **o: [
        each.text for each in mimo_fast.batch(m, "text_dialogue", ["hello"], progress=False, **o)
    ],
    "batch transcribe": lambda m, **o: [
        each.text for each in mimo_fast.batch(m, "transcribe", [AUDIO], progress=False, **o)
    ],
}


@pytest.mark.parametrize("task", TASKS)
class TestTasks:
    def test_reply_as_with_the_adapter_merged(self, tuned, merged, model, task):
        call = TASKS[task]
        got = call(tuned, adapter="qkvo", **LIMITS)
        assert got == call(merged, **LIMITS)
        assert call(tuned, **LIMITS) == call(tuned, adapter=None, **LIMITS) == call(model, **LIMITS)
        assert got != call(model, **LIMITS)

    def test_name_those_that_there_are(self, tuned, model, task):
        if task in ("batch", "batch transcribe"):
            (got,) = mimo_fast.batch(tuned, "tts", ["hello"], progress=False, adapter="qkv")
            assert "did you mean 'qkvo'" in str(got.error)
            return
        refuses(UNKNOWN, lambda: TASKS[task](tuned, adapter="qkv", **LIMITS))
        refuses("no adapter 'qkvo': load", lambda: TASKS[task](model, adapter="qkvo", **LIMITS))


def test_an_unknown_one_is_refused_before_a_recording_is_read(tuned):
    missing = "there is no such file.wav"
    refuses(UNKNOWN, tuned.asr_sft, missing, adapter="qkv")
    refuses(UNKNOWN, tuned.stream, "asr", missing, adapter="qkv")
    refuses(UNKNOWN, tuned.transcript, missing, adapter="qkv")
    refuses(UNKNOWN, tuned.session, adapter="qkv")


def test_rows_of_a_batch_have_an_adapter_each(tuned, golden):
    """Three adapters and none in one batch: upstream's tokens with PEFT's adapters unmerged."""
    prompt, kinds = golden.get("prompts:asr").long(), (None, *THREE)
    wanted = [GOLDEN[f"{kind or 'base'}.generate.asr"].long() for kind in kinds]
    most = max(want.shape[1] for want in wanted) // tuned.group_size
    rows = [prompt] * len(kinds)
    got = mimo_fast.generate(tuned, rows, max_new_tokens=most, adapter=kinds)
    for kind, ids, want in zip(kinds, got, wanted, strict=True):
        said = ids[:, prompt.shape[1] :][:, : want.shape[1]]
        assert torch.equal(said, want), kind
    refuses("2 adapters for 1 prompts", mimo_fast.generate, tuned, prompt, adapter=["qkvo", None])


def test_requests_of_a_batch_may_name_one(tuned):
    requests = [{"input_text": "hello", "adapter": each} for each in (None, *THREE)]
    got = mimo_fast.batch(tuned, "text_dialogue", requests, progress=False, **LIMITS)
    texts = {each.index: each.text for each in got}
    for index, each in enumerate(requests):
        limits = LIMITS | {"seed": LIMITS["seed"] + index}
        assert texts[index] == tuned.text_dialogue_sft("hello", adapter=each["adapter"], **limits)
    assert len({*texts.values()}) == 4


def test_history_goes_on_with_another_adapter(tuned):
    """Its turn is computed anew with all that precedes it, and leaves the draws as they are."""
    model = copy.copy(tuned)
    model.text_dialogue_sft("hello", adapter="qkvo", add_history=True, **LIMITS)
    so_far = model.history
    second = model.text_dialogue_sft("and you?", adapter="dora_rslora", add_history=True, **LIMITS)
    fresh = copy.copy(tuned)
    fresh.history = so_far
    again = fresh.text_dialogue_sft("and you?", adapter="dora_rslora", add_history=True, **LIMITS)
    assert second == again
    assert torch.equal(model.history, fresh.history)
    other = copy.copy(tuned)
    other.history = so_far
    assert other.text_dialogue_sft("and you?", add_history=True, **LIMITS) != second


class TestSessions:
    def turn(self, session: Any) -> tuple[str, torch.Tensor]:
        return said(session, session.stream(str(AUDIO), max_new_tokens=5))

    def test_reply_with_their_adapter(self, tuned, merged):
        sessions = (tuned.session(seed=1, adapter="qkvo"), merged.session(seed=1))
        first, second = ([self.turn(each) for _ in range(2)] for each in sessions)
        assert [text for text, _ in first] == [text for text, _ in second]
        assert torch.equal(sessions[0].ids, sessions[1].ids)
        assert not torch.equal(sessions[0].ids, self.base(tuned))

    def base(self, model: MimoAudio) -> torch.Tensor:
        session = model.session(seed=1)
        for _ in range(2):
            self.turn(session)
        return session.ids

    def test_go_on_from_a_file_with_it(self, tuned, tmp_path):
        session = tuned.session(seed=1, adapter="dora_rslora")
        self.turn(session)
        session.save(tmp_path / "talk")
        restored = tuned.restore_session(tmp_path / "talk")
        assert self.turn(restored)[0] == self.turn(session)[0]
        assert torch.equal(restored.ids, session.ids)
        # Its place among the others may be another one.
        names = dict(reversed(THREE.items()))
        how: dict[str, Any] = {"adapters": names, "merge_adapters": False, "device": "cpu"}
        with mimo_fast.load(*KIT_PAIR, **how) as other:
            again = other.restore_session(tmp_path / "talk")
            assert self.turn(again)[0] == self.turn(tuned.restore_session(tmp_path / "talk"))[0]

    def test_are_refused_by_a_model_without_it(self, tuned, model, merged, tmp_path):
        session = tuned.session(seed=1, adapter="qkvo")
        self.turn(session)
        session.save(tmp_path / "talk")
        for other in (model, merged):
            message = fault(lambda other=other: other.restore_session(tmp_path / "talk"))
            assert "belongs to an" in message
            assert "adapter" in message or "model" in message

    def test_without_one_are_the_models(self, tuned, model, tmp_path):
        session = tuned.session(seed=1)
        self.turn(session)
        session.save(tmp_path / "talk")
        restored = model.restore_session(tmp_path / "talk")
        assert self.turn(restored)[0] == self.turn(session)[0]

    def test_files_from_before_adapters_are_read(self, model, tuned, tmp_path):
        session = model.session(seed=1)
        self.turn(session)
        session.save(tmp_path / "talk")
        path = without_field(tmp_path / "talk", "adapter")
        for each in (model, tuned):
            assert torch.equal(each.restore_session(path).ids, session.ids)


def without_field(path: Path, name: str) -> Path:
    import json

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["session"])
    assert name in header
    del header[name]
    metadata = {"format": "mimo-fast session 1", "session": json.dumps(header)}
    save_file(load_file(path), path, metadata=metadata)
    return path
