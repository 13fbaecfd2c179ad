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

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    BACKBONE,
    CODEC,
    DECODER,
    DTYPE,
    ENCODER,
    EPS,
    LM,
    ROWS,
    SIZE,
    STREAMS,
)
from benchmarks.harness import (
    Case,
    Inputs,
    Outputs,
    Provider,
    Run,
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


def product_case(product: Product, form: str, m: int) -> Case:
    n, k, outputs = sum(product.blocks), product.columns, product.outputs
    stored, besides = shape_weight(form, n, k, product.bias), (product.norm, product.residual)
    nbytes = qmatmul_bytes(m, stored, outputs, SIZE, norm=besides[0], residual=besides[1])

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, m, k),
            "weight": weight_of(form, product.blocks, k, product.bias, device),
            "norm": RMSNorm(normal(device, k, seed=1), EPS) if product.norm else None,
            "residual": normal(device, m, outputs, seed=2) if product.residual else None,
            "swiglu": product.swiglu,
        }

    def run(inputs: Inputs) -> Outputs:
        return (matmul(**inputs),)

    about = (DTYPE, nbytes, 2 * m * n * k, make, unpacked, product_providers(run, form))
    return Case(product.name, "matmul", form, m, f"M={m} N={n} K={k}", *about)


@lru_cache(maxsize=1)
def weight_of(
    form: str, blocks: tuple[int, ...], columns: int, bias: bool, device: torch.device
) -> Weight | QuantizedWeight:
    """One weight for all M, which follow each other; nothing writes into it."""
    return random_weight(form, blocks, columns, DTYPE, device, bias)


def needs_package(name: str) -> Callable[[torch.device], str | None]:
    return lambda device: None if find_spec(name) is not None else f"{name} is not installed"


def product_providers(run: Run, form: str) -> tuple[Provider, ...]:
    """Providers of a product with a weight of this format; for the rest see `around`."""
    packed, spread = _torch_packed, Provider("unpacked", _unpacked, missing=needs_cpu)
    bits = needs_package("bitsandbytes")
    others = {
        "dense": [Provider("linear", lambda i: around(i, F.linear), join)],
        "int8": [
            spread,
            Provider("torch-int8", packed, _pack_torch, needs_cpu),
            Provider("bitsandbytes-int8", _bnb_int8, _pack_bnb_int8, bits, _exact_bnb_int8),
        ],
        "int4": [
            spread,
            Provider("torch-int4", packed, _pack_torch, _lacks_int4),
            Provider("torch-int4-cuda", _int4_cuda, _pack_int4_cuda, needs_cuda, _exact_int4_cuda),
        ],
        "nf4": [Provider("bitsandbytes-nf4", _bnb_nf4, _pack_bnb_nf4, bits, _exact_bnb_nf4)],
    }
    return (*ours(run), *plain(unpacked, ours_on_cpu=form == "dense"), *others[form])


def around(inputs: Inputs, product: Callable[[Tensor, Any], Tensor]) -> Outputs:
    """The op in plain torch except its product x W^T: norm, bias, SwiGLU and residual."""
    x, norm, residual = inputs["x"], inputs.get("norm"), inputs.get("residual")
    y = product(x if norm is None else rms_norm_ref(x, norm.weight, norm.eps), inputs["weight"])
    bias = inputs.get("bias")
    y = y if bias is None else y + bias
    y = swiglu_ref(y) if inputs.get("swiglu") else y
    return (y if residual is None else residual + y,)


def _unpacked(inputs: Inputs) -> Outputs:
    return around(inputs, unpacked_product)


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


def join(inputs: Inputs) -> Inputs:
    """The weight as one dense matrix, without its biases."""
    weight, dtype = inputs["weight"], inputs["x"].dtype
    if isinstance(weight, QuantizedWeight):
        return {**inputs, "weight": dequantize_to(weight, dtype), "bias": weight.bias}
    bias = None if weight.biases[0] is None else torch.cat(weight.biases)
    return {**inputs, "weight": torch.cat(weight.blocks), "bias": bias}


