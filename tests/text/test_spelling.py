"""Numbers and punctuation for models that know spoken words alone, and the words such a model was
trained on."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import KIT, fault

from mimo_fast.errors import PromptError
from mimo_fast.text.spelling import spell
from mimo_fast.text.tokenizer import Tokenizer
from training import domain

VALUES = {
    "zero": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "eleven": 11,
    "twelve": 12,
    "thirteen": 13,
    "fourteen": 14,
    "fifteen": 15,
    "sixteen": 16,
    "seventeen": 17,
    "eighteen": 18,
    "nineteen": 19,
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}


def value(words: list[str]) -> int:
    """What the words of a number mean."""
    total = part = 0
    for word in words:
        if word == "hundred":
            part *= 100
        elif word == "thousand":
            total, part = 1000 * part, 0
        else:
            part += VALUES[word]
    return total + part


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Seven 42, hello world!", "seven forty two hello world"),
        ("0", "zero"),
        ("10 13 20 99", "ten thirteen twenty ninety nine"),
        ("007", "zero zero seven"),
        ("12345", "one two three four five"),
        ("at 7:42", "at seven forty two"),
        ("forty-two", "forty two"),
        ("B2B", "b two b"),
        ("don't DON’T", "don't don’t"),
        ("Größe 你好 é", "größe 你好 é"),
        ("…!? \n", ""),
        ("", ""),
    ],
)
def test_text_becomes_words(text, words):
    assert spell(text) == words.split()


def test_every_number_reads_as_itself_in_words_of_the_domain():
    read = {n: spell(str(n)) for n in range(10000)}
    assert all(value(words) == n for n, words in read.items())
    assert {word for words in read.values() for word in words} <= set(domain.vocabulary())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The kit's tokenizer, with words that its model is said to have been trained on."""
    for path in (KIT / "checkpoint" / "lm").glob("*token*"):
        shutil.copyfile(path, tmp_path / path.name)
    path = tmp_path / "tokenizer_config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(raw | {"trained_words": ["seven", "forty", "two"]}), encoding="utf-8"
    )
    return tmp_path


def test_a_tokenizer_states_the_words_or_none(directory, model):
    assert Tokenizer.from_directory(directory).trained_words == {"seven", "forty", "two"}
    assert model.tokenizer.trained_words == frozenset()


def test_only_a_model_of_stated_words_gets_its_text_spelled(directory, model):
    limited = copy.copy(model)
    limited.tokenizer = Tokenizer.from_directory(directory)
    plain, spelled = (
        model.get_tts_sft_prompt(text, template=0) for text in ("Seven 42!", "seven forty two")
    )
    assert plain.shape != spelled.shape
    assert torch.equal(limited.get_tts_sft_prompt("Seven 42!", template=0), spelled)
    natural = [
        each.get_tts_sft_prompt("Softly: 42!", read_text_only=False) for each in (limited, model)
    ]
    assert torch.equal(*natural), "a style is no text to be said"
    assert "no word to say in '!!'" in fault(lambda: limited.get_tts_sft_prompt("!!"), PromptError)
    model.get_tts_sft_prompt("!!")
