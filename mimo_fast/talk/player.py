"""What is being heard: replies that wait for the speaker, and how much of each it has played."""

from __future__ import annotations

from collections import deque
from time import perf_counter

import numpy as np

FAR = 100
"""Blocks that are kept for an echo canceller."""


class Utterance:
    """A reply on its way to the speaker.

    One thread adds to it, that of the speaker takes from it; neither waits for the other.

    Attributes:
        samples: How many came.
        taken: How many the speaker has taken.
        ended: Whether no more come.
        first: `perf_counter` at which the first is heard; None before it is taken.
    """

    def __init__(self, name: str, rate: int) -> None:
        self.name, self._rate = name, rate
        self._parts = deque[np.ndarray]()
        self._offset = 0
        self.samples = self.taken = 0
        self.ended = False
        self.first: float | None = None
        self._since: tuple[int, float] | None = None
        self.hungry = False

    def push(self, wav: np.ndarray) -> None:
        """More samples, float32 [n]."""
        if len(wav):
            self._parts.append(wav)
            self.samples += len(wav)

    @property
    def drained(self) -> bool:
        """Whether all of it has been taken."""
        return self.ended and self.taken >= self.samples

    def heard(self, now: float | None = None) -> int:
        """Samples that have been heard, less what the card still holds."""
        if self._since is None:
            return self.taken
        before, at = self._since
        passed = (perf_counter() if now is None else now) - at
        return int(min(max(before + passed * self._rate, 0), self.taken))

    def take(self, out: np.ndarray, lead: float | None) -> int:
        """Fills the beginning of a block -> samples; for the speaker's thread.

        lead: seconds until the first of them is heard; None for a speaker that keeps no time.
        """
        done = 0
        while done < len(out) and self._parts:
            part = self._parts[0]
            count = min(len(part) - self._offset, len(out) - done)
            out[done : done + count] = part[self._offset : self._offset + count]
            done += count
            self._offset += count
            if self._offset == len(part):
                self._parts.popleft()
                self._offset = 0
        if done:
            at = perf_counter() + (lead or 0.0)
            self._since = None if lead is None else (self.taken, at)
            self.first = self.first or at
            self.taken += done
        return done


class Player:
    """Replies in their order, and silence between them.

    Attributes:
        gaps: Times that a reply had not come when it was due.
        far: Blocks as they were handed out, where an echo canceller asks for them.
    """

    def __init__(self, rate: int, keeps_far: bool = False) -> None:
        self.rate, self.gaps = rate, 0
        self._line = deque[Utterance]()
        self.far = deque[np.ndarray](maxlen=FAR) if keeps_far else None
        self.played = deque[np.ndarray]()
        self.records = False

    @property
    def busy(self) -> bool:
        """Whether anything is being heard or waits for it."""
        return any(not each.drained for each in list(self._line))

    def begin(self, name: str) -> Utterance:
        """A reply after those that wait."""
        found = Utterance(name, self.rate)
        self._line.append(found)
        return found

    def stop(self) -> list[Utterance]:
        """Silence from here on -> what was not heard to its end."""
        line, self._line = self._line, deque()
        return list(line)

    def fill(self, out: np.ndarray, lead: float | None = None) -> None:
        """Fills a block float32 [n]; for the speaker's thread, which never waits here."""
        # `stop` puts another in its place.
        line, done = self._line, 0
        while done < len(out) and line:
            first = line[0]
            shift = None if lead is None else lead + done / self.rate
            done += first.take(out[done:], shift)
            if first.drained:
                line.popleft()
                continue
            if done < len(out):
                if first.taken and not first.hungry:
                    self.gaps += 1
                first.hungry = first.taken > 0
                break
            first.hungry = False
        out[done:] = 0
        if self.far is not None:
            self.far.append(out.copy())
        if self.records:
            self.played.append(out.copy())


def gaps_in(player: Player) -> str:
    """How many there were, in words."""
    return f"{player.gaps} gap{'' if player.gaps == 1 else 's'} in what was heard"
