"""Task methods: their replies, files, history, and what they share with upstream's."""

import copy
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from dialogues import GROUP, METHODS, arguments, history, last_reply, limit_context, own_dialogue
from helpers import KIT_PAIR, raising, watch
from torch import Tensor

import mimo_fast
from mimo_fast import (
    LM,
    AudioError,
    MimoAudio,
    MiMoSampler,
    NumericError,
    PromptError,
    generate,
    save_wav,
)
from mimo_fast.sampling import GREEDY, TASK_SAMPLERS
from mimo_fast.text.tasks import TASKS, find_task

FRAME = 960
SPOKEN = (
    "tts_sft",
    "spoken_dialogue_sft",
    "spoken_dialogue_sft_multiturn",
    "in_context_learning_s2s",
    "speech_continuation",
)


@pytest.fixture
def own(model: MimoAudio) -> MimoAudio:
    """A model with a history and samplers of its own: greedy for every task."""
    own = own_dialogue(model)
    own.task_sampler_configs = {name: {"global": GREEDY, "local": GREEDY} for name in TASK_SAMPLERS}
    return own


def call(model: MimoAudio, task: str, audio: list[Path], output: Any = None, **options: Any) -> str:
    if task in SPOKEN:
        options["output_path" if task == "tts_sft" else "output_audio_path"] = output
    return getattr(model, task)(*arguments(task, audio), **options)


@pytest.mark.parametrize("task", METHODS)
def test_a_reply_is_what_was_generated(model, audio, tmp_path, task):
    own, path = copy.copy(model), tmp_path / "reply.wav"
    text = call(own, task, audio, path, seed=3, max_new_tokens=24, min_new_tokens=24)
    ids, codes = last_reply(own, 24)
    assert codes.shape[1]
    hidden = own.tokenizer.control_ids
    spoken = own.tokenizer.decode([token for token in ids if token not in hidden])
    assert text == spoken.strip() != ""
    assert path.exists() == (task in SPOKEN) == TASKS[task].speaks
    if task in SPOKEN:
        save_wav(expected := io.BytesIO(), own.codec.decode(codes), 24000)
        assert path.read_bytes() == expected.getvalue()
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (24000, 1, "PCM_16")
        assert info.frames == codes.shape[1] * FRAME


@pytest.mark.parametrize("task", METHODS)
def test_a_seed_fixes_the_reply(model, audio, task):
    own, histories = copy.copy(model), list[Tensor]()
    for seed in (1, 1, 2):
        call(own, task, audio, seed=seed, max_new_tokens=6, min_new_tokens=6)
        histories.append(history(own))
    assert torch.equal(histories[0], histories[1])
    assert histories[0].shape != histories[2].shape or not torch.equal(histories[0], histories[2])


@pytest.mark.parametrize("task", METHODS)
def test_upstreams_stop_tokens_and_samplers(model, audio, monkeypatch, task):
    used: dict[str, Any] = {}
    monkeypatch.setattr(MimoAudio, "_forward", lambda *_ids, **options: used.update(options) or "")
    call(model, task, audio)
    special = {"in_context_learning_s2s": ("eos", "eostm"), "speech_continuation": ("eos", "eosp")}
    usual = ("eos", "eostm", "im_end") if task in SPOKEN else ("eos", "im_end")
    stops = special.get(task, usual)
    (stopper,) = used["stopping_criteria"]
    assert stopper.stop_token_ids == {getattr(model.tokenizer.special, name) for name in stops}
    family = "spoken_dialogue" if "dialogue" in task else task.removesuffix("_sft")
    assert used["task_name"] == ("text_chat" if task.startswith("text_") else family)


