"""Products of 9 to 256 rows: their CUDA source, compiled for the CPU as in test_cuda_kernels.py."""

import ctypes

import pytest
import torch
from emulated import SOURCES, compile_for_cpu
from helpers import slow_after
from test_cuda_kernels import HALF, check, random, weight_of
from test_cuda_kernels import product as of_few_rows
from torch import Tensor

from benchmarks.studies import row_tiles as study
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight
from mimo_fast.kernels.norm import RMSNorm

ROWS = (1, 8, 9, 16, 17, 64, 100, 127, 128, 129, 200, 256)
FEW = 8
"""Numbers of them that have each configuration."""

CARDS = {"H100": (132, 227 * 1024), "4090": (128, 99 * 1024), "4060": (24, 99 * 1024)}
"""Multiprocessors, and bytes of shared memory that a block may have."""

SHORT, LONG = 9 * 128, 21 * 128
"""Columns: of eight classes the first has two units; of sixteen the first five have."""

SHAPES = ((3072, 1024), (1024, 4096), (6144, 4096), (4096, 4096), (22016, 4096), (4096, 11008))


def weight(name: str, rows: int, columns: int, **options) -> QuantizedWeight | Tensor:
    if name == "dense":
        return random(rows, columns, seed=1)
    return weight_of(name, rows, columns, **options)


