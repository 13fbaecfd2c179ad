"""The attention kernels under Triton's interpreter against the references in float32."""

import pytest
import torch
from helpers import assert_as_exact_as_eager, normal, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels import attention as module
from mimo_fast.kernels.attention import rotary_attention, rotary_attention_ref
from mimo_fast.kernels.rope import rope, rope_table
from mimo_fast.kernels.window_attention import window_attention, window_attention_ref

# n, t, heads, kv_heads, dh
SHAPES = [(2, 4, 64, 64, 16), (1, 11, 64, 64, 16), (1, 1, 4, 4, 16), (3, 3, 6, 2, 8)]
SHAPES += [(1, 7, 3, 1, 24), (1, 16, 2, 1, 128), (0, 4, 2, 2, 16)]
pytestmark = pytest.mark.usefixtures("poisoned")


def as_exact_as_eager(operation, reference, tensors: list[Tensor], *rest) -> Tensor:
    """The operation's result, if it is as exact as the reference in the tensors' dtype."""
    got = operation(*tensors, *rest)
    exact = reference(*(x.float() for x in tensors), *rest)
    assert_as_exact_as_eager(got, reference(*tensors, *rest), exact)
    return got


def projected(n: int, t: int, heads: int, kv_heads: int, dh: int, dtype=torch.float32) -> Tensor:
    """Rows of a wider buffer, whose rest must not be read."""
    width = (heads + 2 * kv_heads) * dh
    qkv = torch.full((n, t, width + 8), torch.nan, dtype=dtype)[..., :width]
    return qkv.copy_(normal(n, t, width, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_attention(shape, causal, dtype):
    n, t, heads, kv_heads, dh = shape
    qkv, table = projected(n, t, heads, kv_heads, dh, dtype), rope_table(dh, 640000.0, t + 2)
    if n:
        rest = table, heads, kv_heads, causal
        got = as_exact_as_eager(rotary_attention, rotary_attention_ref, [qkv], *rest)
    else:
        got = rotary_attention(qkv, table, heads, kv_heads, causal)
    assert got.shape == (n, t, heads * dh)
    assert got.is_contiguous()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rotary_attention_of_any_shape(data):
    share, kv_heads, n = (data.draw(st.integers(1, limit)) for limit in (5, 3, 2))
    t, dh = data.draw(st.integers(1, 18)), data.draw(st.sampled_from([2, 8, 12, 16, 40]))
    qkv, table = projected(n, t, share * kv_heads, kv_heads, dh), rope_table(dh, 640000.0, t)
    rest = table, share * kv_heads, kv_heads, data.draw(st.booleans())
    as_exact_as_eager(rotary_attention, rotary_attention_ref, [qkv], *rest)


def test_short_sequences_take_one_launch_and_long_ones_torchs_attention(monkeypatch, grids_of):
    launched = grids_of(module, "rotary_attention_kernel")
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
    refuses("must all be", window_attention, q, k, v, 1, 1)
    with pytest.raises(ValueError, match="do not go together"):
        rotary_attention(projected(1, 4, 3, 2, 16), rope_table(16, 640000.0, 4), 3, 2, causal=True)
    with pytest.raises(ValueError, match="do not go together"):
        rotary_attention(projected(1, 4, 2, 2, 16), rope_table(16, 640000.0, 3), 2, 2, causal=True)
    qkv, table = normal(1, 4, 192)[..., ::2], rope_table(16, 640000.0, 4)
    refuses("contiguous", rotary_attention, qkv, table, 2, 2, causal=True)


@pytest.mark.parametrize(("left", "right"), [(40, 10), (0, 0), (0, 70), (500, 500)])
@pytest.mark.parametrize(("t", "heads"), [(1, 2), (31, 2), (64, 2), (100, 2), (120, 16)])
def test_window_attention(t, heads, left, right, dtype):
    qkv = [normal(t, heads, 16, seed=i, dtype=dtype).transpose(0, 1) for i in range(3)]
    got = as_exact_as_eager(window_attention, window_attention_ref, qkv, left, right)
    assert got.transpose(0, 1).is_contiguous()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 120), st.integers(0, 90), st.integers(0, 90), st.sampled_from([4, 8, 16, 20]))
def test_any_window(t, left, right, dh):
    qkv = [normal(1, t, dh, seed=i) for i in range(3)]
    as_exact_as_eager(window_attention, window_attention_ref, qkv, left, right)
