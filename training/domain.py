"""What the small model can say and understand: sentences of `domain.jsgf`, questions, answers.

The same file is the grammar of the independent recogniser, so both mean the same by "the domain".
"""

import hashlib
import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

from mimo_fast.text.spelling import UNITS

GRAMMAR = Path(__file__).with_name("domain.jsgf")

HELD_OUT = 16
"""One sentence in so many is held out for tests."""

SHORTEST_HELD_OUT = 3
"""Number of words of the shortest held-out sentence: all single words are trained on."""

SPOKEN_LETTERS = {"a": "ay"}
"""Spelling of a letter that makes a synthesizer name it instead of reading a word."""

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = """
    january february march april may june july august september october november december
""".split()  # noqa: SIM905
TALK = {
    "hello": "hello how are you",
    "good morning": "good morning to you",
    "good night": "good night to you",
    "how are you": "i am very good thank you",
    "who are you": "i am a small computer",
    "what is your name": "my name is computer",
    "where do you live": "i live in the city near the river",
    "what color is the sea": "the sea is blue",
    "thank you": "you are welcome",
}

Node = str | tuple["Node", ...] | list["Node"]
"""A word or <rule>; a sequence (tuple) of nodes; a choice (list) between nodes."""


def dialogue() -> dict[str, str]:
    """Questions and the one answer to each."""
    pairs = dict(TALK)
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        following = zip(names, (*names[1:], names[0]), strict=True)
        pairs |= {f"what {kind} comes after {name}": after for name, after in following}
    for a, b in product(range(1, 10), repeat=2):
        pairs[f"what is {UNITS[a]} plus {UNITS[b]}"] = UNITS[a + b]
    return pairs


def draw_sentence(rng: random.Random, held_out: bool = False) -> str:
    """A sentence of the domain, from the trained or from the held-out ones."""
    while True:
        text = " ".join(_words("<sentence>", rng))
        if is_held_out(text) == held_out:
            return text


def is_held_out(text: str) -> bool:
    """Whether training never sees this sentence; it always sees the dialogue's questions."""
    if text.count(" ") + 1 < SHORTEST_HELD_OUT or text in dialogue():
        return False
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT == 0


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the domain."""
    leaves = (word for rule in _rules().values() for word in _leaves(rule))
    talk = " ".join((*dialogue(), *dialogue().values())).split()
    return tuple(sorted({word for word in leaves if not word.startswith("<")} | {*talk}))


def spoken(text: str) -> str:
    """The text of a sentence for a synthesizer: letters alone or beside another are named."""
    words = text.split()
    if len(words) == 1:
        return SPOKEN_LETTERS.get(text, text)
    letters = [len(word) == 1 for word in words]
    beside = [any(letters[max(0, i - 1) : i] + letters[i + 1 : i + 2]) for i in range(len(words))]
    known = zip(words, letters, beside, strict=True)
    return " ".join(SPOKEN_LETTERS.get(w, w) if letter and near else w for w, letter, near in known)


def _words(node: Node, rng: random.Random) -> Iterator[str]:
    if isinstance(node, list):
        yield from _words(rng.choice(node), rng)
    elif isinstance(node, tuple):
        for part in node:
            yield from _words(part, rng)
    elif node.startswith("<"):
        yield from _words(_rules()[node], rng)
    else:
        yield node


def _leaves(node: Node) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for part in node:
            yield from _leaves(part)


@cache
def _rules() -> dict[str, Node]:
    """The rules of the grammar file: `<name> = expansion;` with |, [optional] and (group)."""
    text = GRAMMAR.read_text(encoding="utf-8")
    found = re.findall(r"(<\w+>)\s*=([^;]*);", text)
    return {name: _parse(re.findall(r"<\w+>|\w+|[|()\[\]]", body)) for name, body in found}


def _parse(tokens: list[str], closing: str = "") -> Node:
    """Parses an expansion from the front of `tokens`, up to its closing bracket."""
    choices: list[list[Node]] = [[]]
    while tokens:
        token = tokens.pop(0)
        if token == closing:
            break
        if token == "|":
            choices.append([])
        elif token == "(":
            choices[-1].append(_parse(tokens, ")"))
        elif token == "[":
            choices[-1].append([(), _parse(tokens, "]")])
        else:
            choices[-1].append(token)
    sequences: list[Node] = [tuple(choice) for choice in choices]
    return sequences[0] if len(sequences) == 1 else sequences
