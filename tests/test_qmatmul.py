"""Matrix products with stored weights against float64."""

import pytest
import torch
from helpers import assert_rounded

from mimo_fast.kernels.qmatmul import Weight, matmul


def product(rows: tuple[int, ...], k: int, blocks: list[int], biased: list[bool], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(*rows, k, generator=generator).to(dtype)
    parts = [(torch.randn(n, k, generator=generator) / k**0.5).to(dtype) for n in blocks]
    biases = [torch.randn(n, generator=generator).to(dtype) if b else None for n, b in zip(blocks, biased, strict=True)]
    wide = [part.double() for part in parts]
    want = torch.cat([
        x.double() @ part.T + (0 if bias is None else bias.double()) for part, bias in zip(wide, biases, strict=True)
    ], dim=-1)
    magnitude = torch.cat([x.double().abs() @ part.abs().T for part in wide], dim=-1)
    return x, Weight.stack(parts, biases), want, magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (17,)])
@pytest.mark.parametrize(("k", "blocks", "biased"), [
    (1, [1], [True]), (64, [48, 16, 16], [True, False, True]), (127, [33, 33], [False, False]), (513, [7], [True]),
])
def test_matmul(dtype, rows, k, blocks, biased):
    x, weight, want, magnitude = product(rows, k, blocks, biased, dtype)
    got = matmul(x, weight)
    assert got.dtype == dtype
    assert_rounded(got, want, noise=magnitude * k * 2.0**-24 + 1e-7)


def test_blocks_are_rows_of_one_matrix():
    x, weight, *_ = product((4,), 64, [48, 16, 16], [True, True, True], torch.float32)
    joined = Weight.stack([torch.cat(weight.blocks)], [torch.cat(weight.biases)])
    torch.testing.assert_close(matmul(x, weight), matmul(x, joined))


def test_no_biases_is_biases_of_none():
    weight = Weight.stack([torch.ones(2, 3), torch.ones(1, 3)])
    assert weight.biases == (None, None)
    assert matmul(torch.ones(3), weight).tolist() == [3.0, 3.0, 3.0]


def test_bytes_that_one_product_reads():
    weight = Weight.stack(
        [torch.zeros(3, 5), torch.zeros(2, 5, dtype=torch.bfloat16)], [None, torch.zeros(2, dtype=torch.bfloat16)]
    )
    assert weight.nbytes == 3 * 5 * 4 + 2 * 5 * 2 + 2 * 2


def test_blocks_and_biases_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="zip"):
        matmul(torch.ones(3), Weight.stack([torch.ones(2, 3), torch.ones(2, 3)], [None]))
