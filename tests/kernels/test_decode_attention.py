"""Steps over a cache against a float64 softmax over everything fed, and the cost of int8."""

import math

import pytest
import torch
from helpers import assert_rounded, normal, refuses
from torch import Tensor

from mimo_fast.kernels.decode_attention import decode_attention
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope_append, rope_table


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """x [T, H, Dh] -> float64: halves, as complex numbers, rotated by each position's angles."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = table.double()[:, positions, None]
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((product.real, product.imag), dim=-1)


def oracle(fed: Tensor, table: Tensor, heads: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Output [H Dh] float64 of the last row fed [T, (H + 2 Hkv) Dh]; keys are rounded to dtype."""
    parts = heads, kv_heads, kv_heads
    q, k, v = fed.unflatten(-1, (sum(parts), -1)).split(parts, dim=1)
    positions = torch.arange(len(fed))
    query = rotated(q[-1:], table, positions[-1:])[0].to(dtype).double()
    keys = rotated(k, table, positions).to(dtype).double()
    rows = []
    for head in range(heads):
        own = head // (heads // kv_heads)
        scores = keys[:, own] @ query[head] / math.sqrt(query.shape[-1])
        rows.append(scores.softmax(0) @ v[:, own].double())
    return torch.cat(rows)


def empty_cache(b: int, kv_heads: int, capacity: int, dh: int, dtype, garbage) -> LayerKV:
    shape = b, kv_heads, capacity, dh
    return LayerKV(*(torch.full(shape, garbage, dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_rows_at_lengths_of_their_own(heads, kv_heads, dtype, garbage):
    """Prefilled to 0, 17 and 36 of 40 positions, then three steps together."""
    slots, starts, dh = [3, 0, 4], [0, 17, 36], 16
    cache, table = empty_cache(5, kv_heads, 40, dh, dtype, garbage), rope_table(dh, 640000.0, 40)
    width = (heads + 2 * kv_heads) * dh
    fed = [normal(start + 3, width, seed=start).to(dtype) for start in starts]
    for slot, start, rows in zip(slots, starts, fed, strict=True):
        if start:
            one = torch.tensor([slot])
            rope_append(rows[None, :start], table, cache, one, torch.tensor([0]), heads)
    for step in range(3):
        newest = [rows[start + step] for start, rows in zip(starts, fed, strict=True)]
        qkv = torch.stack(newest)[:, None]
        places = torch.tensor(slots), torch.tensor(starts) + step
        got = decode_attention(qkv, table, cache, *places, heads, 40)
        assert (got.shape, got.dtype) == ((3, 1, heads * dh), dtype)
        for row, (start, rows) in enumerate(zip(starts, fed, strict=True)):
            want = oracle(rows[: start + step + 1], table, heads, kv_heads, dtype)
            # Keys and probabilities may fall to the other side of a rounding.
            noise = 4 * torch.finfo(dtype).eps + (2e-5 if dtype == torch.float32 else 0)
            assert_rounded(got[row, 0], want, noise=noise)
    unused = cache.k[[1, 2]]
    blank = torch.full_like(unused, garbage)
    torch.testing.assert_close(unused, blank, rtol=0, atol=0, equal_nan=True)


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    qkv, table = normal(2, 1, 8 * 16), rope_table(16, 640000.0, 20)
    slots, starts = torch.tensor([1, 0]), torch.tensor([5, 12])

    def filled() -> LayerKV:
        return LayerKV(normal(2, 2, 20, 16), normal(2, 2, 20, 16, seed=1))

    together = decode_attention(qkv, table, filled(), slots, starts, 4, 20)
    for row in range(2):
        part = slice(row, row + 1)
        alone = decode_attention(qkv[part], table, filled(), slots[part], starts[part], 4, 20)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("start", "positions"), [(8, 20), (-1, 20), (5, 5)])
def test_a_position_that_does_not_exist_gives_zero_and_is_not_written(start, positions):
    cache = empty_cache(2, 1, 8, 16, torch.float32, 7.0)
    one = torch.tensor([0])
    table = rope_table(16, 640000.0, positions)
    got = decode_attention(normal(1, 1, 4 * 16), table, cache, one, torch.tensor([start]), 2, 8)
    assert got.abs().max() == 0
    assert (cache.k == 7).all()
    assert (cache.v == 7).all()


def steps_of(cache: LayerKV, fed: Tensor, heads: int) -> Tensor:
    """The last step's output after a prefill of the others."""
    table, zero = rope_table(cache.k.shape[3], 640000.0, cache.capacity), torch.tensor([0])
    rope_append(fed[None, :-1], table, cache, zero, zero, heads)
    last = zero + len(fed) - 1
    return decode_attention(fed[None, -1:], table, cache, zero, last, heads, cache.capacity)


def test_int8_keys_and_values_cost_about_a_percent():
    """The step absmax / 127, about 3 / 127, is an error of 0.7% of a value's deviation."""
    heads, kv_heads, dh, length = 32, 8, 128, 500
    fed = normal(length, (heads + 2 * kv_heads) * dh)
    shape = (1, kv_heads, length, dh)
    exact = steps_of(LayerKV(torch.empty(shape), torch.empty(shape)), fed, heads)
    stored = [torch.empty(shape, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full(shape[:3], math.nan) for _ in range(2)]
    cache = LayerKV(*stored, *scales)
    got = steps_of(cache, fed, heads)
    error = float((got - exact).norm() / exact.norm())
    # Values and probabilities are each off by 0.7%, independently.
    assert 0.005 < error < 0.012
    # Exactly what attention to the dequantized cache gives.
    k, v = cache.read(0, length, torch.float32)
    last = fed[-1:, : heads * dh].unflatten(-1, (heads, dh))
    q = rotated(last, rope_table(dh, 640000.0, length), torch.tensor([length - 1]))
    keys, values = (x[0].double().repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    scores = (keys @ q[0, :, :, None])[..., 0] / math.sqrt(dh)
    want = (scores.softmax(-1)[:, None] @ values).flatten()
    assert_rounded(got[0, 0], want, noise=1e-5)


def test_arguments_that_do_not_match_are_refused():
    cache = empty_cache(1, 2, 20, 16, torch.float32, 0.0)
    table = rope_table(16, 640000.0, 20)
    row, one = normal(1, 1, 128), torch.tensor([0])
    for match, qkv, slots, heads in (
        ("as many slots", row, torch.tensor([0, 0]), 4),
        ("width 128", row, one, 3),
        ("one position a row", normal(1, 2, 128), one, 4),
        ("equal shares", normal(1, 1, 112), one, 3),
        ("does not take", row.bfloat16(), one, 4),
        ("contiguous", row.repeat_interleave(2, dim=2)[..., ::2], one, 4),
    ):
        refuses(match, decode_attention, qkv, table, cache, slots, one, heads, 20)
