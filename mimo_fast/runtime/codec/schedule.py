"""`Schedule`: what a stream waits for, and which statistics it norms by."""

from __future__ import annotations

from dataclasses import dataclass

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
from mimo_fast.runtime.codec.state import CodecState, NormStatistics, Prior


@dataclass(frozen=True)
class Schedule:
    """What decides the shape of a stream's chunks and what they read; one set of graphs serves it.

    Args:
        lookahead: patches that are held back; by an elastic stream in the end.
        elastic: whether less is held back at first, see `elastic_rows`.
        given: whether the stream norms by given statistics as they are. An elastic stream reckons
            with what it is given and goes over to its own.
    """

    lookahead: int
    elastic: bool = False
    given: bool = False

    @classmethod
    def of(cls, config: CodecConfig, lookahead: Lookahead | None, given: bool) -> Schedule:
        """The schedule of a look-ahead, with or without known statistics.

        Raises:
            ValueError: it is out of range.
        """
        if lookahead == "elastic":
            return cls(elastic_reach(config), elastic=True)
        if lookahead is None or lookahead == "exact":
            lookahead = default_lookahead(config, given)
        if not 0 <= lookahead <= LOOKAHEAD:
            raise ValueError(
                f"lookahead must be between 0 and {LOOKAHEAD} patches, not {lookahead}"
            )
        return cls(lookahead, given=given)

    @property
    def hold(self) -> int:
        """Code frames after which one more makes the first samples final."""
        return (min(self.lookahead, 1) if self.elastic else self.lookahead) * PATCH_FRAMES

    def rows(self, config: CodecConfig, frames: int) -> int:
        """Vocoder frames that are held back once the stream has so many."""
        if self.elastic:
            return elastic_rows(config, frames)
        return self.lookahead * patch_rows(config)

    def statistics(self, config: CodecConfig, state: CodecState) -> NormStatistics | Prior | None:
        """What `decode_chunk` norms by: buffers of the state, or None for estimates."""
        if self.elastic:
            return Prior(state.prior[0], state.prior[1])
        if not self.given:
            return None
        unpool, to_mel = state.given
        pooled = None if config.pool == 1 else (unpool[0], unpool[1])
        return NormStatistics(pooled, (to_mel[0], to_mel[1]))


def usual_schedules(config: CodecConfig) -> tuple[Schedule, Schedule, Schedule]:
    """Those that graphs are captured for: exact, exact with given statistics, and elastic."""
    exact = Schedule.of(config, None, given=config.moments is not None)
    return exact, Schedule.of(config, None, given=True), Schedule.of(config, "elastic", given=True)