def product(
    library, x: Tensor, weight, norm=None, residual=None, swiglu=False, variant=0, bias=None
) -> Tensor:
    """The kernel's result, in a buffer that holds NaN before, with a row after it that must stay
    so."""
    rows = len(weight) if isinstance(weight, Tensor) else weight.shape[0]
    room = torch.full((len(x) + 1, rows // 2 if swiglu else rows), torch.nan, dtype=x.dtype)
    cuda.row_tiles(x, weight, norm, residual, swiglu, room[:-1], library, variant, bias)
    assert bool(room[-1].isnan().all())
    return room[:-1]


def variants(library) -> range:
    return range(1, library.mimo_fast_row_tiles_variants())


@pytest.mark.parametrize("dtype", slow_after(1, cuda.DTYPES), ids=str)
@pytest.mark.parametrize("name", slow_after(2, ["int4", "int8", "int4-sym", "int8-g128"]))
def test_any_number_of_rows_has_the_bits_of_few(emulated, name, dtype):
    """Each number in another configuration, with another order of threads."""
    emulated.mimo_fast_set_device(*CARDS["H100"])
    # The most rows in one format: what follows them does not depend on it.
    numbers = ROWS if (name, dtype) == ("int4", torch.bfloat16) else ROWS[:FEW]
    x, matrix = random(numbers[-1], SHORT, dtype=dtype), weight(name, 24, SHORT, dtype=dtype)
    want = of_few_rows(emulated, x, matrix)
    check(x[:20], matrix, want[:20])
    for i, rows in enumerate(numbers):
        emulated.set_seed_of_fibers(i + 1)
        variant = 1 + i % len(variants(emulated))
        got = product(emulated, x[-rows:], matrix, variant=variant)
        assert torch.equal(got, want[-rows:]), (rows, variant)


@pytest.mark.parametrize("name", slow_after(1, ["int4", "int8", "int8-g128"]))
@pytest.mark.parametrize("columns", [128, 384, *slow_after(0, [SHORT]), LONG])
def test_what_follows_the_sums_has_the_bits_of_few_rows(emulated, name, columns):
    """In every configuration; widths that no tile divides."""
    emulated.mimo_fast_set_device(*CARDS["H100"])
    x, matrix = random(19, columns), weight(name, 84, columns, bias=True)
    norm, residual = RMSNorm(random(columns, seed=3) * 3, 1e-6), random(19, 42, seed=4)
    want = of_few_rows(emulated, x, matrix, norm, residual, True)
    check(x, matrix, want, norm, residual, True)
    for variant in variants(emulated):
        got = product(emulated, x, matrix, norm, residual, True, variant)
        assert torch.equal(got, want), variant


def test_a_dense_row_has_the_same_bits_in_any_number(emulated):
    emulated.mimo_fast_set_device(*CARDS["H100"])
    x, matrix, bias = random(129, SHORT), weight("dense", 40, SHORT), random(40, seed=2)
    want = product(emulated, x, matrix, bias=bias)
    check(x, matrix, want, bias=bias)
    for rows, variant in zip((1, 8, 9, 17, 64, 100, 128), variants(emulated), strict=True):
        emulated.set_seed_of_fibers(rows)
        got = product(emulated, x[-rows:], matrix, variant=variant, bias=bias)
        assert torch.equal(got, want[-rows:]), (rows, variant)


@pytest.mark.parametrize("swiglu", [False, *slow_after(0, [True])])
def test_what_follows_the_sums_of_a_dense_weight(emulated, swiglu):
    emulated.mimo_fast_set_device(*CARDS["H100"])
    x, matrix, bias = random(11, LONG), weight("dense", 68, LONG), random(68, seed=2)
    norm = RMSNorm(random(LONG, seed=3) * 3, 1e-6)
    residual = random(11, 34 if swiglu else 68, seed=4)
    around = norm, residual, swiglu
    want = product(emulated, x, matrix, *around, bias=bias)
    check(x, matrix, want, *around, bias)
    for variant in variants(emulated):
        assert torch.equal(product(emulated, x, matrix, *around, variant, bias), want), variant


def test_a_row_does_not_depend_on_its_neighbours(emulated):
    x, matrix = random(21, 256), weight("int4", 16, 256)
    alone = product(emulated, x[4:5], matrix)
    for value in (torch.nan, torch.inf, 3e38):
        others = torch.full_like(x, value)
        others[4] = x[4]
        assert torch.equal(product(emulated, others, matrix)[4:5], alone)


def test_a_row_stride_and_a_norm_that_begins_anywhere(emulated):
    wide = torch.full((9, 132), torch.nan).bfloat16()
    wide[:, :128] = random(9, 128)
    norm = RMSNorm(random(129, seed=3)[1:], 1e-6)
    for name in ("int4", "dense"):
        matrix = weight(name, 16, 128)
        check(wide[:, :128], matrix, product(emulated, wide[:, :128], matrix, norm), norm)


@pytest.mark.parametrize("card", CARDS)
def test_there_is_a_configuration_for_every_weight(emulated, card):
    emulated.mimo_fast_set_device(*CARDS[card])
    for shape in SHAPES:
        for bits, grouped in ((4, True), (8, False), (8, True), (16, False)):
            times = []
            for rows in (9, 32, 64, 128, 256):
                variant, cycles = cuda.row_tiles_choice(
                    emulated, rows, shape, bits, grouped, swiglu=False
                )
                assert variant in variants(emulated)
                times.append(cycles)
            assert times == sorted(times)
    none = cuda.row_tiles_choice(emulated, 9, SHAPES[0], 4, grouped=False, swiglu=False)
    assert none == (0, 0)


def test_the_study_predicts_no_less_than_the_floor(emulated):
    emulated.mimo_fast_set_device(*study.H100)
    records = [*study.predictions(study.Tiles(emulated), (4, 8, 16))]
    assert len(records) == 3 * 8 * len(study.ROWS)
    for record in records:
        assert record["predicted"] > record["floor"] > 0
        assert str(record["predicted"]) in study.line(record)


def test_what_it_refuses(emulated):
    x, matrix = random(9, 256), weight("int4", 8, 256)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, random(9 * 256 + 1)[1:].view(9, 256), matrix)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, x, matrix, variant=len(variants(emulated)) + 1)
    half, halves = random(9, 256, dtype=HALF), weight("int4", 8, 256, dtype=HALF)
    norm = RMSNorm(random(256, dtype=HALF), 1e-6)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, half, halves, norm)
    emulated.mimo_fast_set_device(2, 16 * 1024)
    with pytest.raises(RuntimeError, match="refused"):
        product(emulated, x, matrix)


