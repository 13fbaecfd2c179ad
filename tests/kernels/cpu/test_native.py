"""The native product: against float64, at odd shapes and for hostile values, and what it leaves to
the other paths."""

import math
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import FORMATS, gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul import cpu as qmatmul_cpu
from mimo_fast.kernels.matmul.product import matmul, matmul_ref
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format, quantize

CPU = Path("/proc/cpuinfo")
TAKEN = ["int4", "int4-g64", "int4-sym", "int4-sym-g64", "int8", "int8-g128", "int8-g32"]

LARGEST_ERROR = {torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Of the largest value: 16 bits of x, or the rounding of the result."""

needs_native = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)


def test_they_are_built_where_they_can_be():
    """Otherwise a build that fails would go unnoticed: it is optional."""
    linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    if linux and shutil.which("g++") and "avx2" in CPU.read_text(encoding="utf-8"):
        assert native.available(), native.state()


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    bias = 0 if weight.bias is None else weight.bias.double()
    return x.double() @ dequantize(weight).double().T + bias


def eager_error(x: torch.Tensor, weight: QuantizedWeight) -> float:
    """Root mean square error of the same product in dense bfloat16."""
    bias = None if weight.bias is None else weight.bias.bfloat16()
    y = torch.nn.functional.linear(x.bfloat16(), dequantize(weight).bfloat16(), bias)
    return float((y.double() - exact(x, weight)).square().mean().sqrt())


@needs_native
@settings(max_examples=60)
@example("int4", 1, 17, 4096, True, torch.float32)
@example("int8", 5, 3, 11008, False, torch.bfloat16)
@given(
    st.sampled_from(TAKEN),
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([128, 256, 640, 1152]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_that_of_its_arithmetic(name, rows, outputs, columns, biased, dtype):
    """Half a step of fixed point for each x, float32 sums of offset products, and the rounding of
    the result."""
    weight = quantize(
        gaussian(outputs, columns),
        Format.parse(name),
        gaussian(1, outputs, 3)[0] if biased else None,
    )
    assert native.takes_weight(weight)
    x = (gaussian(rows, columns, 1) * torch.linspace(-3, 3, columns).exp()).to(dtype)
    y = native.quantized_matmul(x, weight)
    assert y.dtype == dtype
    error = (y.double() - exact(x, weight)).abs()
    block = math.gcd(128, weight.group)
    largest = x.double().abs().unflatten(1, (-1, block)).amax(-1).repeat_interleave(block, 1)
    fixed = (largest / 32512 / 2) @ dequantize(weight).double().abs().T
    offsets = weight.scales.double().repeat_interleave(weight.group, 1) * 2**weight.bits
    sums = x.double().abs() @ offsets.T * 2.0**-21
    rounding = exact(x, weight).abs() * torch.finfo(dtype).eps / 2
    assert bool((error <= 1.01 * (rounding + fixed + sums) + 1e-7).all())


@needs_native
@pytest.mark.parametrize("name", TAKEN)
def test_published_width_beats_dense_bfloat16(name):
    weight = quantize(gaussian(64, 4096), Format.parse(name))
    x = gaussian(4, 4096, 1).bfloat16()
    error = float(
        (native.quantized_matmul(x, weight).double() - exact(x, weight)).square().mean().sqrt()
    )
    assert error <= eager_error(x, weight)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("normed", "swiglu", "added"), [(1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_what_a_layer_does_around_it(name, normed, swiglu, added, dtype):
    """Against float64 all the way; the plain path rounds each step to the dtype."""
    weight = quantize(gaussian(34, 1024), Format.parse(name), gaussian(1, 34, 3)[0])
    x, gain = (gaussian(5, 1024, 1) * 3).to(dtype), gaussian(1, 1024, 4)[0].to(dtype)
    outputs = 17 if swiglu else 34
    residual = gaussian(5, outputs, 5).to(dtype) if added else None
    norm = RMSNorm(gain, 0.1) if normed else None
    wide = x.double()
    if normed:
        wide = wide / (wide.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain.double()
    want = exact(wide, weight)
    if swiglu:
        gate, up = want.chunk(2, -1)
        want = gate * gate.sigmoid() * up
    want = want if residual is None else want + residual.double()
    got = native.quantized_matmul(x, weight, norm, residual, swiglu)
    plain = matmul_ref(x, weight, norm=norm, residual=residual, swiglu=swiglu)
    assert got.shape == plain.shape == (5, outputs)
    scale = float(want.abs().max())
    assert float((got.double() - want).abs().max()) <= LARGEST_ERROR[dtype] * scale
    if dtype == torch.bfloat16:
        assert (got.double() - want).square().mean() <= (plain.double() - want).square().mean()


@needs_native
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_row_does_not_depend_on_its_neighbours(name):
    weight = quantize(gaussian(50, 1024), Format.parse(name), gaussian(1, 50)[0])
    x = gaussian(11, 1024, 1)
    together = native.quantized_matmul(x, weight)
    for count in (1, 2, 3, 4, 7):
        assert torch.equal(native.quantized_matmul(x[:count], weight), together[:count])
    x[3] *= 1e20
    assert torch.equal(native.quantized_matmul(x, weight)[[0, 1, 2, 4]], together[[0, 1, 2, 4]])


@needs_native
def test_integers_are_exact():
    """The extremes of every accumulator: the largest q with the largest x throughout."""
    for name, largest in (("int4-sym", 15), ("int8", 255)):
        weight = quantize(gaussian(8, 11008), Format.parse(name))
        words = torch.full_like(weight.words, -1)
        weight = replace(weight, words=words, scales=torch.ones_like(weight.scales))
        offset = (largest + 1) // 2
        for sign in (1, -1):
            y = native.quantized_matmul(torch.full((3, 11008), float(sign)), weight)
            torch.testing.assert_close(
                y, torch.full((3, 8), sign * 11008.0 * (largest - offset)), rtol=1e-5, atol=0
            )


@needs_native
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_values_at_the_edge_of_float(name):
    weight = quantize(gaussian(5, 256), Format.parse(name))
    clean = gaussian(1, 256, 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = clean.repeat(2, 1)
        x[0, 17] = bad
        y = native.quantized_matmul(x, weight)
        assert not y[0].isfinite().any()
        assert torch.equal(y[1:], native.quantized_matmul(clean, weight))
    assert torch.equal(native.quantized_matmul(torch.zeros(1, 256), weight), torch.zeros(1, 5))
    for tiny in (1e-45, 1e-38, 1e-34):
        y = native.quantized_matmul(torch.full((1, 256), tiny), weight)
        assert bool((y.abs() <= 256 * tiny * float(dequantize(weight).abs().max()) + 1e-36).all())
    huge = native.quantized_matmul(clean * 1e33, weight)
    torch.testing.assert_close(huge, exact(clean * 1e33, weight).float(), rtol=1e-3, atol=1e30)


@needs_native
@pytest.mark.parametrize("shape", [(0, 256), (256,), (2, 3, 256), (2, 0, 256)])
def test_shapes(shape):
    weight = quantize(gaussian(9, 256), Format.parse("int4"))
    x = gaussian(1, 3 * 2 * 256).flatten()[: torch.Size(shape).numel()].view(shape)
    y = matmul(x, weight)
    assert y.shape == (*shape[:-1], 9)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(matmul(strided, weight), y)


@needs_native
def test_what_it_does_not_know_goes_elsewhere(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "quantized_matmul", lambda *args: calls.append(args))
    for name in FORMATS:
        calls.clear()
        weight = quantize(gaussian(32, 128), Format.parse(name))
        matmul(torch.ones(1, 128), weight)
        assert bool(calls) == (name in TAKEN) == native.takes_weight(weight)
    # With AVX-512, torch packs 64 rows at a time.
    weight = quantize(gaussian(64, 128), Format.parse("int4"))
    assert not native.takes_weight(replace(weight, scales=weight.scales.float()))
    assert not native.takes_weight(qmatmul_cpu.pack_for_torch(weight))
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    assert not native.takes_weight(weight)


@needs_native
def test_outputs_are_written_whole_and_nothing_else_is():
    weight = quantize(gaussian(33, 128), Format.parse("int4"))
    x = gaussian(3, 128, 1)
    want = native.quantized_matmul(x, weight)
    for _ in range(20):
        poison = torch.full((3, 33), float("nan"))
        del poison
        assert torch.equal(native.quantized_matmul(x, weight), want)
