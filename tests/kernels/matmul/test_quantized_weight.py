"""Quantized matrices: packing, rows, and products on the CPU without the native kernels."""

import math

import pytest
import torch
from helpers import FORMATS, gaussian, outliers, quantized, refuses, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mimo_fast.kernels.matmul import cpu as qmatmul_cpu
from mimo_fast.kernels.matmul.cpu import (
    PACKED_ROWS,
    pack_for_torch,
    packed_product,
    unpacked_product,
)
from mimo_fast.kernels.matmul.product import Weight, matmul, qmatmul_bytes
from mimo_fast.kernels.matmul.quantized_weight import (
    QuantizedWeight,
    dequantize,
    dequantize_to,
    pack_words,
    unpack_words,
)


@pytest.fixture(autouse=True)
def without_native(monkeypatch):
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")


@given(
    *(st.sampled_from([4, 8]), st.sampled_from([32, 64, 96, 128, 256])),
    *(st.integers(1, 3), st.integers(1, 5), st.integers(0, 99)),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packing_is_undone_by_unpacking(bits, group, blocks, rows, seed):
    q = torch.randint(2**bits, (rows, blocks * group), generator=seeded(seed))
    words = pack_words(q, bits, group)
    assert words.shape == (rows, blocks * group * bits // 32)
    assert torch.equal(unpack_words(words, bits, group), q.int())


def test_packed_layout():
    """Plane p of word w is column p W + w of a block, as files hold it."""
    q = torch.zeros(1, 256, dtype=torch.int64)
    q[0, 128 + 3 * 16 + 5] = 11
    words = pack_words(q, 4, 128)
    assert words.nonzero().tolist() == [[0, 16 + 5]]
    assert words[0, 21] == 11 << 12
    q = torch.zeros(1, 64, dtype=torch.int64)
    q[0, 3 * 8 + 2] = 200
    assert pack_words(q, 8, 32).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 128), (48, 256), (64, 384)])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_product_is_that_of_the_dequantized_weight(name, rows, columns, shape, dtype):
    bias = gaussian(1, rows, 3)[0].to(dtype)
    weight = pack_for_torch(quantized(gaussian(rows, columns), name, bias))
    x = gaussian(math.prod(shape), columns, 2).view(*shape, columns).to(dtype)
    dense = dequantize(weight)
    want = x.float() @ dense.T + bias.float()
    got = matmul(x, weight)
    assert got.dtype == dtype
    # Twice the error of the same product in this dtype, whose weight and result are both rounded.
    noise = x.float().abs() @ dense.abs().T + bias.abs().float()
    eager = (torch.nn.functional.linear(x, dense.to(dtype), bias).float() - want).abs().max()
    assert float((got.float() - want).abs().max()) <= 2 * float(eager) + 1e-6 * float(noise.max())


def test_cpu_products_are_used_where_they_can_be(monkeypatch):
    calls = []
    monkeypatch.setattr(
        qmatmul_cpu, "packed_product", lambda *args: calls.append(args) or packed_product(*args)
    )
    for name, columns in (("int4", 128), ("int4-sym-g32", 96), ("int8", 96)):
        weight = pack_for_torch(quantized(gaussian(64, columns), name))
        most = PACKED_ROWS
        cases = (1, True), (most, True), (most + 1, False), (0, False)
        cases = [(rows, torch.bfloat16, packed) for rows, packed in cases]
        for rows, dtype, packed in [*cases, (1, torch.float32, False)]:
            calls.clear()
            assert matmul(torch.ones(rows, columns, dtype=dtype), weight).shape == (rows, 64)
            assert bool(calls) == packed
    for rows, name in ((33, "int4"), (64, "nf4"), (64, "int8-g32")):
        weight = quantized(gaussian(rows, 128), name)
        assert pack_for_torch(weight) is weight


