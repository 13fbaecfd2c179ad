"""Attention of a prompt under Triton's interpreter, against the reference on its real rows."""

import math

import pytest
import torch
from caches import as_float32, filled_cache
from helpers import assert_as_exact_as_eager, normal, refuses

from mimo_fast.kernels import prefill_attention as op
from mimo_fast.kernels.kv_cache import LayerKV

pytestmark = pytest.mark.usefixtures("poisoned")


def prefill_attention(q, cache, slots, positions):
    """Of one prompt."""
    return op.prefill_attention(q[None], cache, slots[None], positions[None])[0]


def prefill_attention_ref(q, cache, slots, positions):
    return op.prefill_attention_ref(q[None], cache, slots[None], positions[None])[0]


def check(
    heads, kv_heads, dh, rows, start, length, dtype=torch.float32, quantized=False, scale=1.0
) -> None:
    capacity = start + length + 5
    cache = filled_cache([1], [start + length], 3, kv_heads, capacity, dh, dtype, quantized)
    q = torch.full((rows, heads, dh), math.nan, dtype=dtype)
    q[:length] = (normal(length, heads, dh, seed=7) * scale).to(dtype)
    positions = torch.full((rows,), -1)
    positions[:length] = start + torch.arange(length)
    slots = torch.full((rows,), 1)
    got = prefill_attention(q, cache, slots, positions)
    assert (got.shape, got.dtype) == ((rows, heads * dh), dtype)
    assert got[length:].count_nonzero() == 0
    real = slots[:length], positions[:length]
    exact = prefill_attention_ref(q[:length].float(), as_float32(cache), *real)
    eager = prefill_attention_ref(q[:length], cache, *real)
    assert_as_exact_as_eager(got[:length], eager, exact)


@pytest.mark.parametrize(("start", "length"), [(0, 32), (0, 1), (37, 20), (5, 66)])
def test_padded_rows_and_starts(start, length, dtype, quantized):
    rows = 70 if length > 32 else 32
    check(4, 2, 16, rows, start, length, dtype, quantized)


@pytest.mark.parametrize("shape", [(5, 1, 32), (6, 6, 8), (6, 2, 24), (40, 1, 16), (8, 2, 128)])
def test_heads_of_any_width_and_share(shape, dtype):
    check(*shape, 32, 3, 19, dtype)


@pytest.mark.parametrize("rows", [64, 128, 160])
def test_every_size_of_tile(rows, dtype):
    check(4, 1, 16, rows, 40, rows - 3, dtype)


def test_large_scores_do_not_overflow():
    check(2, 1, 16, 32, 30, 32, scale=100.0)


def test_a_row_depends_on_its_position_alone(quantized):
    """Bit for bit, whatever later rows, padding and place in a tile."""
    cache = filled_cache([1], [90], 3, 2, 95, 16, torch.float16, quantized)
    q = normal(64, 4, 16).half()
    slots = torch.full((64,), 1)
    whole = prefill_attention(q, cache, slots, 20 + torch.arange(64))
    padded = torch.where(torch.arange(64) < 41, 20 + torch.arange(64), -1)
    assert torch.equal(prefill_attention(q, cache, slots, padded)[:41], whole[:41])
    later = prefill_attention(q[13:45].contiguous(), cache, slots[:32], 33 + torch.arange(32))
    assert torch.equal(later, whole[13:45])


def test_prompts_of_several_slots_are_each_what_it_is_alone(dtype, quantized):
    """Lengths, starts and slots of their own; one is all padding."""
    cache = filled_cache([0, 2, 1], [70, 90, 40], 3, 2, 95, 16, dtype, quantized)
    q, rows = normal(4, 32, 4, 16).to(dtype), torch.arange(32)
    places = [(0, 38, 32), (2, 70, 20), (1, 9, 1), (1, -1, 0)]
    slots = torch.tensor([[slot] * 32 for slot, _, _ in places])
    positions = torch.stack([(start + rows).where(rows < n, -1) for _, start, n in places])
    together = op.prefill_attention(q, cache, slots, positions)
    for part, got in enumerate(together):
        assert torch.equal(got, prefill_attention(q[part], cache, slots[part], positions[part]))
        assert (got[: places[part][2]] != 0).any(-1).all()
        assert got[places[part][2] :].count_nonzero() == 0


@pytest.mark.parametrize("position", [-1, -(2**33), 40, 2**32])
def test_positions_that_do_not_exist_read_nothing(position):
    """The slot does not exist either."""
    cache = LayerKV(*(torch.full((2, 2, 40, 16), math.nan) for _ in range(2)))
    q = torch.full((32, 4, 16), math.nan)
    got = prefill_attention(q, cache, torch.full((32,), 9), torch.full((32,), position))
    assert got.count_nonzero() == 0


def test_arguments_that_do_not_match_are_refused():
    cache = filled_cache([1], [9], 3, 2, 20, 16)
    q, rows = normal(8, 4, 16), torch.arange(8)
    refuses("do not go with", prefill_attention, q, cache, rows[:7], rows)
    refuses("do not go with", prefill_attention, normal(8, 3, 16), cache, rows, rows)
    refuses("queries are", prefill_attention, q.half(), cache, rows, rows)
    refuses("contiguous", prefill_attention, normal(4, 8, 16).transpose(0, 1), cache, rows, rows)
