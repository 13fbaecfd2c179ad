"""The rotary kernels, alone and with the append to the cache."""

import pytest
import torch
from helpers import assert_rounded, normal, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope, rope_append, rope_append_ref, rope_ref, rope_table

LARGE = 1e4
# rows, new, heads, kv_heads, head_dim
APPENDED = [(1, 1, 32, 8, 128), (2, 1, 64, 64, 16), (2, 3, 4, 2, 16)]
APPENDED += [(1, 5, 3, 1, 12), (3, 1, 5, 5, 8), (1, 2, 1, 1, 2)]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    "shape", [(3, 4, 64, 16), (7, 5, 64), (1, 32, 128), (2, 3, 2, 1, 12), (2, 70, 2), (0, 3, 8)]
)
def test_rope(dtype, shape):
    x = normal(*shape, dtype=dtype)
    table = rope_table(shape[-1], 10000.0, shape[-3])
    got = rope(x, table)
    assert got.dtype == dtype
    assert_rounded(got, rope_ref(x.float(), table).double(), noise=1e-6)


def test_rope_with_a_table_for_each_row_and_strided_heads():
    table = rope_table(16, 640000.0, 40)
    rows = torch.stack([table[:, start : start + 4] for start in (0, 7, 33)], dim=1)
    q = normal(3, 4, 12, 16)[:, :, 3:8]
    unbound = normal(5, 3, 4, 16).unbind(1)[1]
    flipped = normal(4, 16, 3).transpose(1, 2)
    for x, part in ((q, rows), (unbound, table[:, 2:7]), (flipped, table[:, :4])):
        assert_close(rope(x, part), rope_ref(x, part), rtol=1e-6, atol=1e-6)


def test_rope_of_rounded_frequencies_far_from_the_start(dtype):
    """Rows of 60 s of the codec's vocoder, turned as complex numbers in float64."""
    table = rope_table(16, 10000.0, 6000, rounding=torch.bfloat16)[:, 5991:]
    x = normal(9, 5, 16, dtype=dtype)
    rates = (1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)).bfloat16().double()
    angles = torch.arange(5991.0, 6000.0).double()[:, None, None] * rates
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    want = torch.cat((turned.real, turned.imag), dim=-1)
    assert_rounded(rope(x, table), want, noise=1e-5)


def test_rope_refuses_a_table_of_other_positions():
    refuses("does not rotate", rope, normal(3, 2, 8), rope_table(8, 10000.0, 4))


