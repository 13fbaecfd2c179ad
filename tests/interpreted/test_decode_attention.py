"""The fused decode step (rotation, append, attention) under Triton's interpreter."""

import math

import pytest
import torch
from caches import as_float32, copied, filled_cache, tensors
from helpers import assert_as_exact_as_eager, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimo_fast.kernels import decode_attention as module
from mimo_fast.kernels.decode_attention import SPLITS, decode_attention, decode_attention_ref
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope_append, rope_table

WHOLE = SPLITS[0][0]
"""The most positions of a cache whose attention is one launch."""

EDGES = {40: [0, 31, 32], 64: [33, 63], 200: [31, 127, 128], 2050: [2047, 2048], 8192: [8191]}
GARBAGE = [(n, x, share) for n, x in ((11, 1e30), (37, math.nan)) for share in (1, 2, 4, 8)]
GARBAGE += [(201, 6e4, 4), (700, math.nan, 4)]
pytestmark = pytest.mark.usefixtures("poisoned")


def assert_cache_as(got: LayerKV, want: LayerKV, dtype: torch.dtype) -> None:
    """All positions agree: floats up to a rounding, int8 values up to a tie."""
    for x, y in zip(tensors(got), tensors(want), strict=True):
        if x.dtype == torch.int8:
            assert (x.int() - y.int()).abs().max() <= 1
            assert (x != y).float().mean() < 0.01
        else:
            eps = torch.finfo(dtype if x.dtype == dtype else torch.float32).eps
            assert_close(x.float(), y.float(), rtol=eps, atol=2e-6, equal_nan=True)


def check(
    heads,
    kv_heads,
    dh,
    capacity,
    starts,
    dtype=torch.float32,
    quantized=False,
    garbage=math.nan,
    max_length=None,
    scale=1.0,
) -> None:
    slots = [3, 0, 4, 1][: len(starts)]
    cache = filled_cache(slots, starts, 5, kv_heads, capacity, dh, dtype, quantized, garbage)
    table = rope_table(dh, 640000.0, capacity + 3)
    # Strided rows, and garbage beside them that must not be read.
    width = (heads + 2 * kv_heads) * dh
    qkv = torch.full((len(starts), 1, width + 16), math.nan, dtype=dtype)[..., :-16]
    qkv[:] = normal(*qkv.shape, dtype=dtype, scale=scale)
    slot, start = torch.tensor(slots), torch.tensor(starts)
    exact_cache, eager_cache = as_float32(cache), copied(cache)
    exact = decode_attention_ref(qkv.float(), table, exact_cache, slot, start, heads)
    eager = decode_attention_ref(qkv, table, eager_cache, slot, start, heads)
    alone_caches = [copied(cache) for _ in starts]
    limit = max_length or capacity
    got = decode_attention(qkv, table, cache, slot, start, heads, limit)
    assert got.shape == (len(starts), 1, heads * dh)
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert_as_exact_as_eager(got, eager, exact)
    assert_cache_as(cache, exact_cache, dtype)
    for row, own in enumerate(alone_caches if len(starts) > 1 else []):
        part = slice(row, row + 1)
        alone = decode_attention(qkv[part], table, own, slot[part], start[part], heads, limit)
        assert torch.equal(alone[0], got[row]), "a row depends on its neighbours"
        place = slot[row], slice(None), start[row]
        pairs = zip(tensors(own), tensors(cache), strict=True)
        assert all(torch.equal(x[place], y[place]) for x, y in pairs)


