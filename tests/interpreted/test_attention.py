"""The attention kernels under Triton's interpreter against the references on the same inputs, in float32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels import attention as module
from mimo_fast.kernels.attention import attention, attention_ref, decode_attention, decode_attention_ref
from mimo_fast.kernels.window_attention import window_attention, window_attention_ref

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output starts as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(math.nan))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale).to(dtype)


def assert_as_exact_as_eager(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Against float32 on the same inputs: no more than twice what eager 16-bit torch is off by; 1e-5 in float32."""
    assert got.shape == exact.shape
    assert got.dtype == eager.dtype
    assert got.isfinite().all()
    bound = 1e-5 * float(exact.abs().max())
    if got.dtype != torch.float32:
        bound = 2 * float((eager.float() - exact).abs().max())
    assert float((got.float() - exact).abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "t", "s", "dh"),
    [(2, 64, 64, 4, 4, 16), (1, 64, 64, 11, 11, 16), (1, 4, 4, 1, 1, 16), (3, 6, 2, 3, 16, 8), (1, 3, 1, 5, 7, 24),
     (1, 2, 1, 16, 16, 128)],
)
def test_small_attention(n, heads, kv_heads, t, s, dh, causal, dtype):
    q, k, v = (normal(n, h, x, dh, seed=i, dtype=dtype) for i, (h, x) in enumerate(
        ((heads, t), (kv_heads, s), (kv_heads, s))))
    exact = attention_ref(q.float(), k.float(), v.float(), causal)
    assert_as_exact_as_eager(attention(q, k, v, causal), attention_ref(q, k, v, causal), exact)


def test_small_attention_takes_the_strides_of_a_split_projection():
    qkv = normal(3, 4, 12 + 2 * 6, 16)
    q, k, v = (x.transpose(1, 2) for x in qkv.split((12, 6, 6), dim=2))
    got = attention(q, k, v, causal=True)
    assert_as_exact_as_eager(got, got, attention_ref(q, k, v, causal=True))
    assert got.transpose(1, 2).is_contiguous(), "the caller would have to copy to join the heads"


def test_long_attention_is_torchs(monkeypatch):
    monkeypatch.setattr(module, "_small_attention", None)
    q, k, v = (normal(1, 2, 17, 16, seed=i) for i in range(3))
    assert torch.equal(attention(q, k, v, causal=True), attention_ref(q, k, v, causal=True))


def cache(
    slots: list[int], lengths: list[int], b: int, kv_heads: int, capacity: int, dh: int,
    dtype: torch.dtype = torch.float32, garbage: float = math.nan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Keys and values where only what the rows may read is not garbage."""
    filled = []
    for seed in (1, 2):
        x = torch.full((b, kv_heads, capacity, dh), garbage, dtype=dtype)
        for slot, length in zip(slots, lengths, strict=True):
            x[slot, :, :length] = normal(kv_heads, length, dh, seed=seed, dtype=dtype)
        filled.append(x)
    return filled[0], filled[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("capacity", "garbage"), [(11, 1e4), (40, math.nan), (200, 1e4), (700, math.nan)])
def test_decode_attention_reads_each_rows_own_length(capacity, garbage, dtype):
    slots, lengths = [3, 0, 4], [1, capacity, capacity * 2 // 3]
    k, v = cache(slots, lengths, 5, 1, capacity, 32, dtype, garbage)
    q = normal(3, 3, 1, 32, dtype=dtype, scale=3)
    exact = decode_attention_ref(q.float(), k.float(), v.float(), slots, lengths)
    got = decode_attention(q, k, v, torch.tensor(slots), torch.tensor(lengths))
    assert_as_exact_as_eager(got, decode_attention_ref(q, k, v, slots, lengths), exact)
    for row in (0, 2):
        alone = decode_attention(q[row : row + 1], k, v, slots[row : row + 1], lengths[row : row + 1])
        assert torch.equal(alone[0], got[row]), "a row depends on its neighbours"


@pytest.mark.parametrize("length", [1, 33, 2048, 2049, 8191, 8192])
def test_decode_attention_at_the_published_dimensions(length):
    k, v = cache([0], [length], 1, 1, 8192, 128)
    q = normal(1, 4, 1, 128)
    got = decode_attention(q, k, v, [0], [length])
    assert_as_exact_as_eager(got, got, decode_attention_ref(q, k, v, [0], [length]))


def test_decode_attention_of_all_heads_at_once():
    """32/8 heads x 128, strided as the runtime strides them."""
    k, v = cache([1, 0], [300, 77], 2, 8, 320, 128)
    q = normal(2, 1, 48, 128)[:, :, :32].transpose(1, 2)
    got = decode_attention(q, k, v, [1, 0], [300, 77])
    assert_as_exact_as_eager(got, got, decode_attention_ref(q, k, v, [1, 0], [300, 77]))
    assert got.transpose(1, 2).is_contiguous()


def test_max_length_only_changes_how_the_work_is_split():
    k, v = cache([0], [50], 1, 1, 2000, 16)
    q = normal(1, 2, 1, 16)
    want = decode_attention_ref(q, k, v, [0], [50])
    for bound in (50, 100, 1000):
        got = decode_attention(q, k, v, [0], [50], max_length=bound)
        assert_as_exact_as_eager(got, got, want)


@pytest.mark.parametrize("capacity", [11, 64, 600])
def test_a_row_of_length_zero_gives_zero(capacity):
    k, v = cache([], [], 1, 2, capacity, 16)
    assert decode_attention(normal(1, 4, 1, 16), k, v, [0], [0]).abs().max() == 0


def test_large_scores_do_not_overflow():
    k, v = cache([0], [90], 1, 1, 100, 16)
    got = decode_attention(normal(1, 2, 1, 16, scale=1e3), k * 100, v, [0], [90])
    assert got.isfinite().all()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_decode_attention_of_any_shape(data):
    share, kv_heads, rows, slots = (data.draw(st.integers(1, limit)) for limit in (5, 2, 2, 3))
    dh, capacity = data.draw(st.sampled_from([4, 8, 16, 24, 40])), data.draw(st.integers(1, 100))
    lengths = data.draw(st.lists(st.integers(1, capacity), min_size=rows, max_size=rows))
    chosen = data.draw(st.lists(st.integers(0, slots - 1), min_size=rows, max_size=rows))
    k, v = (normal(slots, kv_heads, capacity, dh, seed=i) for i in range(2))
    q = normal(rows, share * kv_heads, 1, dh)
    got = decode_attention(q, k, v, chosen, lengths)
    assert_as_exact_as_eager(got, got, decode_attention_ref(q, k, v, chosen, lengths))


def test_arguments_that_do_not_match_are_refused():
    k, v = cache([0], [20], 1, 2, 20, 16)
    q = normal(1, 4, 1, 16)
    with pytest.raises(ValueError, match="slots"):
        decode_attention(q, k, v, [0, 0], [4])
    with pytest.raises(ValueError, match="do not go with"):
        decode_attention(normal(1, 3, 1, 16), k, v, [0], [4])
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, [0], [4])
    with pytest.raises(ValueError, match="one shape"):
        window_attention(q[0], k[0], v[0], 1, 1)


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
