"""The CUDA kernels' own source, compiled for the CPU, where threads are fibers that go on in an
order which is drawn (fibers.cuh)."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulated import ROOT
from helpers import slow_after
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, dequantize
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format, quantize

ROUNDING = 2.0**-8
"""Of bfloat16, half a unit in the last place."""


HALF = torch.float16


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(
    name: str, rows: int, columns: int, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    vector = random(rows, seed=2, dtype=dtype) if bias else None
    weight = quantize(random(rows, columns, seed=1).float(), Format.parse(name), vector)
    return replace(weight, scales=weight.scales.to(dtype))


def product(
    library, x: Tensor, weight: QuantizedWeight, norm=None, residual=None, swiglu=False, variant=0
) -> Tensor:
    """The kernel's result, in a buffer that holds NaN before, with a row after it that must stay
    so."""
    width = weight.shape[0] // 2 if swiglu else weight.shape[0]
    room = torch.full((len(x) + 1, width), torch.nan, dtype=x.dtype)
    assert not cuda.refuses_form(weight, x.dtype)
    cuda.quantized_mma(x, weight, norm, residual, swiglu, room[:-1], library, variant)
    assert bool(room[-1].isnan().all())
    return room[:-1]


def check(
    x: Tensor,
    weight: QuantizedWeight | Tensor,
    got: Tensor,
    norm=None,
    residual=None,
    swiglu=False,
    bias=None,
) -> None:
    """Within the rounding to bfloat16 of the result and, with a norm, of x times its weight."""
    if isinstance(weight, QuantizedWeight):
        weight, bias = dequantize(weight), weight.bias
    wide, dense = x.double(), weight.double()
    if norm is not None:
        wide = (
            wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        )
    want = wide @ dense.T + (0 if bias is None else bias.double())
    size = (1e-5 + (norm is not None) * ROUNDING) * (wide.abs() @ dense.abs().T)
    if swiglu:
        (gate, up), (gate_size, up_size) = want.chunk(2, -1), size.chunk(2, -1)
        want = gate / (1 + (-gate).exp()) * up
        size = 1.1 * gate_size * up.abs() + up_size * gate.abs() + gate_size * up_size
    if residual is not None:
        want = want + residual.double()
    excess = (got.double() - want).abs() - size - ROUNDING * want.abs()
    assert bool((excess <= 0).all()), f"exceeds its bound by {excess.max():.3g}"


@pytest.mark.parametrize("dtype", slow_after(1, cuda.DTYPES), ids=str)
@pytest.mark.parametrize("name", slow_after(2, ["int4", "int8", "int4-sym", "int8-g128"]))
@pytest.mark.parametrize("m", [1, 11])
def test_formats(emulated, name, m, dtype):
    x, weight = random(m, 384, dtype=dtype), weight_of(name, 37, 384, dtype=dtype)
    check(x, weight, product(emulated, x, weight))


@pytest.mark.parametrize("name", slow_after(1, ["int4", "int8"]))
@pytest.mark.parametrize("swiglu", [False, True])
def test_norm_and_epilogues(emulated, name, swiglu):
    x, weight = random(3, 256), weight_of(name, 44, 256, bias=True)
    norm, residual = RMSNorm(random(256, seed=3) * 3, 1e-6), random(3, 22 if swiglu else 44, seed=4)
    got = product(emulated, x, weight, norm, residual, swiglu)
    check(x, weight, got, norm, residual, swiglu)


@pytest.mark.parametrize("name", ["int4", "int8", "int8-g128"])
@pytest.mark.slow
def test_every_configuration_gives_the_same_bits(emulated, name):
    """Tiles, queues and the grid differ; the order of a row's sums does not."""
    x, weight, norm = (
        random(9, 384),
        weight_of(name, 44, 384, bias=True),
        RMSNorm(random(384, seed=3), 1e-6),
    )
    want = product(emulated, x, weight, norm, None, True)
    check(x, weight, want, norm, None, True)
    for variant in range(1, emulated.mimo_fast_variants()):
        assert torch.equal(product(emulated, x, weight, norm, None, True, variant), want), variant


@pytest.mark.slow
def test_every_configuration_of_a_wide_weight(emulated):
    """16 warps; columns that no number of warps divides, so that some warps have one unit more."""
    x, weight = random(2, 21 * 128), weight_of("int4", 20, 21 * 128)
    want = product(emulated, x, weight)
    check(x, weight, want)
    for variant in range(1, emulated.mimo_fast_variants()):
        assert torch.equal(product(emulated, x, weight, variant=variant), want), variant


