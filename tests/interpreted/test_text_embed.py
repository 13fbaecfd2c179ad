"""The input embedding kernels: dense and packed tables, odd widths, unused garbage."""

import pytest
import torch
from helpers import normal, quantized, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimo_fast.kernels import text_embed as module
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.kernels.text_embed import input_embed, input_embed_ref

EMPTY = 5
TEXTS = [[EMPTY], [0], [EMPTY, EMPTY, EMPTY], [3, 0, 11], [3, EMPTY, 11, EMPTY, 3], []]
pytestmark = pytest.mark.usefixtures("poisoned")


def check(tokens: list[int], table: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
    """Text is strided; patches are rows of a wider buffer, NaN wherever none is to be read."""
    text = torch.tensor([tokens, [EMPTY] * len(tokens)], dtype=torch.int64).T.contiguous()[:, 0]
    dim = table.shape[1]
    patches = torch.full((len(tokens), dim + 8), torch.nan, dtype=dtype)[:, :dim]
    patches[text == EMPTY] = normal(dim, dtype=dtype)
    want = input_embed_ref(text, patches, table, EMPTY)
    got = input_embed(text, patches, table, EMPTY)
    assert got.dtype == dtype
    assert want.isfinite().all()
    assert torch.equal(got, want), "a copy, or a product rounded as its reference"


@pytest.mark.parametrize("dim", [1, 33, 1024, 2100])
@pytest.mark.parametrize("tokens", TEXTS)
def test_dense_table(tokens, dim, dtype):
    table = normal(12, dim, dtype=dtype)
    table[EMPTY] = torch.nan
    check(tokens, table, dtype)


@pytest.mark.parametrize("kind", ["int8", "int8-g32", "int4", "int4-g64", "int4-sym", "nf4"])
@pytest.mark.parametrize("dim", [128, 1152, 2048])
@pytest.mark.parametrize("tokens", [[EMPTY], TEXTS[4], []])
def test_packed_table(tokens, dim, kind, dtype):
    check(tokens, quantized(normal(12, dim), kind), dtype)


@pytest.mark.parametrize("dim", [96, 160, 1184])
@pytest.mark.parametrize("kind", ["int8", "int4-g32"])
def test_packed_width_that_128_does_not_divide(kind, dim):
    check(TEXTS[4], quantized(normal(12, dim), kind), torch.float32)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 11), max_size=5), st.integers(1, 1100))
def test_any_text_and_width(tokens, dim):
    check(tokens, normal(12, dim), torch.float32)


def test_a_part_of_a_table_and_of_the_result():
    table, out = normal(12, 48)[:, 5:38], torch.full((3, 40), torch.nan)
    patches = normal(3, 33)
    text = torch.tensor([2, EMPTY, 11])
    input_embed(text, patches, table, EMPTY, out=out[:, :33])
    assert torch.equal(out[:, :33], input_embed_ref(text, patches, table, EMPTY))
    assert out[:, 33:].isnan().all()


@pytest.mark.parametrize("packed", [False, True])
def test_one_launch(monkeypatch, grids_of, packed):
    names = ["dense_embed_kernel", "quantized_embed_kernel"]
    launched = grids_of(module, names.pop(packed))
    monkeypatch.setattr(module, names[0], None)
    table = normal(12, 2048)
    check(TEXTS[4], quantized(table, "int8") if packed else table, torch.float32)
    assert launched == [(5, 2)]


def test_strides_are_checked():
    text, patches = torch.tensor([1, 2]), normal(2, 32)
    refuses("must be contiguous", input_embed, text, patches, normal(32, 12).T, EMPTY)
    refuses("must be contiguous", input_embed, text, normal(2, 64)[:, ::2], normal(12, 32), EMPTY)


@pytest.mark.parametrize("kind", [None, "int4"])
def test_a_token_that_could_not_be_drawn_reads_inside_the_table(kind):
    """Memory before the table is NaN; rows beside it are what they were."""
    memory = torch.full((24, 128), torch.nan)
    memory[12:] = normal(12, 128)
    table = memory[12:] if kind is None else quantized(memory[12:], kind)
    patches = torch.zeros(3, 128)
    text = torch.tensor([3, NOT_FINITE, 11])
    x = input_embed(text, patches, table, EMPTY)
    assert x.isfinite().all()
    want = input_embed(text.clamp(min=0), patches, table, EMPTY)
    assert torch.equal(x, want)
