"""The rule of advice: it never names a format that may lose too much, and better is never worse."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mimo_fast.quality.advice import MEASURES, WORDED, Advice, Bounds, Candidate, advice
from mimo_fast.quality.losses import Loss

BOUNDS = Bounds()
few = settings(max_examples=40)


@st.composite
def losses(draw: st.DrawFn) -> dict[str, Loss]:
    found = {}
    for name in draw(st.sets(st.sampled_from([*MEASURES]))):
        bound = BOUNDS.of(name)
        value = draw(st.floats(-2, 2)) * bound
        below, above = draw(st.floats(0, 2)) * bound, draw(st.floats(0, 2)) * bound
        count = draw(st.integers(2, 500))
        found[name] = Loss(value, value - below, value + above, bound, count)
    return found


FACTORS, BYTES = st.floats(0.01, 2) | st.none(), st.integers(1, 10**10)


@st.composite
def formats(draw: st.DrawFn) -> list[Candidate]:
    full = Candidate("float32", {}, draw(FACTORS), draw(BYTES))
    names = draw(st.lists(st.sampled_from(["int8", "int4", "nf4"]), unique=True))
    return [full, *(Candidate(n, draw(losses()), draw(FACTORS), draw(BYTES)) for n in names)]


def named(found: Advice, candidates: list[Candidate]) -> Candidate:
    return next(each for each in candidates if each.name == found.format)


@few
@given(formats())
def test_it_never_names_what_may_lose_too_much(candidates):
    found = advice(candidates, BOUNDS)
    chosen = named(found, candidates)
    if chosen is not candidates[0]:
        assert set(WORDED) & set(chosen.losses)
        assert all(loss.high <= BOUNDS.of(name) for name, loss in chosen.losses.items())
        assert all(loss.utterances >= 10 for loss in chosen.losses.values())
    assert found.format in found.fastest
    assert set(found.fastest) <= set(found.fit)
    assert found.sentence.startswith(
        f"Keep {found.format}" if chosen is candidates[0] else f"Take {found.format}"
    )
    assert found.sentence.endswith(".")
    # Each other one is accounted for.
    assert all(each.name in found.sentence for each in candidates)


@few
@given(formats())
def test_it_names_the_smallest_of_those_that_are_about_as_fast_as_the_fastest(candidates):
    found = advice(candidates, BOUNDS)
    chosen = named(found, candidates)
    fit = [each for each in candidates if each.name in found.fit]
    if any(each.factor is None for each in fit):
        assert chosen.nbytes == min(each.nbytes for each in fit)
        return
    limit = 1.1 * min(each.factor for each in fit)
    assert chosen.factor <= limit
    assert all(chosen.nbytes <= each.nbytes for each in fit if each.factor <= limit)


@few
@given(formats(), st.floats(0, 1), st.floats(0.1, 1), st.floats(0.1, 1))
def test_what_is_named_is_named_still_where_it_is_better(candidates, less, faster, smaller):
    found = advice(candidates, BOUNDS)
    chosen = named(found, candidates)
    better = replace(
        chosen,
        losses={
            name: replace(loss, value=loss.value - less, low=loss.low - less, high=loss.high - less)
            for name, loss in chosen.losses.items()
        },
        factor=chosen.factor and chosen.factor * faster,
        nbytes=max(1, int(chosen.nbytes * smaller)),
    )
    again = [better if each is chosen else each for each in candidates]
    assert advice(again, BOUNDS).format == found.format


@few
@given(formats(), st.data())
def test_what_loses_more_is_not_named_for_it(candidates, data):
    found = advice(candidates, BOUNDS)
    others = [each for each in candidates[1:] if each.name != found.format and each.losses]
    assume(others)
    worse = data.draw(st.sampled_from(others))
    more = {
        name: replace(loss, value=loss.value + 1, low=loss.low + 1, high=loss.high + 1)
        for name, loss in worse.losses.items()
    }
    again = [replace(each, losses=more) if each is worse else each for each in candidates]
    assert advice(again, BOUNDS).format != worse.name


def test_without_words_nothing_is_taken_in_place_of_the_full_one():
    sound = {"sound": Loss(-1.0, -1.1, -0.9, 0.1, 100)}
    candidates = [Candidate("bfloat16", {}, 1.0, 100), Candidate("int4", sound, 0.1, 25)]
    found = advice(candidates, BOUNDS)
    assert found.format == "bfloat16"
    assert "int4 cannot be judged, as no words were measured" in found.sentence


def small(high: float = 0.02, low: float = -0.02, **fields: float) -> Candidate:
    losses = {"hearing": Loss((low + high) / 2, low, high, 0.03, 50)}
    return Candidate("int8", losses, fields.get("factor", 0.5), 50)


@pytest.mark.parametrize(
    ("other", "name", "reason"),
    [
        (
            small(),
            "int8",
            "Take int8 on this machine: its loss is 0.0 points of",
        ),
        (small(0.2, 0.1), "float32", "as it loses 15.0 points of the words that it hears (at"),
        (small(0.09, -0.09), "float32", "of which 50 utterances are too few to tell: about 450"),
        (small(factor=1.2), "float32", "int8 is slower"),
        # A tie goes to the smaller weights.
        (small(factor=1.09), "int8", "float32 its real-time factor is 1.090 (1.000)"),
    ],
)
def test_the_sentence_says_why(other, name, reason):
    found = advice([Candidate("float32", {}, 1.0, 100), other], BOUNDS)
    assert found.format == name
    assert reason in found.sentence
