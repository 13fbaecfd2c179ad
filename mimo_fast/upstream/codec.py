"""`AudioTokenizer`: upstream's `MiMoAudioTokenizer`, as far as its users touch it.

Its layouts are upstream's: rows of a batch packed one after the other, audio [1, 1, n]. `Codec` has
this project's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import check_dense
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.codec.finite import checked_samples, tensors
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.upstream.config import TokenizerConfig
from mimo_fast.upstream.features import check_lengths
from mimo_fast.upstream.module import ModuleView


@dataclass
class StreamingConfig:
    """How `streaming_decode` overlaps its windows, in code frames.

    The last right_overlap frames of a window are held back, and left_overlap frames before a chunk
    are decoded again. Upstream's code reads neither seg_point, process_seg_point nor
    seg_point_left_overlap; this does not either.
    """

    seg_point: int = field(default=60 * 25)
    process_seg_point: bool = field(default=True)
    left_overlap: int = field(default=10 * 25)
    right_overlap: int = field(default=40)
    seg_point_left_overlap: int = field(default=0)


@dataclass
class StreamingCache:
    """What `streaming_decode` keeps between chunks, a list item a row; None before the first.

    Attributes:
        hidden_states: The window's dequantized codes [T, D].
        processed_lengths: Code frames of the window whose audio has been returned.
    """

    hidden_states: list[Tensor] | None = field(default=None)
    processed_lengths: list[int] | None = field(default=None)


class CodecView(ModuleView):
    """A view of the codec of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.config = TokenizerConfig.of(pipeline.codec.config)

    @property
    def codec(self) -> Codec:
        """The codec itself.

        Raises:
            ClosedError: the model has been closed.
        """
        self.pipeline.owner.check()
        return self.pipeline.codec

    @property
    def device(self) -> torch.device:
        return self.codec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.codec.dtype

    def get_output_length(self, mel_len: Any) -> Any:
        """Frames after the convolutions, before pooling, of an int or a tensor of mel frames."""
        config = self.config
        return (mel_len + 5 - 2 * config.kernel_size) // config.stride_size + 1


@checked
class AudioEncoder(CodecView):
    """Upstream's `AudioEncoder`: features to codes, and codes to what the decoder reads."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors(self.codec):
            if name.startswith("encoder."):
                yield name.removeprefix("encoder."), tensor

    @in_own_modes
    def encode(
        self,
        input_features: Tensor,
        input_lens: Tensor | Sequence[int] | None = None,
        output_length: Tensor | None = None,
        return_codes_only: bool = False,
        n_q: int | None = None,
        use_quantizer: bool = True,
    ) -> Any:
        """Log-mel [sum of input_lens, n_mels], rows one after the other, to codes.

        Args:
            output_length: upstream computes it from input_lens if it is None; so does this always.

        Returns:
            With return_codes_only, codes [n_q, sum of lengths] int64 and their lengths int64 [B].
            Otherwise hidden states [B, T, D], padded with zeros, the same packed, lengths, and
            codes or None; the states are those of the codes unless use_quantizer is False.

        Raises:
            ValueError: the lengths are missing, or not those of the features.
        """
        codec = self.codec
        lengths = check_lengths(input_features, () if input_lens is None else input_lens, least=1)
        bands = codec.config.n_mels
        if input_features.shape[1:] != (bands,) or not input_features.is_floating_point():
            found = f"{input_features.dtype} {list(input_features.shape)}"
            raise ValueError(f"features are floating-point [T, {bands}], not {found}")
        check_dense(input_features)
        mel = input_features.to(codec.device)
        rows = codec.encode_packed(mel, lengths)
        places = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=codec.device)
        hidden, codes = torch.cat(rows), None
        if use_quantizer:
            codes = codec.quantize(hidden, n_q)
            if return_codes_only:
                return codes, places
            hidden = codec.dequantize(codes).to(codec.dtype)
        padded = torch.nn.utils.rnn.pad_sequence(hidden.split(places.tolist()), batch_first=True)
        return padded, hidden, places, codes

    @in_own_modes
    def decode_vq(self, codes: Tensor) -> Tensor:
        """Codes [n, T] -> sum of codebook rows [T, D] float32."""
        codec = self.codec
        codec.check_codes(codes)
        return codec.dequantize(codes)


@checked
class AudioTokenizer(CodecView):
    """Upstream's `MiMoAudioTokenizer`."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.encoder = AudioEncoder(pipeline)
        self.sampling_rate = self.config.sampling_rate
        self.downsample_rate = int(self.config.hop_length * 2 * self.config.avg_pooler)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return tensors(self.codec)

    def encode(
        self, mels: Tensor, input_lens: Tensor | Sequence[int], use_quantizer: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `AudioEncoder.encode`: hidden states, the same packed, lengths, codes."""
        found = self.encoder.encode(mels, input_lens, use_quantizer=use_quantizer)
        states, packed, lengths, codes = found
        return states, packed, lengths, codes

    @in_own_modes
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, T] of the first n codebooks -> audio [1, 1, m] float32, in one segment."""
        return self._audio(self.encoder.decode_vq(codes), codes)[None]

    def _audio(self, hidden: Tensor, codes: Tensor | None = None) -> Tensor:
        """Dequantized codes [T, D] -> audio [1, m]."""
        wav = self.codec.decode_hidden(hidden)
        return checked_samples(self.codec, wav, codes)[None]

    @in_own_modes
    def streaming_decode(
        self,
        codes_chunks: Tensor,
        chunk_input_lengths: Tensor | Sequence[int],
        history_cache: StreamingCache | None = None,
        streaming_config: StreamingConfig | None = None,
        last_chunk: bool = False,
    ) -> tuple[list[Tensor | None], StreamingCache]:
        """Decodes the next chunk of several streams, by windows that overlap.

        Each row is decoded alone. `Codec.stream` costs less and decodes nothing twice.

        Args:
            codes_chunks: codes [n, sum of chunk_input_lengths], rows one after the other.
            history_cache: what the call before returned; None begins.

        Returns:
            For each row the audio that has become final [1, m] float32 on the CPU, or None; and the
            cache, which is the one given.
        """
        cache, settings = history_cache or StreamingCache(), streaming_config or StreamingConfig()
        config, hidden = self.config, self.encoder.decode_vq(codes_chunks)
        lengths = check_lengths(hidden, chunk_input_lengths)
        samples = config.avg_pooler * config.stride_size * config.hop_length
        windows = [*hidden.split(lengths)]
        if cache.hidden_states is not None:
            if len(cache.hidden_states) != len(windows):
                streams = f"{len(cache.hidden_states)} streams"
                raise ValueError(f"the cache is of {streams}, and {len(windows)} chunks came")
            pairs = zip(cache.hidden_states, windows, strict=True)
            windows = [torch.cat(pair) for pair in pairs]
        done = cache.processed_lengths or [0] * len(windows)
        heard = list[Tensor | None]()
        for i, window in enumerate(windows):
            frames, first = len(window), done[i]
            end = frames if last_chunk else frames - settings.right_overlap
            if end <= 0:
                heard.append(None)
                done = [*done[:i], 0, *done[i + 1 :]]
                continue
            wav = self._audio(window).float().cpu()
            heard.append(wav[:, first * samples : end * samples])
            if not last_chunk and frames > settings.left_overlap:
                windows[i] = window[-settings.left_overlap :]
                end -= frames - settings.left_overlap
            done = [*done[:i], end, *done[i + 1 :]]
        cache.hidden_states, cache.processed_lengths = windows, done
        return heard, cache
