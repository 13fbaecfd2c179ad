"""The CUDA wrappers refuse what does not fit before a kernel gets an address."""

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format, quantize

HALF = torch.bfloat16


class Recorder:
    """Stands for the library, and counts the calls that reach it."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def call(*_arguments: object) -> int:
            self.calls += 1
            return 0

        return call


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(HALF)


def arguments(name: str) -> dict[str, Tensor]:
    weight = quantize(random(8, 256).float(), Format.parse(name))
    parts = {"words": weight.words, "scales": weight.scales.to(HALF), "zeros": weight.zeros}
    more = {"bias": random(8), "x": random(3, 256), "norm": random(256)}
    given = parts | more | {"residual": random(3, 4), "y": random(3, 4)}
    return {name: part for name, part in given.items() if part is not None}


def wrong(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dim in range(tensor.ndim):
        yield f"dim {dim} longer", torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim).contiguous()
        yield f"dim {dim} shorter", tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()
        yield f"dim {dim} empty", tensor.narrow(dim, 0, 0)
        yield f"dim {dim} missing", tensor.select(dim, 0).contiguous()
        yield f"dim {dim} twice", torch.stack((tensor, tensor), dim).contiguous()
    for dtype in (torch.float32, torch.float16, torch.int8, torch.int64):
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    yield "on meta", tensor.to("meta")
    yield "every second value", torch.stack((tensor, tensor), -1).contiguous()[..., 0]


def product(kind: str, library: Recorder, given: dict[str, Tensor]) -> None:
    loaded = cast(ctypes.CDLL, library)
    weight = quantize(random(8, 256).float(), Format.parse(kind))
    parts = {name: given.get(name) for name in ("words", "scales", "zeros", "bias")}
    weight = replace(weight, **parts)
    norm, place = RMSNorm(given["norm"], 1e-6), (True, given["y"], loaded)
    cuda.quantized_mma(given["x"], weight, norm, given["residual"], *place)
    cuda.row_tiles(given["x"], weight, norm, given["residual"], *place)
    cuda.quantized_gemm(given["x"], weight, given["residual"], *place)


RIGHT = {("int8", "scales", "dim 1 longer"), ("int8-g128", "scales", "dim 1 shorter")}
"""One format made the other, by a scale a row or a scale a group of 128."""


def refused(kind: str, library: Recorder, given: dict[str, Tensor]) -> bool:
    try:
        product(kind, library, given)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("kind", ["int4", "int4-sym", "int8", "int8-g128"])
def test_products(kind):
    library, right = Recorder(), arguments(kind)
    product(kind, library, right)
    # That with tiles is asked for the room that it takes, too.
    assert library.calls == 4
    for name, value in right.items():
        for change, changed in wrong(value):
            if (kind, name, change) in RIGHT:
                continue
            library.calls = 0
            assert refused(kind, library, right | {name: changed}), f"{name}, {change}"
            # A norm is none of `quantized_gemm`'s, which is called last.
            assert library.calls == 0, f"{name}, {change}"


def test_products_with_a_dense_weight():
    library, right = Recorder(), {name: arguments("int8")[name] for name in ("bias", "x", "norm")}
    right |= {"weight": random(8, 256), "residual": random(3, 4), "y": random(3, 4)}

    def refused(given: dict[str, Tensor]) -> bool:
        norm, loaded = RMSNorm(given["norm"], 1e-6), cast(ctypes.CDLL, library)
        around = (norm, given["residual"], True, given["y"], loaded)
        try:
            cuda.row_tiles(given["x"], given["weight"], *around, bias=given["bias"])
        except ValueError:
            return True
        return False

    assert not refused(right)
    assert library.calls == 2
    for name, value in right.items():
        for change, changed in wrong(value):
            library.calls = 0
            assert refused(right | {name: changed}), f"{name}, {change}"
            assert library.calls == 0, f"{name}, {change}"


def test_an_odd_number_of_rows_has_no_swiglu():
    weight = quantize(random(9, 256).float(), Format.parse("int4"))
    weight = replace(weight, scales=weight.scales.to(HALF))
    loaded = cast(ctypes.CDLL, Recorder())
    with pytest.raises(ValueError, match="SwiGLU of 9 rows"):
        cuda.quantized_gemm(random(3, 256), weight, None, True, random(3, 4), loaded)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_unpacked_rows(kind):
    library = Recorder()
    loaded = cast(ctypes.CDLL, library)
    weight = quantize(random(8, 256).float(), Format.parse(kind))
    weight = replace(weight, scales=weight.scales.to(HALF))
    cuda.unpack(weight, 3, random(5, 256), loaded)
    for start in (-1, 4, 8, 2**40):
        with pytest.raises(ValueError, match="cannot unpack rows"):
            cuda.unpack(weight, start, random(5, 256), loaded)
    for out in (random(5, 128), random(256), random(256, 5).T, random(9, 256)):
        with pytest.raises(ValueError, match="cannot unpack rows"):
            cuda.unpack(weight, 0, out, loaded)
    for out in (random(5, 256).float(), random(5, 256).to("meta")):
        with pytest.raises(ValueError, match=r"the weight|reads"):
            cuda.unpack(weight, 0, out, loaded)
    assert library.calls == 1
