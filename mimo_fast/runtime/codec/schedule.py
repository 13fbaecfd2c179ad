"""`Schedule`: what a stream waits for, and which statistics it norms by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.geometry import (
    LOOKAHEAD,
    PATCH_FRAMES,
    Lookahead,
    default_lookahead,
    elastic_reach,
    elastic_rows,
    patch_rows,
)


class Known(IntEnum):
    """What a stream knows of its norm statistics before its codes; the device reads the number."""

    NOTHING = 0
    """They are estimated from its codes."""
    PRIOR = 1
    """Known ones count as rows before the first."""
    GIVEN = 2
    """Known ones are used as they are."""

    @classmethod
    def of(cls, known: bool, weight: float) -> Known:
        """weight: code frames that known statistics count for."""
        if not known:
            return cls.NOTHING
        return cls.GIVEN if weight == math.inf else cls.PRIOR


@dataclass(frozen=True)
class Schedule:
    """What decides the shape of a stream's chunks, and what they norm by.

    Args:
        lookahead: patches that are held back; by an elastic stream in the end.
        known: what its statistics begin with; in an elastic stream a prior, if only of no rows.
        elastic: whether less is held back at first, see `elastic_rows`.
    """

    lookahead: int
    known: Known
    elastic: bool = False

    @classmethod
    def of(cls, config: CodecConfig, lookahead: Lookahead | None, known: Known) -> Schedule:
        """The schedule of a look-ahead, with or without known statistics.

        Raises:
            ValueError: it is out of range.
        """
        if lookahead == "elastic":
            return cls(elastic_reach(config), Known.PRIOR, elastic=True)
        if lookahead is None or lookahead == "exact":
            lookahead = default_lookahead(config, known is not Known.NOTHING)
        if not 0 <= lookahead <= LOOKAHEAD:
            raise ValueError(
                f"lookahead must be between 0 and {LOOKAHEAD} patches, not {lookahead}"
            )
        return cls(lookahead, known)

    @property
    def hold(self) -> int:
        """Code frames after which one more makes the first samples final."""
        return (min(self.lookahead, 1) if self.elastic else self.lookahead) * PATCH_FRAMES

    def rows(self, config: CodecConfig, frames: int) -> int:
        """Vocoder frames that are held back once the stream has so many."""
        if self.elastic:
            return elastic_rows(config, frames)
        return self.lookahead * patch_rows(config)


def usual_schedules(config: CodecConfig) -> tuple[Schedule, Schedule, Schedule]:
    """Those that graphs are captured for: exact, exact with given statistics, and elastic."""
    stated = config.moments is not None and default_lookahead(config) < LOOKAHEAD
    exact = Schedule.of(config, None, Known.PRIOR if stated else Known.NOTHING)
    given = Schedule.of(config, None, Known.GIVEN)
    return exact, given, Schedule.of(config, "elastic", Known.PRIOR)