def test_a_row_stride_and_a_norm_that_begins_anywhere(emulated):
    wide = torch.full((3, 132), torch.nan).bfloat16()
    wide[:, :128] = random(3, 128)
    weight, norm = weight_of("int4", 16, 128), RMSNorm(random(129, seed=3)[1:], 1e-6)
    check(wide[:, :128], weight, product(emulated, wide[:, :128], weight, norm), norm)


@pytest.mark.parametrize("name", slow_after(1, ["int4", "int8"]))
def test_a_row_does_not_depend_on_its_neighbours(emulated, name):
    x, weight, norm = random(17, 256), weight_of(name, 32, 256), RMSNorm(random(256, seed=3), 1e-6)
    together = product(emulated, x, weight, norm)
    check(x, weight, together, norm)
    for m in (1, 2, 8, 9):
        assert torch.equal(product(emulated, x[:m], weight, norm), together[:m])
    assert torch.equal(product(emulated, x[5:6], weight, norm), together[5:6])


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_card(emulated):
    """Little shared memory takes rows of x in several chunks, many multiprocessors one tile
    each."""
    x, weight = random(5, 384), weight_of("int4", 40, 384)
    want = product(emulated, x, weight)
    for multiprocessors, shared in ((1, 227 * 1024), (7, 227 * 1024), (3, 16 * 1024)):
        emulated.mimo_fast_set_device(multiprocessors, shared)
        assert torch.equal(product(emulated, x, weight), want)
    emulated.mimo_fast_set_device(2, 4096)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, x, weight)


def test_what_it_refuses(emulated):
    x, weight = random(1, 256, dtype=HALF), weight_of("int4", 8, 256, dtype=HALF)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, x, weight, RMSNorm(random(256, dtype=HALF), 1e-6))
    x, weight = random(257)[1:].view(1, 256), weight_of("int4", 8, 256)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, x, weight)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, random(1, 256), weight, variant=emulated.mimo_fast_variants())


@pytest.mark.parametrize("dtype", slow_after(1, cuda.DTYPES), ids=str)
@pytest.mark.parametrize("name", slow_after(2, ["int4", "int8", "int4-sym", "int8-g128"]))
def test_unpacked_rows_are_the_weight_rounded_once(emulated, name, dtype):
    weight, room = weight_of(name, 21, 384, dtype=dtype), torch.full((10, 384), torch.nan).to(dtype)
    cuda.unpack(weight, 5, room[:9], emulated)
    assert torch.equal(room[:9], dequantize(weight)[5:14].to(dtype))
    assert bool(room[9].isnan().all())


def test_what_it_does_not_take():
    x = random(1, 256)
    for name in ("int4-g64", "int8-g32", "nf4"):
        assert cuda.refuses_form(weight_of(name, 8, 256), x.dtype)
    assert cuda.refuses_form(weight_of("int4", 8, 256), torch.float32)
    assert cuda.refuses_form(weight_of("int4", 8, 256), torch.float16)
    assert cuda.refuses_form(weight_of("int8", 8, 192), x.dtype)
    assert cuda.refuses(weight_of("int4", 8, 256), x.device, x.dtype)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_builds_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As set-up does, for one architecture; it loads, and has the functions that are called."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    monkeypatch.setenv("MIMO_FAST_CUDA_ARCHITECTURES", "90")
    import cuda_build
    from ninja_file import NinjaFile

    nvcc = cuda_build.find_nvcc()
    choice = cuda_build.choose(nvcc)
    assert choice.architectures == ["90"]
    ninja = NinjaFile(tmp_path)
    cuda_build.add_library(ninja, nvcc, choice, "cuda.so")
    assert ninja.run()
    loaded = cuda.declared(ctypes.CDLL(str(tmp_path / "cuda.so")))
    assert cuda.build_of(loaded) == choice.line()
    assert choice.line().startswith(f"built by {choice.compiler} for sm_90; not for sm_80: ")


def test_set_up_leaves_the_library_out_where_none_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import cuda_build

    monkeypatch.setenv("MIMO_FAST_CUDA_ARCHITECTURES", "none")
    assert cuda_build.find_nvcc() is None
    monkeypatch.setattr(
        cuda_build.subprocess,
        "run",
        lambda *_, **__: subprocess.CompletedProcess([], 0, "sm_75\nsm_80\nsm_90\nsm_120\n"),
    )
    monkeypatch.setenv("MIMO_FAST_CUDA_ARCHITECTURES", "90, 103 120")
    assert cuda_build.known_architectures("nvcc") == ["90", "120"]
    monkeypatch.delenv("MIMO_FAST_CUDA_ARCHITECTURES")
    assert cuda_build.known_architectures("nvcc") == ["80", "90", "120"]
