"""Ours in bfloat16 beside upstream's order of operations, op by op and for the whole codec.

    python -m benchmarks.studies.bfloat16 [--device cuda] [--out FILE.json]

Upstream's side is plain torch that rounds where upstream's modules round. Both sides get the same
bfloat16 inputs, of the published dimensions; the errors are root mean squares relative to the
result in float64; "differ" is the same between the two, "rounded_once" that of float64's result in
bfloat16. The rest is shares: of codes that differ, and of probability that a sampler moves. The
codec is nano's, on recorded words in one piece.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mimo_fast
from benchmarks.studies.codec_bfloat16 import UpstreamCodec, rotation, waveform
from benchmarks.studies.codec_stream import snr_db
from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.bench.machine import describe_machine
from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.checkpoint.files import open_weights
from mimo_fast.checkpoint.layout import codec_shapes
from mimo_fast.kernels.attention import attention
from mimo_fast.kernels.matmul.product import Weight, matmul
from mimo_fast.kernels.norm import RMSNorm, layer_norm, rms_norm
from mimo_fast.kernels.patch_embed import patch_embed
from mimo_fast.kernels.rope import rope, rope_frequencies, rope_table
from mimo_fast.kernels.rvq import Codebooks
from mimo_fast.kernels.sample import filter_scores
from mimo_fast.kernels.swiglu import swiglu
from mimo_fast.kernels.window_attention import window_attention
from mimo_fast.runtime.codec.layers import TransposedConv, inverse_stft
from mimo_fast.sampling import MiMoSampler, sampler_tensors

WORDS = Path(__file__).parents[2] / "tests" / "words"

ROWS = 64
WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 4096, 11008, 32, 8, 128
CODEC_WIDTH, CODEC_FFN, CODEC_HEADS, CODEC_HEAD_DIM = 1280, 5120, 20, 64
LOCAL_WIDTH, CHANNELS = 1024, 8
MELS, N_FFT, HOP = 128, 960, 240

Parts = tuple[Tensor, Tensor, Tensor]
"""Upstream's result, ours, and float64's."""


class Draws:
    """Normal values in bfloat16 on a device, the same on all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return values.bfloat16().to(self.device)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self(rows, columns, scale=columns**-0.5)

    def ids(self, size: int, *shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=self._generator).to(self.device)


