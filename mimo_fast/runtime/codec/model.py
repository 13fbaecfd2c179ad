"""`Codec`: the audio tokenizer with its streams and their CUDA graphs."""

from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.config import CodecConfig
from mimo_fast.modes import in_own_modes
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.finite import checked_codes, checked_samples
from mimo_fast.runtime.codec.geometry import decoder_weights, default_lookahead
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import RESTART_LIMIT, NormStatistics
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.lm.graphs import wanted
from mimo_fast.runtime.lm.transformer import GetTensor

SMALL = 2**22
"""Most weights of a decoder whose streams a CPU decodes again by default."""


@checked
class Codec(CodecNetwork):
    """Encodes, decodes in one shot, and decodes incrementally; arguments as `CodecNetwork`'s.

    Attributes:
        again: `CodecStream`'s argument for streams that are opened without one: 256 for a small
            codec on a CPU, otherwise 0. Set it to 0 under load, or to 256 on a GPU with time to
            spare.
    """

    def __init__(self, config: CodecConfig, source: WeightSource, codebook: GetTensor) -> None:
        super().__init__(config, source, codebook)
        self.stream_graphs = StreamGraphs(self) if wanted(self.device) else None
        small = self.device.type == "cpu" and decoder_weights(config) <= SMALL
        self.again = RESTART_LIMIT if small else 0

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
        lookahead: int | None = None,
        moments: NormStatistics | None = None,
        again: int | None = None,
    ) -> CodecStream:
        """An incremental decoder.

        Args:
            lookahead: patches that must follow a sample before it is returned, see `CodecStream`.
            moments: norm statistics, as `moments` returns them, to be used as they are; by default
                estimates from the codes so far, and from the checkpoint's own
                (`CodecConfig.moments`) if it has any.
            again: code frames up to which a young stream is decoded again, see `CodecStream`; by
                default `Codec.again`.

        With known statistics a stream waits for no more than its vocoder's reach. Otherwise it
        waits for `LOOKAHEAD` patches, so that its first estimates are better.
        """
        if lookahead is None:
            lookahead = default_lookahead(self.config, given=moments is not None)
        statistics = self.prior(lookahead) if moments is None else moments
        again = self.again if again is None else again
        return CodecStream(self, lookahead, statistics, self.stream_graphs, again)

    @in_own_modes
    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures the graphs of `streams` streams ahead of time, where graphs are used."""
        if self.stream_graphs is not None:
            self.stream_graphs.warmup(streams, progress)
