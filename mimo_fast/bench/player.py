"""A real-time player that is fed by a stream: when it starts to play, and when it runs dry.

It plays from the first sample on while it has audio. Where the next chunk is late it is silent
until that comes, and continues with it. A late last chunk counts like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTINUOUS = 0.1
"""Seconds of silence in a reply that still counts as continuous.

The threshold of vLLM-Omni's `audio_continuity_ok`.
"""


@dataclass(frozen=True)
class Playback:
    """What a listener heard of one reply, in seconds.

    first_audio: from the request to the arrival of the first samples, None if none came. duration:
    of the audio. underruns: each silence within the reply.
    """

    first_audio: float | None
    duration: float
    underruns: tuple[float, ...]

    @property
    def worst_underrun(self) -> float:
        return max(self.underruns, default=0.0)

    @property
    def stalled(self) -> float:
        """Total silence within the reply."""
        return sum(self.underruns)

    @property
    def continuous(self) -> bool:
        """Whether the total silence is at most CONTINUOUS."""
        return self.stalled <= CONTINUOUS


class Player:
    """One reply as it is played while it arrives; times are seconds on any one clock.

    Attributes:
        first: When the first samples came; None before.
        dry_at: When what has come will have been played.
        duration: Seconds of audio that have come.
        silences: (begin, end) of each silence within the reply.
    """

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self.first: float | None = None
        self.dry_at = self.duration = 0.0
        self.silences = list[tuple[float, float]]()

    def hear(self, time: float, samples: int) -> None:
        """Some samples have come, maybe none."""
        if not samples:
            return
        if self.first is None:
            self.first = self.dry_at = time
        # A gap below one sample is rounding.
        if time - self.dry_at > 1 / self._rate:
            self.silences.append((self.dry_at, time))
        seconds = samples / self._rate
        self.dry_at = max(time, self.dry_at) + seconds
        self.duration += seconds

    def buffered(self, time: float) -> float:
        """Seconds of audio that have come and are still to be played."""
        return max(0.0, self.dry_at - time)

    def played(self, time: float) -> float:
        """Seconds of audio that have been played."""
        return self.duration - self.buffered(time)


def play(arrivals: Sequence[tuple[float, int]], sample_rate: int) -> Playback:
    """Plays a reply whose chunks arrived, in order, as (seconds since the request, samples).

    samples may be 0.
    """
    player = Player(sample_rate)
    for time, samples in arrivals:
        player.hear(time, samples)
    underruns = tuple(end - begin for begin, end in player.silences)
    return Playback(player.first, player.duration, underruns)