def _holding(inputs: Inputs, dense: Tensor) -> Inputs:
    """The case with a dense float32 weight of these values."""
    bias = inputs["weight"].bias
    weight = Weight.stack([dense.float()], [None if bias is None else bias.float()])
    return {**inputs, "weight": weight}


def _lacks_int4(device: torch.device) -> str | None:
    if device.type == "cpu" and torch_int4_order() is None:
        return "this torch has no packed int4 form for this CPU"
    return needs_cpu(device)


def _pack_torch(inputs: Inputs) -> dict[str, Any]:
    return {**inputs, "weight": pack_for_torch(inputs["weight"])}


def _torch_packed(inputs: Inputs) -> Outputs:
    return around(inputs, lambda x, w: packed_product(x, w, w.torch_scales))


def _pack_int4_cuda(inputs: Inputs) -> dict[str, Any]:
    weight = inputs["weight"]
    q = unpack_words(weight.words, 4, weight.group)
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    # It computes scale (q - 8) + offset.
    offsets = -(weight.scales.float() * zeros.float())
    both = torch.stack([weight.scales.bfloat16(), offsets.bfloat16()], dim=-1)
    scales = both.transpose(0, 1).contiguous()
    return {**inputs, "weight": (packed, weight.group, scales), "bias": weight.bias}


def _int4_cuda(inputs: Inputs) -> Outputs:
    return around(inputs, lambda x, w: torch.ops.aten._weight_int4pack_mm(x, *w))


def _exact_int4_cuda(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    weight = inputs["weight"]
    q = unpack_words(weight.words, 4, weight.group).float().unflatten(1, (-1, weight.group)) - 8
    scales, offsets = prepared["weight"][2].float().transpose(0, 1)[..., None].unbind(2)
    return _holding(inputs, (q * scales + offsets).flatten(1))


def _pack_bnb_nf4(inputs: Inputs) -> dict[str, Any]:
    from bitsandbytes import functional

    weight = inputs["weight"]
    dense = dequantize_to(weight, inputs["x"].dtype)
    quantized = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    return {**inputs, "weight": quantized, "bias": weight.bias}


def _bnb_nf4(inputs: Inputs) -> Outputs:
    import bitsandbytes

    return around(inputs, lambda x, w: bitsandbytes.matmul_4bit(x, w[0].t(), quant_state=w[1]))


def _exact_bnb_nf4(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    from bitsandbytes import functional

    packed, state = prepared["weight"]
    return _holding(inputs, functional.dequantize_4bit(packed, state))


def _pack_bnb_int8(inputs: Inputs) -> dict[str, Any]:
    import bitsandbytes

    # It warns at every call that it converts to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    weight, state = inputs["weight"], bitsandbytes.MatmulLtState()
    dense = dequantize_to(weight, torch.float16)
    state.CB, state.SCB, _ = bitsandbytes.functional.int8_vectorwise_quant(dense)
    # The setting of its Linear8bitLt for inference.
    state.has_fp16_weights, state.is_training, state.threshold = False, False, 0.0
    return {**inputs, "weight": state, "bias": weight.bias}


def _bnb_int8(inputs: Inputs) -> Outputs:
    import bitsandbytes

    return around(inputs, lambda x, state: bitsandbytes.matmul(x, state.CB, state=state))


def _exact_bnb_int8(inputs: Inputs, prepared: dict[str, Any]) -> Inputs:
    from bitsandbytes import functional

    x, norm, state = inputs["x"], inputs.get("norm"), prepared["weight"]
    x = x if norm is None else rms_norm_ref(x, norm.weight, norm.eps)
    q, scales, _ = functional.int8_vectorwise_quant(x.half())
    held = _holding(inputs, state.CB.float() * (state.SCB[:, None] / 127))
    return {**held, "x": (q.float() * (scales[:, None] / 127)).to(x.dtype), "norm": None}
