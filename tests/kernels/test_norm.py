"""Norms against float64, at odd widths and in low precision."""

import pytest
import torch
from helpers import assert_rounded, seeded

from mimo_fast.kernels.norm import layer_norm, rms_norm

NOISE = 1e-6


def inputs(shape: tuple[int, ...], dtype, scale=1.0, mean=0.0) -> list[torch.Tensor]:
    rng = seeded(shape[-1])
    x = torch.randn(shape, generator=rng) * scale + mean
    weight, bias = (torch.randn(shape[-1], generator=rng) for _ in range(2))
    return [x.to(dtype), weight.to(dtype), bias.to(dtype)]


def wide_rms_norm(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def wide_layer_norm(x, weight, bias, eps):
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return wide_rms_norm(centred, weight, eps) + bias.double()


@pytest.mark.parametrize("shape", [(3, 64), (1, 1), (2, 5, 37), (4096,), (7, 1283)])
@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_rms_norm(dtype, shape, eps):
    x, weight, _ = inputs(shape, dtype)
    got = rms_norm(x, weight, eps)
    assert got.dtype == dtype
    # Once before the weight, as Qwen2 does, and once after.
    assert_rounded(got, wide_rms_norm(x, weight, eps), roundings=2, noise=NOISE)


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 37), (1280,), (7, 257)])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_layer_norm(dtype, shape, mean):
    x, weight, bias = inputs(shape, dtype, mean=mean)
    got = layer_norm(x, weight, bias, 1e-5)
    assert got.dtype == dtype
    assert_rounded(got, wide_layer_norm(x, weight, bias, 1e-5), noise=5 * NOISE)


@pytest.mark.parametrize(("low", "scale"), [(torch.float16, 2000.0), (torch.bfloat16, 3e4)])
def test_low_precision_statistics_are_float32(low, scale):
    """Squares overflow float16, and means of 4096 bfloat16 values lose all digits."""
    x, weight, bias = inputs((2, 4096), low, scale=scale)
    want = wide_rms_norm(x, weight, 0)
    assert_rounded(rms_norm(x, weight, 1e-6), want, roundings=2, noise=5 * NOISE)
    want = wide_layer_norm(x, weight, bias, 0)
    assert_rounded(layer_norm(x, weight, bias, 1e-5), want, roundings=2, noise=5 * NOISE)


def test_zero_rows_stay_finite():
    x, weight, bias = torch.zeros(2, 8), torch.ones(8), torch.full((8,), 3.0)
    assert torch.equal(rms_norm(x, weight, 1e-6), x)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), x + 3)


def test_rows_are_independent():
    x, weight, bias = inputs((5, 33), torch.float32)
    assert torch.equal(rms_norm(x, weight, 1e-6)[2], rms_norm(x[2], weight, 1e-6))
    assert torch.equal(layer_norm(x, weight, bias, 1e-6)[2], layer_norm(x[2], weight, bias, 1e-6))
