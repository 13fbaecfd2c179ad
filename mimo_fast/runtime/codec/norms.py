"""Statistics of the norms over time, of N streams at once.

One-shot decoding norms by the statistics of the whole utterance, which a stream must estimate.
Until so many rows as are expected have been added, the missing rows are extrapolated: they get the
mean of the rows so far, weighted by position, because the first outputs of the causal decoder
attend to few positions and differ from the rest. After that, and at the end, the estimate is the
plain statistics of all rows, so that codes pushed at once are decoded as in one shot. docs/LOG.md
has the figures.

A stream that is decoded again extrapolates nothing: the forecast gains up to 3 dB where an
utterance goes on for as long as it expects, and loses up to 11 dB where it soon ends.

Sums of a stream's rows are float64 [2, 3]: over rows of (weight, weighted mean over channels,
weighted mean square over channels); the weight is 1 in row 0 and the row's position in row 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.runtime.codec.schedule import Known
from mimo_fast.runtime.codec.state import MeanVariance


@dataclass(frozen=True)
class NormKnowledge:
    """What N streams know of one norm beside their own rows.

    Args:
        kind: values of `Known`, int64 [N].
        given: mean and variance to use as they are, float32 [N, 2].
        prior: sums of earlier rows, float64 [N, 3], which count until the stream ends; 0 for none.
        expected: rows up to which missing ones are extrapolated, int64 [N]; 0 for none.
        settled: whether no rows are missing, bool [N].
    """

    kind: Tensor
    given: Tensor
    prior: Tensor
    expected: Tensor
    settled: Tensor

    def statistics(self, sums: Tensor) -> MeanVariance:
        """Mean and variance to norm by, float32 [N] each; sums [N, 2, 3] of the rows so far."""
        alone = self._estimate(sums)
        counts = (self.kind == Known.PRIOR) & (self.prior[:, 0] > 0) & ~self.settled
        together = mean_variance(self.prior + sums[:, 0])
        as_given = self.kind == Known.GIVEN
        mean, variance = (
            given.where(as_given, here.where(counts, there))
            for given, here, there in zip(self.given.unbind(1), together, alone, strict=True)
        )
        return mean, variance

    def _estimate(self, sums: Tensor) -> MeanVariance:
        """Mean and variance at the end of utterances that have these sums so far."""
        plain, later = sums.unbind(1)
        count = plain[:, :1]
        missing = (self.expected[:, None] - count).clamp(min=0) * ~self.settled[:, None]
        moments = (plain[:, 1:] + missing * later[:, 1:] / later[:, :1]) / (count + missing)
        return _mean_variance(*moments.unbind(1))


def mean_variance(sums: Tensor) -> MeanVariance:
    """Mean and variance of rows that have these sums [..., 3], each as the first row of sums."""
    count, mean, square = sums.unbind(-1)
    return _mean_variance(mean / count, square / count)


def _mean_variance(mean: Tensor, square: Tensor) -> MeanVariance:
    return mean.float(), (square - mean.square()).float()


def row_moments(rows: Tensor) -> Tensor:
    """Rows [N, R, D] -> float64 [N, R, 3]: 1, and mean and mean square over channels."""
    wide = rows.double()
    moments = wide.new_ones(*wide.shape[:2], 3)
    moments[..., 1] = wide.mean(2)
    moments[..., 2] = wide.square().mean(2)
    return moments


def sums_of(moments: Tensor, first: Tensor) -> Tensor:
    """Sums [N, 2, 3] of `row_moments` [N, R, 3] from position first [N] on, but those before 0."""
    places = first[:, None] + torch.arange(
        moments.shape[1], device=moments.device, dtype=torch.int64
    )
    plain = (places >= 0).double()
    return torch.stack((plain, plain * (places + 0.5)), dim=1) @ moments
