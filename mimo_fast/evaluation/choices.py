"""Which choice an answer makes, as MiMo-Audio-Eval reads it, and the share of right ones.

Its readings are kept with their quirks, because published scores are made by them: see each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_fast.evaluation.items import Answer, Figure, Found, Tools

LETTERS = "ABCD"

ANNOUNCED = (
    re.compile(
        r"(?m)^[^\S\r\n]*(?:the\s+)?correct\s+(?:choice|answer)\s+is\s*[:\-]?\s*(.*)$",
        re.IGNORECASE,
    ),
    re.compile(r"(?m)^[^\S\r\n]*answer\s*[:\-]\s*(.*)$", re.IGNORECASE),
)
"""What announces an answer in a line."""

BOLD = re.compile(r"\*\*(.+?)\*\*")

WRAPPED = (
    re.compile(r"^\*{1,2}(.+?)\*{1,2}$"),
    re.compile(r"^`(.+?)`$"),
    re.compile(r"^['\"](.+?)['\"]$"),
)
"""What an answer may be wrapped in: bold, code, quotes."""

OPTION = re.compile(r"option\s*([abcd])")


def after_thoughts(text: str) -> str:
    """What follows the first `</think>`; all of a text without one."""
    return text.split("</think>", 1)[-1].lstrip()


def plain(text: str) -> str:
    """The first line of a text, without what it is wrapped in, without punctuation around it."""
    text = text.strip()
    if not text:
        return ""
    line = text.splitlines()[0].strip().replace('\\"', '"').replace("\\'", "'")
    for wrapping in WRAPPED:
        line = wrapping.sub(r"\1", line)
    return re.sub(r"\s+", " ", line.strip(" \t\r\n.:;!?,"))


def stated_answer(text: str) -> str:
    """The answer that a text states: MMAU's and MMAR's `extract_answer`.

    The last one that is announced ("The correct answer is ...", "Answer: ..."; where the line ends
    there, the bold text or the line that follows); else the last bold text; else the first line.
    """
    found = [each for marker in ANNOUNCED for each in _announced(marker, text)]
    found = found or [each for each in map(plain, BOLD.findall(text)) if each]
    if found:
        return found[-1]
    return next((each for each in map(plain, text.splitlines()) if each), "")


def _announced(marker: re.Pattern[str], text: str) -> list[str]:
    found = list[str]()
    for match in marker.finditer(text):
        answer = plain(match.group(1))
        if not answer:
            rest = text[match.end() :]
            bold = BOLD.search(rest)
            lines = [bold.group(1)] if bold and plain(bold.group(1)) else rest.splitlines()
            answer = next((each for each in map(plain, lines) if each), "")
        found += [answer] if answer else []
    return found


def matches(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether a prediction is the answer: MMAU's `string_match`.

    It has all words of the answer, and none that only other choices have.
    """
    said, right = _words(prediction), _words(answer)
    others = [_words(choice) for choice in choices]
    wrong = {word for words in others if words != right for word in words - right}
    return bool(said) and right <= said and said.isdisjoint(wrong)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def chosen_letter(text: str) -> str:
    """The letter that MMSU's evaluator reads: the first character, or the last but one.

    So "Answer: B" is an A, and "(B)" a B. "" where neither is A to D; an empty answer, for which
    MiMo-Audio-Eval counts the letter of the answer before it, is none.
    """
    said = after_thoughts(text).strip().replace("\n", "")
    if said == "None":
        return ""
    return next((each for each in (said[:1], said[-2:-1]) if each and each in LETTERS), "")


def option_index(text: str) -> int:
    """The index of the first "option A" ... "option D" of a text, -1 without one (SpeechMMLU)."""
    found = OPTION.search(text.lower())
    return "abcd".index(found.group(1)) if found else -1


def matched_choice(text: str, truth: Mapping[str, Any]) -> Found:
    """MMAU, MMAR: {"answer", "choices"} of the truth against what the text states."""
    stated = stated_answer(after_thoughts(text))
    return {
        "stated": stated,
        "correct": matches(str(truth["answer"]), stated, truth["choices"]),
    }


def lettered_choice(text: str, truth: Mapping[str, Any]) -> Found:
    """MMSU: whether the choice of the letter is the answer's text."""
    letter = chosen_letter(text)
    choice = dict(zip(LETTERS, truth["choices"], strict=True)).get(letter)
    return {"stated": letter, "correct": choice == truth["answer"]}


def numbered_option(text: str, truth: Mapping[str, Any]) -> Found:
    """SpeechMMLU: whether the option that is named is the one of the truth's index."""
    index = option_index(text)
    return {"stated": index, "correct": index == truth["answer"]}


@dataclass(frozen=True)
class Accuracy:
    """The share of answers that make the right choice.

    Args:
        read: text, the item's truth -> {"stated", "correct"}.
        heard: the language in which a recogniser hears the answer; None for its text.
    """

    read: Callable[[str, Mapping[str, Any]], Found]
    heard: str | None = None
    name: str = "accuracy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"recogniser"} if self.heard else ())

    def find(self, answer: Answer, tools: Tools) -> Found:
        """{"said", "stated", "correct"}; an answer that failed is wrong."""
        said = said_in(answer, tools, self.heard)
        return {"said": said, **self.read(said, answer.item.truth)}

    def figures(self, found: Sequence[tuple[Answer, Found]]) -> Mapping[str, Figure]:
        return {self.name: share_correct(found)}


def said_in(answer: Answer, tools: Tools, heard: str | None) -> str:
    """What an answer says: its text, or what a recogniser hears in a language; "" if it failed."""
    if heard is None:
        return answer.text if answer.error is None else ""
    if answer.audio is None:
        return ""
    assert tools.recogniser is not None
    return tools.recogniser(answer.audio, heard).strip()


def share_correct(found: Sequence[tuple[Answer, Found]], note: str = "") -> Figure:
    """Answers found "correct", in per cent."""
    right = sum(bool(each["correct"]) for _, each in found)
    share = 100 * right / len(found) if found else None
    return Figure(share, "%", len(found), "higher", note)
