"""Big Bench Audio: its files as the hub has them, and a judge's scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_files import (
    as_lines,
    as_parquet,
    big_bench_audio,
    big_bench_audio_as_parquet,
    tone,
    written,
)

from mimo_fast.audio.files import load_audio
from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import Answer, Item, Options, Tools
from mimo_fast.evaluation.sets import SETS
from mimo_fast.evaluation.sets.big_bench_audio import RULE, JudgedRight, judged

BIG_BENCH = SETS["bigbench_audio"]


def items(folder: Path, **options) -> list[Item]:
    return list(BIG_BENCH.read(folder, "train", Options(**options)))


def test_the_files_of_the_repository(tmp_path):
    folder = big_bench_audio(tmp_path)
    first, second = items(folder)
    assert first == Item(
        "0",
        {"input_speech": folder / "big_bench_audio" / "data" / "question_0.mp3"},
        {"answer": "valid"},
        {"category": "formal_fallacies"},
    )
    assert second.groups == {"category": "navigate"}
    own = items(folder / "big_bench_audio", mode="s2s")
    assert [each.arguments for each in own] == [first.arguments, second.arguments]
    assert BIG_BENCH.task(Options()) == "speech2text_dialogue_sft"
    assert BIG_BENCH.task(Options(mode="s2s")) == "spoken_dialogue_sft"


def test_parquet_holds_encoded_recordings(tmp_path):
    first, second = items(big_bench_audio_as_parquet(tmp_path))
    same = [tmp_path / "made" / f"question_{i}.mp3" for i in range(2)]
    for item, recording in zip((first, second), same, strict=True):
        encoded = item.arguments["input_speech"]
        assert load_audio(encoded, 24000).tolist() == load_audio(recording, 24000).tolist()
    assert (first.id, first.truth) == ("0", {"answer": "valid"})


@pytest.mark.parametrize("place", ["prompt.wav", "assets/prompt.wav"])
def test_the_voice_of_spoken_replies(tmp_path, place):
    """MiMo-Audio-Eval's lies in `assets` beside its `data`."""
    folder = big_bench_audio(tmp_path / "data")
    voice = tone((folder if place == "prompt.wav" else tmp_path) / place)
    spoken, written_ = items(folder, mode="s2s")[0], items(folder, mode="s2t")[0]
    assert spoken.arguments["prompt_speech"].resolve() == voice
    assert "prompt_speech" not in written_.arguments


class Scripted:
    """A judge whose answers are known."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked = list(replies), list[object]()

    def __call__(self, messages, audio=()) -> str:
        self.asked.append([*messages])
        return self.replies.pop(0)


def said(score: object) -> str:
    return json.dumps({"steps": [{"description": "a", "conclusion": "b"}], "result": score})


def test_a_judge_is_asked_as_the_evaluation_asks():
    judge = Scripted(f"\n{said(0.7)} ")
    assert judged(judge, "It is valid.", "valid") == 0.7
    assert judge.asked == [
        [
            {"role": "system", "content": RULE},
            {
                "role": "user",
                "content": "Model Response: It is valid.\nReference Answer: valid",
            },
        ]
    ]
    assert RULE.startswith("You are a helpful assistant that evaluates whether")
    assert RULE.endswith("Do not include any extra text. result must be a float in [0.0, 1.0].")


@pytest.mark.parametrize(
    "unread", ["", "yes", "[1]", '{"score": 1}', said("0.9"), said(None), "[" * 99999]
)
def test_an_answer_that_cannot_be_read_is_asked_for_again(unread):
    judge = Scripted(*[unread] * 4, said(1))
    assert judged(judge, "x", "y") == 1.0
    assert len(judge.asked) == 5
    judge = Scripted(*[unread] * 6)
    assert judged(judge, "x", "y") is None
    assert len(judge.asked) == 5


def answer(text: str, **more) -> Answer:
    return Answer(Item("1", {}, {"answer": "valid"}), text, **more)


def test_scores_from_0_6_on_are_right():
    measure, judge = JudgedRight(), Scripted(said(0.6), said(0.59), *["?"] * 5)
    answers = [answer("valid"), answer("hm"), answer("?"), answer("valid", error="it broke")]
    found = [(each, measure.find(each, Tools(judge=judge))) for each in answers]
    assert [each["correct"] for _, each in found] == [True, False, False, False]
    assert [each["score"] for _, each in found] == [0.6, 0.59, None, 0.0]
    (figure,) = measure.figures(found).values()
    assert (figure.value, figure.unit, figure.count) == (25.0, "%", 4)
    assert figure.note.startswith("1 count as wrong because no answer of the judge")
    assert not judge.replies


def test_spoken_replies_are_judged_by_what_is_heard(tmp_path):
    (measure,) = BIG_BENCH.measures("train", Options(mode="s2s"))
    assert measure.needs == {"judge", "recogniser"}
    judge = Scripted(said(1), said(0))
    tools = Tools(judge=judge, recogniser=lambda audio, language: f" heard in {language} ")
    assert measure.find(answer("text", audio=tmp_path / "1.wav"), tools)["correct"]
    assert measure.find(answer("text"), tools) == {"said": "", "score": 0.0, "correct": False}
    assert [each[1]["content"] for each in judge.asked] == [
        "Model Response: heard in en\nReference Answer: valid",
        "Model Response: \nReference Answer: valid",
    ]
    (alone,) = BIG_BENCH.measures("train", Options())
    assert alone.needs == {"judge"}


ROW = {"category": "navigate", "official_answer": "Yes", "id": 1}

WRONG = {
    "nothing": (lambda f: None, "has neither metadata.jsonl nor parquet files"),
    "an empty list": (lambda f: written(f / "metadata.jsonl", "\n"), "has no rows"),
    "no answer": (
        lambda f: as_lines(f / "metadata.jsonl", [{"category": "a", "file_name": "data/a.mp3"}]),
        "row 1 has no official_answer",
    ),
    "a recording less": (
        lambda f: as_lines(f / "metadata.jsonl", [ROW | {"file_name": "data/a.mp3"}]),
        "the recording .*data/a.mp3 is missing",
    ),
    "no audio": (lambda f: as_parquet(f / "a.parquet", [ROW]), "row 1 has no audio"),
    "audio that is none": (
        lambda f: as_parquet(f / "a.parquet", [ROW | {"audio": "a.mp3"}]),
        "the column audio holds neither bytes nor a path",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_its_source(tmp_path, case):
    make, problem = WRONG[case]
    make(tmp_path)
    with pytest.raises(EvaluationError, match=problem) as caught:
        items(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert BIG_BENCH.source in str(caught.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mode": "t2t"}, "is asked as s2t or s2s, not 't2t'"),
        ({"thinking": True}, "is asked without thoughts"),
        ({"shots": 2}, "takes no examples"),
    ],
)
def test_options_that_it_does_not_take(tmp_path, options, problem):
    with pytest.raises(EvaluationError, match=problem):
        items(big_bench_audio(tmp_path), **options)
