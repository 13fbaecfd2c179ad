"""The attention kernels under Triton's interpreter against the references on the same inputs, in
float32."""

import math

import pytest
import torch
from helpers import assert_as_exact_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels import attention as module
from mimo_fast.kernels.attention import rotary_attention, rotary_attention_ref
from mimo_fast.kernels.rope import rope, rope_table
from mimo_fast.kernels.window_attention import window_attention, window_attention_ref

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(math.nan)
    )


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    ).to(dtype)


def projected(
    n: int, t: int, heads: int, kv_heads: int, dh: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of a wider buffer, whose rest must not be read."""
    width = (heads + 2 * kv_heads) * dh
    qkv = torch.full((n, t, width + 8), math.nan, dtype=dtype)[..., :width]
    return qkv.copy_(normal(n, t, width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "t", "heads", "kv_heads", "dh"),
    [
        (2, 4, 64, 64, 16),
        (1, 11, 64, 64, 16),
        (1, 1, 4, 4, 16),
        (3, 3, 6, 2, 8),
        (1, 7, 3, 1, 24),
        (1, 16, 2, 1, 128),
        (0, 4, 2, 2, 16),
    ],
)
def test_rotary_attention(n, t, heads, kv_heads, dh, causal, dtype):
    qkv, table = projected(n, t, heads, kv_heads, dh, dtype), rope_table(dh, 640000.0, t + 2)
    got = rotary_attention(qkv, table, heads, kv_heads, causal)
    assert got.shape == (n, t, heads * dh)
    assert got.is_contiguous()
    if n:
        exact = rotary_attention_ref(qkv.float(), table, heads, kv_heads, causal)
        assert_as_exact_as_eager(
            got, rotary_attention_ref(qkv, table, heads, kv_heads, causal), exact
        )


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rotary_attention_of_any_shape(data):
    share, kv_heads, n = (data.draw(st.integers(1, limit)) for limit in (5, 3, 2))
    t, dh = data.draw(st.integers(1, 18)), data.draw(st.sampled_from([2, 8, 12, 16, 40]))
    qkv, table = projected(n, t, share * kv_heads, kv_heads, dh), rope_table(dh, 640000.0, t)
    causal = data.draw(st.booleans())
    got = rotary_attention(qkv, table, share * kv_heads, kv_heads, causal)
    assert_as_exact_as_eager(
        got, got, rotary_attention_ref(qkv, table, share * kv_heads, kv_heads, causal)
    )


def test_short_sequences_take_one_launch_and_long_ones_torchs_attention(monkeypatch):
    launched, kernel = [], module.rotary_attention_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "rotary_attention_kernel", Counted())
    monkeypatch.setattr(module, "rope", None)
    rotary_attention(projected(2, 4, 64, 64, 16), rope_table(16, 640000.0, 4), 64, 64, causal=False)
    assert launched == [(2, 8)]
    monkeypatch.setattr(module, "rope", rope)
    qkv, table = projected(1, 17, 2, 1, 16), rope_table(16, 640000.0, 17)
    want = rotary_attention_ref(qkv, table, 2, 1, causal=True)
    assert torch.equal(rotary_attention(qkv, table, 2, 1, causal=True), want)
    assert len(launched) == 1


def test_large_scores_do_not_overflow():
    qkv, table = projected(1, 9, 2, 1, 16) * 1e4, rope_table(16, 640000.0, 9)
    assert rotary_attention(qkv, table, 2, 1, causal=True).isfinite().all()


def test_arguments_that_do_not_match_are_refused():
    q, k, v = (normal(2, x, 16) for x in (5, 5, 6))
    with pytest.raises(ValueError, match="must all be"):
        window_attention(q, k, v, 1, 1)
    with pytest.raises(ValueError, match="do not go together"):
        rotary_attention(projected(1, 4, 3, 2, 16), rope_table(16, 640000.0, 4), 3, 2, causal=True)
    with pytest.raises(ValueError, match="do not go together"):
        rotary_attention(projected(1, 4, 2, 2, 16), rope_table(16, 640000.0, 3), 2, 2, causal=True)
    with pytest.raises(ValueError, match="contiguous"):
        rotary_attention(
            normal(1, 4, 192)[..., ::2], rope_table(16, 640000.0, 4), 2, 2, causal=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(40, 10), (0, 0), (0, 70), (500, 500)])
@pytest.mark.parametrize("t", [1, 31, 64, 100])
def test_window_attention(t, left, right, dtype):
    q, k, v = (normal(t, 2, 16, seed=i, dtype=dtype).transpose(0, 1) for i in range(3))
    exact = window_attention_ref(q.float(), k.float(), v.float(), left, right)
    got = window_attention(q, k, v, left, right)
    assert_as_exact_as_eager(got, window_attention_ref(q, k, v, left, right), exact)


def test_window_attention_of_the_vocoder():
    q, k, v = (normal(120, 16, 16, seed=i).transpose(0, 1) for i in range(3))
    got = window_attention(q, k, v, 40, 10)
    assert_as_exact_as_eager(got, got, window_attention_ref(q, k, v, 40, 10))
    assert got.transpose(0, 1).is_contiguous()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 120), st.integers(0, 90), st.integers(0, 90), st.sampled_from([4, 8, 16, 20]))
def test_any_window(t, left, right, dh):
    q, k, v = (normal(1, t, dh, seed=i) for i in range(3))
    got = window_attention(q, k, v, left, right)
    assert_as_exact_as_eager(got, got, window_attention_ref(q, k, v, left, right))
