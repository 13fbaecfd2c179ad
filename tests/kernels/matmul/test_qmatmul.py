"""Matrix products with stored weights against float64."""

import pytest
import torch
from helpers import assert_rounded

from mimo_fast.kernels.matmul import cpu as qmatmul_cpu
from mimo_fast.kernels.matmul.cpu import widened_product
from mimo_fast.kernels.matmul.plan import plan
from mimo_fast.kernels.matmul.product import Weight, matmul, matmul_ref, qmatmul_bytes
from mimo_fast.kernels.norm import RMSNorm, rms_norm_ref
from mimo_fast.quantization import Format, quantize


def product(
    rows: tuple[int, ...], k: int, blocks: list[int], biased: list[bool], dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(*rows, k, generator=generator).to(dtype)
    parts = [(torch.randn(n, k, generator=generator) / k**0.5).to(dtype) for n in blocks]
    biases = [
        torch.randn(n, generator=generator).to(dtype) if b else None
        for n, b in zip(blocks, biased, strict=True)
    ]
    wide = [part.double() for part in parts]
    want = torch.cat(
        [
            x.double() @ part.T + (0 if bias is None else bias.double())
            for part, bias in zip(wide, biases, strict=True)
        ],
        dim=-1,
    )
    magnitude = torch.cat([x.double().abs() @ part.abs().T for part in wide], dim=-1)
    return x, Weight.stack(parts, biases), want, magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (17,)])
@pytest.mark.parametrize(
    ("k", "blocks", "biased"),
    [
        (1, [1], [True]),
        (64, [48, 16, 16], [True, False, True]),
        (127, [33, 33], [False, False]),
        (513, [7], [True]),
    ],
)
def test_matmul(dtype, rows, k, blocks, biased):
    x, weight, want, magnitude = product(rows, k, blocks, biased, dtype)
    got = matmul(x, weight)
    assert got.dtype == dtype
    assert_rounded(got, want, noise=magnitude * k * 2.0**-24 + 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 4, 65])
@pytest.mark.parametrize("name", ["dense", "int8", "int4", "nf4"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_norm_is_the_norm_and_then_the_product(dtype, m, name, swiglu, monkeypatch):
    # The native kernel rounds nothing in between: tests/kernels/cpu/test_native.py.
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    generator = torch.Generator().manual_seed(m)
    part, gain = (torch.randn(*shape, generator=generator) for shape in ((6, 128), (128,)))
    weight = (
        Weight.stack([part[:4].to(dtype), part[4:].to(dtype)])
        if name == "dense"
        else (quantize(part, Format.parse(name)))
    )
    x, residual = (
        torch.randn(m, n, generator=generator).to(dtype) for n in (128, 3 if swiglu else 6)
    )
    got = matmul(x, weight, norm=RMSNorm(gain.to(dtype), 0.1), residual=residual, swiglu=swiglu)
    normed = rms_norm_ref(x, gain.to(dtype), 0.1)
    assert torch.equal(got, matmul_ref(normed, weight, residual=residual, swiglu=swiglu))


@pytest.mark.parametrize("scale", [1e4, 1.0, 1e-4])
def test_normed_product_against_float64(scale):
    x, weight, *_ = product((5,), 127, [33, 4], [True, False], torch.float32)
    x, gain = x * scale, torch.linspace(-2, 3, 127)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    dense, bias = (
        torch.cat(weight.blocks).double(),
        torch.cat([weight.biases[0], torch.zeros(4)]).double(),
    )
    got = matmul(x, weight, norm=RMSNorm(gain, 1e-6))
    assert_rounded(
        got, wide @ dense.T + bias, noise=(wide.abs() @ dense.T.abs()) * 127 * 2.0**-24 + 1e-7
    )


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
        [torch.zeros(3, 5), torch.zeros(2, 5, dtype=torch.bfloat16)],
        [None, torch.zeros(2, dtype=torch.bfloat16)],
    )
    assert weight.nbytes == 3 * 5 * 4 + 2 * 5 * 2 + 2 * 2
    # Two rows: x and y, then what the norm's weight and a residual add.
    assert qmatmul_bytes(2, weight, 5, 2) == weight.nbytes + 2 * (5 + 5) * 2
    assert (
        qmatmul_bytes(2, weight, 5, 2, norm=True, residual=True)
        == weight.nbytes + (2 * (5 + 5 + 5) + 5) * 2
    )


def test_blocks_and_biases_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="zip"):
        matmul(torch.ones(3), Weight.stack([torch.ones(2, 3), torch.ones(2, 3)], [None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 7), (70,)])
def test_widened_weights_are_nearer_than_16_bit_products(dtype, shape):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(n, generator=generator).to(dtype) for n in ((*shape, 1000), (901, 1000), (901,))
    )
    want = x.double() @ weight.double().T + bias.double()
    got, eager = widened_product(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    assert got.dtype == dtype
    error, theirs = ((y.double() - want).square().mean() for y in (got, eager))
    assert error <= 1.01 * theirs
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_weights_are_widened_for_many_rows_where_the_cpu_lacks_the_instructions(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(qmatmul_cpu, "multiplies", lambda dtype, has=has: has)
        for rows, dtype, wanted in (
            (8, torch.bfloat16, True),
            (7, torch.bfloat16, False),
            (9, torch.float32, False),
        ):
            weight = Weight.stack([torch.zeros(3, 4, dtype=dtype)])
            chosen = plan(weight, torch.device("cpu"), dtype).at(rows).implementation
            assert (chosen.name == "torch widened") == (wanted and not has)
