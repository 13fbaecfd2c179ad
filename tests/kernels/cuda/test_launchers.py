"""What `matmul` does around the CUDA kernels: x of any number of dimensions and any strides."""

import ctypes

import pytest
import torch
from emulated import products_by_cuda
from test_cuda_kernels import random, weight_of
from torch import Tensor

from mimo_fast.kernels.matmul.product import Weight, matmul
from mimo_fast.kernels.norm import RMSNorm

K = 128
MANY = 2, 129, K
"""More rows than the kernel with tiles takes."""
SHAPES = ((K,), (2, 1, K), (3, 4, K), (0, 2, K), MANY)
"""Of x."""

TAKEN = {
    ("int4", False): {"CUDA mma", "CUDA unpack + mm"},
    ("int4", True): {"CUDA mma", "CUDA tiles", "CUDA fused gemm"},
    ("int8", False): {"CUDA mma", "CUDA unpack + mm"},
    ("int8", True): {"CUDA mma", "CUDA tiles", "CUDA unpack + mm"},
    ("dense", True): {"CUDA dense tiles"},
}
"""A weight and whether new paths are on -> what computes products of these shapes."""


def every_second(y: Tensor) -> Tensor:
    """The same values with a gap after each."""
    return torch.stack((y, y), -1)[..., 0]


@pytest.mark.parametrize(("name", "new_paths"), TAKEN)
def test_a_product_has_the_shape_of_x(emulated_cuda: ctypes.CDLL, name: str, new_paths: bool):
    bias, norm = random(24, seed=2), RMSNorm(random(K, seed=3), 1e-6)
    dense = Weight.stack([random(24, K, seed=1)], [bias])
    weight = dense if name == "dense" else weight_of(name, 24, K, bias=True)
    with products_by_cuda(emulated_cuda, new_paths) as counts:
        for shape in SHAPES:
            x, residual = random(*shape), random(*shape[:-1], 12, seed=4)
            got = matmul(x, weight, norm=norm, residual=residual, swiglu=True)
            assert got.shape == residual.shape
            flat = x.view(-1, K), residual.view(-1, 12)
            want = matmul(flat[0], weight, norm=norm, residual=flat[1], swiglu=True)
            assert torch.equal(got.view(want.shape), want), shape
            apart = every_second(x), every_second(residual)
            same = matmul(apart[0], weight, norm=norm, residual=apart[1], swiglu=True)
            assert torch.equal(same, got), shape
            residual = random(*shape[:-1], 24, seed=5)
            plain = matmul(x, weight, residual=residual)
            want = matmul(flat[0], weight, residual=residual.view(-1, 24))
            assert torch.equal(plain.view(want.shape), want), shape
    assert {implementation for implementation in counts if "CUDA" in implementation} == TAKEN[
        name, new_paths
    ]
