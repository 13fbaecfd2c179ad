"""The native step of cached attention, against the plain path in float64."""

import pytest
import torch
from helpers import gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.decode_attention import decode_attention, decode_attention_ref
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope_table

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)

POISON = 1e4


def case(
    rows: int,
    heads: int,
    kv_heads: int,
    dh: int,
    capacity: int,
    dtype: torch.dtype,
    starts: list[int],
):
    """qkv with a stride, a table, a cache that is a part of another, slots in reverse; poison from
    the starts on."""
    width = (heads + 2 * kv_heads) * dh
    qkv = torch.randn(rows, 1, width + 3, generator=torch.Generator().manual_seed(1))[
        ..., :width
    ].to(dtype)
    generator = torch.Generator().manual_seed(2)
    k, v = (
        torch.randn(3, rows + 1, kv_heads, capacity, dh, generator=generator)[1].to(dtype)
        for _ in "kv"
    )
    slots = torch.arange(rows).flip(0)
    for slot, start in zip(slots.tolist(), starts, strict=True):
        if 0 <= start < capacity:
            k[slot, :, start:] = v[slot, :, start:] = POISON
    return qkv, rope_table(dh, 1e4, capacity), LayerKV(k, v), slots, torch.tensor(starts)


def in_float64(
    qkv: Tensor, table: Tensor, cache: LayerKV, slots: Tensor, starts: Tensor, heads: int
) -> Tensor:
    """The cache must hold the new position already."""
    kv_heads, dh = cache.k.shape[1], cache.k.shape[3]
    y = torch.zeros(len(qkv), 1, heads * dh, dtype=torch.float64)
    for r, (slot, start) in enumerate(zip(slots.tolist(), starts.tolist(), strict=True)):
        if not 0 <= start < min(cache.capacity, table.shape[1]):
            continue
        q = qkv[r, 0, : heads * dh].double().view(heads, 2, dh // 2)
        cos, sin = table[:, start].double()
        q = torch.cat((q[:, 0] * cos - q[:, 1] * sin, q[:, 1] * cos + q[:, 0] * sin), dim=-1)
        k, v = (
            x[slot, :, : start + 1].double().repeat_interleave(heads // kv_heads, 0)
            for x in (cache.k, cache.v)
        )
        weights = (k @ q[:, :, None] / dh**0.5).softmax(1)
        y[r, 0] = (weights * v).sum(1).flatten()
    return y


@settings(max_examples=40)
@example(2, 32, 8, 128, torch.bfloat16, 700)
@example(1, 64, 64, 16, torch.float32, 11)
@given(
    st.integers(1, 4),
    st.sampled_from([2, 4, 6]),
    st.sampled_from([1, 2]),
    st.sampled_from([8, 16, 24, 64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 80),
)
def test_equals_attention_in_float64(rows, heads, kv_heads, dh, dtype, capacity):
    starts = [(capacity - 1 - 13 * r) % capacity for r in range(rows)]
    qkv, table, cache, slots, at = case(rows, heads, kv_heads, dh, capacity, dtype, starts)
    assert native.takes_attention(qkv, cache)
    want_cache = LayerKV(cache.k.clone(), cache.v.clone())
    plain = decode_attention_ref(qkv, table, want_cache, slots, at, heads)
    got = decode_attention(qkv, table, cache, slots, at, heads, capacity)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    # The difference of two products may round otherwise.
    torch.testing.assert_close(cache.k, want_cache.k, rtol=tolerance, atol=1e-5)
    assert torch.equal(cache.v, want_cache.v)
    want = in_float64(qkv, table, cache, slots, at, heads)
    error, eager = ((y.double() - want).abs().max() for y in (got, plain))
    assert error <= max(2 * eager, 1e-5)
    assert error <= (1e-5 if dtype == torch.float32 else 2e-2)


def test_positions_that_do_not_exist_write_nothing():
    qkv, table, cache, slots, starts = case(3, 4, 2, 16, 9, torch.float32, [-1, 9, 4])
    before = cache.k.clone(), cache.v.clone()
    y = decode_attention(qkv, table, cache, slots, starts, 4, 9)
    assert torch.equal(y[:2], torch.zeros(2, 1, 64))
    assert y[2].abs().max() > 0
    changed = [
        (new != old).any(-1).nonzero().tolist()
        for new, old in zip((cache.k, cache.v), before, strict=True)
    ]
    assert changed == [[[0, 0, 4], [0, 1, 4]]] * 2


def test_a_row_does_not_depend_on_its_neighbours():
    qkv, table, cache, slots, starts = case(4, 8, 2, 32, 300, torch.float32, [250, 3, 299, 31])
    together = decode_attention(qkv, table, cache, slots, starts, 8, 300)
    for r in range(4):
        row = slice(r, r + 1)
        assert torch.equal(
            decode_attention(qkv[row], table, cache, slots[row], starts[row], 8, 300), together[row]
        )


def test_large_scores_do_not_overflow():
    qkv, table, cache, slots, starts = case(1, 2, 1, 16, 100, torch.float32, [99])
    cache.k[0] *= 1e3
    qkv *= 1e3
    got = decode_attention(qkv, table, cache, slots, starts, 2, 100)
    torch.testing.assert_close(
        got.double(), in_float64(qkv, table, cache, slots, starts, 2), rtol=1e-3, atol=1e-3
    )


def test_what_it_does_not_know_goes_elsewhere(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "decode_attention", lambda *args: calls.append(args))
    for dh, dtype, taken in (
        (12, torch.float32, False),
        (16, torch.float16, False),
        (16, torch.float32, True),
    ):
        calls.clear()
        qkv, table, cache, slots, starts = case(1, 2, 1, dh, 20, dtype, [3])
        decode_attention(qkv, table, cache, slots, starts, 2, 20)
        assert bool(calls) == taken
    levels = torch.zeros(1, 1, 20, 16, dtype=torch.int8)
    quantized = LayerKV(levels, levels.clone(), torch.zeros(1, 1, 20), torch.zeros(1, 1, 20))
    assert not native.takes_attention(gaussian(1, 64)[None], quantized)
