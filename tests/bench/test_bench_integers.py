"""The integer peak of a CPU, and what products of prompts reach of it."""

import pytest
import torch

from benchmarks.synthetic import random_weight
from mimo_fast.bench import integers
from mimo_fast.bench.integers import Matrix
from mimo_fast.kernels.cpu import library as native

needs_peak = pytest.mark.skipif(
    not native.available() or native.compiled().instruction_set() == "portable",
    reason="no native kernels with instructions of their own",
)


@needs_peak
def test_the_peak_is_more_than_a_product_reaches(monkeypatch):
    monkeypatch.setattr(integers, "ROUNDS", 2**14)
    matrix = Matrix(random_weight("int4", (512,), 512, torch.bfloat16))
    found = integers.rates(matrix, 16, torch.bfloat16, 4)
    assert found.reached == pytest.approx(16 * 512 * 512 / found.seconds)
    assert 0 < found.share < 1.1
    peak = integers.integer_peak()
    assert peak is not None
    # More than a product a nanosecond: whatever else runs, it is no loop of scalars.
    assert peak > 1e9


@needs_peak
def test_products_are_counted():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native.compiled().multiply_registers(1)
        assert one in (8 * 32, 8 * 16, 8 * 4)
        assert native.compiled().multiply_registers(5) == 5 * one
        torch.set_num_threads(2)
        assert native.compiled().multiply_registers(3) == 2 * 3 * one
    finally:
        torch.set_num_threads(threads)


def test_without_native_kernels_there_is_no_peak(monkeypatch):
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    assert integers.integer_peak() is None


@needs_peak
def test_portable_kernels_have_no_peak(monkeypatch):
    monkeypatch.setattr(native.compiled(), "multiply_registers", lambda rounds: 0)
    assert integers.integer_peak() is None


@needs_peak
def test_shares_of_several_matrices(monkeypatch):
    monkeypatch.setattr(integers, "ROUNDS", 2**14)
    weights = [random_weight(form, (128,), 256, torch.bfloat16) for form in ("int8-g64", "int4")]
    shares = integers.prompt_shares([Matrix(w) for w in weights], torch.float32, (5, 7))
    assert list(shares) == [5, 7]
    assert all(0 < share < 1.1 for share in shares.values())