@pytest.mark.parametrize(("capacity", "garbage", "share"), GARBAGE)
def test_rows_of_different_lengths(capacity, garbage, share, dtype, quantized):
    garbage = min(garbage, 6e4) if dtype == torch.float16 and not quantized else garbage
    starts = [0, capacity - 1, capacity * 2 // 3]
    check(share, 1, 16, capacity, starts, dtype, quantized, garbage)


@pytest.mark.parametrize("capacity", [11, 90])
@pytest.mark.parametrize("shape", [(64, 64, 16), (4, 2, 64), (6, 3, 24), (2, 1, 128), (5, 5, 2)])
def test_heads_of_any_width(capacity, shape, dtype, quantized):
    check(*shape, capacity, [capacity // 2, capacity - 1], dtype, quantized)


def test_the_published_backbone(quantized):
    check(32, 8, 128, 300, [211], quantized=quantized)
    check(32, 8, 128, 40, [33, 39], torch.float16, quantized)


@pytest.mark.parametrize(("capacity", "starts"), EDGES.items())
def test_positions_at_the_edges_of_blocks_and_parts(capacity, starts):
    for start in starts:
        check(2, 1, 16, capacity, [start])


@pytest.mark.parametrize("max_length", [50, 100, 1000, 5000])
def test_max_length_only_changes_how_the_work_is_split(max_length, quantized):
    check(2, 1, 16, 400, [49], quantized=quantized, max_length=max_length)


def test_large_scores_do_not_overflow():
    check(2, 1, 16, 100, [90], scale=100.0)


@pytest.mark.parametrize(("capacity", "max_length"), [(8, 8), (40, 40), (40, 200)])
@pytest.mark.parametrize(("start", "positions"), [(0, 0), (0, 50), (7, 7), (-1, 50), (2**32, 50)])
def test_an_impossible_position_is_not_written(start, positions, capacity, max_length, quantized):
    """Past the cache (slot 1 follows slot 0), past the table, negative, beyond 32 bits."""
    if positions == 50 and start == 0:
        start = capacity
    table = rope_table(8, 640000.0, 50)[:, :positions].contiguous()
    cache = filled_cache([0, 1], [capacity, capacity], 3, 2, capacity, 8, quantized=quantized)
    before = [x.clone() for x in tensors(cache)]
    rows = normal(2, 1, 6 * 8)
    slot, starts = torch.tensor([0, 2]), torch.tensor([start, 0 if positions else start])
    got = decode_attention(rows, table, cache, slot, starts, 2, max_length)
    assert got[0].abs().max() == 0
    for x, y in zip(tensors(cache), before, strict=True):
        assert_close(x[:2], y[:2], rtol=0, atol=0, equal_nan=True)
        assert_close(x[2, :, 1:], y[2, :, 1:], rtol=0, atol=0, equal_nan=True)
    if positions:
        alone = decode_attention_ref(rows[1:], table, cache, slot[1:], starts[1:], 2)
        assert_close(got[1:], alone, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(data):
    share, kv_heads, rows = (data.draw(st.integers(1, limit)) for limit in (5, 3, 3))
    dh, capacity = data.draw(st.sampled_from([2, 8, 12, 16, 40])), data.draw(st.integers(1, 100))
    starts = data.draw(st.lists(st.integers(0, capacity - 1), min_size=rows, max_size=rows))
    check(share * kv_heads, kv_heads, dh, capacity, starts, quantized=data.draw(st.booleans()))


@pytest.mark.parametrize("capacity", [12, 40])
def test_steps_store_what_a_prefill_stores(capacity, quantized):
    """In a cache whose memory order is [B, S, Hkv, Dh]."""
    qkv, table, slot = normal(1, 10, 6 * 16), rope_table(16, 640000.0, 40), torch.tensor([1])
    caches = []
    for _ in range(2):
        shape = (2, capacity, 2, 16)
        stored = torch.int8 if quantized else torch.float32
        k, v = (torch.zeros(shape, dtype=stored).transpose(1, 2) for _ in range(2))
        scales = [torch.zeros(2, 2, capacity) for _ in range(2)] if quantized else []
        caches.append(LayerKV(k, v, *scales))
    rope_append(qkv, table, caches[0], slot, torch.tensor([0]), heads=2)
    for t in range(10):
        decode_attention(qkv[:, t : t + 1], table, caches[1], slot, torch.tensor([t]), 2, capacity)
    for at_once, one_by_one in zip(tensors(caches[0]), tensors(caches[1]), strict=True):
        assert torch.equal(at_once, one_by_one)
        assert at_once[1].count_nonzero() > 0
        assert at_once[0].count_nonzero() == 0


@pytest.mark.parametrize("capacity", [8, 40])
def test_heads_of_zeros(capacity, quantized):
    """Their int8 scale is 0, and nothing may be divided by it."""
    cache = filled_cache([0], [5], 1, 1, capacity, 16, quantized=quantized)
    qkv, table = torch.zeros(1, 1, 4 * 16), rope_table(16, 640000.0, capacity)
    got = decode_attention(qkv, table, cache, torch.tensor([0]), torch.tensor([5]), 2, capacity)
    want = cache.read(0, 6, torch.float32)[1].mean(2)
    assert_close(got.view(1, 2, 16), want.expand(1, 2, 16))


@pytest.mark.parametrize(("capacity", "launches"), [(11, 1), (WHOLE, 1), (WHOLE + 1, 2), (4000, 2)])
def test_launches(grids_of, capacity, launches):
    kernels = [name for name in vars(module) if name.endswith("_kernel")]
    assert len(kernels) == 3
    launched = grids_of(module, *kernels)
    check(2, 1, 16, capacity, [3])
    assert len(launched) == launches
