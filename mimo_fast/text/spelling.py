"""Text -> spoken words in lower case, for a checkpoint with a small vocabulary."""

import re

LONGEST = 4
"""Digits of a number read as one; longer ones, and ones with a leading 0, are read by digits."""

UNITS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen
""".split()  # noqa: SIM905
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

PIECES = re.compile(r"([0-9]+)|([^\W\d_]+(?:['’][^\W\d_]+)*)")
"""A number, or a word of any script."""


def spell(text: str) -> list[str]:
    """The words of a text as they are said, in lower case: "Seven 42!" -> seven, forty, two."""
    words: list[str] = []
    for digits, word in PIECES.findall(text.lower()):
        words += _digits(digits) if digits else [word]
    return words


def _digits(digits: str) -> list[str]:
    if len(digits) > LONGEST or (digits[0] == "0" and len(digits) > 1):
        return [UNITS[int(digit)] for digit in digits]
    return _number(int(digits)) or [UNITS[0]]


def _number(value: int) -> list[str]:
    """Words of a number, none of 0."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if value >= size:
            return [UNITS[value // size], name, *_number(value % size)]
    if value >= len(UNITS):
        return [TENS[value // 10 - 2], *_number(value % 10)]
    return [UNITS[value]] if value else []
