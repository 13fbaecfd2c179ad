"""Who asks for what and when: seeded people who arrive, talk, listen, interrupt; what they heard.

    listeners   every one hears a reply after the other, the next asked for as soon as the last word
                of one was heard: so many streams are audible all the time
    people      a dialogue each: a pause, an utterance in real time, the reply; every seventh reply
                or so is interrupted
    closed      as fast as the machine goes: a reply is read to its end at once, then the next

Arrivals are a Poisson process, given how many come within the ramp: sorted uniform times. What is
said are the sentences of tests/words; a reply of `listeners` holds one to six of them, as many as
a geometric distribution of mean two gives. Utterances are the recordings of tests/words, as long
as they are. Everything is a function of the seed: of an engine, a server and the simulation the
same is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_fast.bench.player import Player
from mimo_fast.bench.timing import percentile

WORDS = Path(__file__).parents[2] / "tests" / "words"

MOST_SENTENCES = 6
MORE = 0.5
"""Probability that another sentence follows."""

BARGE_INS = 0.15
"""Share of the replies that a person interrupts; where is uniform over the first seconds."""

PATIENCE = 2.0
"""Seconds of a reply within which it is interrupted, if at all."""

PAUSE = 1.0
"""Mean seconds between the end of a reply and the next utterance, exponential."""

ROOM = 2.0
"""Seconds of audio that a listener holds; it reads on when it has room."""

FIRST = 2.0
"""Seconds after which waiting for the first audio of a reply is silence like any other."""

CONTINUITY = 0.999
"""Share of the time in which a reply must be heard, for its stream to count as carried."""

PROFILES = ("listeners", "people", "closed")


def lines(name: str) -> list[str]:
    text = (WORDS / f"{name}.txt").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def recording_files() -> list[Path]:
    """The utterances: questions and sentences, as somebody said them."""
    return sorted(WORDS.glob("*.flac"))


@dataclass(frozen=True)
class Turn:
    """What a person does next.

    Attributes:
        pause: Seconds before it.
        sentences: What is to be said, where it asks for a reading.
        said: Number of the recording that it says, where it talks; else None.
        barge_in: Seconds of the reply after which it interrupts, or None.
    """

    pause: float
    sentences: tuple[str, ...]
    said: int | None = None
    barge_in: float | None = None

    @property
    def text(self) -> str:
        return ". ".join(self.sentences) + "."


@dataclass(frozen=True)
class Person:
    """Arrives after so many seconds; its turns do not end."""

    seed: int
    number: int
    arrives: float
    profile: str

    def turn(self, index: int) -> Turn:
        draw = random.Random(f"{self.seed} {self.number} {index}")
        if self.profile == "people":
            barges = draw.random() < BARGE_INS
            return Turn(
                pause=draw.expovariate(1 / PAUSE),
                sentences=(),
                said=draw.randrange(len(recording_files())),
                barge_in=draw.uniform(0.3, PATIENCE) if barges else None,
            )
        count = 1
        while count < MOST_SENTENCES and draw.random() < MORE:
            count += 1
        return Turn(0.0, tuple(draw.choices(lines("sentences"), k=count)))


def people(profile: str, count: int, ramp: float, seed: int) -> list[Person]:
    """So many people, in the order in which they arrive within the ramp."""
    draw = random.Random(f"{seed} arrivals {profile} {count}")
    times = sorted(draw.uniform(0, ramp) for _ in range(count))
    return [Person(seed, i, time, profile) for i, time in enumerate(times)]


@dataclass
class Heard:
    """One request and what came of it; times are seconds since the beginning of the run.

    Attributes:
        player: What its listener plays.
        groups: When each group came.
        prompt: Groups of its prompt, where that is known.
        ended: When the listener stopped to listen, early or not.
        error: The class of what ended it instead.
    """

    asked: float
    player: Player
    groups: list[float] = field(default_factory=list)
    patches: list[float] = field(default_factory=list)
    prompt: int = 0
    ended: float | None = None
    error: str | None = None


def within(begin: float, end: float, since: float, until: float) -> float:
    """Seconds of (begin, end) that are within (since, until)."""
    return max(0.0, min(end, until) - max(begin, since))


def summary(heard: Iterable[Heard], since: float, until: float) -> dict[str, Any]:
    """What was heard within the window: continuity, gaps, first audio, groups a second.

    A reply that is silent at the end of the window, because its next chunk has not come, has a gap
    to there; so has one that is not heard FIRST seconds after it was asked for.
    """
    played = silent = 0.0
    gaps, waits, errors = list[float](), list[float](), list[str]()
    counts = {"requests": 0, "groups": 0, "patches": 0, "prompts": 0, "prompt_groups": 0}
    replies, lengths = 0, list[float]()
    for each in heard:
        player = each.player
        if since <= each.asked < until:
            counts["requests"] += 1
            errors += [each.error] if each.error else []
            if player.first is not None:
                waits.append(player.first - each.asked)
            elif each.error is None:
                waits.append((each.ended or until) - each.asked)
        counts["groups"] += sum(since <= time < until for time in each.groups)
        counts["patches"] += sum(since <= time < until for time in each.patches)
        if each.groups and since <= each.groups[0] < until:
            counts["prompts"] += 1
            counts["prompt_groups"] += each.prompt
        waited = player.first if each.ended is None else min(player.first or each.ended, each.ended)
        if (late := within(each.asked + FIRST, waited or until, since, until)) > 0:
            gaps.append(late)
            silent += late
        if player.first is None:
            continue
        # It stops to listen at `ended`; where it did not, it waits on.
        end = until if each.ended is None else each.ended
        silences = [(a, min(b, end)) for a, b in player.silences if a < end]
        if each.ended is None and player.dry_at < until:
            silences.append((player.dry_at, until))
        found = [within(*gap, since, until) for gap in silences]
        gaps += [gap for gap in found if gap > 0]
        silent += sum(found)
        played += within(player.first, min(player.dry_at, end), since, until) - sum(
            within(a, min(b, player.dry_at), since, until) for a, b in silences
        )
        if each.ended is not None and since <= each.ended < until:
            replies += 1
            lengths.append(player.duration)
    seconds = until - since
    total = played + silent
    return counts | {
        "seconds": seconds,
        "groups_a_second": counts["groups"] / seconds,
        "audio_a_second": counts["patches"] * 0.16 / seconds,
        "played_seconds": played,
        "gaps": len(gaps),
        "gap_seconds": silent,
        "worst_gap": max(gaps, default=0.0),
        "continuity": played / total if total else None,
        "first_audio": spread(waits),
        "reply_seconds": spread(lengths),
        "errors": {name: errors.count(name) for name in sorted(set(errors))},
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {name: percentile(values, share) for name, share in shares.items()} | {"n": len(values)}


def carried(point: dict[str, Any]) -> bool:
    """Whether all streams of a point were carried."""
    continuity = point["continuity"]
    return continuity is not None and continuity >= CONTINUITY and not point["errors"]
