"""The rule by which a fast implementation is accepted refuses what is wrong, in every dtype."""

import pytest
import torch

from mimo_fast.bench.accuracy import accuracy, compare_codes, worst
from mimo_fast.kernels.rvq import rvq_encode_ref


def rounded(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    return exact.to(dtype), exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_may_be_twice_as_far_off_as_eager(dtype):
    eager, exact = rounded(dtype)
    off = float((eager.float() - exact).abs().max())
    assert accuracy(eager, eager, exact).accepted
    for factor, accepted in ((1.5, True), (4.0, False)):
        got = eager.clone()
        got[exact.abs().argmin()] += factor * off
        assert accuracy(got, eager, exact).accepted == accepted


def test_float32_has_a_bound_of_its_own():
    eager, exact = rounded(torch.float32)
    size = float(exact.abs().max())
    for error, accepted in ((5e-6, True), (2e-5, False)):
        got = exact.clone()
        got[3] += error * size
        assert accuracy(got, eager, exact).accepted == accepted


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused(bad, dtype):
    eager, exact = rounded(dtype)
    got = eager.clone()
    got[5] = bad
    assert not accuracy(got, eager, exact).accepted


def test_an_exact_op_must_be_exact():
    """Where eager 16-bit torch makes no error, as when rows are copied, none is allowed."""
    exact = torch.arange(8.0)
    eager = exact.bfloat16()
    assert accuracy(eager.clone(), eager, exact).accepted
    assert not accuracy(eager + 0.25, eager, exact).accepted


def test_integers_are_equal_and_levels_nearly():
    codes = torch.arange(1000)
    assert accuracy(codes.clone(), codes, codes).accepted
    wrong = codes.clone()
    wrong[7] += 1
    assert not accuracy(wrong, codes, codes).accepted
    levels = torch.zeros(1000, dtype=torch.int8)
    for count, step, accepted in ((5, 1, True), (50, 1, False), (1, 2, False)):
        got = levels.clone()
        got[:count] += step
        assert accuracy(got, levels, levels).accepted == accepted


def test_another_shape_or_dtype_is_refused():
    x = torch.ones(4)
    assert not accuracy(x[:3], x, x).accepted
    assert not accuracy(x.half(), x, x).accepted


def test_the_worst_output_counts():
    x = torch.ones(4)
    assert worst([x, x], [x, x], [x, x]).accepted
    assert not worst([x, x + 1], [x, x], [x, x]).accepted
    assert not worst([x + 1, x], [x, x], [x, x]).accepted
    with pytest.raises(ValueError, match="zip"):
        worst([x], [x, x], [x, x])


def test_codes_may_differ_by_a_near_tie_alone():
    generator = torch.Generator().manual_seed(0)
    x, book = torch.randn(6, 8, generator=generator), torch.randn(5, 8, generator=generator)
    books = [torch.cat((book, book[:1] + 1e-7)), book]
    want = rvq_encode_ref(x, books)
    assert compare_codes(x, books, want, want) == (0, 0)
    x[2] = book[0] + 0.1
    want = rvq_encode_ref(x, books)
    tied, wrong, outside = want.clone(), want.clone(), want.clone()
    assert int(want[0, 2]) in (0, 5)
    tied[0, 2] = 5 - tied[0, 2]
    wrong[0, 1] = (wrong[0, 1] + 1) % 5
    outside[1, 3] = 5
    assert compare_codes(x, books, tied, want) == (0, 1)
    assert compare_codes(x, books, wrong, want) == (1, 0)
    assert compare_codes(x, books, outside, want) == (1, 0)
