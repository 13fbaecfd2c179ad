"""A patch decoder with random quantized weights, as the persistent kernel and as a plain reference.

Needs only torch. Dimensions: a matrix has N rows and K columns; the decoder has width D, an FFN of
width F and L layers, and runs T steps.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

HEAD = 16
COLUMNS = 128
TILE = 16
POSITIONS = 16
PHASES = ("qkv", "out", "gate/up", "down", "norm and logits", "draw")
FRAMES = 4
TIMES = ("wait", "stage", "multiply", "publish")


@dataclass(frozen=True)
class Matrix:
    """[N, K] as `mimo_fast.kernels.matmul.quantized_weight` packs it.

    Args:
        words: int32 [N, K bits / 32].
        scales: bfloat16 [N, K / 128] or [N, 1].
        zeros: float16 as scales, or None.
        bits: 4 or 8.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def blocks(self) -> int:
        """Of 128 columns."""
        return self.words.shape[1] * 32 // self.bits // COLUMNS

    def dense(self) -> Tensor:
        """float32 [N, K]."""
        planes = 32 // self.bits
        split = self.words.view(len(self.words), self.blocks, 1, COLUMNS // planes)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=self.words.device)[
            :, None
        ]
        values = ((split >> shifts) & (2**self.bits - 1)).flatten(2).float() - 2 ** (self.bits - 1)
        if self.zeros is not None:
            values = values - self.zeros.float()[..., None]
        return (values * self.scales.float()[..., None]).flatten(1)

    def units(self) -> tuple[Tensor, Tensor]:
        """Units of 16 rows x 128 columns.

        Returns words [N / 16, K / 128, 64 bits] and scales int16 [N / 16, K / 128, 32].
        """
        tiles = len(self.words) // TILE
        words = self.words.view(tiles, 2, 8, self.blocks, self.bits // 4, 4, 4).permute(
            0, 3, 1, 4, 2, 5, 6
        )
        scales = self.scales.expand(-1, self.blocks)
        zeros = torch.zeros_like(scales, dtype=torch.float16) if self.zeros is None else self.zeros
        both = torch.stack(
            (scales.contiguous().view(torch.int16), zeros.contiguous().view(torch.int16)), dim=-1
        )
        both = both.view(tiles, 2, 8, self.blocks, 2).permute(0, 3, 2, 1, 4)
        return words.reshape(tiles, self.blocks, -1), both.reshape(tiles, self.blocks, -1)


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor
    qkv: Matrix
    bias: Tensor
    out: Matrix
    ffn_norm: Tensor
    gate_up: Matrix
    down: Matrix

    def units(self) -> tuple[Tensor, Tensor]:
        """All units of the layer, in the kernel's order: words [U, ...], scales [U, ...]."""
        parts = []
        for name, matrix in (
            ("qkv", self.qkv),
            ("out", self.out),
            ("gate_up", self.gate_up),
            ("down", self.down),
        ):
            for_name = [_jobs(name, each) for each in matrix.units()]
            parts.append(for_name)
        words, scales = zip(*parts, strict=True)
        return torch.cat(words), torch.cat(scales)


