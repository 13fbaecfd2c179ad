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
from mimo_fast.runtime.codec.norms import mean_variance
from mimo_fast.runtime.codec.pools import CodecState
from mimo_fast.runtime.codec.state import NormStatistics, Rows, StateTensors

PRIOR_FRAMES = 50
"""Code frames that statistics count for in an elastic stream: 2 s. docs/LOG.md has the figures."""

STATED_FRAMES = 2
"""Code frames that a checkpoint's own statistics count for in other streams.

They are of the speech that it was trained on, and a recording can be far from it.
"""

MOST_FRAMES = 1e9
"""Code frames beside which a stream's own rows count for nothing: over a year."""


def prior_sums(config: CodecConfig, given: Tensor, frames: float) -> Tensor:
    """Sums float64 [2, 3], see `StateTensors.prior`, of so many code frames.

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
    """Writes what is known before a stream begins into its row, where its chunks read it.

    frames: code frames that it counts for in an elastic stream.

    Raises:
        ValueError: the statistics are not those of this codec.
    """
    given, prior = (tensor[state.row] for tensor in (state.tensors.given, state.tensors.prior))
    prior.zero_()
    given.zero_()
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
    for place, pair in zip(given[-len(pairs) :], pairs, strict=True):
        place.copy_(torch.stack([moment.reshape(()) for moment in pair]))
    prior.copy_(prior_sums(config, given, frames))


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


def totals(state: StateTensors, rows: Rows) -> Tensor:
    """Sums float64 [N, 2, 3] of streams' rows: of `unpool` and `to_mel`, as in `prior`.

    Those of several streams add up to those of one that says it all.
    """
    return torch.stack([rows.read(sums)[:, 0] for sums in (state.unpool, state.to_mel)], dim=1)


def statistics_of(config: CodecConfig, sums: Tensor) -> NormStatistics:
    """The statistics of rows that have these sums [2, 3]."""
    unpool, to_mel = map(mean_variance, sums)
    return NormStatistics(unpool if config.pool != 1 else None, to_mel)
