"""Products with stored weights, as the layers call them, and other libraries that compute them.

A product has its norm, bias, SwiGLU and residual where the layer has them.

    unpacked          our CPU product of quantized weights for many rows: some rows of the weight
                      are unpacked to float32 at a time
    linear            one F.linear with a joined dense weight (cuBLAS on a GPU), norm and epilogues
                      in plain torch
    torch-int8, torch-int4, torch-int4-cuda
                      torch's products with packed weights, on the CPU and on CUDA
    bitsandbytes-int8, bitsandbytes-nf4
                      its matmul and matmul_4bit

These products round weights, and bitsandbytes' int8 the activations too, before they multiply. Such
a provider is compared with the exact result of the rounded values, as the op's own formats are.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BACKBONE, CODEC, DECODER, DTYPE, ENCODER, EPS, LM, ROWS, SIZE, STREAMS
from benchmarks.harness import (
    Benchmark,
    Inputs,
    Outputs,
    Provider,
    needs_cpu,
    needs_cuda,
    normal,
    ours,
    plain,
)
from benchmarks.synthetic import random_weight, shape_weight
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.matmul.cpu import pack_for_torch, packed_product, unpacked_product
from mimo_fast.kernels.matmul.product import Weight, matmul, qmatmul_bytes
from mimo_fast.kernels.matmul.quantized_weight import (
    QuantizedWeight,
    dequantize_to,
    torch_int4_order,
    unpack_words,
)
from mimo_fast.kernels.norm import RMSNorm, rms_norm_ref
from mimo_fast.kernels.swiglu import swiglu_ref

FORMATS = ("dense", "int8", "int4", "nf4")
INNER_K_TILES = 8
"""Of torch's int4 product on CUDA."""


@dataclass(frozen=True)
class Product:
    """One matrix of the model [sum blocks, K], and what its product does besides."""

    name: str
    blocks: tuple[int, ...]
    columns: int
    rows: tuple[int, ...]
    bias: bool = False
    norm: bool = False
    swiglu: bool = False
    residual: bool = False
    formats: tuple[str, ...] = FORMATS

    @property
    def outputs(self) -> int:
        return sum(self.blocks) // (2 if self.swiglu else 1)

    def nbytes(self, form: str, m: int) -> int:
        """Bytes that a product of M rows must move."""
        weight = shape_weight(form, sum(self.blocks), self.columns, self.bias)
        besides = {"norm": self.norm, "residual": self.residual}
        return qmatmul_bytes(m, weight, self.outputs, SIZE, **besides)


def layer(part: str, config: TransformerConfig, rows: tuple[int, ...]) -> Iterator[Product]:
    """The four products of a layer."""
    dim, ffn, attended = config.dim, config.ffn_dim, config.heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    yield Product(f"{part}.qkv", (attended, kv, kv), dim, rows, bias=True, norm=True)
    yield Product(f"{part}.out", (dim,), attended, rows, residual=True)
    yield Product(f"{part}.gate_up", (ffn, ffn), dim, rows, norm=True, swiglu=True)
    yield Product(f"{part}.down", (dim,), ffn, rows, residual=True)


def products() -> Iterator[Product]:
    dim, group, ffn = CODEC.dim, LM.group_size, CODEC.decoder_ffn
    # A patch is one row a frame, and twice as many positions of the codec's decoder.
    frames, positions = tuple(group * n for n in (1, 2, 4, 16, 128)), (2 * group, 64, 512)
    yield from layer("backbone", BACKBONE, ROWS)
    yield Product("backbone.text_head", (LM.vocab_size,), BACKBONE.dim, STREAMS)
    yield from layer("patch_decoder", DECODER, STREAMS)
    yield from layer("patch_encoder", ENCODER, frames)
    yield Product("patch_encoder.to_backbone", (BACKBONE.dim,), group * ENCODER.dim, ROWS)
    yield Product("patch_decoder.from_backbone", (DECODER.dim,), BACKBONE.dim, STREAMS)
    for name, blocks, columns, residual in (
        ("qkv", (dim, dim, dim), dim, False),
        ("out", (dim,), dim, True),
        ("up", (ffn,), dim, False),
        ("down", (dim,), ffn, True),
    ):
        about = {"bias": True, "residual": residual, "formats": ("dense", "int8")}
        yield Product(f"codec.{name}", blocks, columns, positions, **about)


