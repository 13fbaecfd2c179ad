"""Readers of MMAU, MMAR, MMSU and SpeechMMLU, on files in their published forms."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from published_files import (
    VOICE,
    as_json,
    as_lines,
    as_parquet,
    mmar,
    mmar_row,
    mmau,
    mmau_row,
    mmsu,
    mmsu_row,
    speech_mmlu,
    speech_mmlu_row,
    tone,
    written,
)

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.choices import matched_choice
from mimo_fast.evaluation.items import Item, Options
from mimo_fast.evaluation.sets import SETS
from mimo_fast.text.tasks import TASKS

CHOSEN = (
    "Choose a choices from the given 2 choices. Do not provide any additional explanations or"
    " content. Output must match exactly one of the listed choices."
)


def items(name: str, folder: Path, split: str | None = None, **options) -> list[Item]:
    chosen = SETS[name]
    return list(chosen.read(folder, split or chosen.splits[0], Options(**options)))


def task(name: str, **options) -> str:
    found = SETS[name].task(Options(**options))
    assert found in TASKS
    return found


@pytest.mark.parametrize("thinking", [False, True])
def test_mmau_by_instruction(tmp_path, thinking):
    found = items("mmau", mmau(tmp_path), thinking=thinking)
    assert [each.id for each in found] == ["a0", "a1", "a2"]
    first, second, _ = found
    assert first.arguments == {
        "input_text": f"<sound>What barks 0?\n\nChoice: \nA fox\nA dog\n\n{CHOSEN}",
        "input_speech": tmp_path / "MMAU" / "test-mini-audios" / "a0.wav",
        "thinking": thinking,
    }
    text = f"<sound>What barks 1?\n\nChoice: \nA fox\nA dog\nTwo dogs\n\n{CHOSEN}"
    assert second.arguments["input_text"] == text.replace("given 2", "given 3")
    assert second.truth == {"answer": "A dog", "choices": ["A fox", "A dog", "Two dogs"]}
    assert second.groups == {"task": "music", "difficulty": "easy"}
    assert task("mmau", thinking=thinking) == "instruction_following"


def test_mmau_by_example(tmp_path):
    """The draws of MiMo-Audio-Eval with one process, and its wording for base models."""
    found = items("mmau", mmau(tmp_path, 7), shots=5)
    assert task("mmau", shots=5) == "few_shots_qa"
    random.seed(42)
    numbers, question = list(range(7)), found[4].arguments["examples"][-1]
    assert question == {
        "audio": tmp_path / "MMAU" / "test-mini-audios" / "a4.wav",
        "question": "What barks 4?\n\nChoice: \nA fox\nA dog\n\nMake a choice from the given 2"
        " choices.",
    }
    for i, item in enumerate(found):
        *shown, asked = item.arguments["examples"]
        drawn = random.sample(numbers[:i] + numbers[i + 1 :], 5)
        assert [each["audio"].stem for each in shown] == [f"a{number}" for number in drawn]
        assert all(each["answer"] == "A dog" for each in shown)
        assert asked["audio"].stem == f"a{i}"
    assert items("mmau", tmp_path, shots=5, seed=1) != found


def test_mmar(tmp_path):
    folder = mmar(tmp_path)
    first, second = items("mmar", folder)
    text = f"<sound>Who speaks?\n\nChoice: \nA man\nA woman\n\n{CHOSEN}"
    assert first.arguments == {
        "input_text": text,
        "input_speech": folder / "MMAR" / "audio" / "clip_0.wav",
        "thinking": False,
    }
    assert second.groups == {
        "modality": "mix-sound-speech",
        "category": "Signal Layer",
        "sub-category": "Acoustic Quality Analysis",
    }
    (asked,) = items("mmar", folder, shots=1)[0].arguments["examples"][1:]
    made = CHOSEN.replace("Choose a choices", "Make a choice")
    assert asked["question"] == f"Who speaks?\n\nChoice: \nA man\nA woman\n\n{made}<sound>"


def test_mmar_as_lines_in_a_folder_of_its_own(tmp_path):
    tone(tmp_path / "audio" / "clip_0.wav")
    as_lines(tmp_path / "MMAR-meta.jsonl", [mmar_row(0)])
    (item,) = items("mmar", tmp_path)
    assert item.arguments["input_speech"] == tmp_path / "audio" / "clip_0.wav"


def test_mmsu(tmp_path):
    first, second = items("mmsu", mmsu(tmp_path))
    text = (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in"
        " next line, **you should only choose A or B or C or D.** Do not provide any additional"
        " explanations or content.\n\nQuestion: How often?\n\nA. 1\nB. twice\nC. never\nD. always"
    )
    assert second.arguments == {
        "input_speech": tmp_path / "MMSU_Bench" / "MMSU" / "audio" / "code_1.wav",
        "input_text": text,
        "thinking": False,
    }
    assert first.truth == {"answer": "twice", "choices": ["0", "twice", "never", "always"]}
    assert first.groups["category"] == "Perception"
    thought = items("mmsu", tmp_path, thinking=True)[1].arguments
    sentence = "You can think about the question briefly and then answer it."
    assert thought["input_text"] == text + sentence
    assert thought["thinking"] is True
    assert task("mmsu") == "audio_understanding_sft"


def test_mmsu_with_two_choices(tmp_path):
    """What is not there is the word None, which MiMo-Audio-Eval asks with as well."""
    row = mmsu_row(1)
    del row["choice_c"], row["choice_d"]
    as_lines(mmsu(tmp_path) / "MMSU_Bench" / "MMSU" / "question" / "mmsu.jsonl", [row])
    (item,) = items("mmsu", tmp_path)
    assert item.arguments["input_text"].endswith("\n\nA. 1\nB. twice\nC. None\nD. None")


@pytest.mark.parametrize("mode", ["s2t", "s2s", "t2t", "t2s"])
@pytest.mark.parametrize("shots", [0, 2])
def test_speech_mmlu(tmp_path, mode, shots):
    root = speech_mmlu(tmp_path) / "SpeechMMLU"
    found = items("speechmmlu", tmp_path, mode=mode, shots=shots)
    assert [each.id for each in found] == ["anatomy_0", "anatomy_1", "virology_0", "virology_1"]
    item = found[1]
    spoken = root / "audio" / "anatomy" / "prompts" / f"anatomy_{VOICE}"

    def asked(text: str, recording: Path) -> dict:
        return {"speech": recording} if mode[0] == "s" else {"text": text}

    want = [asked("Questions about anatomy.\n", spoken / "anatomy_beginning.mp3")]
    for i, letter in enumerate("BA"[:shots]):
        question = spoken / f"anatomy_{i}_question_and_choices.mp3"
        want.append(asked(f"anatomy example {i}?\n", question))
        answer = {"text": f"Option {letter}.\n"}
        want.append(
            answer | ({"speech": spoken / f"anatomy_{i}_answer.mp3"} if mode[2] == "s" else {})
        )
    text = "anatomy, question 1? Option A: yes. Option B: no.\n"
    want.append(asked(text, root / "audio" / "anatomy" / "anatomy_1.mp3"))
    assert item.arguments["prompts"] == want
    limits = item.arguments["min_new_tokens"], item.arguments["max_new_tokens"]
    assert limits == ((5, 10) if mode[2] == "t" else (10, 25))
    assert item.truth == {"answer": 1}
    assert item.groups == {"subject": "anatomy"}
    assert task("speechmmlu", mode=mode) == ("gen_text" if mode[2] == "t" else "gen_speech")


def test_speech_mmlu_as_lines(tmp_path):
    """As `datasets` reads JSON, in a folder of its own."""
    root = speech_mmlu(tmp_path, ["anatomy"]) / "SpeechMMLU"
    (root / "anatomy" / "train-00000-of-00001.parquet").unlink()
    as_lines(root / "data" / "anatomy.jsonl", [speech_mmlu_row("anatomy", 1)])
    (item,) = items("speechmmlu", root, mode="t2t")
    assert item.id == "anatomy_1"


def test_files_of_the_hubs_client_are_none_of_the_set(tmp_path):
    root = speech_mmlu(tmp_path, ["anatomy"]) / "SpeechMMLU"
    as_json(root / ".cache" / "huggingface" / "download" / "x.json", {"etag": "1"})
    assert len(items("speechmmlu", tmp_path)) == 2


def test_measures_of_speech_mmlu():
    measures = SETS["speechmmlu"].measures("all", Options(mode="s2s"))
    assert [(each.name, set(each.needs)) for each in measures] == [
        ("accuracy", {"recogniser"}),
        ("accuracy of its text", set()),
    ]
    (alone,) = SETS["speechmmlu"].measures("all", Options(mode="t2t"))
    assert (alone.name, alone.needs) == ("accuracy", frozenset())


def test_ids_that_repeat_are_numbers(tmp_path):
    rows = [mmau_row(0), mmau_row(0) | {"question": "Again?"}]
    as_json(mmau(tmp_path) / "MMAU" / "mmau-test-mini.json", rows)
    assert [each.id for each in items("mmau", tmp_path)] == ["00000", "00001"]


def without(row: dict, *columns: str) -> dict:
    return {name: value for name, value in row.items() if name not in columns}


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an empty folder": ("mmau", lambda _: None, "has no MMAU/mmau-test-mini.json"),
    "an empty list": (
        "mmau",
        lambda f: as_json(f / "mmau-test-mini.json", []),
        "mmau-test-mini.json has no rows",
    ),
    "no JSON": (
        "mmau",
        lambda f: written(f / "mmau-test-mini.json", "[{"),
        "mmau-test-mini.json is not valid JSON",
    ),
    "no text": (
        "mmau",
        lambda f: (f / "mmau-test-mini.json").write_bytes(b"\xff\xfe\x00"),
        "cannot read .*mmau-test-mini.json",
    ),
    "a row that is none": (
        "mmau",
        lambda f: as_json(f / "mmau-test-mini.json", [mmau_row(0), 3]),
        "row 2 is a int, not an object",
    ),
    "a column less": (
        "mmau",
        lambda f: as_json(f / "mmau-test-mini.json", [without(mmau_row(0), "choices", "answer")]),
        "row 1 has no choices, answer",
    ),
    "choices that are no list": (
        "mmau",
        lambda f: as_json(f / "mmau-test-mini.json", [mmau_row(0) | {"choices": "A fox"}]),
        "choices are no list",
    ),
    "a recording less": (
        "mmau",
        lambda f: as_json(f / "mmau-test-mini.json", [mmau_row(0)]),
        "the recording .*test-mini-audios/a0.wav is missing",
    ),
    "no metadata": (
        "mmar",
        lambda f: tone(f / "MMAR" / "audio" / "a.wav"),
        "no MMAR/MMAR-meta.json",
    ),
    "a line that is no JSON": (
        "mmsu",
        lambda f: written(f / "question" / "mmsu.jsonl", '\n{"id": 1'),
        "mmsu.jsonl, line 2 is not valid JSON",
    ),
    "no questions": (
        "speechmmlu",
        lambda f: as_json(f / "few_shot_prompts.json", {}),
        "has no parquet or JSON files",
    ),
    "no parquet": (
        "speechmmlu",
        lambda f: [
            as_json(f / "few_shot_prompts.json", {}),
            written(f / "anatomy.parquet", "PAR1, really"),
        ],
        "cannot read .*anatomy.parquet",
    ),
    "a column of parquet less": (
        "speechmmlu",
        lambda f: [
            as_json(f / "few_shot_prompts.json", {}),
            as_parquet(f / "a.parquet", [without(speech_mmlu_row("anatomy", 0), "voice_id")]),
        ],
        "a.parquet: row 1 has no voice_id",
    ),
    "a subject without examples": (
        "speechmmlu",
        lambda f: [
            as_json(f / "few_shot_prompts.json", {"virology": {}}),
            as_parquet(f / "a.parquet", [speech_mmlu_row("anatomy", 0)]),
        ],
        "few_shot_prompts.json has no beginning and examples of anatomy",
    ),
    "an answer outside": (
        "speechmmlu",
        lambda f: [
            as_json(f / "few_shot_prompts.json", {"anatomy": {"beginning": "x", "examples": []}}),
            as_parquet(f / "a.parquet", [speech_mmlu_row("anatomy", 0) | {"answer": 4}]),
            tone(f / "audio/anatomy/prompts" / f"anatomy_{VOICE}" / "anatomy_beginning.mp3"),
        ],
        "the answer of anatomy_0 is 4, not 0 to 3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_with_its_source(tmp_path, case):
    name, make, problem = WRONG[case]
    make(tmp_path)
    with pytest.raises(EvaluationError, match=problem) as caught:
        items(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert SETS[name].source in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("mmsu", {"shots": 5}, "MMSU takes no examples: leave shots out"),
        ("mmau", {"shots": 3}, "3 items leave no 3 examples for each: use fewer shots"),
        ("mmau", {"shots": -1}, "shots must be 0 or more, not -1"),
        ("speechmmlu", {"thinking": True}, "SpeechMMLU is asked without thoughts"),
        ("speechmmlu", {"shots": 3}, "has 2 examples of anatomy, not 3: use fewer shots"),
        ("speechmmlu", {"mode": "s2x"}, "is asked as s2t, s2s, t2t, t2s, not 's2x'"),
    ],
)
def test_options_that_a_set_does_not_take(tmp_path, name, options, problem):
    {"mmsu": mmsu, "mmau": mmau, "speechmmlu": speech_mmlu}[name](tmp_path)
    with pytest.raises(EvaluationError, match=problem):
        items(name, tmp_path, **options)


def test_published_scores_are_of_the_figures_and_of_ways_of_asking():
    for name in ("mmau", "mmar", "mmsu", "speechmmlu", "bigbench_audio"):
        chosen = SETS[name]
        for score in chosen.published:
            measures = chosen.measures(chosen.splits[0], score.options)
            assert score.figure in {each.name for each in measures}
            assert score.options.mode in (chosen.modes or (None,))
            assert 60 < score.value < 75


def test_choices_of_a_row_are_measured_by_its_words(tmp_path):
    item = items("mmau", mmau(tmp_path))[1]
    assert matched_choice("Two dogs", item.truth) == {"stated": "Two dogs", "correct": False}
    assert matched_choice("**A dog**", item.truth) == {"stated": "A dog", "correct": True}
