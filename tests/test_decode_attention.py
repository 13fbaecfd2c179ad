"""Steps over a cache against an explicit float64 softmax over all that was fed, and what int8
costs."""

import math

import pytest
import torch
from helpers import assert_rounded
from torch import Tensor

from mimo_fast.kernels.decode_attention import decode_attention
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.rope import rope_append, rope_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """x [T, H, Dh] -> float64, its halves the parts of complex numbers rotated by each position's
    angles."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = table.double()[:, positions, None]
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((product.real, product.imag), dim=-1)


def oracle(fed: Tensor, table: Tensor, heads: int, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Output [H Dh] float64 of the last of the rows fed [T, (H + 2 Hkv) Dh]; keys rounded to dtype
    as in a cache."""
    q, k, v = fed.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
        (heads, kv_heads, kv_heads), dim=1
    )
    positions = torch.arange(len(fed))
    query = rotated(q[-1:], table, positions[-1:])[0].to(dtype).double()
    keys = rotated(k, table, positions).to(dtype).double()
    rows = []
    for head in range(heads):
        own = head // (heads // kv_heads)
        scores = keys[:, own] @ query[head] / math.sqrt(query.shape[-1])
        rows.append(scores.softmax(0) @ v[:, own].double())
    return torch.cat(rows)


def empty_cache(
    b: int, kv_heads: int, capacity: int, dh: int, dtype: torch.dtype, garbage: float
) -> LayerKV:
    return LayerKV(
        *(torch.full((b, kv_heads, capacity, dh), garbage, dtype=dtype) for _ in range(2))
    )


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("garbage", [1e4, math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_rows_at_lengths_of_their_own(heads, kv_heads, dtype, garbage):
    """Prefilled to 0, 17 and 36 of 40 positions, then three steps together."""
    slots, starts, dh = [3, 0, 4], [0, 17, 36], 16
    cache, table = empty_cache(5, kv_heads, 40, dh, dtype, garbage), rope_table(dh, 640000.0, 40)
    fed = [
        gaussian(start + 3, (heads + 2 * kv_heads) * dh, seed=start).to(dtype) for start in starts
    ]
    for slot, start, rows in zip(slots, starts, fed, strict=True):
        if start:
            rope_append(
                rows[None, :start], table, cache, torch.tensor([slot]), torch.tensor([0]), heads
            )
    for step in range(3):
        qkv = torch.stack([rows[start + step] for start, rows in zip(starts, fed, strict=True)])[
            :, None
        ]
        got = decode_attention(
            qkv, table, cache, torch.tensor(slots), torch.tensor(starts) + step, heads, 40
        )
        assert got.shape == (3, 1, heads * dh)
        assert got.dtype == dtype
        for row, (start, rows) in enumerate(zip(starts, fed, strict=True)):
            want = oracle(rows[: start + step + 1], table, heads, kv_heads, dtype)
            # Keys and probabilities may fall to the other side of a rounding.
            noise = 4 * torch.finfo(dtype).eps + (2e-5 if dtype == torch.float32 else 0)
            assert_rounded(got[row, 0], want, noise=noise)
    assert torch.equal(cache.k[[1, 2]], torch.full_like(cache.k[[1, 2]], garbage)) or math.isnan(
        garbage
    )


def test_a_row_alone_gives_what_it_gives_in_a_batch():
    qkv, table = gaussian(2, 1, 8 * 16), rope_table(16, 640000.0, 20)
    slots, starts = torch.tensor([1, 0]), torch.tensor([5, 12])

    def filled() -> LayerKV:
        return LayerKV(gaussian(2, 2, 20, 16), gaussian(2, 2, 20, 16, seed=1))

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
    got = decode_attention(gaussian(1, 1, 4 * 16), table, cache, one, torch.tensor([start]), 2, 8)
    assert got.abs().max() == 0
    assert (cache.k == 7).all()
    assert (cache.v == 7).all()


def steps_of(cache: LayerKV, fed: Tensor, heads: int) -> Tensor:
    """The last step's output after a prefill of the others."""
    table, zero = rope_table(cache.k.shape[3], 640000.0, cache.capacity), torch.tensor([0])
    rope_append(fed[None, :-1], table, cache, zero, zero, heads)
    return decode_attention(
        fed[None, -1:], table, cache, zero, zero + len(fed) - 1, heads, cache.capacity
    )


def test_int8_keys_and_values_cost_about_a_percent():
    """Gaussian heads of 128: a step of absmax / 127, about 3 / 127, is an error of 0.7% of a
    value's deviation."""
    heads, kv_heads, dh, length = 32, 8, 128, 500
    fed = gaussian(length, (heads + 2 * kv_heads) * dh)
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
    cache, table, one = (
        empty_cache(1, 2, 20, 16, torch.float32, 0.0),
        rope_table(16, 640000.0, 20),
        torch.tensor([0]),
    )
    with pytest.raises(ValueError, match="as many slots"):
        decode_attention(gaussian(1, 1, 128), table, cache, torch.tensor([0, 0]), one, 4, 20)
    with pytest.raises(ValueError, match="width 128"):
        decode_attention(gaussian(1, 1, 128), table, cache, one, one, 3, 20)
    with pytest.raises(ValueError, match="one position a row"):
        decode_attention(gaussian(1, 2, 128), table, cache, one, one, 4, 20)
    with pytest.raises(ValueError, match="equal shares"):
        decode_attention(gaussian(1, 1, 112), table, cache, one, one, 3, 20)
    with pytest.raises(ValueError, match="does not take"):
        decode_attention(gaussian(1, 1, 128).bfloat16(), table, cache, one, one, 4, 20)
