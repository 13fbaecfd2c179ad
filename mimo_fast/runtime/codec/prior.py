"""Norm statistics known before a stream begins, and what they count for while it goes on.

A listener hears the first patch before the stream itself says much about its statistics. Those of
earlier replies in the same voice, of the voice prompt or of a calibration are nearer to the truth
than an estimate from eight frames; after a few seconds the stream's own are. So known statistics
count as rows that came before the first: `PRIOR_FRAMES` code frames of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.state import (
    CodecState,
    MeanVariance,
    NormStatistics,
    RunningStatistics,
    mean_variance,
)

PRIOR_FRAMES = 50
"""Code frames that statistics count for in an elastic stream: 2 s. docs/LOG.md has the figures."""

STATED_FRAMES = 2
"""Code frames that a checkpoint's own statistics count for in other streams.

They are of the speech that it was trained on, and a recording can be far from it.
"""

MOST_FRAMES = 1e9
"""Code frames beside which a stream's own rows count for nothing: over a year."""


def prior_sums(config: CodecConfig, given: Tensor, frames: float) -> Tensor:
    """Sums float64 [2, 3], see `Prior`, of so many code frames.

    given: means and variances [2, 2] of `unpool` and `to_mel`.
    """
    mean, variance = given.double().unbind(1)
    means = torch.stack((torch.ones_like(mean), mean, variance + mean.square()), dim=1)
    # Fills from numbers, so that nothing waits for the device.
    rows = min(frames, MOST_FRAMES) * config.pool
    means[0] *= rows
    means[1] *= rows * config.decoder_stride
    return means


def know(
    config: CodecConfig, state: CodecState, known: NormStatistics | None, frames: float
) -> None:
    """Writes what is known before a stream begins into its state, where its chunks read it.

    frames: code frames that it counts for in an elastic stream.

    Raises:
        ValueError: the statistics are not those of this codec.
    """
    state.prior.zero_()
    state.given.zero_()
    if known is None:
        return
    pairs = [pair for pair in known if pair is not None]
    if len(pairs) != 1 + (config.pool != 1):
        raise ValueError(
            "these statistics are of a codec that pools otherwise: measure them with this one's "
            "moments"
        )
    if not all(map(_is_mean_and_variance, pairs)):
        raise ValueError("statistics are a mean and a variance each: use Codec.moments")
    for place, pair in zip(state.given[-len(pairs) :], pairs, strict=True):
        place.copy_(torch.stack([moment.reshape(()) for moment in pair]))
    state.prior.copy_(prior_sums(config, state.given, frames))


def _is_mean_and_variance(pair: object) -> bool:
    values = pair if isinstance(pair, tuple) else ()
    return len(values) == 2 and all(
        isinstance(value, Tensor)
        and value.numel() == 1
        and value.is_floating_point()
        and value.layout == torch.strided
        and not value.is_meta
        for value in values
    )


def totals(state: CodecState) -> Tensor:
    """Sums float64 [2, 3] of a stream's rows: of `unpool` and `to_mel`, see `Prior`.

    Those of several streams add up to those of one that says it all.
    """
    return torch.stack((state.unpool.sums[0], state.to_mel.sums[0]))


def statistics_of(config: CodecConfig, sums: Tensor) -> NormStatistics:
    """The statistics of rows that have these sums [2, 3]."""
    unpool, to_mel = map(mean_variance, sums)
    return NormStatistics(unpool if config.pool != 1 else None, to_mel)


def norm_statistics(
    running: RunningStatistics, known: MeanVariance | Tensor | None, sums: Tensor, ended: bool
) -> MeanVariance:
    """Mean and variance to norm by.

    Args:
        running: the forecast of a stream that says no more than its sums.
        known: statistics to use as they are; or sums of earlier rows, float64 [3], which count
            until the stream ends; None, or sums of 0, for the estimate from the stream alone.
        sums: of the stream's rows so far, float64 [2, 3].
        ended: no rows follow: the statistics are those of the stream.
    """
    if isinstance(known, tuple):
        return known
    alone = running.estimate(sums, ended)
    if known is None or ended:
        return alone
    together = mean_variance(known + sums[0])
    # On the device, so that one graph serves streams with and without earlier rows.
    mean, variance = (
        torch.where(known[0] > 0, here, there) for here, there in zip(together, alone, strict=True)
    )
    return mean, variance
