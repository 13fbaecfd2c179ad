"""The fused product of many rows of x with a quantized weight: its CUDA source, compiled for the
CPU as in test_cuda_kernels.py."""

import pytest
import torch
from helpers import slow_after
from test_cuda_kernels import ROUNDING, random, weight_of
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize, unpack_words

SMALL = 1
"""The number of the configuration with the smallest tiles: 64 rows of a weight, 16 of x."""


def product(
    library, x: Tensor, weight: QuantizedWeight, residual=None, swiglu=False, variant=SMALL
) -> Tensor:
    """The kernel's result, in a buffer that holds NaN before, with a row after it that must stay
    so."""
    width = weight.shape[0] // 2 if swiglu else weight.shape[0]
    room = torch.full((len(x) + 1, width), torch.nan, dtype=x.dtype)
    assert not cuda.refuses_form(weight, x.dtype)
    assert cuda.gemm_takes(x)
    cuda.quantized_gemm(x, weight, residual, swiglu, room[:-1], library, variant)
    assert bool(room[-1].isnan().all())
    return room[:-1]


def rounded(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight's values as the kernel multiplies them: double [N, K].

    float64 holds each product and sum of these exactly, so each rounding is one.
    """
    q = unpack_words(weight.words, weight.bits, weight.group) - (1 << (weight.bits - 1))
    q, scale = q.double().unflatten(1, (-1, weight.group)), weight.scales.double()[..., None]
    if weight.bits == 8:
        values = q * scale
        return (values.to(dtype) if weight.group == 128 else values).double().flatten(1)
    zero = torch.zeros_like(scale) if weight.zeros is None else weight.zeros.double()[..., None]
    term = ((zero.round() - zero) * scale).to(dtype).double()
    return ((q - zero.round()) * scale + term).to(dtype).double().flatten(1)


def check(x: Tensor, weight: QuantizedWeight, got: Tensor, residual=None, swiglu=False) -> None:
    """Within the rounding of the result, and float32's of its sums."""
    wide, dense = x.double(), rounded(weight, x.dtype)
    want = wide @ dense.T + (0 if weight.bias is None else weight.bias.double())
    size = 1e-6 * (wide.abs() @ dense.abs().T)
    if swiglu:
        (gate, up), (gate_size, up_size) = want.chunk(2, -1), size.chunk(2, -1)
        want = gate / (1 + (-gate).exp()) * up
        size = 1.1 * gate_size * up.abs() + up_size * gate.abs() + gate_size * up_size + 1e-6
    if residual is not None:
        want = want + residual.double()
    excess = (got.double() - want).abs() - size - ROUNDING * want.abs()
    assert bool((excess <= 0).all()), f"exceeds its bound by {excess.max():.3g}"


@pytest.mark.parametrize("dtype", slow_after(1, cuda.DTYPES), ids=str)
@pytest.mark.parametrize("name", slow_after(2, ["int4", "int8", "int4-sym", "int8-g128"]))
def test_formats(emulated, name, dtype):
    x, weight = random(5, 384, dtype=dtype), weight_of(name, 70, 384, dtype=dtype)
    check(x, weight, product(emulated, x, weight))


@pytest.mark.parametrize("dtype", slow_after(1, cuda.DTYPES), ids=str)
def test_values_of_the_weight_are_near_the_exact_ones(dtype):
    """What `check` compares with, against the formula."""
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for name in ("int4", "int4-sym", "int8", "int8-g128"):
        weight = weight_of(name, 40, 384, dtype=dtype)
        step = weight.scales.double().abs()[..., None].expand(-1, -1, weight.group).flatten(1)
        off = (rounded(weight, dtype) - dequantize(weight).double()).abs()
        bound = unit * (1.01 * dequantize(weight).double().abs() + 0.51 * step) + 1e-7
        assert bool((off <= bound).all()), name


@pytest.mark.parametrize("name", slow_after(1, ["int4", "int8"]))
@pytest.mark.parametrize("swiglu", [False, True])
def test_bias_residual_and_swiglu(emulated, name, swiglu):
    x, weight = random(19, 256), weight_of(name, 150, 256, bias=True)
    residual = random(19, 75 if swiglu else 150, seed=4)
    got = product(emulated, x, weight, residual, swiglu)
    check(x, weight, got, residual, swiglu)


@pytest.mark.parametrize("name", ["int4", "int8", "int8-g128"])
@pytest.mark.slow
def test_every_configuration_gives_the_same_bits(emulated, name):
    """Five blocks of columns, so that the queues of both groups go round and are unequal."""
    emulated.mimo_fast_set_device(2, 227 * 1024)
    x, weight = random(18, 640), weight_of(name, 66, 640, bias=True)
    want = product(emulated, x, weight)
    check(x, weight, want)
    for variant in (0, *range(2, emulated.mimo_fast_gemm_variants())):
        assert torch.equal(product(emulated, x, weight, variant=variant), want), variant


def test_one_block_of_columns(emulated):
    """The odd blocks' warps have none."""
    x, weight = random(3, 128), weight_of("int4", 8, 128)
    check(x, weight, product(emulated, x, weight))


@pytest.mark.parametrize("name", slow_after(1, ["int4", "int8"]))
def test_a_row_does_not_depend_on_its_neighbours(emulated, name):
    x, weight = random(33, 256), weight_of(name, 16, 256)
    together = product(emulated, x, weight)
    check(x, weight, together)
    assert torch.equal(product(emulated, x[:17], weight), together[:17])
    assert torch.equal(product(emulated, x[16:32], weight, variant=2), together[16:32])
    assert torch.equal(product(emulated, x[21:22], weight), together[21:22])


def test_a_row_stride(emulated):
    wide = torch.full((3, 136), torch.nan).bfloat16()
    wide[:, :128] = random(3, 128)
    weight = weight_of("int4", 16, 128)
    check(wide[:, :128], weight, product(emulated, wide[:, :128], weight))


def test_zeros_far_from_the_middle(emulated):
    """A group whose values all lie far from zero has a large one."""
    x, weight = random(2, 256), weight_of("int4", 16, 256)
    weight.zeros.add_(torch.linspace(-300, 300, 32).view(16, 2).half())
    dense = dequantize(weight).double()
    got, want = product(emulated, x, weight).double(), x.double() @ dense.T
    size = 1.5 * ROUNDING * (x.double().abs() @ dense.abs().T)
    assert bool(((got - want).abs() <= size + ROUNDING * want.abs()).all())


def test_what_it_refuses(emulated):
    weight = weight_of("int4", 8, 256)
    x = random(8 + 256)[4:260].view(1, 256)
    assert not cuda.gemm_takes(x)
    with pytest.raises(RuntimeError, match="refused"):
        cuda.quantized_gemm(x, weight, None, False, random(1, 8), emulated)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, random(1, 256), weight, variant=emulated.mimo_fast_gemm_variants())
    emulated.mimo_fast_set_device(2, 16 * 1024)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, random(1, 256), weight, variant=3)
