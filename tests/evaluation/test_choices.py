"""Which choice an answer makes: expectations by hand from MiMo-Audio-Eval's evaluators."""

from __future__ import annotations

from pathlib import Path

import pytest

from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.choices import (
    Accuracy,
    after_thoughts,
    chosen_letter,
    lettered_choice,
    matched_choice,
    matches,
    numbered_option,
    option_index,
    stated_answer,
)
from mimo_fast.evaluation.few_shot import drawn_examples
from mimo_fast.evaluation.items import Answer, Item, Tools


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A fox.", "A fox"),
        ("\n\n  'A fox!'  \nIt barks.", "A fox"),
        ("I think so.\nThe correct answer is: **A fox**.", "**A fox**"),
        ("I think so.\nThe correct answer is **A fox**", "A fox"),
        ("correct choice is - `a  fox`", "a fox"),
        ("Answer: a dog\nAnswer: a fox", "a fox"),
        ("Answer: a fox\nThe correct answer is a dog", "a fox"),
        ("The answer: a fox\nThat is it.", "The answer: a fox"),
        ("It is **a dog** or **a fox**.", "a fox"),
        ("The correct answer is:\nno\n**A fox**", "no"),
        ("Answer: ...\nno\n**A fox**", "A fox"),
        ("Answer: ...\n\n  a fox\nbarks", "a fox"),
        ("Answer: ...\n** **\na fox", "a fox"),
        ("The correct answer is\n\n  a fox\nbarks", "a fox"),
        ("answer -", "answer -"),
        ('\\"A fox\\"', "A fox"),
        ("...", ""),
        ("", ""),
    ],
)
def test_what_an_answer_states(text, stated):
    assert stated_answer(text) == stated


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("red fox", "The RED fox!", True),
        ("red fox", "fox", False),
        ("red fox", "red fox, not a dog", False),
        ("red fox", "red fox or red deer", False),
        ("red fox", "", False),
        ("red fox", "...", False),
        ("dog", "red dog", False),
        ("red deer", "red deer", True),
        ("red deer", "deer red", True),
    ],
)
def test_a_prediction_has_all_words_of_its_choice_and_none_of_others(answer, prediction, right):
    assert matches(answer, prediction, ["red fox", "dog", "red deer"]) is right


def test_a_choice_that_another_contains_is_right_whatever_it_says_more():
    """Its words are no wrong ones of the other."""
    assert matches("red fox", "red fox", ["fox", "red fox"])
    assert not matches("fox", "red fox", ["fox", "red fox"])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. A fox", "B"),
        (" \nC\n", "C"),
        ("(D)", "D"),
        ("The choice is B.", "B"),
        ("Answer: B", "A"),
        ("The choice is B", ""),
        ("None", ""),
        ("b", ""),
        ("", ""),
        ("hm", ""),
        ("A or B?</think>\nC", "C"),
    ],
)
def test_the_letter_of_an_answer(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("The answer is option C.", 2),
        ("OPTION\n a, or option B", 0),
        ("optiond", 3),
        ("option e; Option B", 1),
        ("option abc", 0),
        ("C", -1),
        ("", -1),
    ],
)
def test_the_option_that_is_named(text, index):
    assert option_index(text) == index


def test_thoughts_end_once():
    assert after_thoughts("hm</think>\n a</think>b") == "a</think>b"
    assert after_thoughts(" a") == "a"


def answer_of(text: str, truth: dict, **more) -> Answer:
    return Answer(Item("1", {}, truth), text, **more)


WORDS = {"answer": "a fox", "choices": ["a fox", "a dog", "a deer", "a cat"]}


@pytest.mark.parametrize(
    ("read", "truth", "right", "wrong"),
    [
        (matched_choice, WORDS, "Dogs bark.</think>A fox.", "A dog."),
        (lettered_choice, WORDS, "A", "B"),
        (numbered_option, {"answer": 2}, "It is option C.", "option D"),
    ],
)
def test_accuracy_is_the_share_of_right_answers(read, truth, right, wrong):
    measure = Accuracy(read)
    answers = [answer_of(text, truth) for text in (right, right, wrong)]
    answers.append(answer_of(right, truth, error="it broke"))
    found = [(each, measure.find(each, Tools())) for each in answers]
    assert [each["correct"] for _, each in found] == [True, True, False, False]
    (figure,) = measure.figures(found).values()
    assert (figure.value, figure.unit, figure.count, figure.better) == (50.0, "%", 4, "higher")
    assert measure.needs == frozenset()


def test_speech_is_what_a_recogniser_hears_in_it(tmp_path):
    heard = list[tuple[Path, str]]()

    def recogniser(audio: Path, language: str) -> str:
        heard.append((audio, language))
        return " Option A. "

    measure = Accuracy(numbered_option, heard="en")
    assert measure.needs == {"recogniser"}
    tools, path = Tools(recogniser=recogniser), tmp_path / "1.wav"
    found = measure.find(answer_of("Option B.", {"answer": 0}, audio=path), tools)
    assert found == {"said": "Option A.", "stated": 0, "correct": True}
    assert measure.find(answer_of("Option A.", {"answer": 0}), tools)["correct"] is False
    assert heard == [(path, "en")]


def test_without_answers_there_is_no_share():
    assert Accuracy(numbered_option).figures([])["accuracy"].value is None


class TestDraws:
    def test_they_are_those_of_one_generator_row_after_row(self):
        """`random.seed(42)`, then `random.sample` of the others for each row."""
        found = ["".join(each) for each in drawn_examples("abcdef", 2, 42)]
        assert found == ["bf", "dc", "bf", "af", "fd", "ae"]

    @pytest.mark.parametrize("seed", range(5))
    def test_no_row_is_its_own_example(self, seed):
        for row, drawn in zip(range(20), drawn_examples(range(20), 7, seed), strict=True):
            assert row not in drawn
            assert len(set(drawn)) == 7

    def test_too_few_rows(self):
        with pytest.raises(EvaluationError, match="3 items leave no 3 examples for each"):
            list(drawn_examples("abc", 3, 42))
        assert [sorted(each) for each in drawn_examples("abc", 3, 42, fewer=True)] == [
            ["b", "c"],
            ["a", "c"],
            ["a", "b"],
        ]
