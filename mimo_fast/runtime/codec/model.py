"""`Codec`: the audio tokenizer with its streams and their CUDA graphs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.config import CodecConfig
from mimo_fast.modes import in_own_modes
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.finite import checked_codes, checked_samples
from mimo_fast.runtime.codec.geometry import Lookahead
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.prior import PRIOR_FRAMES, prior_sums, statistics_of
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.lm.graphs import wanted
from mimo_fast.runtime.lm.transformer import GetTensor


@checked
class Codec(CodecNetwork):
    """Encodes, decodes in one shot, and decodes incrementally; arguments as `CodecNetwork`'s."""

    def __init__(self, config: CodecConfig, source: WeightSource, codebook: GetTensor) -> None:
        super().__init__(config, source, codebook)
        self.calibration: NormStatistics | None = None
        self.stream_graphs = StreamGraphs(self) if wanted(self.device) else None

    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """As `CodecNetwork.encode`. On a GPU codes are -1 where they come of no finite values.

        Raises:
            NumericError: on a CPU, values are not finite.
        """
        return checked_codes(self, super().encode(wav, n_q), wav)

    def decode(self, codes: Tensor) -> Tensor:
        """As `CodecNetwork.decode`. On a GPU samples are NaN where values are not finite.

        Raises:
            NumericError: on a CPU, samples are not finite.
        """
        return checked_samples(self, super().decode(codes), codes)

    def stream(
        self,
        lookahead: Lookahead | None = None,
        moments: NormStatistics | None = None,
        weight: float = PRIOR_FRAMES,
    ) -> CodecStream:
        """An incremental decoder.

        Args:
            lookahead: patches that must follow a sample before it is returned, "elastic", or
                "exact", which None means; see `CodecStream`.
            moments: norm statistics, as `moments` returns them; by default the checkpoint's own
                (`CodecConfig.moments`) or, if it has none, estimates from the codes so far. An
                elastic stream prefers those of `calibration` to the checkpoint's.
            weight: code frames that they count for in an elastic stream; others use them as they
                are.

        With known statistics an exact stream waits for no more than its vocoder's reach. Otherwise
        it waits for `LOOKAHEAD` patches, so that its first estimates are better.
        """
        statistics = self.stated_statistics if moments is None else moments
        if moments is None and lookahead == "elastic" and self.calibration is not None:
            statistics = self.calibration
        lookahead = "exact" if lookahead is None else lookahead
        return CodecStream(self, lookahead, statistics, self.stream_graphs, weight)

    @in_own_modes
    def calibrate(self, recordings: Iterable[Tensor]) -> NormStatistics:
        """Measures what elastic streams begin with where nothing is known of a voice.

        Args:
            recordings: codes [n, T] each, as many codebooks as streams will be fed, of speech like
                that which they will decode.

        Returns:
            The statistics of all of them, which are `calibration` from then on.

        Raises:
            ValueError: there are none.
        """
        sums = torch.zeros(2, 3, dtype=torch.float64, device=self.device)
        for codes in recordings:
            moments = self.moments(codes)
            given = torch.stack([torch.stack(pair or moments.to_mel) for pair in moments])
            sums += prior_sums(self.config, given, codes.shape[1])
        if not bool(sums[1, 0] > 0):
            raise ValueError("calibrate needs at least one recording")
        self.calibration = statistics_of(self.config, sums)
        return self.calibration

    @in_own_modes
    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures the graphs of `streams` streams ahead of time, where graphs are used."""
        if self.stream_graphs is not None:
            self.stream_graphs.warmup(streams, progress)