def benchmarks() -> Iterator[Benchmark]:
    for each in products():
        yield from (product_benchmark(each, form, m) for form in each.formats for m in each.rows)


def product_benchmark(product: Product, form: str, m: int) -> Benchmark:
    n, k = sum(product.blocks), product.columns

    def make(device: torch.device) -> Inputs:
        residual = normal(device, m, product.outputs, seed=2) if product.residual else None
        return {
            "x": normal(device, m, k),
            "weight": weight_of(form, product.blocks, k, product.bias, device),
            "norm": RMSNorm(normal(device, k, seed=1), EPS) if product.norm else None,
            "residual": residual,
            "swiglu": product.swiglu,
        }

    def run(inputs: Inputs) -> Outputs:
        return (matmul(**inputs),)

    providers = (*ours(run), *plain(unpacked, ours_on_cpu=form == "dense"), *others(form))
    about = (DTYPE, product.nbytes(form, m), 2 * m * n * k, make, unpacked, providers)
    return Benchmark(product.name, "matmul", form, m, f"M={m} N={n} K={k}", *about)


@lru_cache(maxsize=1)
def weight_of(
    form: str, blocks: tuple[int, ...], columns: int, bias: bool, device: torch.device
) -> Weight | QuantizedWeight:
    """One weight for all M, which follow each other; nothing writes into it."""
    return random_weight(form, blocks, columns, DTYPE, device, bias)


def around(inputs: Inputs, product: Callable[[Tensor, Any], Tensor]) -> Outputs:
    """The op in plain torch except its product x W^T: norm, bias, SwiGLU and residual."""
    norm, bias, residual = (inputs.get(name) for name in ("norm", "bias", "residual"))
    x = inputs["x"] if norm is None else rms_norm_ref(inputs["x"], norm.weight, norm.eps)
    y = product(x, inputs["weight"])
    y = y if bias is None else y + bias
    y = swiglu_ref(y) if inputs.get("swiglu") else y
    return (y if residual is None else residual + y,)


