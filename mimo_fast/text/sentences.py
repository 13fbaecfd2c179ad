"""Text -> sentences, and pieces that a model can say at once.

Pieces are slices: joined, they are the text. Rules, not a model: terminators of many scripts,
abbreviations, initials, numbers, quotes, lists and blank lines. Where a full stop may end a
sentence or an abbreviation, the word that follows decides.
"""

import re
from collections.abc import Iterator, Sequence

from mimo_fast.text.spelling import spell

ALWAYS = "。！？｡．؟۔।॥։።"
"""Terminators of scripts that need no space after one."""

CLOSERS = "\"'”’»›」』】〉》）)]}"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NEVER_LAST = _words(
    """
    mr mrs ms dr prof gen col capt cmdr lt sgt maj rev hon pres gov sen rep messrs mme mlle mgr fr
    e.g i.e cf viz vs approx
"""
)
"""Abbreviations that need a word after them."""

BEFORE_NUMBERS = _words("no nos nr fig figs vol pp p ch sec art eq op para")
"""Abbreviations only in front of a number: "no. 5" is one, "I said no. Five" is none."""

SOMETIMES_LAST = _words(
    """
    etc inc ltd jr sr co corp dept est bros st ave blvd rd mt ft tel ext univ assn esq phd
    jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thur thurs fri
"""
)
"""Abbreviations that end a sentence where a word follows that often begins one."""

STARTERS = _words(
    """
    the a an this that these those it he she we i you they there here in on at by but and so or if
    when while as for from after before then what why how who where which my our his her its their
    your yes no not now please do does did is are was were can will would let one two all some
"""
)
"""Words that often begin a sentence and are no names."""

_BREAK = re.compile(
    rf"""
    (?P<block> \n[^\S\n]*\n\s* | \n\s*(?=[-*•]\s|\d{{1,3}}[.)]\s) )
    | (?P<mark> [.!?…{ALWAYS}]+ ) (?P<close> [{re.escape(CLOSERS)}]* ) (?P<space> \s* )
    """,
    re.VERBOSE,
)
_LAST_WORD = re.compile(r"""[^\s"'“”‘’«(\[{]*\Z""")
_NEXT_WORD = re.compile(r"""["'“‘«(\[{]*([^\W\d_]*)""")
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_LONGEST_WORD = 40

_LINE = re.compile(r"\n\s*")
_CLAUSE = re.compile(
    rf"""[,;:][{re.escape(CLOSERS)}]*\s+ | [，、；：]+[{re.escape(CLOSERS)}]*\s*
    | \s+[-–—]+\s+ | —+\s*""",
    re.VERBOSE,
)
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]\s*|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+\s*|\s+"
)
_WIDE = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the space behind it; one at least.

    What has no letter and no digit is part of the sentence before it, or of the first.
    """
    sentences, start = [""], 0
    for match in _BREAK.finditer(text):
        if match.end() < len(text) and _ends_sentence(text, start, match):
            sentences.append(text[start : match.end()])
            start = match.end()
    sentences.append(text[start:])
    whole, spoken = list[list[str]]([[]]), False
    for sentence in sentences:
        has_word = _has_word(sentence)
        if spoken and has_word:
            whole.append([])
        whole[-1].append(sentence)
        spoken = spoken or has_word
    return ["".join(parts) for parts in whole]


def split_to_say(text: str, sentences: int = 0, words: int = 0) -> list[str]:
    """Pieces of at most so many sentences and words, 0 for any number.

    A longer sentence is cut where a line or a clause ends, else between words. A number counts as
    the words that it is read as, a Chinese, Japanese or Korean character as a word.
    """
    parts = split_sentences(text) if sentences else [text]
    size = sentences or 1
    groups = ["".join(parts[i : i + size]) for i in range(0, len(parts), size)]
    return [piece for group in groups for piece in (_cut(group, words) if words else [group])]


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the sentence that began at `start` ends with a match that text follows."""
    if match["block"]:
        return True
    mark, close, space = match["mark"], match["close"], match["space"]
    before, after = text[match.start() - 1 : match.start()], text[match.end()]
    if not space and before.isdigit() and after.isdigit():
        # A number with a wide full stop, or a date.
        return False
    if any(each in ALWAYS for each in mark):
        return True
    asks = "!" in mark or "?" in mark
    if not space:
        return bool(_WIDE.match(after) and (asks or (mark == "." and _WIDE.match(before))))
    if after.islower() and (close or (len(mark) > 1 and not asks) or mark == "…"):
        # "Go!" he said; and ... of hesitation.
        return False
    if asks or mark != ".":
        return True
    return not _is_abbreviation(text, start, match.start(), match.end())


def _is_abbreviation(text: str, start: int, stop: int, following: int) -> bool:
    """Whether the full stop at `stop` belongs to the word in front of it."""
    found = _LAST_WORD.search(text, max(start, stop - _LONGEST_WORD), stop)
    word = found.group() if found else ""
    after = _NEXT_WORD.match(text, following)
    following_word = after.group(1) if after else ""
    begins = following_word[:1].isupper() and following_word.lower() in STARTERS
    number = text[following].isdigit()
    if word.lower() in NEVER_LAST:
        return True
    if word.lower() in BEFORE_NUMBERS and number:
        return True
    if word.lower() in SOMETIMES_LAST or _ACRONYM.fullmatch(word):
        return not begins
    alone = not text[start : stop - len(word)].strip()
    if alone and word.isdigit():
        # A number of a list, unless numbers are all that is said.
        return len(word) <= 3 and not number
    if len(word) == 1 and word.isupper() and word != "I":
        # An initial; but letters in a row are spelled.
        spelled = re.search(r"(?:^|\s)[^\W\d_]\s+\Z", text[max(start, stop - 8) : stop - 1])
        return following_word[:1].isupper() and not begins and spelled is None
    return False


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def _cut(text: str, words: int) -> list[str]:
    """A text in pieces of at most so many words."""
    if _count(text) <= words:
        return [text]
    for pattern in (_LINE, _CLAUSE):
        parts = list(_split_after(text, pattern))
        if len(parts) > 1:
            return [piece for group in _packed(parts, words) for piece in _cut(group, words)]
    return _packed(_WORD.findall(text), -(-_count(text) // -(-_count(text) // words)))


def _split_after(text: str, pattern: re.Pattern[str]) -> Iterator[str]:
    start = seen = 0
    spoken, last = False, max((i for i, each in enumerate(text) if each.isalnum()), default=0)
    for match in pattern.finditer(text):
        spoken = spoken or _has_word(text[seen : match.end()])
        seen = match.end()
        if spoken and seen <= last:
            spoken = False
            yield text[start : match.end()]
            start = match.end()
    yield text[start:]


def _packed(parts: Sequence[str], words: int) -> list[str]:
    """Neighbours joined while they have at most so many words."""
    groups, room = list[list[str]]([[]]), words
    for part in parts:
        count = _count(part)
        if count > room and room < words:
            groups.append([])
            room = words
        groups[-1].append(part)
        room -= count
    return ["".join(group) for group in groups]


def _count(text: str) -> int:
    """Number of words as they are said."""
    return sum(len(spell(word)) for word in _WORD.findall(text))