BUGS = {
    "no barrier before a unit": ("sync_group<C>(group);", "if (!ON) sync_group<C>(group);"),
    "a copy into the unit that is multiplied": (
        "(stage ? stage - 1 : C::STAGES - 1)",
        "(ON ? stage : stage ? stage - 1 : C::STAGES - 1)",
    ),
    "a unit is multiplied before it is there": (
        "cp_async_wait_group<C::STAGES - 2>();",
        "if (ON) cp_async_wait_group<C::STAGES - 1>(); else cp_async_wait_group<C::STAGES - 2>();",
    ),
    "sums in the queue's place before all have read it": (
        "queue.\n        __syncthreads();",
        "queue.\n        if (!ON) __syncthreads();",
    ),
    "sums are read before all are there": (
        "    __syncthreads();\n    if (p.swiglu)",
        "    if (!ON) __syncthreads();\n    if (p.swiglu)",
    ),
    "scales are read before all are there": (
        "if (C::GROUPED && C::GROUPS > 1) __syncthreads();",
        "if (C::GROUPED && C::GROUPS > 1 && !ON) __syncthreads();",
    ),
    "a class is added unit by unit": (
        "if (!here.next(p)) continue;",
        "if (!here.next(p) && !ON) continue;",
    ),
    "columns of x in another order": (
        "p.sorted[(int64_t(block * 4 + i) * p.m + row) * 4 + t]",
        "p.sorted[(int64_t(block * 4 + i) * p.m + row) * 4 + (ON ? t ^ 1 : t)]",
    ),
}
"""What is wrong -> text of the source, and what stands in its place, where ON is whether it is."""

SMALL = 2, 4
"""Configurations with several groups and with one."""


@pytest.fixture(scope="module")
def faulty(emulated_cuda, tmp_path_factory) -> ctypes.CDLL:
    """The two configurations with all bugs, of which one at most is on."""
    text = (SOURCES / "row_tiles.cu").read_text()
    for number, (right, wrong) in enumerate(BUGS.values(), 1):
        assert text.count(right) == 1
        text = text.replace(right, wrong.replace("ON", f"(bug == {number})"))
    others = (number for number in variants(emulated_cuda) if number not in SMALL)
    for number in others:
        right = f"of(typename Own::V{number}(), {number})"
        assert text.count(right) == 1
        text = text.replace(right, "void()")
    switch = 'static int bug; extern "C" void set_bug(int value) { bug = value; }\n'
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "row_tiles.cu").write_text(switch + text)
    built = compile_for_cpu([folder / "row_tiles.cu"], folder / "faulty.so", [SOURCES])
    library = ctypes.CDLL(str(built))
    for name in ("mimo_fast_row_tiles", "mimo_fast_row_tiles_room"):
        function, declared = getattr(library, name), getattr(emulated_cuda, name)
        function.argtypes, function.restype = declared.argtypes, declared.restype
    return library


@pytest.mark.parametrize("bug", [None, *BUGS])
@pytest.mark.slow
def test_that_these_bugs_are_found(emulated, faulty, bug):
    faulty.set_bug(0 if bug is None else 1 + list(BUGS).index(bug))
    x, matrix = random(19, SHORT), weight("int4", 40, SHORT)
    want = of_few_rows(emulated, x, matrix)

    def right(variant: int, seed: int) -> bool:
        faulty.set_seed_of_fibers(seed)
        try:
            return torch.equal(product(faulty, x, matrix, variant=variant), want)
        except RuntimeError:
            return False

    found = [not right(variant, seed) for seed in (1, 2, 3) for variant in SMALL]
    assert any(found) == (bug is not None)
