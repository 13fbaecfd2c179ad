"""The backbone's input: text rows from any table, patches elsewhere, nothing unused read."""

import pytest
import torch
from helpers import assert_rounded, normal, quantized, refuses

from mimo_fast.kernels.matmul.quantized_weight import dequantize
from mimo_fast.kernels.text_embed import input_embed

EMPTY = 7
TEXTS = [[], [EMPTY], [0], [EMPTY, EMPTY], [3, 0, 9], [3, EMPTY, 9, EMPTY, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", TEXTS)
def test_each_row_comes_from_where_it_should(text, dtype):
    table, patches = normal(10, 33, dtype=dtype), normal(len(text), 33, dtype=dtype)
    for row, token in enumerate(text):
        if token != EMPTY:
            patches[row] = torch.nan
    table[EMPTY] = torch.nan
    got = input_embed(torch.tensor(text, dtype=torch.int64), patches, table, EMPTY)
    assert (got.shape, got.dtype) == (patches.shape, dtype)
    for row, token in enumerate(text):
        assert torch.equal(got[row], patches[row] if token == EMPTY else table[token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int8-g32", "int4", "int4-sym-g64", "nf4"])
def test_rows_of_a_quantized_table(kind, dtype):
    table = quantized(normal(10, 256), kind)
    patches = torch.full((4, 256), torch.nan, dtype=dtype)
    patches[2] = 1.5
    got = input_embed(torch.tensor([9, 0, EMPTY, 9]), patches, table, EMPTY)
    assert got.dtype == dtype
    assert torch.equal(got[2], patches[2])
    assert_rounded(got[[0, 1, 3]], dequantize(table).double()[[9, 0, 9]])


def test_into_out():
    table, patches = normal(10, 8), normal(2, 8)
    out = torch.full((3, 8), torch.nan)
    got = input_embed(torch.tensor([EMPTY, 2]), patches, table, EMPTY, out=out[:2])
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(out[:2], torch.stack([patches[0], table[2]]))
    assert out[2].isnan().all()


def test_arguments_that_do_not_match_are_refused():
    table, patches, text = normal(10, 8), normal(2, 8), torch.tensor([1, 2])
    refuses("width 8", input_embed, text[:1], patches, table, EMPTY)
    refuses("width 9", input_embed, text, patches, normal(10, 9), EMPTY)
    refuses("must be as patches", input_embed, text, patches, table, EMPTY, out=normal(2, 8).half())
