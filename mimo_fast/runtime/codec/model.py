"""`Codec`: the audio tokenizer with its streams and their CUDA graphs."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.config import CodecConfig
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.modes import in_own_modes
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs, PendingCodes
from mimo_fast.runtime.codec.finite import checked_codes, checked_samples
from mimo_fast.runtime.codec.geometry import (
    LOOKAHEAD,
    Lookahead,
    decoder_weights,
    default_lookahead,
)
from mimo_fast.runtime.codec.graphs import StreamGraphs
from mimo_fast.runtime.codec.network import CodecNetwork
from mimo_fast.runtime.codec.prior import (
    PRIOR_FRAMES,
    STATED_FRAMES,
    prior_sums,
    statistics_of,
)
from mimo_fast.runtime.codec.recordings import attempt, encoder_outputs
from mimo_fast.runtime.codec.state import RESTART_LIMIT, NormStatistics
from mimo_fast.runtime.codec.stream import CodecStream
from mimo_fast.runtime.codec.together import Push, advance
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
        self.calibration: NormStatistics | None = None
        self.stream_graphs = StreamGraphs(self) if wanted(self.device) else None
        graphs = wanted(self.device) and enabled(NewPath.ENCODER_GRAPHS, self.device)
        self.encoder_graphs = EncoderGraphs(self) if graphs else None
        small = self.device.type == "cpu" and decoder_weights(config) <= SMALL
        self.again = RESTART_LIMIT if small else 0

    @in_own_modes
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """As `CodecNetwork.encode`. On a GPU codes are -1 where they come of no finite values.

        Raises:
            NumericError: on a CPU, values are not finite.
        """
        pending = self.encode_later(wav, n_q)
        if pending is not None:
            return self._codes(pending, n_q, wav)
        return self._codes(self.encoder_output(wav), n_q, wav)

    @in_own_modes
    def encode_together(
        self, waves: Sequence[Tensor], n_q: int | None = None
    ) -> list[Tensor | Exception]:
        """Codes of several recordings, exactly those that `encode` gives each alone.

        The encoder's layers are read once for a minute of recordings, not once for each; by graph
        the recordings are launched one after the other, and nobody waits between them. Beside the
        codes it holds no more memory than the longest recording takes.

        Args:
            waves: waveforms [n] at 24 kHz, of any lengths.

        Returns:
            One result a recording, in their order: codes [n_q, T] int64 as `encode`'s, or the error
            that is that recording's alone.
        """
        given = list[Tensor | PendingCodes | Exception]()
        for wav in waves:
            pending = attempt(partial(self.encode_later, wav, n_q))
            given.append(wav if pending is None else pending)
        found: list[Tensor | PendingCodes | Exception] = encoder_outputs(self, given)
        pairs = zip(waves, found, strict=True)
        return [attempt(partial(self._codes, each, n_q, wav)) for wav, each in pairs]

    @in_own_modes
    def encode_measured_together(
        self, waves: Sequence[Tensor], n_q: int | None = None
    ) -> list[tuple[Tensor, Tensor] | Exception]:
        """`encode_measured` of several recordings, as `encode_together`."""

        def checked(wav: Tensor) -> Tensor:
            self.check_waveform(wav, n_q)
            return wav

        def measured(found: Tensor | Exception) -> tuple[Tensor, Tensor]:
            if isinstance(found, Exception):
                raise found
            return self.quantize_measured(found, n_q)

        outputs = encoder_outputs(self, [attempt(partial(checked, wav)) for wav in waves])
        return [attempt(partial(measured, each)) for each in outputs]

    def _codes(
        self, found: Tensor | PendingCodes | Exception, n_q: int | None, wav: Tensor
    ) -> Tensor:
        """The codes of a waveform, from the encoder's output [T, D] or what came in its place."""
        if isinstance(found, Exception):
            raise found
        codes = found.on_device() if isinstance(found, PendingCodes) else self.quantize(found, n_q)
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
        self,
        lookahead: Lookahead | None = None,
        moments: NormStatistics | None = None,
        weight: float | None = None,
        again: int | None = None,
    ) -> CodecStream:
        """An incremental decoder.

        Args:
            lookahead: patches that must follow a sample before it is returned, "elastic", or
                "exact", which None means; see `CodecStream`.
            moments: norm statistics, as `moments` returns them. By default estimates from the codes
                so far, which begin with the checkpoint's own (`CodecConfig.moments`) if it has any
                or, in an elastic stream, with those of `calibration`.
            weight: code frames that the statistics count for beside those of the stream; by default
                `math.inf` for given ones, which are then used as they are, and 50 in an elastic
                stream.
            again: code frames up to which a young stream is decoded again, see `CodecStream`; by
                default `Codec.again`.

        With known statistics an exact stream waits for no more than its vocoder's reach. Otherwise
        it waits for `LOOKAHEAD` patches, so that its first estimates are better.
        """
        known, elastic = moments, lookahead == "elastic"
        if weight is None:
            weight = PRIOR_FRAMES if elastic else math.inf if moments else STATED_FRAMES
        if moments is None and elastic:
            known = self.calibration or self.stated_statistics
        elif moments is None:
            # A stream that waits for LOOKAHEAD patches knows better by then.
            waits = lookahead if isinstance(lookahead, int) else default_lookahead(self.config)
            known = self.stated_statistics if waits < LOOKAHEAD else None
        return CodecStream(
            self,
            "exact" if lookahead is None else lookahead,
            known,
            self.stream_graphs,
            weight,
            self.again if again is None else again,
        )

    @in_own_modes
    def advance(self, pushes: Sequence[Push]) -> list[Tensor | Exception]:
        """Decodes the next chunks of several streams of this codec, in any state of life.

        Weights are read once for all chunks of one shape.

        Returns:
            One result a push, in their order: samples that are final now, float32 [m] on the
            codec's device, m may be 0; or the error that ends that stream alone. On a GPU samples
            of values that are not finite are NaN, and nobody has waited for them.

        Raises:
            ValueError: a stream has two pushes.
        """
        return advance(self, self.stream_graphs, pushes)

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

    @in_own_modes
    def warm_up_encoder(self, n_q: int, progress: bool = True) -> None:
        """Captures the encoder's graphs for so many codebooks, where they are used."""
        if self.encoder_graphs is not None:
            self.encoder_graphs.warmup(n_q, progress)
