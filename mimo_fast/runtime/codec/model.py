"""`Codec`: the audio tokenizer with its streams, and the graphs that they run on."""

from mimo_fast.config import CodecConfig
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.geometry import default_lookahead
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.lm.graphs import wanted
from mimo_fast.runtime.lm.transformer import GetTensor


class Codec(CodecNetwork):
    """Encodes, decodes at once, and decodes as codes come; arguments as `CodecNetwork`'s."""

    def __init__(self, config: CodecConfig, source: WeightSource, codebook: GetTensor) -> None:
        super().__init__(config, source, codebook)
        self.stream_graphs = StreamGraphs(self) if wanted(self.device) else None

    def stream(
        self, lookahead: int | None = None, moments: NormStatistics | None = None
    ) -> CodecStream:
        """A decoder to be fed codes as they come; `CodecStream` tells of the arguments.

        A checkpoint that states the statistics of its speech (`CodecConfig.moments`) is streamed with
        those, and then need not wait for more than its vocoder sees; any other waits for
        `LOOKAHEAD` patches, to begin with better statistics.
        """
        if lookahead is None:
            lookahead = default_lookahead(self.config, given=moments is not None)
        statistics = self.stated_statistics if moments is None else moments
        return CodecStream(self, lookahead, statistics, self.stream_graphs)

    def warmup(self, streams: int, progress: bool = True) -> None:
        """Captures the graphs of so many streams ahead of time, where there are graphs."""
        if self.stream_graphs is not None:
            self.stream_graphs.warmup(streams, progress)
