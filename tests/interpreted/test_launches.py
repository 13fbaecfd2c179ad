"""The launches of one layer at decode, counted and not run: they do not depend on values."""

import pytest
import torch
from helpers import normal
from torch import Tensor

from benchmarks.launches import Layer, layers
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.matmul.product import Weight, matmul
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.rope import rope_table
from mimo_fast.quantization import Format, quantize
from mimo_fast.runtime.lm.state import KVCache
from mimo_fast.runtime.lm.transformer import (
    Attend,
    LayerWeights,
    TransformerWeights,
    cached_attend,
    self_attend,
    transformer,
)

AT_MOST = {"backbone": 6, "patch decoder": 5, "patch encoder": 5}
"""Launches a layer: 4 products, and what attention takes."""

LAYERS = {layer.name: layer for layer in layers()}
EPS = 1e-6
FINAL_NORM = "rms_norm_kernel"
LOCAL = TransformerConfig(64, 1, 4, 4, 16, 128, 1e4, EPS)
DIMENSIONS = {"patch decoder": LOCAL, "patch encoder": LOCAL}
DIMENSIONS["backbone"] = TransformerConfig(128, 1, 4, 2, 32, 256, 1e4, EPS)
CAPACITY = {"backbone": 128, "patch decoder": 11}
"""Of the caches; the backbone's is one whose attention is split and merged."""


def random_weight(kind: str, rows: int, columns: int, bias: Tensor | None = None):
    """One block, as a matrix is stored on a GPU."""
    dense = normal(rows, columns) / columns**0.5
    if kind == "dense":
        return Weight.stack([dense], [bias])
    fitting = Format.parse(kind).fit(columns)
    assert fitting
    return quantize(dense, fitting, bias)


def one_layer(config: TransformerConfig, kind: str) -> TransformerWeights:
    dim, attended = config.dim, config.heads * config.head_dim
    qkv = attended + 2 * config.kv_heads * config.head_dim
    layer = LayerWeights(
        attention_norm=normal(dim),
        qkv=random_weight(kind, qkv, dim, normal(qkv)),
        out=random_weight(kind, dim, attended),
        ffn_norm=normal(dim),
        gate_up=random_weight(kind, 2 * config.ffn_dim, dim),
        down=random_weight(kind, dim, config.ffn_dim),
    )
    return TransformerWeights((layer,), normal(dim))


def attend_of(layer: Layer, config: TransformerConfig, rows: int) -> Attend:
    table = rope_table(config.head_dim, config.rope_theta, 128)
    if layer.name == "patch encoder":
        return self_attend(config, table[:, :rows], causal=False)
    cache = KVCache.allocate(config, rows, CAPACITY[layer.name], torch.float32, torch.device("cpu"))
    slots, starts = torch.arange(rows), torch.full((rows,), 3)
    return cached_attend(config, table, cache, slots, starts, cache.capacity)


def shortened(names: list[str], kind: str) -> list[str]:
    return [name.removeprefix("dense_" if kind == "dense" else "quantized_") for name in names]


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "nf4"])
@pytest.mark.parametrize("m", [1, 4])
def test_products_are_the_only_launches_beside_attention(launches, kind, m):
    config = DIMENSIONS["backbone"]
    weights, x = one_layer(config, kind), normal(m, 1, config.dim)
    attended, widths = normal(m, 1, config.heads * config.head_dim), []

    def attend(_layer: int, qkv: Tensor) -> Tensor:
        widths.append(qkv.shape[-1])
        launches.names.append("attention")
        return attended

    with launches:
        transformer(x, weights, EPS, attend)
    assert widths == [256]
    gemv = "gemv_kernel"
    assert shortened(launches.names, kind) == [gemv, "attention", gemv, gemv, gemv, FINAL_NORM]


@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize("name", DIMENSIONS)
@pytest.mark.parametrize("m", [1, 4])
def test_launches_of_a_layer(launches, name, m, kind):
    config, layer = DIMENSIONS[name], LAYERS[name]
    rows = (1, m) if name == "patch encoder" else (m, 1)
    attend = attend_of(layer, config, m)
    transformer(normal(*rows, config.dim), one_layer(config, kind), EPS, attend)
    assert shortened(launches.names, kind) == [*layer.kernels, FINAL_NORM]
    assert len(layer.kernels) <= AT_MOST[name]


@pytest.mark.parametrize(("dtype", "inside"), [(torch.float32, 64), (torch.float16, 4)])
def test_norm_is_a_launch_beyond_so_many_rows(launches, dtype, inside):
    weight, norm = random_weight("int4", 6, 128), RMSNorm(normal(128).to(dtype), EPS)
    matmul(normal(inside, 128).to(dtype), weight, norm=norm)
    assert len(launches.names) == 1
    matmul(normal(inside + 1, 128).to(dtype), weight, norm=norm)
    product = "unpack_kernel" if inside == 64 else "quantized_dot_kernel"
    assert launches.names[1:] == ["rms_norm_kernel", product]


def test_blocks_that_are_not_joined_take_a_launch_each(launches):
    """`accelerate` shares weights this way; the norm is inside each launch."""
    x = normal(2, 64)
    weight = Weight.stack([normal(8, 64), normal(4, 64)])
    norm = RMSNorm(normal(64), EPS)
    with launches:
        matmul(x, weight, norm=norm)
    assert launches.names == ["dense_gemv_kernel", "dense_gemv_kernel", "torch.cat"]
