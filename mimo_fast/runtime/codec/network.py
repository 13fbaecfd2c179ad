"""The network of the audio tokenizer (upstream `MiMoAudioTokenizer`).

    waveform -> log-mel -> encoder -> RVQ codes
    codes -> decoder -> vocoder -> waveform

Published dimensions: 24 kHz, 100 mel frames and 25 code frames a second.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import check_dense
from mimo_fast.audio.mel import log_mel
from mimo_fast.config import CodecConfig, Moments
from mimo_fast.errors import AudioError
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.rvq import Codebooks, rvq_decode, rvq_encode
from mimo_fast.modes import in_own_modes
from mimo_fast.process import Owner
from mimo_fast.quantization import WeightSource
from mimo_fast.runtime.codec.geometry import receptive_patches
from mimo_fast.runtime.codec.layers import (
    CodecLayer,
    CodecStack,
    Norm,
    TransposedConv,
    ieee_convolutions,
    inverse_stft,
    split_lengths,
)
from mimo_fast.runtime.codec.offload import offload
from mimo_fast.runtime.codec.pools import CodecPools
from mimo_fast.runtime.codec.state import NormStatistics
from mimo_fast.runtime.lm.transformer import GetTensor

ENCODE_SEGMENT = 6000
"""Mel frames encoded at once: 60 s (upstream `MimoAudio.preprocess_input`)."""

PASS_FRAMES = ENCODE_SEGMENT
"""Most mel frames of several rows that the encoder computes at once: their memory is that of a
segment."""

DECODE_SEGMENT = 1500
"""Code frames decoded at once: 60 s (upstream `MimoAudio.forward`)."""

ROUNDINGS = {"exact": torch.float32, "bfloat16": torch.bfloat16}
"""`CodecConfig.rope_frequencies` -> `CodecStack.rounding`."""

INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def statistics_on(device: torch.device, config: CodecConfig, moments: Moments) -> NormStatistics:
    """Norm statistics from the mean and variance of `unpool` and of `to_mel`."""
    unpool, to_mel = torch.tensor(moments, dtype=torch.float32, device=device)
    pooled = None if config.pool == 1 else (unpool[0], unpool[1])
    return NormStatistics(pooled, (to_mel[0], to_mel[1]))


@dataclass(frozen=True)
class MelRow:
    """Log-mel [T, n_mels] of one sequence of the encoder, and what upstream has behind it.

    Upstream pads rows, such as a short last segment, to the longest, and the padding leaks into
    their last frames.

    Attributes:
        padded: Whether mel frames follow it in its batch.
        repeats: Whether frames of the encoder do; upstream repeats the row's last one there where
            it pools, and has zeros after the longest row.
    """

    mel: Tensor
    padded: bool
    repeats: bool


def passes(rows: Iterable[MelRow]) -> Iterator[list[MelRow]]:
    """Rows in their order, as many at once as have `PASS_FRAMES` mel frames, or one."""
    waiting, frames = list[MelRow](), 0
    for row in rows:
        length = len(row.mel)
        if waiting and frames + length > PASS_FRAMES:
            yield waiting
            waiting, frames = [], 0
        waiting.append(row)
        frames += length
    if waiting:
        yield waiting


@checked
class CodecNetwork:
    """Weights and functions over them; `Codec` adds streams.

    Args:
        config: dimensions.
        source: its weights, on the device and in the dtype to compute in.
        codebook: reads a float32 tensor by upstream's name. Codebooks stay in float32 because codes
            depend on small differences between rows.

    Attributes:
        pools: State of its streams.
        calls: Number of computations so far that decoded chunks of streams.
        encode_segment, decode_segment: Mel frames that `encode` and code frames that `decode`
            compute at once, upstream's 60 s.
    """

    def __init__(self, config: CodecConfig, source: WeightSource, codebook: GetTensor) -> None:
        self.config, self.owner = config, Owner()
        self.pools, self.calls = CodecPools(), 0
        self.encode_segment, self.decode_segment = ENCODE_SEGMENT, DECODE_SEGMENT

        def stack(
            name: str, layers: int, heads: int, causal: bool, window: tuple[int, int]
        ) -> CodecStack:
            loaded = (CodecLayer.load(f"{name}.{i}", config.norm, source) for i in range(layers))
            rounding = ROUNDINGS[config.rope_frequencies]
            return CodecStack(tuple(loaded), heads, config.rope_theta, causal, window, rounding)

        self.conv1, self.conv2 = (
            (source(f"encoder.{conv}.weight"), source(f"encoder.{conv}.bias"))
            for conv in ("conv1", "conv2")
        )
        self.encoder = stack(
            "encoder.layers",
            config.encoder_layers,
            config.encoder_heads,
            config.encoder_causal,
            config.encoder_window,
        )
        self.encoder_norm = Norm.load("encoder.layer_norm", config.norm, source)
        self.unpool: TransposedConv | None = None
        if config.pool != 1:
            self.unpool = TransposedConv.load("decoder.dconv1", config.pool, source)
            self.pool_conv = source("encoder.down_sample_layer.0.weight")
            self.pool_norm = Norm.load("encoder.down_sample_norm", config.norm, source)
        books = range(len(config.codebook_sizes))
        self.codebooks = Codebooks.pack(
            [codebook(f"encoder.quantizer.vq.layers.{i}._codebook.embed") for i in books]
        )
        self.decoder = stack(
            "decoder.layers",
            config.decoder_layers,
            config.decoder_heads,
            config.decoder_causal,
            config.decoder_window,
        )
        self.decoder_norm = Norm.load("decoder.layer_norm", config.norm, source)
        self.to_mel = TransposedConv.load("decoder.dconv2", config.decoder_stride, source)
        self.vocoder_in = source.weight("decoder.vocoder.embeddings")
        heads, window = config.vocoder_heads, config.vocoder_window
        self.vocoder = stack("decoder.vocoder.layers", config.vocoder_layers, heads, False, window)
        self.vocoder_norm = Norm.load("decoder.vocoder.layer_norm", config.norm, source)
        self.vocoder_out = source.weight("decoder.vocoder.head.out", bias=True)
        self.window = source("decoder.vocoder.head.istft.window").float()
        self.device, self.dtype = self.conv1[0].device, self.conv1[0].dtype
        self.stated_statistics: NormStatistics | None = None
        if config.moments is not None:
            self.stated_statistics = statistics_on(self.device, config, config.moments)

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @cached_property
    def fingerprint(self) -> str:
        """Tells this codec from others: its dimensions and some of its weights."""
        digest = hashlib.sha256(repr(self.config).encode())
        for tensor in (self.to_mel.bias, self.decoder_norm.weight, self.codebooks.books[0][:4]):
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @in_own_modes
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """Waveform [n] at 24 kHz -> codes [n_q, T] int64, a frame for every 960 samples.

        n_q: number of codebooks; all by default.
        """
        self.check_waveform(wav, n_q)
        return self.quantize(self.encoder_output(wav), n_q)

    @in_own_modes
    def encode_measured(self, wav: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor]:
        """`encode`, and the share of the encoder output's energy that the codes lose, a scalar."""
        self.check_waveform(wav, n_q)
        return self.quantize_measured(self.encoder_output(wav), n_q)

    def encoder_output(self, wav: Tensor) -> Tensor:
        """Waveform [n] -> encoder output [T, D]."""
        return self.encode_mel(self.log_mel(wav))

    def log_mel(self, wav: Tensor) -> Tensor:
        """Waveform [n] -> log-mel [T_mel, n_mels] on the codec's device."""
        return log_mel(wav.to(self.device), self.config)

    def check_waveform(self, wav: Tensor, n_q: int | None) -> None:
        """Raises what `encode` raises before it computes anything."""
        self.owner.check()
        if n_q is not None and not 1 <= n_q <= len(self.codebooks):
            raise ValueError(f"n_q must be between 1 and {len(self.codebooks)}, not {n_q}")
        check_dense(wav)
        if not wav.is_floating_point():
            raise AudioError(f"encode takes float samples, not {wav.dtype}; see load_audio")
        if wav.ndim != 1:
            problem = f"encode takes a mono waveform [n], not {list(wav.shape)}"
            raise AudioError(f"{problem}; average its channels first")

    def quantize(self, hidden: Tensor, n_q: int | None = None) -> Tensor:
        """Encoder output [T, D] -> codes [n_q, T]."""
        return rvq_encode(hidden.float(), self.codebooks.first(n_q))

    def quantize_measured(self, hidden: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor]:
        """`quantize`, and the share of the encoder output's energy that the codes lose."""
        hidden = hidden.float()
        codes = self.quantize(hidden, n_q)
        lost = hidden - self.dequantize(codes)
        return codes, lost.square().sum() / hidden.square().sum()

    def encode_mel(self, mel: Tensor) -> Tensor:
        """Log-mel [T_mel, n_mels] -> encoder output [T, D], in segments."""
        return torch.cat(self.encode_packed(mel, split_lengths(len(mel), self.encode_segment)))

    def encode_packed(self, mel: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Log-mel [sum of lengths, n_mels] of several rows -> encoder output [T, D] of each."""
        rows = self.mel_rows(mel, lengths)
        return [each for part in passes(rows) for each in self.encode_rows(part)]

    def mel_rows(self, mel: Tensor, lengths: Sequence[int]) -> list[MelRow]:
        """Log-mel [sum of lengths, n_mels] as rows of one batch of upstream's."""
        config, longest = self.config, max(lengths)

        def frames(length: int) -> int:
            return (length + 2 - config.kernel) // config.stride + 1

        parts = mel.split([*lengths])
        return [MelRow(x, len(x) < longest, frames(len(x)) < frames(longest)) for x in parts]

    def encode_rows(self, rows: Sequence[MelRow]) -> list[Tensor]:
        """Encoder output [T, D] of each row, with the bits that it has alone."""
        convolved = [self.convolved(row.mel, row.padded) for row in rows]
        outputs = self.encoder.run_sequences(convolved, self.config.skip_layer)
        return [self._pooled(x, row.repeats) for x, row in zip(outputs, rows, strict=True)]

    def _pooled(self, x: Tensor, repeats: bool) -> Tensor:
        """Outputs of the encoder's layers [T, D] -> [T / pool, D]; see `MelRow.repeats`."""
        config = self.config
        x = self.encoder_norm(x)
        if config.pool == 1:
            return x
        if short := -len(x) % config.pool:
            filler = x[-1:] if repeats else x.new_zeros(1, x.shape[1])
            x = torch.cat((x, filler.expand(short, -1)))
        with ieee_convolutions():
            x = F.conv1d(x.T[None], self.pool_conv, stride=config.pool)[0].T
        return self.pool_norm(F.gelu(x))

    def convolved(self, mel: Tensor, padded: bool) -> Tensor:
        """Log-mel [T_mel, n_mels] -> the encoder layers' input [T_mel / stride, D]."""
        config = self.config
        with ieee_convolutions():
            x = F.pad(mel.to(self.dtype).T, (0, int(padded)))
            x = F.gelu(F.conv1d(x[None], *self.conv1, padding=1))
            x = F.gelu(F.conv1d(x, *self.conv2, stride=config.stride, padding=1))[0].T
        return x[: (len(mel) + 2 - config.kernel) // config.stride + 1]

    @in_own_modes
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, T] of the first n codebooks -> waveform [960 T] float32, in segments."""
        self.owner.check()
        self.check_codes(codes)
        parts = codes.split(self.decode_segment, dim=1)
        return torch.cat([self.decode_hidden(self.dequantize(part)) for part in parts])

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [n, T] -> sum of codebook rows [T, D] float32."""
        return rvq_decode(codes.to(self.device, torch.int64), self.codebooks)

    def decode_hidden(self, hidden: Tensor) -> Tensor:
        """Dequantized codes [T, D] -> waveform [960 T] float32."""
        mel = self.to_mel(self._decoder_hidden(hidden))
        x = self.vocoder_norm(self.vocoder(matmul(mel, self.vocoder_in)))
        return inverse_stft(matmul(x, self.vocoder_out), self.window, self.config.hop)

    def _decoder_hidden(self, hidden: Tensor) -> Tensor:
        x = hidden.to(self.dtype)
        return self.decoder_norm(self.decoder(x if self.unpool is None else self.unpool(x)))

    @in_own_modes
    def moments(self, codes: Tensor) -> NormStatistics:
        """Norm statistics of decoding codes [n, T] in one shot, as `stream` takes them."""
        self.owner.check()
        self.check_codes(codes)
        hidden = self.dequantize(codes)
        conv = self.unpool
        unpool = None if conv is None else conv.statistics(conv.convolve(hidden.to(self.dtype)))
        mel = self.to_mel.convolve(self._decoder_hidden(hidden))
        return NormStatistics(unpool, self.to_mel.statistics(mel))

    @property
    def receptive_patches(self) -> int:
        """Patches after a sample that can still change it."""
        return receptive_patches(self.config)

    def offload_encoder(self) -> None:
        """Keeps the encoder's layers in host memory (pinned for CUDA); each encode copies them.

        It frees half of the codec's bytes on the device; each encode then waits for the copies.
        """
        self.encoder = offload(self.encoder, self.device)

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError unless codes are [n, T] with every index inside its codebook."""
        if not isinstance(codes, Tensor) or codes.is_meta or codes.layout != torch.strided:
            raise ValueError("codes must be a dense tensor of integers, with values")
        if codes.dtype not in INTEGERS:
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= len(self.codebooks) or codes.shape[1] == 0:
            raise ValueError(
                f"codes must be [1 to {len(self.codebooks)}, T >= 1], not {list(codes.shape)}"
            )
        codes = codes.cpu()
        sizes = codes.new_tensor(self.config.codebook_sizes[: len(codes)], dtype=torch.int64)
        if ((codes < 0) | (codes >= sizes[:, None])).any():
            problem = "codes hold an index outside its codebook"
            raise ValueError(f"{problem}; drop the empty codes of text positions first")
