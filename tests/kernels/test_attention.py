"""Each form of attention against an explicit softmax in float64."""

import math

import pytest
import torch
from helpers import assert_rounded, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.kernels.attention import WINDOW_BLOCK, attention, rotary_attention, window_attention
from mimo_fast.kernels.rope import rope, rope_table


def oracle(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """q [N, H, T, Dh], k and v [N, Hkv, S, Dh], visible bool [T, S] -> [N, H, T, Dh] float64."""
    share = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for n in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[n, h // share].double(), v[n, h // share].double()
            scores = q[n, h].double() @ keys.T / math.sqrt(q.shape[-1])
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)
            out[n, h] = scores.softmax(-1) @ values
    return out


def float32_noise(q: Tensor, k: Tensor, v: Tensor) -> float:
    """The output's error if float32 scores are off by a few units of their terms' sum."""
    largest_q, largest_k = (x.double().abs().amax((0, 1, 2)) for x in (q, k))
    magnitude = largest_q @ largest_k / math.sqrt(q.shape[-1])
    return float(4 * 2.0**-24 * magnitude * v.abs().max())


def causal_mask(t: int, s: int) -> Tensor:
    return torch.tensor([[key <= s - t + query for key in range(s)] for query in range(t)])


def window_mask(t: int, left: int, right: int) -> Tensor:
    distance = torch.arange(t)[None] - torch.arange(t)[:, None]
    return (distance >= -left) & (distance <= right)


def random_qkv(heads, kv_heads, t, s, dh, n=1, dtype=torch.float32) -> list[Tensor]:
    rng = seeded(heads * 1000 + t * 10 + s)
    shapes = ((n, heads, t, dh), (n, kv_heads, s, dh), (n, kv_heads, s, dh))
    q, k, v = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    return [q * 3, k, v]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 7), (5, 5), (33, 33), (4, 9), (2, 130), (17, 18)])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_softmax(heads, kv_heads, t, s, causal):
    q, k, v = random_qkv(heads, kv_heads, t, s, 16, n=2)
    want = oracle(q, k, v, causal_mask(t, s) if causal else None)
    assert_rounded(attention(q, k, v, causal), want, noise=float32_noise(q, k, v))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s"), [(9, 9), (3, 20), (1, 20)])
def test_attention_in_low_precision(dtype, causal, t, s):
    q, k, v = random_qkv(4, 2, t, s, 32, dtype=dtype)
    want = oracle(q, k, v, causal_mask(t, s) if causal else None)
    got = attention(q, k, v, causal)
    assert got.dtype == dtype
    # The probabilities may be rounded before they weight the values, and the weighted sum after.
    noise = float32_noise(q, k, v) + torch.finfo(dtype).eps * float(v.abs().max())
    assert_rounded(got, want, noise=noise)


def test_causal_attention_cannot_see_the_future():
    q, k, v = random_qkv(4, 2, 6, 10, 16)
    before = attention(q, k, v, causal=True)
    for query in range(6):
        last = 10 - 6 + query
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, last + 1 :], later_v[:, :, last + 1 :] = 1e4, -1e4
        assert_close(attention(q, later_k, later_v, causal=True)[:, :, query], before[:, :, query])
        # The newest visible position does count.
        seen = v.clone()
        seen[:, :, last] += 100
        change = attention(q, k, seen, causal=True) - before
        assert change[:, :, query].abs().max() > 1e-3


def test_query_heads_share_key_value_heads_in_blocks():
    """Head h reads key/value head h // (H / Hkv)."""
    q, k, v = torch.randn(1, 6, 1, 4), torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)
    got = attention(q, k, v, causal=True)
    assert torch.equal(got[0, :, 0], v[0, [0, 0, 0, 1, 1, 1], 0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("t", [1, 4, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary_attention_turns_queries_and_keys(heads, kv_heads, t, causal):
    rng = seeded(t)
    qkv = torch.randn(2, t, (heads + 2 * kv_heads) * 16, generator=rng)
    table = rope_table(16, 640000.0, t + 3)
    q, k, v = qkv.unflatten(-1, (-1, 16)).split((heads, kv_heads, kv_heads), dim=2)
    q, k = (rope(x, table[:, :t]) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    want = oracle(q, k, v, causal_mask(t, t) if causal else None).transpose(1, 2).flatten(2)
    got = rotary_attention(qkv, table, heads, kv_heads, causal)
    assert_rounded(got, want, noise=float32_noise(q, k, v))


def test_rotary_attention_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="do not go together"):
        rotary_attention(torch.zeros(1, 3, 64), rope_table(16, 10000.0, 2), 2, 1, causal=True)


@pytest.mark.parametrize("t", [1, 2, WINDOW_BLOCK - 1, WINDOW_BLOCK, WINDOW_BLOCK + 1, 300, 700])
@pytest.mark.parametrize("left", [0, 3, 40, 800])
@pytest.mark.parametrize("right", [0, 10, 300, 1000])
def test_window_attention_is_the_masked_softmax(t, left, right):
    q, k, v = random_qkv(2, 2, t, t, 8)
    got = window_attention(q[0], k[0], v[0], left, right)
    assert not got.isnan().any()
    want = oracle(q, k, v, window_mask(t, left, right))
    assert_rounded(got[None], want, noise=float32_noise(q, k, v))


@settings(max_examples=25)
@given(st.integers(1, 2 * WINDOW_BLOCK + 2), st.integers(0, 60), st.integers(0, 60))
def test_any_window(t, left, right):
    q, k, v = random_qkv(1, 1, t, t, 4)
    got = window_attention(q[0], k[0], v[0], left, right)
    want = oracle(q, k, v, window_mask(t, left, right))
    assert_rounded(got[None], want, noise=float32_noise(q, k, v))


def test_window_attention_sees_nothing_outside_its_window():
    q, k, v = random_qkv(2, 2, 600, 600, 8)
    want = window_attention(q[0], k[0], v[0], 40, 10)[:, 300]
    far_k, far_v = k.clone(), v.clone()
    for outside in (slice(0, 260), slice(311, None)):
        far_k[:, :, outside], far_v[:, :, outside] = 1e3, 1e5
    got = window_attention(q[0], far_k[0], far_v[0], 40, 10)[:, 300]
    assert_close(got, want)
