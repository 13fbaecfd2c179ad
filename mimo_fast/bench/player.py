"""A real-time player that is fed by a stream: when it starts to play, and when it runs dry.

It plays from the first sample on (or once `buffer` seconds have come) while it has audio. Where the
next chunk is late it is silent until that comes, and continues with it. A late last chunk counts
like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

CONTINUOUS = 0.1
"""Seconds of silence in a reply that still counts as continuous.

The threshold of vLLM-Omni's `audio_continuity_ok`.
"""


@dataclass(frozen=True)
class Playback:
    """What a listener heard of one reply, in seconds.

    first_audio: from the request to the arrival of the first samples, None if none came. duration:
    of the audio. gaps: between the arrivals of chunks that held audio. underruns: each silence
    within the reply.
    """

    first_audio: float | None
    duration: float
    gaps: tuple[float, ...]
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


def play(arrivals: Sequence[tuple[float, int]], sample_rate: int, buffer: float = 0.0) -> Playback:
    """Plays a reply whose chunks arrived, in order, as (seconds since the request, samples).

    samples may be 0.

    Args:
        buffer: seconds of audio to wait for before playing; a reply that ends before is played
            at its end.
    """
    heard = [(time, samples / sample_rate) for time, samples in arrivals if samples]
    times = [time for time, _ in heard]
    duration = sum(seconds for _, seconds in heard)
    gaps = tuple(after - before for before, after in pairwise(times))
    came, dry_at, underruns = 0.0, None, list[float]()
    for i, (time, seconds) in enumerate(heard):
        came += seconds
        if dry_at is None:
            if came >= buffer or i == len(heard) - 1:
                dry_at = time + came
            continue
        # A gap below one sample is rounding.
        if time - dry_at > 1 / sample_rate:
            underruns.append(time - dry_at)
        dry_at = max(time, dry_at) + seconds
    return Playback(times[0] if times else None, duration, gaps, tuple(underruns))
