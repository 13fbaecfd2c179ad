"""The cache: int8 heads, allocation, and steps beside a prefill."""

from dataclasses import replace

import pytest
import torch
from helpers import refuses, seeded
from torch.testing import assert_close

from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.kv_cache import LayerKV, quantize_heads
from mimo_fast.kernels.rope import rope_table
from mimo_fast.runtime.lm.state import KVCache, kv_bytes
from mimo_fast.runtime.lm.transformer import cached_attend, prefill_attend, self_attend

CPU = torch.device("cpu")


@pytest.mark.parametrize("dh", [2, 16, 128])
def test_quantized_heads(dh):
    x = torch.randn(7, 5, dh, generator=seeded(dh)) * torch.logspace(-6, 6, 7)[:, None, None]
    x[0, 0] = 0
    levels, scales = quantize_heads(x)
    assert (levels.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert scales[0, 0] == 0
    largest = levels.abs().amax(-1).flatten()[1:]
    assert largest.eq(127).all(), "the largest value takes the last level"
    assert ((levels * scales[..., None] - x).abs() <= scales[..., None] * 0.5001).all()
    assert_close(quantize_heads(-x)[0], -levels, rtol=0, atol=0)


def test_caches_that_do_not_go_together_are_refused():
    k, scales = torch.zeros(2, 3, 8, 16), torch.zeros(2, 3, 8)
    refuses("one layout", LayerKV, k, k[..., :8])
    refuses("one layout", LayerKV, k, k.transpose(0, 1).contiguous().transpose(0, 1))
    refuses("int8", LayerKV, k, k, scales, scales)
    refuses("int8", LayerKV, k.char(), k.char())
    refuses("int8", LayerKV, k.char(), k.char(), scales)
    refuses(r"scales \[2, 3, 8\] must be", LayerKV, k.char(), k.char(), scales, scales[:, :, :4])


@pytest.fixture
def backbone(model) -> TransformerConfig:
    return replace(model.lm.config.backbone, heads=6, kv_heads=2, head_dim=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_bytes_are_known_before_anything_is_allocated(backbone, dtype, quantized):
    cache = KVCache.allocate(backbone, 3, 11, dtype, CPU, quantized)
    positions = backbone.layers * 3 * 11
    head = 16 + 4 if quantized else 16 * dtype.itemsize
    assert cache.nbytes == kv_bytes(backbone, 3, 11, dtype, quantized) == positions * 2 * 2 * head
    assert cache.capacity == cache.layer(0).capacity == 11


def test_int8_takes_about_half_of_bfloat16_at_the_published_dimensions(model):
    published = replace(model.lm.config.backbone, layers=36, heads=32, kv_heads=8, head_dim=128)
    whole, half = (kv_bytes(published, 1, 8192, torch.bfloat16, q) for q in (False, True))
    assert whole == 36 * 8192 * 8 * 128 * 2 * 2
    assert half / whole == 132 / 256


@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_is_a_view(backbone, quantized):
    cache = KVCache.allocate(backbone, 2, 5, torch.float32, CPU, quantized)
    layer = cache.layer(1)
    assert layer.k.shape == (2, 2, 5, 16)
    for part, whole in ((layer.k, cache.k), (layer.v, cache.v), (layer.k_scales, cache.k_scales)):
        assert part is whole is None or part.data_ptr() == whole[1].data_ptr()
    assert (layer.k_scales is not None) == quantized


@pytest.mark.parametrize("quantized", [False, True])
def test_prefills_and_steps_are_attention_to_the_whole(backbone, quantized):
    """Slot 1 takes prefills of 4 and 2 positions and three steps, beside slot 0."""
    table = rope_table(16, 640000.0, 12)
    cache = KVCache.allocate(backbone, 2, 12, torch.float32, CPU, quantized)
    for x in (cache.k, cache.v):
        x.fill_(127)
    for x in (cache.k_scales, cache.v_scales):
        if x is not None:
            x.fill_(torch.nan)
    qkv = torch.randn(2, 9, 10 * 16, generator=seeded(0))
    prefill_attend(backbone, table, cache, 0, 0)(1, qkv[1:, :6])
    got = [prefill_attend(backbone, table, cache, 1, 0)(1, qkv[:1, :4])]
    got.append(prefill_attend(backbone, table, cache, 1, 4)(1, qkv[:1, 4:6]))
    for t in range(6, 9):
        rows = torch.stack([qkv[0, t : t + 1], qkv[1, t : t + 1]])
        places = torch.tensor([1, 0]), torch.tensor([t, t])
        attend = cached_attend(backbone, table, cache, *places, 12)
        got.append(attend(1, rows)[:1])
    want = self_attend(backbone, table, causal=True)(1, qkv)
    error = float((torch.cat(got, dim=1) - want[:1]).norm() / want[:1].norm())
    assert 0.001 < error < 0.012 if quantized else error < 1e-6
