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


def play(arrivals: Sequence[tuple[float, int]], sample_rate: int) -> Playback:
    """Plays a reply whose chunks arrived, in order, as (seconds since the request, samples).

    samples may be 0.
    """
    heard = [(time, samples / sample_rate) for time, samples in arrivals if samples]
    first = heard[0][0] if heard else None
    dry_at, underruns = first or 0.0, list[float]()
    for time, seconds in heard:
        # A gap below one sample is rounding.
        if time - dry_at > 1 / sample_rate:
            underruns.append(time - dry_at)
        dry_at = max(time, dry_at) + seconds
    return Playback(first, sum(seconds for _, seconds in heard), tuple(underruns))
