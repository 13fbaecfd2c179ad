"""What the score of a watermark's detector is worth as a probability, on speech kept back.

    pip install 'mimo-fast[mark]'; apt-get install flite espeak-ng
    python -m benchmarks.studies.watermark [FILE.json]

Speech of synthesizers and of nano, marked and not, goes through the transformations that a mark is
to survive. Platt's scaling (a logistic curve over the score, or over its log-odds, with smoothed
targets) is fitted to one half of the voices and checked on the other, both ways, then to both: the
constants of `marking/watermark.py`. nano is one voice: its halves are other sentences by other
seeds. So a confidence is a probability where a recording is as likely marked as not, and has gone
through one of the transformations as likely as through another.

Unmarked speech at another speed is measured beside that and fitted to nothing: marked speech at
these speeds has lost its mark, so no curve over the score tells the two apart.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.common import Record, parser_of, write
from benchmarks.transformations import CHANGES, RATE, SPEEDS
from mimo_fast.bench.environment import environment
from mimo_fast.marking.watermark import find_watermark, watermark
from training import domain
from training.confidence import FOREIGN
from training.synthesis import ESPEAK, Manner, synthesize

HALVES = {
    "one": ("slt", "kal16", f"{ESPEAK}en-us+m3", f"{ESPEAK}en-gb+f4"),
    "other": ("awb", "rms", f"{ESPEAK}en-gb+f2", f"{ESPEAK}en-us+m7"),
}
"""Voices of synthesizers, none of them in both; nano is in both."""

EDGE = 1e-3
"""Of log-odds: scores nearer to 0 or 1 count as this near."""

LONG = 2
"""Voices of a half that say something of 10 to 15 s, too."""

REPLIES, TOGETHER = 8, 6
"""Sentences of nano in a half, of one to three seconds, and how many of them follow each other in
one more recording."""


class Score(NamedTuple):
    half: str
    voice: str
    change: str
    marked: bool
    value: float


class Curve(NamedTuple):
    """A logistic curve over scores, or over their log-odds -> a probability."""

    slope: float
    bias: float
    over: str = "score"

    def __call__(self, scores: Sequence[float]) -> Tensor:
        return torch.sigmoid(self.slope * OVER[self.over](scores) + self.bias)


def log_odds(scores: Sequence[float]) -> Tensor:
    return torch.tensor(scores).double().clamp(EDGE, 1 - EDGE).logit()


OVER: dict[str, Callable[[Sequence[float]], Tensor]] = {
    "score": lambda scores: torch.tensor(scores).double(),
    "log-odds": log_odds,
}


def speech(half: str) -> Iterator[tuple[str, Tensor]]:
    """Voices and what they say, [n] at 24 kHz."""
    rng, foreign = random.Random(half), FOREIGN.read_text(encoding="utf-8").splitlines()
    for i, voice in enumerate(HALVES[half]):
        texts = [domain.spoken(domain.draw_sentence(rng)), rng.choice(foreign)]
        texts += [" ".join(rng.sample(foreign, 3))] * (i < LONG)
        for text in texts:
            yield voice, synthesize(text, Manner(voice)).wav
    with mimo_fast.load() as nano:
        said = [
            torch.cat([chunk.audio for chunk in nano.stream("tts", text, seed=rng.getrandbits(32))])
            for text in (domain.draw_sentence(rng) for _ in range(REPLIES))
        ]
    for wav in (*said, torch.cat(said[:TOGETHER])):
        yield "nano", wav


def measured(half: str) -> Iterator[Score]:
    for voice, wav in speech(half):
        for marked, heard in ((False, wav), (True, watermark(wav, RATE))):
            for name, change in (CHANGES if marked else CHANGES | SPEEDS).items():
                found = find_watermark(*change(heard))
                yield Score(half, voice, name, marked, round(found.score, 4))


def fitted(scores: Sequence[Score], over: str) -> Curve:
    """Platt's scaling of what went through `CHANGES`."""
    scores = [each for each in scores if each.change in CHANGES]
    values = OVER[over]([each.value for each in scores])
    marked = torch.tensor([each.marked for each in scores])
    count = int(marked.sum())
    # Of a class that was never wrong in so many cases the next may be.
    targets = torch.where(marked, (count + 1) / (count + 2), 1 / (len(scores) - count + 2)).double()
    found = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([found], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits = found[0] * values + found[1]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        entropy.backward()
        return entropy

    search.step(loss)
    slope, bias = (round(each, 3) for each in found.tolist())
    return Curve(slope, bias, over)


def checked(curve: Curve, scores: Sequence[Score]) -> Record:
    """What a curve says of scores: by transformation, and how far it is from what is so."""
    sure = [
        (each, float(value))
        for each, value in zip(scores, curve([each.value for each in scores]), strict=True)
    ]
    known = [(each, value) for each, value in sure if each.change in CHANGES]
    bins = [
        {
            "confidence": round(sum(value for _, value in within) / len(within), 3),
            "marked": round(sum(each.marked for each, _ in within) / len(within), 3),
            "count": len(within),
        }
        for low, high in ((0, 0.02), (0.02, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 0.98), (0.98, 1.1))
        if (within := [(each, value) for each, value in known if low <= value < high])
    ]
    misses = [abs(each.marked - value) for each, value in known]
    return {
        "curve": curve._asdict(),
        "brier": round(sum(miss**2 for miss in misses) / len(misses), 6),
        "log loss": round(-sum(math.log(1 - miss) for miss in misses) / len(misses), 6),
        "bins": bins,
        "marked, least": {
            name: round(min(values), 4)
            for name in CHANGES
            if (values := [v for each, v in sure if each.change == name and each.marked])
        },
        "unmarked, most": {
            name: round(max(values), 4)
            for name in CHANGES | SPEEDS
            if (values := [v for each, v in sure if each.change == name and not each.marked])
        },
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="JSON to write")
    parser.add_argument("--scores", type=Path, help="take those of an earlier JSON")
    arguments = parser.parse_args()
    if arguments.scores:
        earlier = json.loads(arguments.scores.read_text(encoding="utf-8"))
        about, scores = earlier["environment"], [*_scores(earlier["scores"])]
    else:
        about = environment("cpu")
        scores = [each for half in HALVES for each in measured(half)]
    record: Record = {"environment": about, "halves": HALVES}
    for over in OVER:
        found: Record = {}
        record[f"over the {over}"] = found
        for half in HALVES:
            own, others = (
                [s for s in scores if (s.half == half) == mine] for mine in (True, False)
            )
            found[f"fitted to {half}, checked on the rest"] = checked(fitted(own, over), others)
        found["fitted to all, checked on the same"] = checked(fitted(scores, over), scores)
        for name, each in found.items():
            print(f"over the {over}, {name}: {each}")
    write(arguments.file, record | {"scores": _table(scores)})


def _scores(table: Record) -> Iterator[Score]:
    for half, voices in table.items():
        for voice, kinds in voices.items():
            for kind, changes in kinds.items():
                for change, values in changes.items():
                    for value in values:
                        yield Score(half, voice, change, kind == "marked", value)


def _table(scores: Sequence[Score]) -> Record:
    """Scores by half, voice, whether marked, and transformation."""
    found: Record = {}
    for half, voice, change, marked, value in scores:
        place = found.setdefault(half, {}).setdefault(voice, {})
        kind = place.setdefault("marked" if marked else "unmarked", {})
        kind.setdefault(change, []).append(value)
    return found


if __name__ == "__main__":
    main()
