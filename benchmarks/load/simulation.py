"""People of `people.py` against the policy of the engine, with a table of step times for a clock.

What decides is `runtime/engine/policy.py` itself; what is simulated is what it decides about: rows
that decode, prompts, readers that take a group when they have room for it. As the engine does it, a
step runs while a reader waits, rows run at most AHEAD groups ahead of their readers, and what is
asked for during a step is looked at after it. Every row has a slot.

A reply is a pattern: for each of its pieces the groups of the prompt, then the samples that come
with each group. nano says the same every time, so its patterns are its own replies.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load.engine import GRACE, Point
from benchmarks.load.people import Heard, Person, Turn, people, summary
from benchmarks.load.steps import StepTable
from mimo_fast.bench.player import Player
from mimo_fast.config import GROUP_SECONDS
from mimo_fast.runtime.codec.geometry import elastic_rows, patch_rows
from mimo_fast.runtime.engine import policy

AHEAD = 4


@dataclass(frozen=True)
class Piece:
    """One prompt and its reply.

    Attributes:
        prompt: Groups of the prompt.
        samples: Of audio that come with each group.
        spoken: Whether each group is a patch.
        before: Groups in the cache besides: those of a reply that is heard from its middle on.
    """

    prompt: int
    samples: tuple[int, ...]
    spoken: tuple[bool, ...]
    before: int = 0


Patterns = Callable[[Turn, Person, int], Sequence[Piece]]
"""The reply to a turn of a person, which has had so many before."""


def long_reply(prompt: int, words: int, patches: int, config: Any, rate: int) -> Piece:
    """A reply of the published dimensions: words first, then patches, as an elastic stream plays.

    config: of the codec.
    """
    row, size = patch_rows(config), round(GROUP_SECONDS * rate)
    given, samples = 0, list[int]()
    for patch in range(1, patches + 1):
        rows = patch * row
        ready = rows if patch == patches else max(rows - elastic_rows(config, rows), given)
        samples.append((ready - given) * size // row)
        given = ready
    spoken = (False,) * words + (True,) * patches
    return Piece(prompt, (0,) * words + tuple(samples), spoken)


@dataclass
class Row:
    """A piece of a reply at work in the engine."""

    piece: Piece
    demand: policy.Demand
    left: int
    decoded: int = 0
    ready: deque[int] = field(default_factory=deque)

    @property
    def runs(self) -> bool:
        return self.decoded < len(self.piece.samples) and len(self.ready) < AHEAD

    @property
    def ended(self) -> bool:
        return self.decoded == len(self.piece.samples) and not self.ready


@dataclass
class Reader:
    """A person, and the reply that it hears."""

    person: Person
    index: int = 0
    pieces: deque[Piece] = field(default_factory=deque)
    row: Row | None = None
    heard: Heard | None = None
    waits: bool = False


class Simulation:
    """One engine and its crowd.

    Args:
        point: see `engine.Point`; nothing is loaded.
        table: what steps take.
        patterns: the replies.
        rate: samples a second.
    """

    def __init__(
        self, point: Point, table: StepTable, patterns: Patterns, rate: int = 24_000
    ) -> None:
        self.point, self.table, self.patterns, self.rate = point, table, patterns, rate
        self.cost = policy.StepCost()
        self.until = point.ramp + point.seconds
        self.heard = list[Heard]()
        self.now = 0.0
        self.busy = 0.0
        self.steps = self.rows = 0
        self._wakes = list[tuple[float, int, Reader, Callable[[Reader, float], None]]]()
        self._number = 0
        self._readers = list[Reader]()

    def run(self) -> dict[str, Any]:
        """Plays the window through -> what `people.summary` says of it."""
        point = self.point
        for person in people(point.profile, point.streams, point.ramp, point.seed):
            reader = Reader(person)
            self._readers.append(reader)
            self._wake(person.arrives, reader, self._ask)
        while self.now < self.until + GRACE:
            self._run_wakes()
            if not self._step():
                if not self._wakes:
                    break
                self.now = max(self.now, self._wakes[0][0])
        found = summary(self.heard, point.ramp, self.until)
        rows = self.rows / self.steps if self.steps else 0.0
        share = self.busy / self.now if self.now else 0.0
        return vars(point) | found | {"busy": share, "rows_a_step": rows}

    # What readers do

    def _wake(self, time: float, reader: Reader, act: Callable[[Reader, float], None]) -> None:
        self._number += 1
        heapq.heappush(self._wakes, (time, self._number, reader, act))  # type: ignore[misc]

    def _run_wakes(self) -> None:
        while self._wakes and self._wakes[0][0] <= self.now:
            time, _, reader, act = heapq.heappop(self._wakes)
            act(reader, time)

    def _ask(self, reader: Reader, time: float) -> None:
        if time >= self.until:
            return
        turn = reader.person.turn(reader.index)
        reader.pieces = deque(self.patterns(turn, reader.person, reader.index))
        reader.index += 1
        prompt = sum(piece.prompt for piece in reader.pieces)
        reader.heard = Heard(time, Player(self.rate), prompt=prompt)
        self.heard.append(reader.heard)
        self._next_piece(reader, time)

    def _next_piece(self, reader: Reader, time: float) -> None:
        piece = reader.pieces.popleft()
        demand = policy.Demand(policy.Priority.LISTENER, time)
        reader.row = Row(piece, demand, piece.prompt)
        reader.waits = True

    def _read(self, reader: Reader, time: float) -> None:
        """Takes the groups that are ready until the reader has no room or waits for the next."""
        row, heard = reader.row, reader.heard
        assert row is not None
        assert heard is not None
        player, fast = heard.player, self.point.profile == "closed"
        while row.ready:
            samples = row.ready.popleft()
            player.hear(time, samples)
            heard.groups.append(time)
            count = round(player.duration / GROUP_SECONDS)
            heard.patches.extend([time] * (count - len(heard.patches)))
            full = player.buffered(time) - self.point.room
            if not fast and full > 0:
                reader.waits = False
                self._wake(min(time + full, max(self.until, time)), reader, self._read)
                return
            if time > self.until and (fast or player.first is not None):
                reader.row, heard.ended = None, time
                return
        if not row.ended:
            reader.waits = True
        elif reader.pieces:
            self._next_piece(reader, time)
        else:
            reader.row, reader.waits = None, False
            heard.ended = time if fast else max(time, player.dry_at)
            self._wake(heard.ended, reader, self._ask)

    # What the engine does

    def _step(self) -> bool:
        rows = [each.row for each in self._readers if each.row is not None and each.row.runs]
        if not rows or not any(each.row and each.waits for each in self._readers):
            return False
        for row in rows:
            row.demand.prompt = row.demand.chunk = row.left
        step = policy.next_step([row.demand for row in rows], self.now, self.cost)
        decoding = [rows[i] for i in step.rows]
        prompts = [(rows[i], groups) for i, groups in step.prompts]
        groups = sum(count for _, count in prompts)
        prefill = self.table.step(0, int(bool(prompts)), groups, 0, 0)
        cached = sum(row.piece.before + row.piece.prompt + row.decoded for row in decoding)
        spoke = sum(row.piece.spoken[row.decoded] for row in decoding)
        decode = self.table.step(len(decoding), 0, 0, cached, spoke)
        if groups:
            self.cost.saw_prompts(groups, prefill)
        if decoding:
            self.cost.saw(len(decoding), decode)
        for row, count in prompts:
            row.left -= count
            row.demand.served = self.now + prefill
        self.now += prefill + decode
        self.busy += prefill + decode
        self.steps += 1
        self.rows += len(decoding)
        for row in decoding:
            samples = row.piece.samples[row.decoded]
            row.decoded += 1
            row.demand.served = self.now
            if samples:
                row.demand.hears(samples / self.rate, self.now)
            row.ready.append(samples)
        for reader in self._readers:
            if reader.waits and reader.row is not None and reader.row.ready:
                self._read(reader, self.now)
        return True
