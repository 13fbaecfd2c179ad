"""The codec in bfloat16 as upstream computes it, in plain torch: `UpstreamCodec`.

Every product, norm and buffer is rounded where upstream's modules round it once `.bfloat16()` has
been called on them: weights, codebooks (which then are float32 again), the ISTFT's window, rotary
frequencies, and cosines and sines. Attention is torch's; upstream calls flash-attn, which sums in
another order.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.kernels.rvq import rvq_decode_ref, rvq_encode_ref
from mimo_fast.runtime.codec.layers import MAX_MAGNITUDE, overlap_add
from mimo_fast.runtime.codec.network import ENCODE_SEGMENT


class UpstreamCodec:
    """One segment at a time.

    Args:
        config: dimensions, with LayerNorm.
        read: a tensor by upstream's name.
        dtype: torch.bfloat16, as upstream has it, or torch.float32.
    """

    def __init__(
        self,
        config: CodecConfig,
        read: Callable[[str], Tensor],
        names: list[str],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.tensors: Mapping[str, Tensor] = {name: read(name).to(dtype) for name in names}
        books = range(len(config.codebook_sizes))
        self.books = [
            self.tensors[f"encoder.quantizer.vq.layers.{i}._codebook.embed"].float() for i in books
        ]

    def encode(self, mel: Tensor, n_q: int | None = None) -> Tensor:
        """Log-mel [T_mel, n_mels] of at most a segment -> codes [n_q, T]."""
        return rvq_encode_ref(self.hidden(mel).float(), self.books[:n_q])

    def hidden(self, mel: Tensor) -> Tensor:
        """Log-mel [T_mel, n_mels] -> encoder output [T, D]."""
        if len(mel) > ENCODE_SEGMENT:
            raise ValueError(f"a segment has at most {ENCODE_SEGMENT} frames, not {len(mel)}")
        config, get = self.config, self.tensors
        x = mel.to(self.dtype).T[None]
        for conv, stride in (("conv1", 1), ("conv2", config.stride)):
            weight, bias = get[f"encoder.{conv}.weight"], get[f"encoder.{conv}.bias"]
            x = F.gelu(F.conv1d(x, weight, bias, stride, padding=1))
        x = x[0].T
        everywhere = torch.ones(len(x), len(x), dtype=torch.bool)
        layers = config.encoder_layers, config.encoder_heads
        outputs = self._stack("encoder.layers", x, *layers, everywhere)
        x = (
            outputs[-1]
            if config.skip_layer is None
            else outputs[-1] + outputs[config.skip_layer - 1]
        )
        x = self._norm("encoder.layer_norm", x)
        if config.pool == 1:
            return x
        x = torch.cat((x, x.new_zeros(-len(x) % config.pool, x.shape[1])))
        pooled = F.conv1d(x.T[None], get["encoder.down_sample_layer.0.weight"], stride=config.pool)
        return self._norm("encoder.down_sample_norm", F.gelu(pooled[0].T))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [n, T] of at most a segment -> waveform [960 T] in `dtype`."""
        config = self.config
        x = rvq_decode_ref(codes, self.books).to(self.dtype)
        if config.pool != 1:
            x = self._unpooled("decoder.dconv1", x, config.pool)
        places = torch.arange(len(x))
        past = places[:, None] - places
        layers = config.decoder_layers, config.decoder_heads
        x = self._stack("decoder.layers", x, *layers, past >= 0)[-1]
        x = self._unpooled(
            "decoder.dconv2", self._norm("decoder.layer_norm", x), config.decoder_stride
        )
        x = F.linear(x, self.tensors["decoder.vocoder.embeddings.weight"])
        places = torch.arange(len(x))
        ahead = places - places[:, None]
        left, right = config.vocoder_window
        layers = config.vocoder_layers, config.vocoder_heads
        visible = (ahead >= -left) & (ahead <= right)
        x = self._stack("decoder.vocoder.layers", x, *layers, visible)[-1]
        head = self._linear("decoder.vocoder.head.out", self._norm("decoder.vocoder.layer_norm", x))
        return waveform(head, self.tensors["decoder.vocoder.head.istft.window"], config.hop)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias)

    def _unpooled(self, name: str, x: Tensor, stride: int) -> Tensor:
        conv, norm = (
            [self.tensors[f"{name}.{part}.{kind}"] for kind in ("weight", "bias")]
            for part in ("conv", "norm")
        )
        out = F.group_norm(F.conv_transpose1d(x.T[None], *conv, stride), 1, *norm)[0].T
        return out[: len(x) * stride]

    def _stack(
        self, name: str, x: Tensor, layers: int, heads: int, visible: Tensor
    ) -> list[Tensor]:
        turn, outputs = rotations(self.config, x, x.shape[1] // heads), []
        for i in range(layers):
            layer = f"{name}.{i}"
            normed = self._norm(f"{layer}.self_attn_layer_norm", x)
            q, k, v = (
                self._linear(f"{layer}.self_attn.{part}_proj", normed).unflatten(1, (heads, -1))
                for part in "qkv"
            )
            q, k, v = (part.transpose(0, 1)[None] for part in (turn(q), turn(k), v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            x = x + self._linear(f"{layer}.self_attn.out_proj", out[0].transpose(0, 1).flatten(1))
            up = self._linear(f"{layer}.fc1", self._norm(f"{layer}.final_layer_norm", x))
            x = x + self._linear(f"{layer}.fc2", F.gelu(up))
            outputs.append(x)
        return outputs


def rotations(config: CodecConfig, x: Tensor, head_dim: int) -> Callable[[Tensor], Tensor]:
    """The rotation of heads [T, H, Dh] of the positions of x [T, D], all in x's dtype."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    rates = (1.0 / config.rope_theta**exponents).to(x.dtype).float()
    angles = torch.outer(torch.arange(len(x)).float(), rates)
    return rotation(angles, x.dtype)


def rotation(angles: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rotation by angles [T, Dh / 2] as upstream has it: the table and each term are rounded."""
    cos, sin = (
        torch.cat((part, part), -1).to(dtype)[:, None] for part in (angles.cos(), angles.sin())
    )

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turn


def waveform(head: Tensor, window: Tensor, hop: int) -> Tensor:
    """`inverse_stft` in the head's dtype up to the spectrum, and again from the waveform on."""
    log_magnitude, phase = head.chunk(2, dim=-1)
    magnitude = log_magnitude.exp().clip(max=MAX_MAGNITUDE)
    spectrum = torch.complex(
        magnitude.float() * phase.cos().float(), magnitude.float() * phase.sin().float()
    )
    frames = torch.fft.irfft(spectrum, len(window), dim=-1) * window
    envelope = overlap_add(window.square().expand(len(frames), -1), hop)
    trim = (len(window) - hop) // 2
    kept = slice(trim, trim + len(head) * hop)
    return (overlap_add(frames, hop)[kept] / envelope[kept]).to(head.dtype)
