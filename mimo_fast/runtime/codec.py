"""The audio tokenizer: waveform -> log-mel -> encoder -> RVQ codes, and codes -> decoder -> vocoder -> waveform.

(upstream `MiMoAudioTokenizer`)  Published dimensions: 24 kHz, 100 mel frames and 25 code frames a second.
"""

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..audio import log_mel
from ..config import CodecConfig
from ..errors import AudioError
from ..kernels.qmatmul import Weight, matmul
from ..kernels.rvq import Codebooks, rvq_decode, rvq_encode
from .codec_layers import Norm, TransposedConv, inverse_stft, load_stack, split_lengths
from .codec_stream import CodecStream
from .transformer import GetTensor

ENCODE_SEGMENT = 6000
"""Mel frames encoded at once: 60 s (upstream `MimoAudio.preprocess_input`)."""

DECODE_SEGMENT = 1500
"""Code frames decoded at once: 60 s (upstream `MimoAudio.forward`)."""


def ieee_convolutions() -> AbstractContextManager[None]:
    """Convolutions without TF32, cuDNN's default: codes depend on them, and nearly equal distances are common."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Codec:
    """Weights and functions over them.

    Args:
        config: dimensions.
        get: tensor by upstream's name, on the device and in the dtype to compute in. Codebooks become float32.
    """

    def __init__(self, config: CodecConfig, get: GetTensor) -> None:
        self.config = config
        self.conv1, self.conv2 = ((get(f"encoder.{c}.weight"), get(f"encoder.{c}.bias")) for c in ("conv1", "conv2"))
        self.encoder = load_stack(
            "encoder.layers", config.encoder_layers, config.encoder_heads, config.encoder_causal,
            config.encoder_window, config.norm, config.rope_theta, get,
        )
        self.encoder_norm = Norm.load("encoder.layer_norm", config.norm, get)
        if config.pool != 1:
            self.pool_conv = get("encoder.down_sample_layer.0.weight")
            self.pool_norm = Norm.load("encoder.down_sample_norm", config.norm, get)
            self.unpool = TransposedConv.load("decoder.dconv1", config.pool, get)
        names = [f"encoder.quantizer.vq.layers.{i}._codebook.embed" for i in range(len(config.codebook_sizes))]
        self.codebooks = Codebooks.pack([get(name) for name in names])
        self.decoder = load_stack(
            "decoder.layers", config.decoder_layers, config.decoder_heads, config.decoder_causal,
            config.decoder_window, config.norm, config.rope_theta, get,
        )
        self.decoder_norm = Norm.load("decoder.layer_norm", config.norm, get)
        self.to_mel = TransposedConv.load("decoder.dconv2", config.decoder_stride, get)
        self.vocoder_in = Weight.stack([get("decoder.vocoder.embeddings.weight")])
        self.vocoder = load_stack(
            "decoder.vocoder.layers", config.vocoder_layers, config.vocoder_heads, False,
            config.vocoder_window, config.norm, config.rope_theta, get,
        )
        self.vocoder_norm = Norm.load("decoder.vocoder.layer_norm", config.norm, get)
        head = "decoder.vocoder.head"
        self.vocoder_out = Weight.stack([get(f"{head}.out.weight")], [get(f"{head}.out.bias")])
        self.window = get(f"{head}.istft.window").float()
        self.device, self.dtype = self.conv1[0].device, self.conv1[0].dtype

    @property
    def sample_rate(self) -> int:
        return self.config.sample_rate

    @torch.no_grad()
    def encode(self, wav: Tensor, n_q: int | None = None) -> Tensor:
        """Waveform [n] at 24 kHz -> codes [n_q, T] int64 (all codebooks by default), T = one a 960 samples."""
        if n_q is not None and not 1 <= n_q <= len(self.codebooks):
            raise ValueError(f"n_q must be between 1 and {len(self.codebooks)}, not {n_q}")
        if wav.ndim != 1:
            raise AudioError(f"encode takes a mono waveform [n], not {list(wav.shape)}; average its channels first")
        return self.quantize(self.encode_mel(log_mel(wav.to(self.device), self.config)), n_q)

    def quantize(self, hidden: Tensor, n_q: int | None = None) -> Tensor:
        """Encoder output [T, D] -> codes [n_q, T]."""
        return rvq_encode(hidden.float(), self.codebooks.first(n_q))

    def encode_mel(self, mel: Tensor) -> Tensor:
        """Log-mel [T_mel, n_mels] -> encoder output [T, D], in segments of 6000 frames."""
        lengths = split_lengths(len(mel), ENCODE_SEGMENT)
        # Upstream pads a short last segment to the full one's length, and what it pads with leaks across the end.
        short = len(lengths) > 1 and lengths[-1] < ENCODE_SEGMENT
        parts = mel.split(lengths)
        return torch.cat([self._encode_segment(part, short and part is parts[-1]) for part in parts])

    def _encode_segment(self, mel: Tensor, padded: bool) -> Tensor:
        config = self.config
        with ieee_convolutions():
            x = F.pad(mel.to(self.dtype).T, (0, int(padded)))
            x = F.gelu(F.conv1d(x[None], *self.conv1, padding=1))
            x = F.gelu(F.conv1d(x, *self.conv2, stride=config.stride, padding=1))[0].T
        length = (len(mel) + 2 - config.kernel) // config.stride + 1
        x = self.encoder_norm(self.encoder(x[:length], config.skip_layer))
        if config.pool == 1:
            return x
        if short := -len(x) % config.pool:
            x = torch.cat((x, x[-1:].expand(short, -1) if padded else x.new_zeros(short, x.shape[1])))
        with ieee_convolutions():
            x = F.conv1d(x.T[None], self.pool_conv, stride=config.pool)[0].T
        return self.pool_norm(F.gelu(x))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, T], n <= number of codebooks -> waveform [960 T] float32, in segments of 60 s."""
        self.check_codes(codes)
        return torch.cat([self.decode_hidden(self.dequantize(part)) for part in codes.split(DECODE_SEGMENT, dim=1)])

    def dequantize(self, codes: Tensor) -> Tensor:
        """Codes [n, T] -> sum of codebook rows [T, D] float32."""
        return rvq_decode(codes.to(self.device, torch.int64), self.codebooks)

    def decode_hidden(self, hidden: Tensor) -> Tensor:
        """Dequantized codes [T, D] -> waveform [960 T] float32."""
        x = hidden.to(self.dtype)
        with ieee_convolutions():
            if self.config.pool != 1:
                x = self.unpool(x)
            mel = self.to_mel(self.decoder_norm(self.decoder(x)))
        x = self.vocoder_norm(self.vocoder(matmul(mel, self.vocoder_in)))
        return inverse_stft(matmul(x, self.vocoder_out), self.window, self.config.hop)

    def stream(self) -> CodecStream:
        """A decoder to be fed codes as they come."""
        return CodecStream(self)

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError unless codes are [n, T] with every index inside its codebook."""
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, not {codes.dtype}")
        if codes.ndim != 2 or not 1 <= codes.shape[0] <= len(self.codebooks) or codes.shape[1] == 0:
            raise ValueError(f"codes must be [1 to {len(self.codebooks)}, T >= 1], not {list(codes.shape)}")
        sizes = torch.tensor(self.config.codebook_sizes[: len(codes)])[:, None]
        if ((codes.cpu() < 0) | (codes.cpu() >= sizes)).any():
            raise ValueError("codes hold an index outside its codebook; drop the empty codes of text positions first")
