"""Words that `mimo-fast convert` says wrongly with nano, by example, on more than its card has.

    python -m benchmarks.studies.by_example [FILE.json] [--kind KIND] [--rounds N] [--first N]

Each round draws two sentences as examples, says them in nano's own voice by flite for what became
of them, and converts all others by one call of the command with the round's number as its seed.

card       the dialogue's answers in the unheard voice, as those of the card
varied     the same at other rates and pitches of that voice
held out   sentences that training never had, by whose kind nano was never asked to say again

Rates are word errors of the recogniser over words, with the interval that holds 95% of 2000
resamplings of the sentences; `flite` is what it mishears of the synthesizer itself.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

from torch import Tensor

import mimo_fast
from benchmarks.studies.common import Record, parser_of, write
from mimo_fast.bench.environment import environment
from mimo_fast.cli.main import main as command
from training import domain
from training.data import STYLES, UNHEARD_VOICE, answers
from training.listen import recognise, word_errors
from training.synthesis import Manner, synthesize

RATE = 24_000
HELD_OUT = 45
"""Held-out sentences of a round, as many as the dialogue has answers."""

Scores = dict[str, list[tuple[int, int]]]
"""Of each sentence (errors, words) of each round."""


def unheard(rng: random.Random) -> Manner:
    return Manner(UNHEARD_VOICE)


def varied(rng: random.Random) -> Manner:
    return Manner(UNHEARD_VOICE, rng.uniform(0.85, 1.2), rng.uniform(0.85, 1.2))


def dialogue(rng: random.Random) -> list[str]:
    return [*answers()]


def held_out(rng: random.Random) -> list[str]:
    return [domain.draw_sentence(rng, held_out=True) for _ in range(HELD_OUT)]


KINDS: dict[str, tuple[Callable[[random.Random], list[str]], Callable[[random.Random], Manner]]] = {
    "card": (dialogue, unheard),
    "varied": (dialogue, varied),
    "held out": (held_out, unheard),
}


def converted(number: int, kind: str, folder: Path) -> tuple[Scores, Scores]:
    """A round: what the recogniser hears of nano, and of flite, sentence by sentence."""
    rng = random.Random(f"{kind} {number}")
    sentences, manner = KINDS[kind]
    texts, options = [*dict.fromkeys(sentences(rng))], list[str]()
    shown = rng.sample(answers(), 2)
    for i, text in enumerate(shown):
        before, after = folder / f"{i}-before.wav", folder / f"{i}-after.wav"
        mimo_fast.save_wav(before, recording(text, manner(rng)), RATE)
        mimo_fast.save_wav(after, recording(text), RATE)
        options += ["--example", str(before), str(after), text]
    asked = {folder / f"{i:03}.wav": text for i, text in enumerate(texts) if text not in shown}
    for path, text in asked.items():
        mimo_fast.save_wav(path, recording(text, manner(rng)), RATE)
    output = folder / "converted"
    given = [*options, *map(str, asked), "-o", str(output), "--seed", str(number)]
    with redirect_stderr(StringIO()) as problems, redirect_stdout(StringIO()):
        failed = command(["convert", *given])
    mine, flite = Scores(), Scores()
    for path, text in asked.items():
        count = len(text.split())
        # A recording of which nothing was said has no file: all of its words are wrong.
        heard = (
            recognise(mimo_fast.load_audio(output / path.name, RATE), RATE)
            if (output / path.name).exists()
            else ""
        )
        mine.setdefault(text, []).append((word_errors(heard, text), count))
        flite.setdefault(text, []).append((floor(text), count))
    missing = sum(not (output / path.name).exists() for path in asked)
    assert bool(failed) == bool(missing), problems.getvalue()
    return mine, flite


@cache
def recording(text: str, manner: Manner = STYLES["normal"]) -> Tensor:
    """A sentence, by default in the voice that nano speaks in."""
    return synthesize(domain.spoken(text), manner).wav


@cache
def floor(text: str) -> int:
    """Words that the recogniser mishears of the synthesizer."""
    return word_errors(recognise(recording(text), RATE), text)


def rate(scores: Sequence[tuple[int, int]]) -> float:
    return sum(errors for errors, _ in scores) / sum(words for _, words in scores)


def summary(scores: Scores) -> Record:
    """The rate, with an interval over sentences, which are what is drawn."""
    rng, groups = random.Random(0), [*scores.values()]
    drawn = sorted(
        rate([one for group in rng.choices(groups, k=len(groups)) for one in group])
        for _ in range(2000)
    )
    everything = [one for group in groups for one in group]
    worst = sorted(scores, key=lambda text: -rate(scores[text]))[:8]
    return {
        "wrong": round(rate(everything), 4),
        "interval": [round(drawn[50], 4), round(drawn[1949], 4)],
        "words": sum(words for _, words in everything),
        "conversions": len(everything),
        "sentences": len(groups),
        "worst": {text: round(rate(scores[text]), 3) for text in worst},
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="JSON to write; other kinds in it stay")
    parser.add_argument("--kind", choices=KINDS, action="append", help="[all]; repeatable")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=1000, help="number of the first round")
    args = parser.parse_args()
    record: Record = {}
    if args.file and args.file.exists():
        record = json.loads(args.file.read_text(encoding="utf-8"))
    for kind in args.kind or KINDS:
        about = {"environment": environment("cpu"), "first": args.first}
        mine, flite, rounds = Scores(), Scores(), list[float]()
        for number in range(args.first, args.first + args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                found = converted(number, kind, Path(folder))
            for known, new in zip((mine, flite), found, strict=True):
                for text, scores in new.items():
                    known.setdefault(text, []).extend(scores)
            rounds.append(round(rate([one for each in found[0].values() for one in each]), 4))
            print(kind, number, rounds[-1], flush=True)
            told = {"by round": rounds, "flite": summary(flite)["wrong"]}
            record[kind] = summary(mine) | told | about
            write(args.file, record)


if __name__ == "__main__":
    main()