def rms_norms(draw: Draws) -> Parts:
    x, weight, eps = draw(ROWS, WIDTH), 1 + draw(WIDTH, scale=0.1), 1e-6

    def scaled(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    theirs = weight * scaled(x.float()).bfloat16()
    return theirs, rms_norm(x, weight, eps), weight.double() * scaled(x.double())


def normed_products(draw: Draws) -> Parts:
    x, norm, weight = draw(ROWS, WIDTH), 1 + draw(WIDTH, scale=0.1), draw.weight(WIDTH, WIDTH)

    def scaled(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    theirs = F.linear(norm * scaled(x.float()).bfloat16(), weight)
    ours = matmul(x, Weight.stack([weight]), norm=RMSNorm(norm, 1e-6))
    return theirs, ours, F.linear(norm.double() * scaled(x.double()), weight.double())


def layer_norms(draw: Draws) -> Parts:
    x, weight, bias = draw(ROWS, CODEC_WIDTH), draw(CODEC_WIDTH), draw(CODEC_WIDTH)
    wide = [part.double() for part in (x, weight, bias)]
    theirs = F.layer_norm(x, weight.shape, weight, bias)
    ours = layer_norm(x, weight, bias, 1e-5)
    return theirs, ours, F.layer_norm(wide[0], weight.shape, *wide[1:])


def norms_over_time(draw: Draws) -> Parts:
    x, kernel, bias = draw(ROWS, CODEC_WIDTH), draw(CODEC_WIDTH, MELS, 3, scale=0.03), draw(MELS)
    weight, shift = 1 + draw(MELS, scale=0.1), draw(MELS)

    def by_hand(*parts: Tensor) -> Tensor:
        x, kernel, bias, weight, shift = parts
        out = F.conv_transpose1d(x.T[None], kernel, bias, 2)
        return F.group_norm(out, 1, weight, shift)[0].T[: 2 * len(x)]

    parts = x, kernel, bias, weight, shift
    ours = TransposedConv(kernel, bias, weight, shift, 2)(x)
    return by_hand(*parts), ours, by_hand(*(part.double() for part in parts))


def rotated(draw: Draws, theta: float, heads: int, width: int, first: int) -> Parts:
    """Positions from `first` on."""
    x, positions = draw(ROWS, heads, width), torch.arange(first, first + ROWS)
    rates = rope_frequencies(width, theta)
    angles = torch.outer(positions.float(), rates).to(draw.device)
    theirs = rotation(angles, torch.bfloat16)(x)
    table = rope_table(width, theta, first + ROWS, draw.device)[:, first:]
    turned = (
        torch.complex(*x.double().chunk(2, dim=-1))
        * torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    )
    return theirs, rope(x, table), torch.cat((turned.real, turned.imag), dim=-1)


def attended(draw: Draws) -> Parts:
    heads = (1, HEADS, 8 * ROWS, HEAD_DIM), (1, KV_HEADS, 8 * ROWS, HEAD_DIM)
    q, k, v = draw(*heads[0]), draw(*heads[1]), draw(*heads[1])
    options = {"is_causal": True, "enable_gqa": True}
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    wide = (part.double() for part in (q, k, v))
    exact = F.scaled_dot_product_attention(*wide, **options)
    return theirs, attention(q, k, v, causal=True), exact


def windowed(draw: Draws) -> Parts:
    q, k, v = (draw(16, 8 * ROWS, 16) for _ in range(3))
    ahead = torch.arange(8 * ROWS) - torch.arange(8 * ROWS)[:, None]
    visible = ((ahead >= -40) & (ahead <= 10)).to(draw.device)

    def seen(*parts: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*parts, attn_mask=visible)

    exact = seen(*(part.double() for part in (q, k, v)))
    return seen(q, k, v), window_attention(q, k, v, 40, 10), exact


def gated(draw: Draws) -> Parts:
    x = draw(ROWS, 2 * FFN)
    gate, up = x.chunk(2, dim=-1)
    exact = F.silu(gate.double()) * up.double()
    return F.silu(gate) * up, swiglu(x), exact


def gated_products(draw: Draws) -> Parts:
    x, gate, up = draw(ROWS, WIDTH), draw.weight(FFN, WIDTH), draw.weight(FFN, WIDTH)
    theirs = F.silu(F.linear(x, gate)) * F.linear(x, up)
    wide = x.double()
    exact = F.silu(F.linear(wide, gate.double())) * F.linear(wide, up.double())
    return theirs, matmul(x, Weight.stack([gate, up]), swiglu=True), exact


def added_products(draw: Draws) -> Parts:
    x, weight, residual = draw(ROWS, WIDTH), draw.weight(WIDTH, WIDTH), draw(ROWS, WIDTH)
    theirs = residual + F.linear(x, weight)
    exact = residual.double() + F.linear(x.double(), weight.double())
    return theirs, matmul(x, Weight.stack([weight]), residual=residual), exact


def activated_products(draw: Draws) -> Parts:
    x, weight = draw(ROWS, CODEC_WIDTH), draw.weight(CODEC_FFN, CODEC_WIDTH)
    theirs = F.gelu(F.linear(x, weight))
    exact = F.gelu(F.linear(x.double(), weight.double()))
    return theirs, F.gelu(matmul(x, Weight.stack([weight]))), exact


def logits(draw: Draws) -> Parts:
    x, weight = draw(ROWS, WIDTH), draw.weight(8192, WIDTH)
    exact = F.linear(x.double(), weight.double())
    return F.linear(x, weight), matmul(x, Weight.stack([weight])), exact


def summed_codes(draw: Draws) -> Parts:
    sizes = [129] * CHANNELS
    tables = [draw(size, LOCAL_WIDTH) for size in sizes]
    codes = draw.ids(128, ROWS, CHANNELS, 4)
    theirs = torch.zeros(ROWS, 4, LOCAL_WIDTH, dtype=torch.bfloat16, device=draw.device)
    exact = theirs.double()
    for channel, table in enumerate(tables):
        theirs += table[codes[:, channel]]
        exact += table[codes[:, channel]].double()
    offsets = torch.arange(CHANNELS, device=draw.device) * 129
    empty = torch.full_like(offsets, 128)
    return theirs, patch_embed(codes, torch.cat(tables), offsets, empty), exact


def spectra(draw: Draws) -> Parts:
    head = draw(ROWS, N_FFT + 2)
    window = torch.hann_window(N_FFT, device=draw.device).bfloat16()
    exact = waveform(head.double(), window.double(), HOP)
    return waveform(head, window, HOP), inverse_stft(head, window.float(), HOP), exact


OPS: dict[str, Callable[[Draws], Parts]] = {
    "RMSNorm": rms_norms,
    "RMSNorm, product": normed_products,
    "LayerNorm": layer_norms,
    "transposed convolution, GroupNorm": norms_over_time,
    "RoPE, language model, from 0 on": lambda draw: rotated(draw, 640_000, HEADS, HEAD_DIM, 0),
    "RoPE, language model, from 8000 on": lambda draw: rotated(
        draw, 640_000, HEADS, HEAD_DIM, 8000
    ),
    "RoPE, codec, from 2900 on": lambda draw: rotated(
        draw, 10_000, CODEC_HEADS, CODEC_HEAD_DIM, 2900
    ),
    "attention, 512 positions": attended,
    "attention in a window": windowed,
    "SwiGLU": gated,
    "products, SwiGLU": gated_products,
    "product, residual": added_products,
    "product, GELU": activated_products,
    "logits": logits,
    "sum of 8 code embeddings": summed_codes,
    "ISTFT head": spectra,
}


def relative(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is wanted."""
    wide = want.double()
    error = ((got.double() - wide).square().mean() / wide.square().mean()).sqrt()
    return float(f"{error:.3g}")


def ops(device: torch.device) -> Iterator[Record]:
    for name, compute in OPS.items():
        theirs, ours, exact = compute(Draws(device))
        yield {
            "op": name,
            "upstream_error": relative(theirs, exact),
            "our_error": relative(ours, exact),
            "differ": relative(ours, theirs.double()),
            "rounded_once": relative(exact.bfloat16(), exact),
        }


def rounded_frequencies() -> Iterator[Record]:
    """Largest error of an angle, in radians, where frequencies are rounded, after 60 s."""
    for name, width, positions in (
        ("encoder, decoder", CODEC_HEAD_DIM, 3000),
        ("vocoder", 16, 6000),
    ):
        exact, rounded = (
            rope_frequencies(width, 10_000.0, rounding=kind).double()
            for kind in (torch.float32, torch.bfloat16)
        )
        error = (exact - rounded).abs().max().item() * (positions - 1)
        yield {"op": f"rounded frequencies, {name}", "radians_after_60_s": round(error, 3)}


def upstream_probabilities(scores: Tensor, sampler: MiMoSampler) -> Tensor:
    """Upstream's sampler in the scores' dtype: [N, V] -> probabilities [N, V]."""
    scores = scores / sampler.temperature
    if sampler.top_k:
        scores = scores.masked_fill(scores < scores.topk(sampler.top_k)[0][:, -1:], -torch.inf)
    if sampler.top_p is not None:
        ordered, ids = scores.sort()
        removed = ordered.softmax(-1).cumsum(-1) <= 1 - sampler.top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, ids, removed), -torch.inf)
    return scores.softmax(-1)


def samplers(device: torch.device) -> Iterator[Record]:
    """Probability moved (total variation) by sampling in bfloat16, from logits in bfloat16."""
    draw = Draws(device)
    for name, size, scale, sampler in (
        ("text, top-k 50, top-p 0.95", 151_680, 3.0, MiMoSampler(True, 0.6, 50, 0.95)),
        ("text, top-p 0.95", 151_680, 3.0, MiMoSampler(True, 0.6, None, 0.95)),
        ("codes of 1025, top-p 0.95", 1025, 2.0, MiMoSampler(True, 0.9, None, 0.95)),
        ("codes of 129, top-p 0.95", 129, 2.0, MiMoSampler(True, 0.9, None, 0.95)),
    ):
        scores = draw(ROWS, size, scale=scale)
        theirs = upstream_probabilities(scores, sampler)
        exact = upstream_probabilities(scores.double(), sampler)
        settings = sampler_tensors([sampler] * ROWS, device)
        ours = filter_scores(scores, settings).softmax(-1)
        yield {
            "op": f"sampling of {name}",
            "upstream_moves": moved(theirs, exact),
            "we_move": moved(ours, exact),
            "upstream_keeps": kept(theirs),
            "we_keep": kept(ours),
            "exact_keeps": kept(exact),
        }


def moved(probabilities: Tensor, exact: Tensor) -> float:
    """Total variation, the mean over the rows."""
    return float(f"{(probabilities.double() - exact).abs().sum(-1).mean() / 2:.2g}")


def kept(probabilities: Tensor) -> float:
    """Number of tokens that can be drawn, the mean over the rows."""
    return round(float((probabilities > 0).sum(-1).double().mean()), 1)


def whole_codec() -> Iterator[Record]:
    """Shares of nano's first 8 codebooks that differ from upstream's in bfloat16."""
    words = torch.cat([load_audio(path, 24_000) for path in sorted(WORDS.glob("*.flac"))])
    config = mimo_fast.load(device="cpu").codec.config
    read, names = open_weights(NANO / "codec").get, [*codec_shapes(config)]
    rounded, exact = (
        UpstreamCodec(config, read, names, kind) for kind in (torch.bfloat16, torch.float32)
    )
    for seconds in (3, len(words) // 24_000):
        wav = words[: seconds * 24_000]
        mel = log_mel(wav, config)
        truth = rounded.encode(mel, 8)
        spoken = rounded.decode(truth).float()
        found: Record = {"op": f"the codec, {seconds} s", "differing_codes": {}, "decoded_db": {}}
        found["differing_codes"]["upstream in float32"] = share(exact.encode(mel, 8), truth)
        found["decoded_db"]["upstream in float32"] = snr_db(exact.decode(truth), spoken)
        for dtype in (torch.float32, torch.bfloat16):
            for rope_of in ("exact", "bfloat16"):
                codec = mimo_fast.load(device="cpu", dtype=dtype, codec_rope=rope_of).codec
                name = f"{str(dtype).removeprefix('torch.')}, {rope_of} frequencies"
                found["differing_codes"][name] = share(codec.encode(wav, 8), truth)
                found["decoded_db"][name] = snr_db(codec.decode(truth), spoken)
        # The last of them is upstream's way but for this.
        books = codec.codebooks.books
        codec.codebooks = Codebooks.pack([book.bfloat16() for book in books])
        found["differing_codes"][f"{name}, rounded codebooks"] = share(codec.encode(wav, 8), truth)
        found["decoded_db"][f"{name}, rounded codebooks"] = snr_db(codec.decode(truth), spoken)
        yield found


def share(got: Tensor, want: Tensor) -> float:
    return round(float((got != want).double().mean()), 4)


def line(record: Record) -> str:
    values = (f"{key} {value}" for key, value in record.items() if key != "op")
    return f"{record['op']}: {', '.join(values)}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cpu", help="[cpu]")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device = torch.device(args.device)

    def records() -> Iterator[Record]:
        yield from ops(device)
        yield from rounded_frequencies()
        yield from samplers(device)
        yield from whole_codec()

    collect(records(), line, {"machine": [*describe_machine()]}, args.out)


if __name__ == "__main__":
    main()
