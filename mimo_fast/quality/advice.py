"""The rule by which one format is named, and the sentence that says why.

A format is fit if its words were measured and no loss beside the full one may exceed its bound: the
95% interval's upper end decides, so that what a few utterances cannot show is not taken for true.
The full one is always fit. Of the fit ones, those within a tenth of the fastest are as fast; of
these the one with the smallest weights is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mimo_fast.quality.losses import Loss

WORDS = 0.03
"""Of the words: three in a hundred, which takes a hundred words to rule out (the rule of three, see
`losses`), some tens of recordings. Who has more may ask for less: --margin."""

VOICE = 0.05
"""Of the cosine between voices: a seventh of what lies between two sentences of one voice and one
of each of two, 0.84 and 0.50 (`voices` in benchmarks/results/2026-11-29-quality-nano.json)."""

SOUND = 0.1
"""Of DNSMOS, whose scale is 1 to 5: half of the standard deviation over sentences that nano says,
0.19 (same file)."""

SPEED = 0.1
"""Of the fastest's time: on a machine that does other things, too, medians differ by as much."""


@dataclass(frozen=True)
class Bounds:
    """What a format may lose, in each measure's unit, and what counts as equally fast."""

    words: float = WORDS
    voice: float = VOICE
    sound: float = SOUND
    speed: float = SPEED

    def of(self, measure: str) -> float:
        return {"voice": self.voice, "sound": self.sound}.get(measure, self.words)


@dataclass(frozen=True)
class Measure:
    """How a loss is called in a sentence, its factor there, and its unit."""

    title: str
    factor: float
    digits: int
    unit: str

    def shown(self, value: float) -> str:
        # Not -0.0, which a loss of nothing would be otherwise.
        return f"{round(self.factor * value, self.digits) + 0.0:.{self.digits}f}"


MEASURES = {
    "hearing": Measure("the words that it hears", 100, 1, " points"),
    "speech": Measure("the words that are heard in its speech", 100, 1, " points"),
    "voice": Measure("its voice's likeness", 1, 3, ""),
    "sound": Measure("DNSMOS", 1, 3, ""),
}
"""Measure of a loss -> how it is called."""

WORDED = ("hearing", "speech")
"""Measures of words: without one of them a format cannot be judged."""


@dataclass(frozen=True)
class Candidate:
    """A format as it was measured.

    Attributes:
        losses: Measure -> loss beside the full one; the full one has none.
        factor: Seconds of computing a second of speech; None where it was not measured.
        nbytes: Of its weights.
    """

    name: str
    losses: Mapping[str, Loss]
    factor: float | None
    nbytes: int

    @property
    def fit(self) -> bool:
        worded = any(name in self.losses for name in WORDED)
        return worded and all(loss.verdict == "holds" for loss in self.losses.values())


@dataclass(frozen=True)
class Advice:
    """The format to take, those that were fit, those of them that are as fast as the fastest."""

    format: str
    fit: tuple[str, ...]
    fastest: tuple[str, ...]
    sentence: str = field(compare=False)


def advice(candidates: Sequence[Candidate], bounds: Bounds) -> Advice:
    """Names one of the candidates, of which the first is the full one; see the module."""
    full, *others = candidates
    fit = [full, *(each for each in others if each.fit)]
    tied = fit
    factors = [each.factor for each in fit if each.factor is not None]
    if len(factors) == len(fit):
        limit = min(factors) * (1 + bounds.speed)
        tied = [each for each in fit if each.factor is not None and each.factor <= limit]
    # The first of equal ones, which is the more exact.
    chosen = min(tied, key=lambda each: each.nbytes)
    names = tuple(each.name for each in fit), tuple(each.name for each in tied)
    return Advice(chosen.name, *names, _sentence(chosen, full, candidates, fit, tied))


def _sentence(
    chosen: Candidate,
    full: Candidate,
    candidates: Sequence[Candidate],
    fit: Sequence[Candidate],
    tied: Sequence[Candidate],
) -> str:
    others = [each for each in candidates if each is not chosen and each is not full]
    reasons = [_passed_over(each, chosen, fit, tied) for each in others]
    if chosen is full:
        kept = "; ".join(reasons) or "no other was compared"
        return f"Keep {full.name} on this machine: {kept}."
    lost = [_kept(name, loss) for name, loss in chosen.losses.items()]
    losses = "its loss is" if len(lost) == 1 else "its losses are"
    take = f"Take {chosen.name} on this machine: {losses} {_listed(lost)}"
    gains = f"beside {full.name} {_gains(chosen, full)}"
    return "; ".join([take, gains, *reasons]) + "."


def _kept(name: str, loss: Loss) -> str:
    measure = MEASURES[name]
    value, high, bound = map(measure.shown, (loss.value, loss.high, loss.bound))
    return f"{value}{measure.unit} of {measure.title} (at most {high}, {bound} allowed)"


def _gains(one: Candidate, other: Candidate) -> str:
    """Speed and weights of one, and in brackets another's."""
    found = [f"its weights take {one.nbytes / 1e6:,.1f} MB ({other.nbytes / 1e6:,.1f} MB)"]
    if one.factor is not None and other.factor is not None:
        found.insert(0, f"its real-time factor is {one.factor:.3f} ({other.factor:.3f})")
    return _listed(found)


def _figures(one: Candidate) -> str:
    speed = "" if one.factor is None else f"real-time factor {one.factor:.3f}, "
    return f"{speed}weights {one.nbytes / 1e6:,.1f} MB"


def _passed_over(
    each: Candidate, chosen: Candidate, fit: Sequence[Candidate], tied: Sequence[Candidate]
) -> str:
    """Why a format is not the one that is named."""
    if each in tied:
        return f"{each.name} is about as fast and not smaller ({_figures(each)})"
    if each in fit:
        return f"{each.name} is slower ({_figures(each)})"
    if not any(name in each.losses for name in WORDED):
        return f"{each.name} cannot be judged, as no words were measured"
    broken = {name: loss for name, loss in each.losses.items() if loss.verdict == "broken"}
    if broken:
        lost = _listed([_broken(name, loss) for name, loss in broken.items()])
        return f"{each.name} is not taken, as it loses {lost}"
    unsettled = {name: loss for name, loss in each.losses.items() if loss.verdict == "open"}
    count = min(loss.utterances for loss in unsettled.values())
    lost = _listed([_open(name, loss) for name, loss in unsettled.items()])
    needed = [loss.needed for loss in unsettled.values()]
    known = [number for number in needed if number is not None]
    more = f": about {max(known)} would do" if len(known) == len(needed) else ""
    few = f"{count} utterances are too few to tell"
    return f"{each.name} is not taken, as it may lose {lost}, of which {few}{more}"


def _broken(name: str, loss: Loss) -> str:
    measure = MEASURES[name]
    value, low, bound = map(measure.shown, (loss.value, loss.low, loss.bound))
    return f"{value}{measure.unit} of {measure.title} (at least {low}, {bound} allowed)"


def _open(name: str, loss: Loss) -> str:
    measure = MEASURES[name]
    high, bound = map(measure.shown, (loss.high, loss.bound))
    return f"up to {high}{measure.unit} of {measure.title} ({bound} allowed)"


def _listed(parts: Sequence[str]) -> str:
    *before, last = parts
    return f"{', '.join(before)} and {last}" if before else last