def _jobs(name: str, units: Tensor) -> Tensor:
    """Units [N / 16, K / 128, ...] of one matrix in the order of its jobs."""
    tiles, blocks = units.shape[:2]
    if name == "gate_up":
        return units.unflatten(0, (2, tiles // 2)).transpose(0, 1).flatten(0, 2)
    split = units.unflatten(1, (2, blocks // 2))
    if name == "qkv":
        return split.unflatten(0, (3, tiles // 3)).permute(1, 2, 0, 3, 4).flatten(0, 3)
    return split.flatten(0, 2)


@dataclass(frozen=True)
class Model:
    layers: tuple[Layer, ...]
    norm: Tensor
    eps: float = 1e-6
    theta: float = 640000.0

    @property
    def dim(self) -> int:
        return len(self.norm)

    @property
    def ffn(self) -> int:
        return self.layers[0].down.blocks * COLUMNS

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def angles(self) -> Tensor:
        """Cosines and sines of each position [POSITIONS, 2, HEAD / 2]."""
        exponents = torch.arange(0, HEAD, 2, dtype=torch.int64, device=self.device).float() / HEAD
        angles = torch.outer(
            torch.arange(POSITIONS, device=self.device).float(), 1.0 / self.theta**exponents
        )
        return torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()


@dataclass(frozen=True)
class Heads:
    """Of the codes: channel c makes the code of frame t - c in step t.

    Args:
        heads, embeddings: bfloat16 [V, D], the channels' rows one below the other.
        sizes, empty: of each channel, and the code that is never drawn.
        noise: float32 [FRAMES, V], added to logit / temperature, or None.
    """

    heads: Tensor
    embeddings: Tensor
    sizes: tuple[int, ...]
    empty: tuple[int, ...]
    noise: Tensor | None = None
    temperature: float = 1.0

    def rows(self, channel: int) -> slice:
        first = sum(self.sizes[:channel])
        return slice(first, first + self.sizes[channel])

    def active(self, step: int) -> range:
        return range(max(0, step - FRAMES + 1), min(len(self.sizes), step + 1))

    def inputs(self, first: Tensor, codes: Tensor) -> Tensor:
        """The inputs [T, D] of all steps, given the first [D] and the codes [C, FRAMES]."""
        rows = [first]
        for step in range(len(self.sizes) + FRAMES - 2):
            drawn = [self.rows(c).start + int(codes[c, step - c]) for c in self.active(step)]
            rows.append(self.embeddings[drawn].float().sum(0).bfloat16())
        return torch.stack(rows)

    def regret(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """How far each code's float32 score is below the best, [C, FRAMES]; NaN: invalid code."""
        result = torch.zeros(codes.shape)
        for step in range(len(hidden)):
            for c in self.active(step):
                scores = (
                    hidden[step].float() @ self.heads[self.rows(c)].float().T
                ) / self.temperature
                if self.noise is not None:
                    scores = scores + self.noise[step - c, self.rows(c)]
                scores[self.empty[c]] = -torch.inf
                code = int(codes[c, step - c])
                known = 0 <= code < self.sizes[c]
                result[c, step - c] = scores.max() - scores[code] if known else torch.nan
        return result


def random_heads(
    dim: int, sizes: tuple[int, ...], noisy: bool, seed: int = 0, device: str = "cpu"
) -> Heads:
    """Logits of a deviation of 2; the last code of a channel is its empty one."""
    draw = torch.Generator(device).manual_seed(seed + 1)
    rows = sum(sizes)
    heads = (torch.randn(rows, dim, generator=draw, device=device) * 2 / dim**0.5).bfloat16()
    embeddings = torch.randn(rows, dim, generator=draw, device=device).bfloat16()
    uniform = torch.rand(FRAMES, rows, generator=draw, device=device).clamp(1e-6, 1 - 1e-6)
    noise = -(-uniform.log()).log() if noisy else None
    return Heads(
        heads, embeddings, sizes, tuple(size - 1 for size in sizes), noise, 0.9 if noisy else 1.0
    )


def random_model(
    dim: int,
    ffn: int,
    layers: int,
    bits: int,
    grouped: bool,
    zeros: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Model:
    """Weights scaled so that the product of a normed row is about as large as the row."""
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, device=device)

    def matrix(rows: int, columns: int, size: float) -> Matrix:
        shape = (rows, columns * bits // 32)
        words = torch.randint(
            -(2**31), 2**31, shape, generator=draw, device=device, dtype=torch.int32
        )
        groups = columns // COLUMNS if grouped else 1
        scale = size / columns**0.5 / (2**bits / 12**0.5)
        scales = (scale * (0.5 + uniform(rows, groups))).bfloat16()
        offsets = (4 * uniform(rows, groups) - 2).half() if zeros else None
        return Matrix(words, scales, offsets, bits)

    def norm() -> Tensor:
        return (1 + 0.2 * normal(dim)).bfloat16()

    return Model(
        tuple(
            Layer(
                norm(),
                matrix(3 * dim, dim, 1.0),
                (0.5 * normal(3 * dim)).bfloat16(),
                matrix(dim, dim, 1.0),
                norm(),
                matrix(2 * ffn, dim, 1.0),
                matrix(dim, ffn, 1.0),
            )
            for _ in range(layers)
        ),
        norm(),
    )


def reference(model: Model, inputs: Tensor, rounded: bool) -> Tensor:
    """All steps at once: inputs [T, D] -> final-normed hidden states float32 [T, D].

    rounded: to bfloat16 where the kernel rounds; else nowhere.
    """

    def kept(x: Tensor) -> Tensor:
        return x.bfloat16().float() if rounded else x

    def normed(x: Tensor, weight: Tensor, matrix: Matrix) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + model.eps).rsqrt()
        return kept(x * weight.float()) @ matrix.dense().T * scale

    def rotated(x: Tensor) -> Tensor:
        cos, sin = model.angles()[: len(x)].unbind(1)
        first, second = x.chunk(2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    x = inputs.float()
    for layer in model.layers:
        qkv = kept(normed(x, layer.attention_norm, layer.qkv) + layer.bias.float())
        q, k, v = (part.unflatten(-1, (-1, HEAD)) for part in qkv.chunk(3, -1))
        q, k = rotated(q), kept(rotated(k))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5
        causal = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        x = x + kept(torch.einsum("hqk,khd->qhd", weights, v).flatten(1)) @ layer.out.dense().T
        gate, up = normed(x, layer.ffn_norm, layer.gate_up).chunk(2, -1)
        x = x + kept(torch.nn.functional.silu(gate) * up) @ layer.down.dense().T
    scale = (x.square().mean(-1, keepdim=True) + model.eps).rsqrt()
    return x * scale * model.norm.float()


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions' arguments."""
    pointer, integer, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    decode = library.mimo_fast_engine_decode
    decode.argtypes = [
        *[pointer] * 12,
        integer,
        ctypes.c_float,
        *[pointer] * 5,
        *[integer] * 7,
        ctypes.c_float,
        *[integer] * 4,
        pointer,
    ]
    if hasattr(library, "mimo_fast_engine_exchange"):
        library.mimo_fast_engine_exchange.argtypes = [*[integer] * 6, *[pointer] * 4]
        library.mimo_fast_engine_stream.argtypes = [
            pointer,
            wide,
            wide,
            *[integer] * 4,
            *[pointer] * 2,
        ]
    return library


class Decoder:
    """The kernel's arguments for a model, kept between runs as a product would keep them."""

    def __init__(
        self, library: ctypes.CDLL, model: Model, steps: int, heads: Heads | None = None
    ) -> None:
        device, dim, layers = model.device, model.dim, model.layers
        self.library, self.model, self.steps = library, model, steps
        self.bits = layers[0].qkv.bits
        ordered = [layer.units() for layer in layers]
        self.words = torch.stack([words for words, _ in ordered])
        self.scales = torch.stack([scales for _, scales in ordered])
        self.norms = torch.stack(
            [*(n for layer in layers for n in (layer.attention_norm, layer.ffn_norm)), model.norm]
        )
        self.bias = torch.stack([layer.bias for layer in layers])
        self.angles = model.angles()
        self.heads, channels = heads, len(heads.sizes) if heads else 0
        self.codes = torch.full((channels, FRAMES), -1, dtype=torch.int32, device=device)
        self.sizes, self.empty = (
            (ctypes.c_int * channels)(*(getattr(heads, n) if heads else ()))
            for n in ("sizes", "empty")
        )
        self.cache = torch.full(
            (len(layers), dim // HEAD, POSITIONS, 2 * HEAD), torch.nan, device=device
        ).bfloat16()
        pieces = (
            dim // HEAD * 24 + dim + model.ffn // 4 + (sum(heads.sizes) + 3 if heads else 0) // 4
        )
        self.exchanged = torch.zeros(pieces, 4, dtype=torch.int32, device=device)
        self.state = torch.zeros(64, dtype=torch.int32, device=device)
        self.hidden = torch.full((steps + 1, dim), torch.nan, device=device).bfloat16()

    def waited_in_vain(self) -> bool:
        """Whether blocks have left a launch for want of data; then makes the buffers as new."""
        vain = bool(self.state[32].item())
        if vain:
            self.state.zero_()
            self.exchanged.zero_()
        return vain

    @property
    def nbytes(self) -> int:
        """That a step reads, at least once."""
        return sum(
            t.numel() * t.element_size() for t in (self.words, self.scales, self.norms, self.bias)
        )

    def run(
        self,
        inputs: Tensor,
        blocks: int,
        threads: int = 512,
        depth: int = 4,
        keep: int = -1,
        pause: int = 0,
        without: int = 0,
        clocks: Tensor | None = None,
        stream: int | None = None,
    ) -> int:
        """inputs bfloat16 [T, D] -> self.hidden[:T].

        With heads, only inputs[0] is used; T steps also write self.codes.

        clocks: int64 [blocks, 6, 4], see PHASES and TIMES. Returns a cudaError_t.
        without: for measurements with a wrong result: 1 leaves out the waiting for data, 2 the
            copies of weights, 4 the reads of earlier keys and values; a sum leaves out several.
        """
        assert inputs.is_contiguous()
        assert inputs.dtype == torch.bfloat16
        assert len(inputs) <= self.steps
        heads, model = self.heads, self.model

        def at(*tensors: Tensor | None) -> list[int | None]:
            return [None if each is None else each.data_ptr() for each in tensors]

        drawn = (
            (heads.heads, heads.embeddings, heads.noise, self.codes)
            if heads
            else (None, None, None, None)
        )
        return self.library.mimo_fast_engine_decode(
            *at(self.words, self.scales, self.norms, self.bias, self.angles, inputs, *drawn),
            self.sizes,
            self.empty,
            len(self.codes),
            1 / heads.temperature if heads else 1.0,
            *at(self.hidden, self.cache, self.exchanged, self.state, clocks),
            model.dim,
            model.ffn,
            len(model.layers),
            len(inputs),
            keep,
            pause,
            without,
            model.eps,
            self.bits,
            depth,
            blocks,
            threads,
            stream,
        )
