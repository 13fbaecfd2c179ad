"""Spelling of numbers and punctuation for models of spoken words, and the words they know."""

import copy
from pathlib import Path

import pytest
import torch
from helpers import fault, limited_tokenizer

from mimo_fast.errors import PromptError
from mimo_fast.text.spelling import spell
from mimo_fast.text.tokenizer import Tokenizer
from training import domain

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    " fifteen sixteen seventeen eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: n for n, word in enumerate(SMALL.split())}
VALUES |= {word: 10 * n for n, word in enumerate(TENS.split(), 2)}


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
    return limited_tokenizer(tmp_path, ["seven", "forty", "two"])


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