@pytest.mark.parametrize("task", SPOKEN)
def test_a_reply_without_a_word_spoken_writes_no_file(own, audio, tmp_path, task):
    (tmp_path / "a.wav").write_bytes(b"old")
    for path in (tmp_path / "a.wav", tmp_path / "b.wav"):
        message = re.escape(f"nothing was said, so {path} was not written: raise max_new_tokens")
        with pytest.raises(AudioError, match=message):
            call(own, task, audio, path, max_new_tokens=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.wav": b"old"}


def test_of_such_a_reply_audio_is_upstreams_second_of_silence(own):
    ids, limit = own.get_tts_sft_prompt("Hi."), {"max_new_tokens": 1}
    assert torch.equal(own.forward(ids, return_audio=True, **limit), torch.zeros(1, 1, 24000))
    chunks = [*own.stream("tts", "Hi.", **limit)]
    assert [len(chunk.audio) for chunk in chunks] == [0]
    assert chunks[0].timing.groups == 1


@pytest.mark.parametrize("task", METHODS)
@pytest.mark.parametrize("limit", [0, -1, -(2**70)])
def test_a_reply_has_a_group_at_least(own, audio, tmp_path, task, limit):
    own.text_dialogue_sft("Hi.", max_new_tokens=2)
    before = history(own)
    for start in (
        partial(call, own, task, audio, tmp_path / "a.wav"),
        partial(own.stream, task, *arguments(task, audio)),
        partial(own.forward, own.get_tts_sft_prompt("Hi.")),
        partial(own.decode, own.conversation(), "tts", frozenset()),
        partial(own.session().stream, audio[1]),
        partial(generate, own, own.get_tts_sft_prompt("Hi.")),
    ):
        with pytest.raises(ValueError, match=rf"^max_new_tokens must be at least 1, not {limit}$"):
            start(max_new_tokens=limit)
    with pytest.raises(ValueError, match=r"^min_new_tokens must be 0 or more, not -1$"):
        call(own, task, audio, min_new_tokens=-1)
    with pytest.raises(TypeError, match=r"max_new_tokens must be an int or None, not 2\.5$"):
        call(own, task, audio, max_new_tokens=2.5)
    assert torch.equal(history(own), before)
    assert not [*tmp_path.iterdir()]


def test_without_an_output_only_text_is_returned(own, tmp_path):
    text = own.tts_sft("Hi.", None, max_new_tokens=12, seed=0)
    assert text == own.tts_sft("Hi.", tmp_path / "a.wav", max_new_tokens=12, seed=0) != ""


class TestFailures:
    def test_a_missing_directory(self, own, tmp_path):
        path = tmp_path / "missing" / "a.wav"
        with pytest.raises(AudioError, match=re.escape(f"cannot write {path}: ")):
            own.tts_sft("Hi.", path, max_new_tokens=12, seed=0)
        assert not list(tmp_path.iterdir())

    def test_an_unwritable_waveform_leaves_the_old_file(self, own, tmp_path):
        (tmp_path / "a.wav").write_bytes(b"old")
        own.codec = copy.copy(own.codec)
        own.codec.decode = lambda codes: torch.full((10,), torch.nan)  # type: ignore[method-assign]
        with pytest.raises(NumericError, match="samples are not finite"):
            own.tts_sft("Hi.", tmp_path / "a.wav", max_new_tokens=12, seed=0)
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left == {"a.wav": b"old"}

    def test_an_error_while_decoding(self, own, tmp_path, monkeypatch):
        want = own.tts_sft("Hi.", tmp_path / "a.wav", max_new_tokens=12, seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(LM, "step", raising(RuntimeError, "out of memory"))
            with pytest.raises(RuntimeError, match="out of memory"):
                own.tts_sft("Hi.", tmp_path / "b.wav", max_new_tokens=12, seed=0)
        assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
        assert own.tts_sft("Hi.", None, max_new_tokens=12, seed=0) == want


class TestForward:
    def test_audio_has_upstreams_shape(self, own):
        ids = own.get_tts_sft_prompt("Hi.", template=0)
        wav = own.forward(ids, return_audio=True, max_new_tokens=16)
        _, codes = last_reply(own, 16)
        assert wav.shape == (1, 1, codes.shape[1] * FRAME)
        assert torch.equal(wav[0, 0], own.codec.decode(codes))
        # The caller may change it in place.
        assert torch.equal(wav.clone().mul_(0.5), wav.mul_(0.5))

    def test_unknown_tasks_use_the_default_samplers(self, own):
        text, codes = MiMoSampler(True, 0.8), MiMoSampler(True, 0.7)
        own.default_global_sampler, own.default_local_sampler = text, codes
        for task in (None, "?"):
            assert own.get_task_sampler(task) == {"global": text, "local": codes}
        ids = own.get_tts_sft_prompt("Hi.", seed=0)
        own.forward(ids, max_new_tokens=10, seed=5)
        samplers = {"global_sampler": text, "local_sampler": codes}
        assert torch.equal(history(own), generate(own, ids, max_new_tokens=10, seed=5, **samplers))

    def test_samplers_belong_to_the_model(self, model):
        other = mimo_fast.load(*KIT_PAIR, device="cpu")
        other.task_sampler_configs["tts"]["global"].temperature = 2.0
        for untouched in (model.task_sampler_configs, TASK_SAMPLERS):
            assert untouched["tts"]["global"].temperature == 0.6


class TestHistory:
    @pytest.mark.parametrize("task", ["spoken", "speech2text", "text"])
    def test_a_turn_prefills_itself_and_equals_a_whole_prefill(self, own, audio, monkeypatch, task):
        options: dict[str, Any] = {"max_new_tokens": 8}
        if task == "spoken":
            options |= {"system_prompt": "Be brief.", "prompt_speech": audio[0]}
        turn = partial(getattr(own, f"{task}_dialogue_sft"), **options)
        said = "And then?" if task == "text" else audio[1]
        turn(said)
        first, counts = history(own), list[int]()

        def count(_: LM, parts: Any, *__: Any) -> None:
            counts.append(sum(part.ids.shape[1] // GROUP for part in parts))

        watch(monkeypatch, LM, "prefill_together", count)
        turn(said, add_history=True)
        both = history(own)
        assert torch.equal(both[:, : first.shape[1]], first)
        # Of the first turn, its last group alone has not been fed yet.
        new = (both.shape[1] - first.shape[1]) // GROUP - 8
        assert sum(counts) == new + 1
        assert torch.equal(generate(own, both[:, : -8 * GROUP], max_new_tokens=8), both)

    def test_later_turns_do_not_repeat_instruction_and_voice(self, own, audio):
        voice: dict[str, Any] = {"system_prompt": "Be brief.", "prompt_speech": audio[0]}
        options = voice | {"add_history": True}
        first = own.get_spoken_dialogue_sft_prompt(audio[1], **options)
        own.spoken_dialogue_sft(audio[1], max_new_tokens=2, **options)
        later = own.get_spoken_dialogue_sft_prompt(audio[1], **options)
        assert torch.equal(later, own.get_spoken_dialogue_sft_prompt(audio[1]))
        assert later.shape[1] < first.shape[1]

    def test_starts_over_without_add_history_or_after_clear_history(self, own):
        assert (own.history, own.has_history) == (None, False)
        own.text_dialogue_sft("Hi.", max_new_tokens=4, add_history=True)
        first, prompt = history(own), own.get_text_dialogue_sft_prompt("Hi.")
        assert torch.equal(first, generate(own, prompt, max_new_tokens=4))
        own.text_dialogue_sft("Hi.", max_new_tokens=4)
        assert torch.equal(history(own), first)
        own.clear_history()
        assert (own.history, own.has_history) == (None, False)
        own.text_dialogue_sft("Hi.", max_new_tokens=4, add_history=True)
        assert torch.equal(history(own), first)

    def test_a_turn_that_does_not_fit_leaves_it_alone(self, own):
        limit_context(own, 80)
        own.text_dialogue_sft("Hi.", max_new_tokens=4)
        before = history(own)
        problem = r"context is 80 groups \(12\.8 s\): start a new one or shorten"
        with pytest.raises(PromptError, match=problem):
            own.text_dialogue_sft("too long " * 20, max_new_tokens=4, add_history=True)
        assert torch.equal(history(own), before)
        own.text_dialogue_sft("Hi.", max_new_tokens=4, add_history=True)
        assert torch.equal(history(own)[:, : before.shape[1]], before)


def test_a_task_may_be_called_without_its_suffix():
    for name in ("tts_sft", "speech_continuation"):
        assert find_task(name) is TASKS[name]
    assert find_task("asr") is TASKS["asr_sft"]
    assert find_task("text_dialogue_multiturn") is TASKS["text_dialogue_sft_multiturn"]
    problem = r"^no task 'sing'; there are asr_sft, tts_sft, .*speech_continuation"
    with pytest.raises(ValueError, match=problem):
        find_task("sing")


def test_every_task_has_a_method_and_a_prompt(model):
    only_evaluated = {"instruction_following", "few_shots_qa", "gen_text", "gen_speech"}
    assert set(METHODS) == TASKS.keys() - only_evaluated
    for name in METHODS:
        assert callable(getattr(model, name))
        assert callable(TASKS[name].prompt)
        assert callable(getattr(model, f"get_{name.replace('speech2text', 's2t')}_prompt"))


def test_a_turn_that_follows_closes_the_stream_still_read(own):
    first = own.stream("text_dialogue", "Hi.", max_new_tokens=9, seed=1)
    next(first)
    own.text_dialogue_sft("And now?", max_new_tokens=3, add_history=True, seed=1)
    assert list(first) == []


@pytest.mark.parametrize("text", [None, {"a": 1}, 3])
def test_what_is_not_text_is_refused(own, audio, text):
    for call in (
        lambda: own.text_dialogue_sft(text),
        lambda: own.audio_understanding_sft(audio[1], text),
        lambda: own.tts_sft(text, "never.wav"),
    ):
        with pytest.raises(TypeError, match=r"^MimoAudio\.\w+: (input_)?text must be a str, not "):
            call()
    for call in (
        lambda: own.get_asr_sft_prompt(audio[1], template=99),
        lambda: own.forward(torch.empty(9, 0, dtype=torch.int64)),
    ):
        with pytest.raises(PromptError):
            call()
