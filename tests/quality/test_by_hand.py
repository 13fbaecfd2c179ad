"""The committed report of nano, recomputed: rates, intervals, the rule, every number it gives.

Nothing of `mimo_fast.quality` is used: the arithmetic is written out here.
"""

import json
import random
import re
import statistics
from pathlib import Path

import pytest

from training.listen import word_errors

REPORT = json.loads(
    (Path(__file__).parents[2] / "benchmarks/results/2026-11-29-quality-nano.json").read_text()
)
FULL, FORMATS, BOUNDS = REPORT["full"], REPORT["formats"], REPORT["bounds"]
WORDED = {
    "hearing": [each["reference"] for each in REPORT["recordings"]],
    "speech": REPORT["texts"],
}
ROUNDS = 4000


def ends(losses: list[float], words: list[int]) -> tuple[float, float]:
    """The 95% interval of a loss an utterance drawn with replacement, by Python's own generator."""
    draw, found = random.Random(7), []
    for _ in range(ROUNDS):
        chosen = draw.choices(range(len(words)), k=len(words))
        found.append(sum(losses[i] for i in chosen) / sum(words[i] for i in chosen))
    cuts = statistics.quantiles(found, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def by_hand(name: str, measure: str) -> tuple[float, float, float]:
    """Loss of a format and its interval."""
    if measure in WORDED:
        texts = WORDED[measure]
        words = [len(text.split()) for text in texts]
        ours, theirs = (
            [word_errors(got, want) for got, want in zip(heard, texts, strict=True)]
            for heard in (FORMATS[each][measure]["heard"] for each in (name, FULL))
        )
        losses = [a - b for a, b in zip(ours, theirs, strict=True)]
        low, high = ends(losses, words)
        return sum(losses) / sum(words), low, max(high, 3 / sum(words))
    pairs = zip(FORMATS[name][measure]["values"], FORMATS[FULL][measure]["values"], strict=True)
    losses = [theirs - ours for ours, theirs in pairs if None not in (ours, theirs)]
    return statistics.fmean(losses), *ends(losses, [1] * len(losses))


MEASURED = [(name, measure) for name, each in FORMATS.items() for measure in each.get("losses", ())]


@pytest.mark.parametrize(("name", "measure"), MEASURED)
def test_losses_and_intervals(name, measure):
    given = FORMATS[name]["losses"][measure]
    value, low, high = by_hand(name, measure)
    assert given["value"] == pytest.approx(value, abs=1e-9)
    noise = 0.1 * (high - low)
    assert (given["low"], given["high"]) == pytest.approx((low, high), abs=noise)
    assert given["bound"] == BOUNDS["words" if measure in WORDED else measure]
    inside, outside = given["high"] <= given["bound"], given["low"] > given["bound"]
    assert given["utterances"] >= 10
    assert given["verdict"] == ("holds" if inside else "broken" if outside else "open")


def test_all_four_losses_of_int8_and_int4_were_measured():
    assert set(MEASURED) >= {
        (name, measure)
        for name in ("int8", "int4")
        for measure in ("hearing", "speech", "voice", "sound")
    }


def test_the_format_that_is_named():
    fit = [
        name
        for name, each in FORMATS.items()
        if name == FULL
        or all(by_hand(name, m)[2] <= loss["bound"] for m, loss in each["losses"].items())
    ]
    factors = {name: FORMATS[name]["speed"]["real_time_factor"] for name in fit}
    fast = [name for name in fit if factors[name] <= 1.1 * min(factors.values())]
    smallest = min(fast, key=lambda name: FORMATS[name]["memory"]["weights"])
    assert REPORT["advice"]["format"] == smallest
    assert smallest in ("int8", "int4")
    assert (REPORT["advice"]["fit"], REPORT["advice"]["fastest"]) == (fit, fast)


def test_every_number_of_the_sentence_is_a_figure_of_the_report():
    sentence = re.sub("float32|int8|int4", "", REPORT["advice"]["sentence"])
    known = set[float]()
    for each in FORMATS.values():
        known.add(round(each["memory"]["weights"] / 1e6, 1))
        known.add(round(each["speed"]["real_time_factor"], 3))
        for measure, loss in each.get("losses", {}).items():
            factor, digits = (100, 1) if measure in WORDED else (1, 3)
            known |= {round(factor * loss[k], digits) for k in ("value", "low", "high", "bound")}
            known |= {loss["utterances"], loss["needed"] or loss["utterances"]}
    numbers = re.findall(r"-?\d+(?:\.\d+)?", sentence)
    assert len(numbers) > 10
    assert {float(number) for number in numbers} <= known


def test_counts_are_those_of_the_recordings_and_texts():
    assert len(REPORT["recordings"]) == len(REPORT["texts"]) == 24
    assert all(each["from"] == "given" for each in REPORT["recordings"])
    for each in FORMATS.values():
        assert each["hearing"]["words"] == [len(text.split()) for text in WORDED["hearing"]]
        rate = sum(each["speech"]["errors"]) / sum(each["speech"]["words"])
        assert each["speech"]["rate"] == pytest.approx(rate)
