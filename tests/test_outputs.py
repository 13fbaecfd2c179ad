"""Task methods and the files they write: a target is checked before the model speaks."""

import pytest
import soundfile
import torch

import mimo_fast
from mimo_fast import AudioError

HI = torch.zeros(24000)


@pytest.mark.parametrize(
    "task",
    [
        lambda model, path: model.tts_sft("Hi.", path),
        lambda model, path: model.spoken_dialogue_sft(HI, path),
        lambda model, path: model.spoken_dialogue_sft_multiturn(
            [{"role": "user", "content": HI}], path
        ),
        lambda model, path: model.in_context_learning_s2s("Repeat.", [], HI, None, path),
        lambda model, path: model.speech_continuation(HI, path),
        lambda model, path: model.forward(model.get_tts_sft_prompt("Hi."), output_audio_path=path),
    ],
)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none/a.wav", "there is no folder"),
        ("a.m4a", "use one of the suffixes"),
        ("a", "use one of the suffixes"),
        ("folder.wav", "a folder"),
    ],
)
def test_a_target_that_cannot_be_written(model, tmp_path, monkeypatch, task, name, problem):
    def speak(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked")

    (tmp_path / "folder.wav").mkdir()
    monkeypatch.setattr(mimo_fast.MimoAudio, "_start", speak)
    for path in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(AudioError, match=problem):
            task(model, path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.wav"]


@pytest.mark.parametrize("empty", [None, ""])
def test_no_path_is_no_file(model, empty):
    assert isinstance(model.spoken_dialogue_sft(HI, empty, max_new_tokens=4), str)


def test_the_suffix_of_a_task_method_chooses_the_format(model, tmp_path):
    model.tts_sft("Hi.", tmp_path / "a.opus", max_new_tokens=20, seed=1)
    assert soundfile.info(tmp_path / "a.opus").subtype == "OPUS"


def test_audio_that_is_too_long_is_told_to_be_cut(model):
    """A task method has no limits to raise; a caller of load_audio who set some does."""
    with pytest.raises(AudioError, match=r"longer than 1800 s; cut it$"):
        model.asr_sft(torch.zeros(24000 * 1801))
    with pytest.raises(AudioError, match=r"cut it or raise DecodeLimits\.seconds$"):
        mimo_fast.load_audio(HI, 24000, limits=mimo_fast.DecodeLimits(seconds=0.5))
