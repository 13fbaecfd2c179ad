"""The fused decode step under Triton's interpreter: rotation, append and attention against the
reference."""

import math

import pytest
import torch
from helpers import assert_as_exact_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels import decode_attention as module
from mimo_fast.kernels.decode_attention import SPLITS, decode_attention, decode_attention_ref
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope_append, rope_table

DTYPES = [torch.float32, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned")


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    ).to(dtype)


def filled_cache(
    slots: list[int],
    starts: list[int],
    b: int,
    kv_heads: int,
    capacity: int,
    dh: int,
    dtype: torch.dtype = torch.float32,
    quantized: bool = False,
    garbage: float = math.nan,
) -> LayerKV:
    """A cache where only the positions before each row's start are not garbage: 127 with huge
    scales if quantized."""
    shape = (b, kv_heads, capacity, dh)
    stored, value = (torch.int8, 127) if quantized else (dtype, garbage)
    k, v = (torch.full(shape, value, dtype=stored) for _ in range(2))
    scales = [torch.full(shape[:3], garbage) for _ in range(2)] if quantized else []
    cache = LayerKV(k, v, *scales)
    for slot, start in zip(slots, starts, strict=True):
        cache.append(
            slot, 0, *(normal(kv_heads, start, dh, seed=slot + i, dtype=dtype) for i in range(2))
        )
    return cache


def tensors(cache: LayerKV) -> list[Tensor]:
    return [x for x in (cache.k, cache.v, cache.k_scales, cache.v_scales) if x is not None]


def as_float32(cache: LayerKV) -> LayerKV:
    """A copy: of float32 keys and values unless they are int8."""
    return LayerKV(
        *(x.clone() if x.dtype == torch.int8 else x.float().clone() for x in tensors(cache))
    )


def assert_cache_as(got: LayerKV, want: LayerKV, dtype: torch.dtype) -> None:
    """Everywhere, untouched positions included; keys and scales up to a rounding, int8 values up to
    a tie."""
    for x, y in zip(tensors(got), tensors(want), strict=True):
        if x.dtype == torch.int8:
            assert (x.int() - y.int()).abs().max() <= 1
            assert (x != y).float().mean() < 0.01
        else:
            eps = torch.finfo(dtype if x.dtype == dtype else torch.float32).eps
            torch.testing.assert_close(x.float(), y.float(), rtol=eps, atol=2e-6, equal_nan=True)


def check(
    heads: int,
    kv_heads: int,
    dh: int,
    capacity: int,
    starts: list[int],
    dtype: torch.dtype = torch.float32,
    quantized: bool = False,
    garbage: float = math.nan,
    max_length: int | None = None,
    scale: float = 1.0,
) -> None:
    slots = [3, 0, 4, 1][: len(starts)]
    cache = filled_cache(slots, starts, 5, kv_heads, capacity, dh, dtype, quantized, garbage)
    table = rope_table(dh, 640000.0, capacity + 3)
    # Strided rows, and garbage beside them that must not be read.
    qkv = torch.full((len(starts), 1, (heads + 2 * kv_heads) * dh + 16), math.nan, dtype=dtype)[
        ..., :-16
    ]
    qkv[:] = normal(*qkv.shape, dtype=dtype, scale=scale)
    slot, start = torch.tensor(slots), torch.tensor(starts)
    exact_cache, eager_cache = as_float32(cache), LayerKV(*(x.clone() for x in tensors(cache)))
    exact = decode_attention_ref(qkv.float(), table, exact_cache, slot, start, heads)
    eager = decode_attention_ref(qkv, table, eager_cache, slot, start, heads)
    alone_caches = [LayerKV(*(x.clone() for x in tensors(cache))) for _ in starts]
    got = decode_attention(qkv, table, cache, slot, start, heads, max_length or capacity)
    assert got.shape == (len(starts), 1, heads * dh)
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert_as_exact_as_eager(got, eager, exact)
    assert_cache_as(cache, exact_cache, dtype)
    for row, own in enumerate(alone_caches if len(starts) > 1 else []):
        part = slice(row, row + 1)
        alone = decode_attention(
            qkv[part], table, own, slot[part], start[part], heads, max_length or capacity
        )
        assert torch.equal(alone[0], got[row]), "a row depends on its neighbours"
        place = slot[row], slice(None), start[row]
        assert all(
            torch.equal(x[place], y[place])
            for x, y in zip(tensors(own), tensors(cache), strict=True)
        )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1, 2, 4, 8])