def unpacked(inputs: Inputs) -> Outputs:
    """Reference of a product: unpacked row block by row block, in the dtype of x."""
    weight, dtype = inputs["weight"], inputs["x"].dtype
    if isinstance(weight, QuantizedWeight):
        weight = Weight.stack([dequantize_to(weight, dtype)], [weight.bias])

    def product(x: Tensor, weight: Weight) -> Tensor:
        parts = [
            F.linear(x, block.to(dtype), None if bias is None else bias.to(dtype))
            for block, bias in zip(weight.blocks, weight.biases, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return around({**inputs, "weight": weight}, product)


def others(form: str) -> list[Provider]:
    """Who else computes a product with a weight of this format; for the rest see `around`."""
    if form == "dense":
        return [Provider("linear", lambda i: around(i, F.linear), _join)]
    if form == "nf4":
        nf4 = {"blocksize": 64, "quant_type": "nf4"}
        bits = _packed(
            "bitsandbytes-nf4",
            lambda w: _bits().functional.quantize_4bit(dequantize_to(w, DTYPE), **nf4),
            lambda x, packed: _bits().matmul_4bit(x, packed[0].t(), quant_state=packed[1]),
            _needs_bitsandbytes,
            lambda _, packed: _bits().functional.dequantize_4bit(*packed),
        )
        return [bits]
    spread = Provider("unpacked", lambda i: around(i, unpacked_product), missing=needs_cpu)
    if form == "int4":
        product, needs = torch.ops.aten._weight_int4pack_mm, needs_cuda
        on_cuda = (_pack_int4, lambda x, packed: product(x, *packed), needs, _exact_int4)
        return [spread, _torch_packed(form, _lacks_int4), _packed("torch-int4-cuda", *on_cuda)]
    bits = _packed(
        "bitsandbytes-int8",
        _pack_bnb_int8,
        lambda x, state: _bits().matmul(x, state.CB, state=state),
        _needs_bitsandbytes,
    )
    return [spread, _torch_packed(form, needs_cpu), replace(bits, stands_for=_exact_bnb_int8)]


def _join(inputs: Inputs) -> Inputs:
    """The weight as one dense matrix, without its biases."""
    weight = inputs["weight"]
    bias = None if weight.biases[0] is None else torch.cat(weight.biases)
    return {**inputs, "weight": torch.cat(weight.blocks), "bias": bias}


def _torch_packed(form: str, missing: Callable[[torch.device], str | None]) -> Provider:
    return Provider(
        f"torch-{form}",
        lambda i: around(i, lambda x, w: packed_product(x, w, w.torch_scales)),
        lambda i: {**i, "weight": pack_for_torch(i["weight"])},
        missing,
    )


def _packed(
    name: str,
    pack: Callable[[QuantizedWeight], Any],
    product: Callable[[Tensor, Any], Tensor],
    missing: Callable[[torch.device], str | None],
    exact: Callable[[QuantizedWeight, Any], Tensor] | None = None,
) -> Provider:
    """A provider whose product takes the weight in another form.

    exact: (our weight, its form) -> the values [N, K] that this form has.
    """

    def prepare(inputs: Inputs) -> Inputs:
        weight = inputs["weight"]
        return {**inputs, "weight": pack(weight), "bias": weight.bias}

    def stands_for(inputs: Inputs, prepared: Inputs) -> Inputs:
        return _holding(inputs, exact(inputs["weight"], prepared["weight"]))

    return Provider(name, lambda i: around(i, product), prepare, missing, exact and stands_for)


def _holding(inputs: Inputs, dense: Tensor) -> Inputs:
    """The inputs with a dense float32 weight of these values."""
    bias = inputs["weight"].bias
    weight = Weight.stack([dense.float()], [None if bias is None else bias.float()])
    return {**inputs, "weight": weight}


def _lacks_int4(device: torch.device) -> str | None:
    if device.type == "cpu" and torch_int4_order() is None:
        return "this torch has no packed int4 form for this CPU"
    return needs_cpu(device)


def _needs_bitsandbytes(_device: torch.device) -> str | None:
    return None if find_spec("bitsandbytes") is not None else "bitsandbytes is not installed"


def _pack_int4(weight: QuantizedWeight) -> tuple[Tensor, int, Tensor]:
    q = unpack_words(weight.words, 4, weight.group)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    # It computes scale (q - 8) + offset.
    offsets = -(weight.scales.float() * zeros.float())
    both = torch.stack([weight.scales.bfloat16(), offsets.bfloat16()], dim=-1)
    return packed, weight.group, both.transpose(0, 1).contiguous()


def _exact_int4(weight: QuantizedWeight, packed: tuple[Tensor, int, Tensor]) -> Tensor:
    q = unpack_words(weight.words, 4, weight.group).float().unflatten(1, (-1, weight.group)) - 8
    scales, offsets = packed[2].float().transpose(0, 1)[..., None].unbind(2)
    return (q * scales + offsets).flatten(1)


def _bits() -> Any:
    return importlib.import_module("bitsandbytes")


def _pack_bnb_int8(weight: QuantizedWeight) -> Any:
    # It warns at every call that it converts to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    state, dense = _bits().MatmulLtState(), dequantize_to(weight, torch.float16)
    state.CB, state.SCB, _ = _bits().functional.int8_vectorwise_quant(dense)
    # The setting of its Linear8bitLt for inference.
    state.has_fp16_weights, state.is_training, state.threshold = False, False, 0.0
    return state


def _exact_bnb_int8(inputs: Inputs, prepared: Inputs) -> Inputs:
    """Both of its operands are rounded."""
    x, norm, state = inputs["x"], inputs.get("norm"), prepared["weight"]
    x = x if norm is None else rms_norm_ref(x, norm.weight, norm.eps)
    q, scales, _ = _bits().functional.int8_vectorwise_quant(x.half())
    held = _holding(inputs, state.CB.float() * (state.SCB[:, None] / 127))
    return {**held, "x": (q.float() * (scales[:, None] / 127)).to(x.dtype), "norm": None}
