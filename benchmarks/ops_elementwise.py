"""Norms, SwiGLU, embeddings and codebooks: ops that move more than they compute, but for the search
of codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cases import CODEC, DTYPE, LM, ROWS, STREAMS, integers, normal, op_case
from benchmarks.harness import Case, Inputs, Outputs
from benchmarks.synthetic import random_weight
from mimo_fast.bench.accuracy import Accuracy, compare_codes
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.norm import layer_norm, layer_norm_ref, norm_bytes, rms_norm, rms_norm_ref
from mimo_fast.kernels.patch_embed import patch_embed, patch_embed_bytes, patch_embed_ref
from mimo_fast.kernels.rvq import (
    Codebooks,
    rvq_decode,
    rvq_decode_bytes,
    rvq_decode_ref,
    rvq_encode,
    rvq_encode_bytes,
    rvq_encode_ref,
)
from mimo_fast.kernels.swiglu import swiglu, swiglu_bytes, swiglu_ref
from mimo_fast.kernels.text_embed import input_embed, input_embed_bytes, input_embed_ref

FRAMES = (4, 64, 512)
"""Of the codec: a patch, 2.6 s and 20 s of codes."""

TABLE = 1024
"""Rows of the text embedding that a case holds; a gather costs the same in any table that no cache
holds, and there are many copies of this one."""

EMPTY_ID = 0
LAYER_NORM_EPS = 1e-5


def cases() -> Iterator[Case]:
    for m in ROWS:
        yield _rms_norm("backbone", m, LM.backbone.dim)
    for m in ROWS:
        yield _rms_norm("patch_decoder", m, LM.patch_decoder.dim)
    for part, dim, rows in (
        ("codec", CODEC.dim, (8, 64, 512)),
        ("vocoder", CODEC.vocoder_dim, (176, 1024)),
    ):
        for m in rows:
            yield _layer_norm(part, m, dim)
    for part, width in (
        ("backbone", LM.backbone.ffn_dim),
        ("patch_decoder", LM.patch_decoder.ffn_dim),
    ):
        for m in ROWS:
            yield _swiglu(part, m, width)
    for m in ROWS:
        yield _patch_embed(m)
    for form in ("dense", "int8"):
        for m in STREAMS:
            yield _input_embed(m, form)
    for t in FRAMES:
        yield _rvq_encode(t)
    for t in FRAMES:
        yield _rvq_decode(t)


def _rms_norm(part: str, m: int, dim: int) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, m, dim),
            "weight": normal(device, dim, seed=1),
            "eps": LM.backbone.norm_eps,
        }

    return op_case(
        f"{part}.rms_norm",
        rms_norm,
        rms_norm_ref,
        make,
        m=m,
        shape=f"M={m} D={dim}",
        nbytes=norm_bytes(m, dim, DTYPE.itemsize),
        flop=4 * m * dim,
    )


def _layer_norm(part: str, m: int, dim: int) -> Case:
    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, m, dim),
            "weight": normal(device, dim, seed=1),
            "bias": normal(device, dim, seed=2),
            "eps": LAYER_NORM_EPS,
        }

    return op_case(
        f"{part}.layer_norm",
        layer_norm,
        layer_norm_ref,
        make,
        m=m,
        shape=f"M={m} D={dim}",
        nbytes=norm_bytes(m, dim, DTYPE.itemsize) + dim * DTYPE.itemsize,
        flop=7 * m * dim,
    )


def _swiglu(part: str, m: int, width: int) -> Case:
    def make(device: torch.device) -> Inputs:
        return {"gate_up": normal(device, m, 2 * width)}

    return op_case(
        f"{part}.swiglu",
        swiglu,
        swiglu_ref,
        make,
        m=m,
        shape=f"M={m} F={width}",
        nbytes=swiglu_bytes(m, width, DTYPE.itemsize),
        flop=5 * m * width,
    )


def _patch_embed(patches: int) -> Case:
    channels, group, dim = LM.channels, LM.group_size, LM.patch_encoder.dim

    def make(device: torch.device) -> Inputs:
        codes = [
            integers(device, size - 1, patches, group, seed=c)
            for c, size in enumerate(LM.code_sizes)
        ]
        offsets = torch.tensor([0, *LM.code_sizes[:-1]], device=device).cumsum(0)
        return {
            "codes": torch.stack(codes, dim=1),
            "table": normal(device, sum(LM.code_sizes), dim),
            "offsets": offsets,
            "empty": torch.tensor(LM.empty_codes, device=device),
        }

    return op_case(
        "patch_encoder.patch_embed",
        patch_embed,
        patch_embed_ref,
        make,
        m=patches,
        shape=f"M={patches} C={channels} G={group}",
        flop=patches * channels * group * dim,
        nbytes=patch_embed_bytes(patches, channels, group, dim, DTYPE.itemsize),
    )


def _input_embed(rows: int, form: str) -> Case:
    """Text rows, the dearer kind where one is packed; every fourth of many is audio."""
    dim = LM.backbone.dim
    audio = rows // 4
    row_bytes = dim * DTYPE.itemsize if form == "dense" else dim + 2

    def make(device: torch.device) -> Inputs:
        text = integers(device, TABLE - 1, rows) + 1
        text[:audio] = EMPTY_ID
        return {
            "text": text,
            "patches": normal(device, rows, dim),
            "table": _table(form, dim, device),
            "empty_id": EMPTY_ID,
        }

    nbytes = input_embed_bytes(audio, rows - audio, dim, DTYPE.itemsize, row_bytes)
    return op_case(
        "backbone.input_embed",
        input_embed,
        input_embed_ref,
        make,
        m=rows,
        shape=f"M={rows} D={dim}",
        form=form,
        nbytes=nbytes,
        flop=rows * dim,
    )


def _table(form: str, dim: int, device: torch.device) -> Tensor | QuantizedWeight:
    if form == "dense":
        return normal(device, TABLE, dim, seed=3)
    # Of float32: on a CPU a weight of bfloat16 is packed for products, of which no rows can be
    # taken.
    weight = random_weight(form, (TABLE,), dim, torch.float32, device)
    assert isinstance(weight, QuantizedWeight)
    return weight


def _codebooks(device: torch.device) -> Codebooks:
    sizes = [size - 1 for size in LM.code_sizes]
    return Codebooks.pack(
        [
            normal(device, size, CODEC.dim, dtype=torch.float32, seed=i) * 0.8**i
            for i, size in enumerate(sizes)
        ]
    )


def _rvq_encode(t: int) -> Case:
    sizes = [size - 1 for size in LM.code_sizes]

    def make(device: torch.device) -> Inputs:
        return {
            "x": normal(device, t, CODEC.dim, dtype=torch.float32, scale=2.0),
            "codebooks": _codebooks(device),
        }

    def reference(x: Tensor, codebooks: Codebooks) -> Tensor:
        return rvq_encode_ref(x, codebooks.books)

    def check(inputs: Inputs, got: Outputs) -> Accuracy:
        want = reference(**inputs)
        if got[0].shape != want.shape:
            return Accuracy(t, 0, 1.0)
        wrong, _ = compare_codes(inputs["x"], inputs["codebooks"].books, got[0], want)
        return Accuracy(wrong, 0, wrong / t)

    return op_case(
        "codec.rvq_encode",
        rvq_encode,
        reference,
        make,
        m=t,
        shape=f"T={t} Q={len(sizes)}",
        dtype=torch.float32,
        nbytes=rvq_encode_bytes(t, CODEC.dim, sizes),
        flop=2 * t * CODEC.dim * sum(sizes),
        check=check,
    )


def _rvq_decode(t: int) -> Case:
    sizes: Sequence[int] = [size - 1 for size in LM.code_sizes]

    def make(device: torch.device) -> Inputs:
        codes = torch.stack([integers(device, size, t, seed=i) for i, size in enumerate(sizes)])
        return {"codes": codes, "codebooks": _codebooks(device)}

    def reference(codes: Tensor, codebooks: Codebooks) -> Tensor:
        return rvq_decode_ref(codes, codebooks.books)

    return op_case(
        "codec.rvq_decode",
        rvq_decode,
        reference,
        make,
        m=t,
        shape=f"T={t} Q={len(sizes)}",
        dtype=torch.float32,
        nbytes=rvq_decode_bytes(t, CODEC.dim, len(sizes)),
        flop=t * CODEC.dim * len(sizes),
    )