@pytest.mark.parametrize(("capacity", "garbage"), [(11, 1e30), (37, math.nan)])
def test_rows_of_different_lengths(capacity, garbage, share, dtype, quantized):
    garbage = min(garbage, 6e4) if dtype == torch.float16 and not quantized else garbage
    starts = [0, capacity - 1, capacity * 2 // 3]
    check(share, 1, 16, capacity, starts, dtype, quantized, garbage)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("capacity", "heads", "kv_heads", "dh"),
    [
        (11, 64, 64, 16),
        (16, 4, 2, 64),
        (12, 6, 3, 24),
        (9, 2, 1, 128),
        (90, 4, 2, 64),
        (50, 6, 3, 24),
        (40, 5, 5, 2),
    ],
)
def test_heads_of_any_width(capacity, heads, kv_heads, dh, dtype, quantized):
    check(heads, kv_heads, dh, capacity, [capacity // 2, capacity - 1], dtype, quantized)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capacity", "garbage"), [(201, 6e4), (700, math.nan)])
def test_split_rows_of_different_lengths(capacity, garbage, dtype, quantized):
    check(4, 1, 16, capacity, [0, capacity - 1, capacity * 2 // 3], dtype, quantized, garbage)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_published_backbone(quantized):
    """32/8 heads x 128, split and whole."""
    check(32, 8, 128, 300, [211], quantized=quantized)
    check(32, 8, 128, 40, [33, 39], torch.float16, quantized)


@pytest.mark.parametrize(
    ("start", "capacity"),
    [
        (0, 40),
        (31, 40),
        (32, 40),
        (33, 64),
        (63, 64),
        (31, 200),
        (127, 200),
        (128, 200),
        (2047, 2050),
        (2048, 2050),
        (8191, 8192),
    ],
)
def test_positions_at_the_edges_of_blocks_and_parts(start, capacity):
    check(2, 1, 16, capacity, [start])


@pytest.mark.parametrize("max_length", [50, 100, 1000, 5000])
@pytest.mark.parametrize("quantized", [False, True])
def test_max_length_only_changes_how_the_work_is_split(max_length, quantized):
    check(2, 1, 16, 400, [49], quantized=quantized, max_length=max_length)


def test_large_scores_do_not_overflow():
    check(2, 1, 16, 100, [90], scale=100.0)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("capacity", "max_length"), [(8, 8), (40, 40), (40, 200)])
@pytest.mark.parametrize(("start", "positions"), [(0, 0), (0, 50), (7, 7), (-1, 50), (2**32, 50)])
def test_a_position_that_does_not_exist_is_not_written(
    start, positions, capacity, max_length, quantized
):
    """Of the cache (slot 1 begins where slot 0 ends), of the table, before both, and beyond 32
    bits."""
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
        torch.testing.assert_close(x[:2], y[:2], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(x[2, :, 1:], y[2, :, 1:], rtol=0, atol=0, equal_nan=True)
    if positions:
        alone = decode_attention_ref(rows[1:], table, cache, slot[1:], starts[1:], 2)
        torch.testing.assert_close(got[1:], alone, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape(data):
    share, kv_heads, rows = (data.draw(st.integers(1, limit)) for limit in (5, 3, 3))
    dh, capacity = data.draw(st.sampled_from([2, 8, 12, 16, 40])), data.draw(st.integers(1, 100))
    starts = data.draw(st.lists(st.integers(0, capacity - 1), min_size=rows, max_size=rows))
    check(share * kv_heads, kv_heads, dh, capacity, starts, quantized=data.draw(st.booleans()))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("capacity", [12, 40])
def test_steps_store_what_a_prefill_stores(capacity, quantized):
    """And into a cache whose heads lie beside each other: [B, S, Hkv, Dh] in memory."""
    qkv, table, slot = normal(1, 10, 6 * 16), rope_table(16, 640000.0, 40), torch.tensor([1])
    caches = []
    for _ in range(2):
        shape = (2, capacity, 2, 16)
        k, v = (
            torch.zeros(shape, dtype=torch.int8 if quantized else torch.float32).transpose(1, 2)
            for _ in range(2)
        )
        caches.append(
            LayerKV(k, v, *([torch.zeros(2, 2, capacity) for _ in range(2)] if quantized else []))
        )
    rope_append(qkv, table, caches[0], slot, torch.tensor([0]), heads=2)
    for t in range(10):
        decode_attention(qkv[:, t : t + 1], table, caches[1], slot, torch.tensor([t]), 2, capacity)
    for at_once, one_by_one in zip(tensors(caches[0]), tensors(caches[1]), strict=True):
        assert torch.equal(at_once, one_by_one)
        assert at_once[1].count_nonzero() > 0
        assert at_once[0].count_nonzero() == 0


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("capacity", [8, 40])
def test_heads_of_zeros(capacity, quantized):
    """Their int8 scale is 0, by which nothing may be divided."""
    cache = filled_cache([0], [5], 1, 1, capacity, 16, quantized=quantized)
    qkv, table = torch.zeros(1, 1, 4 * 16), rope_table(16, 640000.0, capacity)
    got = decode_attention(qkv, table, cache, torch.tensor([0]), torch.tensor([5]), 2, capacity)
    want = cache.read(0, 6, torch.float32)[1].mean(2)
    torch.testing.assert_close(got.view(1, 2, 16), want.expand(1, 2, 16))


@pytest.mark.parametrize(
    ("capacity", "launches"), [(SPLITS[0][0], 1), (11, 1), (SPLITS[0][0] + 1, 2), (4000, 2)]
)
def test_launches(monkeypatch, capacity, launches):
    launched = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    kernels = [name for name in vars(module) if name.endswith("_kernel")]
    assert len(kernels) == 3
    for name in kernels:
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    check(2, 1, 16, capacity, [3])
    assert len(launched) == launches


def test_arguments_that_do_not_match_are_refused():
    cache, table = filled_cache([0], [4], 1, 2, 20, 16), rope_table(16, 640000.0, 20)
    qkv, one = normal(1, 1, 8 * 16), torch.tensor([0])
    with pytest.raises(ValueError, match="as many slots"):
        decode_attention(qkv, table, cache, torch.tensor([0, 0]), one, 4, 20)
    with pytest.raises(ValueError, match="width 128"):
        decode_attention(qkv, table, cache, one, one, 3, 20)
    with pytest.raises(ValueError, match="one position a row"):
        decode_attention(normal(1, 2, 8 * 16), table, cache, one, one, 4, 20)
    with pytest.raises(ValueError, match="does not take"):
        decode_attention(qkv.half(), table, cache, one, one, 4, 20)
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(qkv.repeat_interleave(2, dim=2)[..., ::2], table, cache, one, one, 4, 20)