def cache_of(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A cache full of large values whose slots, heads and positions lie in memory in `order`."""
    back = [order.index(axis) for axis in range(3)]
    blank = torch.full([*(shape[axis] for axis in order), shape[3]], LARGE, dtype=dtype)
    return blank.permute(*back, 3)


def check_append(
    rows, new, heads, kv_heads, head_dim, starts, slots, order=(0, 1, 2), dtype=torch.float32
) -> None:
    shape = (max(slots) + 2, kv_heads, max(starts) + new + 3, head_dim)
    table = rope_table(head_dim, 640000.0, shape[2])
    qkv = normal(rows, new, (heads + 2 * kv_heads) * head_dim + 8, dtype=dtype)[..., :-8]
    k, v = (cache_of(shape, order, dtype) for _ in range(2))
    want_k, want_v = k.float(), v.float()
    cache, want = LayerKV(k, v), LayerKV(want_k, want_v)
    slot, start = torch.tensor(slots), torch.tensor(starts)
    want_q = rope_append_ref(qkv.float(), table, want, slot, start, heads)
    got_q = rope_append(qkv, table, cache, slot, start, heads)
    assert got_q.is_contiguous()
    assert got_q.dtype == dtype
    assert_rounded(got_q, want_q.double(), noise=1e-6)
    # All of the cache: what was there before must be untouched.
    assert_rounded(k, want_k.double(), noise=1e-6)
    assert torch.equal(v, want_v.to(dtype))
    assert int((v != LARGE).sum()) == rows * new * kv_heads * head_dim


@pytest.mark.parametrize("shape", APPENDED)
def test_append(dtype, shape):
    starts, slots = [0, 17, 5][: shape[0]], [2, 0, 1][: shape[0]]
    check_append(*shape, starts, slots, dtype=dtype)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
STARTS = st.lists(st.integers(0, 40), min_size=3, max_size=3)
ORDERS = st.permutations(range(3))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from((2, 8, 12, 16)), st.permutations(range(4)), STARTS, ORDERS)
def test_append_to_any_slots_at_any_positions(sizes, head_dim, slots, starts, order):
    check_append(*sizes, head_dim, starts[: sizes[0]], slots[: sizes[0]], tuple(order))


def test_appending_one_by_one_is_appending_at_once():
    table, qkv = rope_table(16, 640000.0, 20), normal(1, 6, 4 * 16)
    caches = [LayerKV(*(torch.full((1, 1, 20, 16), LARGE) for _ in range(2))) for _ in range(2)]
    slot = torch.tensor([0])
    at_once = rope_append(qkv, table, caches[0], slot, torch.tensor([3]), heads=2)
    one_by_one = []
    for t, row in enumerate(qkv.split(1, dim=1), start=3):
        one_by_one.append(rope_append(row, table, caches[1], slot, torch.tensor([t]), heads=2))
    assert torch.equal(at_once, torch.cat(one_by_one, dim=2))
    assert torch.equal(caches[0].k, caches[1].k)
    assert torch.equal(caches[0].v, caches[1].v)


def test_append_quantizes():
    """Strided rows into a cache with room, of which nothing else may change."""
    shape, slot, start = (3, 2, 9, 12), torch.tensor([2, 0]), torch.tensor([1, 4])
    qkv, table = normal(2, 3, 7 * 12 + 8)[..., :-8], rope_table(12, 640000.0, 9)
    qkv[0, 1] = 0
    caches = []
    for append in (rope_append, rope_append_ref):
        stored = [torch.full(shape, 99, dtype=torch.int8) for _ in range(2)]
        caches.append(LayerKV(*stored, *(torch.full(shape[:3], LARGE) for _ in range(2))))
        append(qkv, table, caches[-1], slot, start, 3)
    got, want = caches
    for scales, wanted in ((got.k_scales, want.k_scales), (got.v_scales, want.v_scales)):
        assert_close(scales, wanted, rtol=1e-6, atol=0)
        assert int((scales != LARGE).sum()) == 2 * 3 * 2
    assert torch.equal(got.v, want.v)
    assert (got.k.int() - want.k.int()).abs().max() <= 1
    assert (got.k != want.k).float().mean() < 0.01


@pytest.mark.parametrize(("start", "positions"), [(7, 40), (8, 40), (-2, 40), (7, 8)])
def test_positions_past_the_cache_or_the_table_are_not_written(start, positions):
    """Slot 1 begins where slot 0 ends."""
    k, v = (torch.full((2, 2, 8, 8), LARGE) for _ in range(2))
    packed = [torch.full((2, 2, 8, 8), 99, dtype=torch.int8) for _ in range(2)]
    quantized = LayerKV(*packed, *(torch.full((2, 2, 8), LARGE) for _ in range(2)))
    qkv, table = normal(1, 2, 48), rope_table(8, 640000.0, positions)
    for cache in (LayerKV(k, v), quantized):
        rope_append(qkv, table, cache, torch.tensor([0]), torch.tensor([start]), 2)
    held = [p for p in (start, start + 1) if 0 <= p < 8]
    for cache in (k, v):
        assert bool((cache[1] == LARGE).all())
        assert (cache[0] != LARGE).any(-1).any(0).nonzero().flatten().tolist() == held
    for scales in (quantized.k_scales, quantized.v_scales):
        assert bool((scales[1] == LARGE).all())
        assert (scales[0] != LARGE).any(0).nonzero().flatten().tolist() == held
    for stored in packed:
        assert bool((stored[1] == 99).all())
        assert (stored[0] != 99).any(-1).any(0).nonzero().flatten().tolist() == held


def test_append_refuses_what_does_not_fit():
    """One of the checks that tests/kernels/test_decode_attention.py goes through."""
    table, k = rope_table(8, 640000.0, 8), torch.zeros(1, 1, 8, 8)
    one = torch.tensor([0])
    refuses("width 32", rope_append, normal(1, 1, 32), table, LayerKV(k, k), one, one, heads=1)