@pytest.mark.parametrize("name", ["int4", "int4-g32", "int4-sym", "int8"])
def test_torchs_form_holds_the_same_values_and_nothing_twice(name):
    weight = quantized(outliers(192, 384), name, gaussian(1, 192)[0])
    packed = pack_for_torch(weight)
    assert packed.shape == weight.shape
    assert torch.equal(dequantize(packed), dequantize(weight))
    for start, end in ((0, 1), (5, 71), (64, 128), (190, 192), (150, 999), (60, 60)):
        assert torch.equal(dequantize(packed, start, end), dequantize(weight, start, end))
    assert packed.words.nbytes == weight.words.nbytes
    held = packed.words.nbytes + packed.torch_scales.nbytes
    assert held <= weight.words.nbytes + 2 * weight.scales.nbytes


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8"])
def test_torchs_form_joins(name):
    parts = [quantized(gaussian(rows, 256, rows), name, gaussian(1, rows)[0]) for rows in (64, 128)]
    joined = QuantizedWeight.stack([pack_for_torch(part) for part in parts])
    want = QuantizedWeight.stack(parts)
    assert joined.torch_scales is not None
    assert torch.equal(dequantize(joined), dequantize(want))
    x = gaussian(3, 256, 1).bfloat16()
    apart = torch.cat([matmul(x, pack_for_torch(part)) for part in parts], dim=1)
    assert torch.equal(matmul(x, joined), apart)
    refuses("one format", QuantizedWeight.stack, [joined, want])


@pytest.mark.parametrize("mean", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8"])
def test_packed_products_of_uncentred_inputs(name, mean):
    """Errors shared by a group, such as its zero's, add up in such sums."""
    weight = pack_for_torch(quantized(gaussian(256, 4096) + 0.5, name))
    x, dense = (gaussian(4, 4096, 1) + mean).bfloat16(), dequantize(weight)
    want = x.double() @ dense.double().T
    eager = float((torch.nn.functional.linear(x, dense.bfloat16()).double() - want).abs().max())
    packed = packed_product(x, weight, weight.torch_scales)
    for product, bound in ((packed, 2), (unpacked_product(x, weight), 1)):
        assert float((product.double() - want).abs().max()) <= bound * eager


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8"])
def test_many_rows_and_few_agree(name):
    weight = pack_for_torch(quantized(gaussian(64, 256), name))
    x = gaussian(PACKED_ROWS + 1, 256, 5).bfloat16()
    many, few = matmul(x, weight), torch.cat([matmul(row[None], weight) for row in x])
    assert_close(many.float(), few.float(), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("packed", [False, True])
def test_epilogues(packed):
    dense = gaussian(64, 128)
    weight = quantized(dense, "int8") if packed else Weight.stack([dense[:32], dense[32:]])
    values = dequantize(weight) if packed else dense
    x, residual = gaussian(3, 128, 1), gaussian(3, 32, 2)
    gate, up = (x @ values.T).chunk(2, -1)
    want = residual + torch.nn.functional.silu(gate) * up
    assert_close(matmul(x, weight, residual=residual, swiglu=True), want)
    wide = gaussian(3, 64, 2)
    assert_close(matmul(x, weight, residual=wide), wide + x @ values.T)


def test_width_that_does_not_match_is_refused():
    with pytest.raises(ValueError, match="last dimension"):
        matmul(torch.ones(2, 64), quantized(gaussian(4, 128), "int8"))


def test_rows_join():
    biases = {rows: torch.full((rows,), rows * 1.0) for rows in (3, 5)}
    parts = [quantized(gaussian(n, 128, n), "int4", bias) for n, bias in biases.items()]
    joined = QuantizedWeight.stack(parts)
    assert joined.shape == (8, 128)
    assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in parts]))
    assert joined.bias.tolist() == [3.0] * 3 + [5.0] * 5
    assert torch.equal(dequantize_to(joined, torch.float32), dequantize(joined))
    with pytest.raises(ValueError, match="one format"):
        QuantizedWeight.stack([parts[0], quantized(gaussian(5, 128), "int8")])


def test_bytes_of_a_product():
    weight = quantized(gaussian(6, 256), "int4", torch.zeros(6, dtype=torch.bfloat16))
    assert weight.nbytes == 6 * 256 // 2 + 6 * 2 * (2 + 2) + 6 * 2
    assert qmatmul_bytes(3, weight, 6, 2) == weight.nbytes + 3 * (256 + 6) * 2
