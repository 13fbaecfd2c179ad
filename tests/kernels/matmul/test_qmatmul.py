"""Matrix products with stored weights against float64."""

import pytest
import torch
from helpers import assert_rounded, quantized, seeded
from torch.testing import assert_close

from mimo_fast.kernels.matmul import cpu as qmatmul_cpu
from mimo_fast.kernels.matmul.cpu import widened_product
from mimo_fast.kernels.matmul.plan import plan
from mimo_fast.kernels.matmul.product import Weight, matmul, matmul_ref, qmatmul_bytes
from mimo_fast.kernels.norm import RMSNorm, rms_norm_ref


def product(rows: tuple[int, ...], k: int, blocks: list[int], biased: list[bool], dtype):
    rng = seeded(k)
    x = torch.randn(*rows, k, generator=rng).to(dtype)
    parts = [(torch.randn(n, k, generator=rng) / k**0.5).to(dtype) for n in blocks]
    drawn = [torch.randn(n, generator=rng).to(dtype) for n in blocks]
    biases = [bias if b else None for bias, b in zip(drawn, biased, strict=True)]
    wide = [part.double() for part in parts]
    added = [0 if bias is None else bias.double() for bias in biases]
    want = torch.cat([x.double() @ part.T + b for part, b in zip(wide, added, strict=True)], dim=-1)
    magnitude = torch.cat([x.double().abs() @ part.abs().T for part in wide], dim=-1)
    return x, Weight.stack(parts, biases), want, magnitude


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (17,)])
@pytest.mark.parametrize(
    ("k", "blocks"), [(1, [1]), (64, [48, 16, 16]), (127, [33, 33]), (513, [7])]
)
def test_matmul(dtype, rows, k, blocks):
    # None of two blocks, all but the middle one of three.
    biased = [len(blocks) != 2 and i != 1 for i in range(len(blocks))]
    x, weight, want, magnitude = product(rows, k, blocks, biased, dtype)
    got = matmul(x, weight)
    assert got.dtype == dtype
    assert_rounded(got, want, noise=magnitude * k * 2.0**-24 + 1e-7)


@pytest.mark.parametrize("m", [1, 4, 65])
@pytest.mark.parametrize("name", ["dense", "int8", "int4", "nf4"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_norm_is_the_norm_and_then_the_product(dtype, m, name, swiglu, monkeypatch):
    # The native kernel rounds nothing in between: tests/kernels/cpu/test_native.py.
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    rng = seeded(m)
    part, gain = (torch.randn(*shape, generator=rng) for shape in ((6, 128), (128,)))
    dense = Weight.stack([part[:4].to(dtype), part[4:].to(dtype)])
    weight = dense if name == "dense" else quantized(part, name)
    x, residual = (torch.randn(m, n, generator=rng).to(dtype) for n in (128, 3 if swiglu else 6))
    got = matmul(x, weight, norm=RMSNorm(gain.to(dtype), 0.1), residual=residual, swiglu=swiglu)
    normed = rms_norm_ref(x, gain.to(dtype), 0.1)
    assert torch.equal(got, matmul_ref(normed, weight, residual=residual, swiglu=swiglu))


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-4])
def test_normed_product_against_float64(scale):
    x, weight, *_ = product((5,), 127, [33, 4], [True, False], torch.float32)
    x, gain = x * scale, torch.linspace(-2, 3, 127)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    dense = torch.cat(weight.blocks).double()
    bias = torch.cat([weight.biases[0], torch.zeros(4)]).double()
    got = matmul(x, weight, norm=RMSNorm(gain, 1e-6))
    noise = (wide.abs() @ dense.T.abs()) * 127 * 2.0**-24 + 1e-7
    assert_rounded(got, wide @ dense.T + bias, noise=noise)


def test_blocks_are_rows_of_one_matrix():
    x, weight, *_ = product((4,), 64, [48, 16, 16], [True, True, True], torch.float32)
    joined = Weight.stack([torch.cat(weight.blocks)], [torch.cat(weight.biases)])
    assert_close(matmul(x, weight), matmul(x, joined))


def test_no_biases_is_biases_of_none():
    weight = Weight.stack([torch.ones(2, 3), torch.ones(1, 3)])
    assert weight.biases == (None, None)
    assert matmul(torch.ones(3), weight).tolist() == [3.0, 3.0, 3.0]


def test_bytes_that_one_product_reads():
    half = torch.zeros(2, 5, dtype=torch.bfloat16)
    weight = Weight.stack([torch.zeros(3, 5), half], [None, half[:, 0]])
    assert weight.nbytes == 3 * 5 * 4 + 2 * 5 * 2 + 2 * 2
    # Two rows: x and y, then what the norm's weight and a residual add.
    assert qmatmul_bytes(2, weight, 5, 2) == weight.nbytes + 2 * (5 + 5) * 2
    fused = qmatmul_bytes(2, weight, 5, 2, norm=True, residual=True)
    assert fused == weight.nbytes + (2 * (5 + 5 + 5) + 5) * 2


def test_blocks_and_biases_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="zip"):
        matmul(torch.ones(3), Weight.stack([torch.ones(2, 3), torch.ones(2, 3)], [None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 7), (70,)])
def test_widened_weights_are_nearer_than_16_bit_products(dtype, shape):
    rng = seeded(1)
    shapes = (*shape, 1000), (901, 1000), (901,)
    x, weight, bias = (torch.randn(each, generator=rng).to(dtype) for each in shapes)
    want = x.double() @ weight.double().T + bias.double()
    got, eager = widened_product(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    assert got.dtype == dtype
    error, theirs = ((y.double() - want).square().mean() for y in (got, eager))
    assert error <= 1.01 * theirs
    assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_weights_are_widened_for_many_rows_where_the_cpu_lacks_the_instructions(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(qmatmul_cpu, "multiplies", lambda dtype, has=has: has)
        cases = (8, torch.bfloat16, True), (7, torch.bfloat16, False), (9, torch.float32, False)
        for rows, dtype, wanted in cases:
            weight = Weight.stack([torch.zeros(3, 4, dtype=dtype)])
            chosen = plan(weight, torch.device("cpu"), dtype).at(rows).implementation
            assert (chosen.name == "torch widened") == (wanted and not has)
