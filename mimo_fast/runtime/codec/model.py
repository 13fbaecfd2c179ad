"""`Codec`: the audio tokenizer with its streams and their CUDA graphs."""

from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.config import CodecConfig
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.modes import in_own_modes
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs, PendingCodes
from mimo_fast.runtime.codec.finite import checked_codes, checked_samples
from mimo_fast.runtime.codec.geometry import default_lookahead
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.lm.graphs import wanted
from mimo_fast.runtime.lm.transformer import GetTensor


@checked
class Codec(CodecNetwork):
    """Encodes, decodes in one shot, and decodes incrementally; arguments as `CodecNetwork`'s."""

    def __init__(self, config: CodecConfig, source: WeightSource, codebook: GetTensor) -> None:
        super().__init__(config, source, codebook)
        self.stream_graphs = StreamGraphs(self) if wanted(self.device) else None
        graphs = wanted(self.device) and enabled(NewPath.ENCODER_GRAPHS, self.device)
        self.encoder_graphs = EncoderGraphs(self) if graphs else None

    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """As `CodecNetwork.encode`. On a GPU codes are -1 where they come of no finite values.

        Raises:
            NumericError: on a CPU, values are not finite.
        """
        pending = self.encode_later(wav, n_q)
        codes = super().encode(wav, n_q) if pending is None else pending.on_device()
        return checked_codes(self, codes, wav)

    @in_own_modes
    def encode_later(self, wav: Tensor, n_q: int | None = None) -> PendingCodes | None:
        """`encode` that waits for nothing, by graph; None where no graph takes the waveform."""
        self.check_waveform(wav, n_q)
        if self.encoder_graphs is None or not self.encoder_graphs.serves(self, wav):
            return None
        return self.encoder_graphs.encode(wav, n_q or len(self.codebooks))

    def decode(self, codes: Tensor) -> Tensor:
        """As `CodecNetwork.decode`. On a GPU samples are NaN where values are not finite.

        Raises:
            NumericError: on a CPU, samples are not finite.
        """
        return checked_samples(self, super().decode(codes), codes)

    def stream(
        self, lookahead: int | None = None, moments: NormStatistics | None = None
    ) -> CodecStream:
        """An incremental decoder.

        Args:
            lookahead: patches that must follow a sample before it is returned, see `CodecStream`.
            moments: norm statistics, as `moments` returns them; by default the checkpoint's own
                (`CodecConfig.moments`) or, if it has none, estimates from the codes so far.

        With known statistics a stream waits for no more than its vocoder's reach. Otherwise it
        waits for `LOOKAHEAD` patches, so that its first estimates are better.
        """
        if lookahead is None:
            lookahead = default_lookahead(self.config, given=moments is not None)
        statistics = self.stated_statistics if moments is None else moments
        return CodecStream(self, lookahead, statistics, self.stream_graphs)

    @in_own_modes
    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures the graphs of `streams` streams ahead of time, where graphs are used."""
        if self.stream_graphs is not None:
            self.stream_graphs.warmup(streams, progress)

    @in_own_modes
    def warm_up_encoder(self, n_q: int, progress: bool = True) -> None:
        """Captures the encoder's graphs for so many codebooks, where they are used."""
        if self.encoder_graphs is not None:
            self.encoder_graphs.warmup(n_q, progress)
