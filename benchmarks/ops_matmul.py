"""Products with stored weights, as the layers call them: norm, bias, SwiGLU and residual where
theirs are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from benchmarks.cases import CODEC, DTYPE, LM, ROWS, STREAMS, normal
from benchmarks.harness import Case, Inputs, Outputs
from benchmarks.providers import product_providers, unpacked
from benchmarks.synthetic import random_weight, shape_weight
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight, matmul, qmatmul_bytes
from mimo_fast.kernels.norm import RMSNorm

FORMATS = ("dense", "int8", "int4", "nf4")


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
    dim, attended, kv = (
        config.dim,
        config.heads * config.head_dim,
        config.kv_heads * config.head_dim,
    )
    yield Product(f"{part}.qkv", (attended, kv, kv), dim, rows, bias=True, norm=True)
    yield Product(f"{part}.out", (dim,), attended, rows, residual=True)
    yield Product(
        f"{part}.gate_up", (config.ffn_dim, config.ffn_dim), dim, rows, norm=True, swiglu=True
    )
    yield Product(f"{part}.down", (dim,), config.ffn_dim, rows, residual=True)


def products() -> Iterator[Product]:
    backbone, patch, group = LM.backbone, LM.patch_decoder, LM.group_size
    yield from layer("backbone", backbone, ROWS)
    yield Product("backbone.text_head", (LM.vocab_size,), backbone.dim, STREAMS)
    yield from layer("patch_decoder", patch, STREAMS)
    # A patch is a row for each of its frames.
    yield from layer(
        "patch_encoder", LM.patch_encoder, tuple(group * n for n in (1, 2, 4, 16, 128))
    )
    yield Product("patch_encoder.to_backbone", (backbone.dim,), group * LM.patch_encoder.dim, ROWS)
    yield Product("patch_decoder.from_backbone", (patch.dim,), backbone.dim, STREAMS)
    # A patch of audio is twice as many decoder positions as it has frames.
    dim, rows = CODEC.dim, (2 * group, 64, 512)
    yield Product("codec.qkv", (dim, dim, dim), dim, rows, bias=True, formats=("dense", "int8"))
    yield Product(
        "codec.out", (dim,), dim, rows, bias=True, residual=True, formats=("dense", "int8")
    )
    yield Product("codec.up", (CODEC.decoder_ffn,), dim, rows, bias=True, formats=("dense", "int8"))
    yield Product(
        "codec.down",
        (dim,),
        CODEC.decoder_ffn,
        rows,
        bias=True,
        residual=True,
        formats=("dense", "int8"),
    )


def cases() -> Iterator[Case]:
    for product in products():
        for form in product.formats:
            for m in product.rows:
                yield _case(product, form, m)


def _case(product: Product, form: str, m: int) -> Case:
    n, k = sum(product.blocks), product.columns
    nbytes = qmatmul_bytes(
        m,
        shape_weight(form, n, k, product.bias),
        product.outputs,
        DTYPE.itemsize,
        norm=product.norm,
        residual=product.residual,
    )

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, m, k),
            "weight": _weight(form, product.blocks, k, product.bias, device),
            "norm": RMSNorm(normal(device, k, seed=1), LM.backbone.norm_eps)
            if product.norm
            else None,
            "residual": normal(device, m, product.outputs, seed=2) if product.residual else None,
            "swiglu": product.swiglu,
        }

    def run(inputs: Inputs) -> Outputs:
        return (matmul(**inputs),)

    shape = f"M={m} N={n} K={k}"
    return Case(
        product.name,
        "matmul",
        form,
        m,
        shape,
        DTYPE,
        nbytes,
        2 * m * n * k,
        make,
        unpacked,
        product_providers(run, form),
    )


@lru_cache(maxsize=1)
def _weight(
    form: str, blocks: tuple[int, ...], columns: int, bias: bool, device: torch.device
) -> Weight | QuantizedWeight:
    """One for all M, which follow each other; nothing writes into it."""
    return random_weight(form, blocks, columns, DTYPE, device, bias)
