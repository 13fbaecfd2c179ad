"""The persistent patch decoder's source on a CPU: threads are fibers, resumed in random order."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated import HEADERS, SOURCES, compile_for_cpu, compiled_once
from helpers import slow_after
from torch import Tensor

from benchmarks.studies.engine_model import (
    Decoder,
    Matrix,
    Model,
    declared,
    random_heads,
    random_model,
    reference,
)
from mimo_fast.kernels.matmul.quantized_weight import dequantize
from mimo_fast.quantization import Format, quantize

SOURCE = SOURCES / "engine" / "decoder.cu"
PARTS = [path for path in SOURCE.parent.glob("*.cuh") if path.name != "grid.cuh"]
STUCK = 719
DIM, FFN, LAYERS, STEPS = 256, 512, 2, 3


def built(source: Path, target: Path) -> ctypes.CDLL:
    return declared(ctypes.CDLL(str(compile_for_cpu([source], target, [HEADERS / "engine"]))))


def built_with(change: Callable[[str], str], folder: Path, before: str = "") -> ctypes.CDLL:
    """Of changed source text, after a text that is added."""
    for path in (SOURCE, *PARTS):
        (folder / path.name).write_text(change(path.read_text()))
    source = folder / SOURCE.name
    source.write_text(before + source.read_text())
    return built(source, folder / "emulated.so")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled_once(tmp_path_factory, "decoder", [SOURCE], [HEADERS / "engine"])
    return declared(ctypes.CDLL(str(library)))


def given(steps: int = STEPS, dim: int = DIM) -> Tensor:
    return torch.randn(steps, dim, generator=torch.Generator().manual_seed(5)).bfloat16()


def decoded(
    library, model: Model, x: Tensor, blocks: int = 4, threads: int = 64, seed: int = 1, **settings
) -> Tensor:
    """The result, of buffers that hold NaNs before, with a row after it that must stay so."""
    library.set_seed_of_fibers(seed)
    decoder = Decoder(library, model, len(x))
    assert decoder.run(x, blocks, threads, **settings) == 0
    assert int(decoder.state[32]) == 0
    assert int(decoder.state[0]) == len(model.layers) * len(x)
    assert bool(decoder.hidden[-1].isnan().all())
    return decoder.hidden[:-1]


def check(model: Model, x: Tensor, got: Tensor) -> None:
    """Half a bfloat16 ulp for the result, and as much again for earlier values that round apart."""
    want = reference(model, x, rounded=True)
    assert (got.float() - want).norm() <= 2**-8 * want.norm()
    assert (got.float() - want).abs().max() <= 2**-7 * want.abs().max()
    plain = reference(model, x, rounded=False)
    assert (got.float() - plain).norm() <= 2 * (want - plain).norm() + 2**-8 * plain.norm()


@pytest.mark.parametrize(
    ("bits", "grouped", "zeros", "depth"),
    [
        (8, False, False, 4),
        (4, True, True, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((8, True, False, 5), (4, True, False, 8), (4, True, True, 10))
        ),
    ],
)
def test_formats(emulated, bits, grouped, zeros, depth):
    model, x = random_model(DIM, FFN, LAYERS, bits, grouped, zeros), given()
    check(model, x, decoded(emulated, model, x, depth=depth))


@pytest.mark.slow
def test_any_number_of_blocks_and_any_order_give_the_same_bits(emulated):
    model, x = random_model(DIM, FFN, LAYERS, 4, True, True), given(2)
    want = decoded(emulated, model, x)
    for blocks, threads, seed in ((1, 64, 2), (3, 96, 3), (4, 64, 4), (5, 128, 5), (32, 64, 6)):
        assert torch.equal(decoded(emulated, model, x, blocks, threads, seed), want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.slow
def test_the_usual_launch_has_a_kernel_that_gives_the_same_bits(emulated, tmp_path, bits):
    usual = re.compile("USUAL_(DIM|FFN|BLOCKS|THREADS) = ([0-9]+)")
    assert dict(usual.findall((SOURCE.parent / "engine.cuh").read_text())) == {
        "DIM": "1024",
        "FFN": "4096",
        "BLOCKS": "128",
        "THREADS": "512",
    }
    values = {"DIM": DIM, "FFN": 1024, "BLOCKS": 32, "THREADS": 128}
    library = built_with(
        lambda text: usual.sub(lambda found: f"USUAL_{found[1]} = {values[found[1]]}", text),
        tmp_path,
    )
    model, x = random_model(DIM, 1024, LAYERS, bits, bits == 4, bits == 4), given(2)
    assert torch.equal(decoded(library, model, x, 32, 128), decoded(emulated, model, x))


@pytest.mark.slow
def test_the_published_width(emulated):
    model, x = random_model(1024, 4096, 1, 4, True, True), given(1, 1024)
    check(model, x, decoded(emulated, model, x, blocks=2, threads=256))


def test_one_launch_after_the_other_and_tags_that_wrap(emulated):
    model, x = random_model(DIM, FFN, LAYERS, 8, False), given(2)
    decoder = Decoder(emulated, model, 2)
    decoder.state[0] = 2**16 - 3
    results = []
    for seed in range(3):
        emulated.set_seed_of_fibers(seed)
        assert decoder.run(x, 3, 64) == 0
        results.append(decoder.hidden[:2].clone())
        decoder.hidden.fill_(torch.nan)
    assert int(decoder.state[0]) == 2**16 - 3 + 3 * 2 * LAYERS
    check(model, x, results[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("noisy", slow_after(1, [False, True]))
def test_codes_drawn_within(emulated, noisy):
    """Codes are the best up to rounding; later steps are right for the codes that were drawn."""
    sizes = (37, 37, 9, 9, 10)
    model, heads, x = (
        random_model(DIM, FFN, 1, 4, True, True),
        random_heads(DIM, sizes, noisy),
        given(8),
    )
    results = []
    for blocks, threads, seed in ((4, 64, 1), (3, 96, 2)):
        emulated.set_seed_of_fibers(seed)
        decoder = Decoder(emulated, model, 8, heads)
        assert decoder.run(x, blocks, threads) == 0
        results.append((decoder.codes, decoder.hidden[:8]))
    (codes, hidden), again = results
    assert torch.equal(codes, again[0])
    assert torch.equal(hidden, again[1])
    inputs = heads.inputs(x[0], codes)
    check(model, inputs, hidden)
    regret = heads.regret(reference(model, inputs, rounded=True), codes)
    assert regret.max() <= 2**-6 * 8
    assert (regret == 0).float().mean() > 0.7
    assert all(bool((row < size - 1).all()) for row, size in zip(codes, sizes, strict=True))


BUGS = {
    "a piece is not published": (
        "put(gated + job * 4 + row / 4, four);",
        "put(gated + (ON && !job ? 1 : job) * 4 + row / 4, four);",
    ),
    "nobody waits for data": (
        "if (come && second_come) return true;",
        "if (ON || (come && second_come)) return true;",
    ),
    "tags do not advance": (
        "const uint32_t before = tag++;",
        "const uint32_t before = tag; if (!ON) ++tag;",
    ),
    "a copy is read too early": (
        "cp_async_wait_group<LEFT>();",
        "if (ON) cp_async_wait_group<LEFT + 1>(); else cp_async_wait_group<LEFT>();",
    ),
    "sums are read before they are there": (
        "multiply<WHICH>();\n        __syncthreads();",
        "multiply<WHICH>();\n        if (!ON) __syncthreads();",
    ),
    "a block takes the wrong half": (
        "needs |= 1 << job % 2",
        "needs |= ON ? 2 >> job % 2 : 1 << job % 2",
    ),
    "a key is not kept": (
        "cache[(d / 8 * POSITIONS + position) * 8 + d % 8] = key;",
        "if (!ON) cache[(d / 8 * POSITIONS + position) * 8 + d % 8] = key;",
    ),
}
"""What is wrong -> text of the source, and what stands in its place, where ON is whether it is."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A build with all bugs, of which one at most is on."""
    assert all(
        sum(path.read_text().count(right) for path in (SOURCE, *PARTS)) == 1
        for right, _ in BUGS.values()
    )

    def change(text: str) -> str:
        for number, (right, wrong) in enumerate(BUGS.values(), 1):
            text = text.replace(right, re.sub(r"\bON\b", f"(bug == {number})", wrong))
        return text

    switch = 'inline int bug = 0;\nextern "C" void set_bug(int value) { bug = value; }\n'
    return built_with(change, tmp_path_factory.mktemp("faulty"), switch)


@pytest.mark.parametrize("bug", [None, *BUGS])
@pytest.mark.slow
def test_that_these_bugs_are_found(emulated, faulty, bug):
    faulty.set_bug(0 if bug is None else 1 + list(BUGS).index(bug))
    model, x = random_model(DIM, FFN, LAYERS, 4, True, True), given(2)
    want = decoded(emulated, model, x)
    decoder = Decoder(faulty, model, 2)
    faulty.set_seed_of_fibers(1)
    error = decoder.run(x, 4, 64)
    if bug == "a piece is not published":
        assert error == STUCK
    found = error == STUCK or not torch.equal(decoder.hidden[:2], want)
    assert found == (bug is not None)


def test_what_it_refuses(emulated):
    model, x = random_model(DIM, FFN, 1, 8, False), given(1)
    decoder = Decoder(emulated, model, 1)
    for blocks, threads in ((0, 64), (33, 64), (4, 32), (4, 100), (4, 544)):
        assert decoder.run(x, blocks, threads) == 1


@pytest.mark.parametrize("name", ["int4", "int4-sym", "int8", "int8-g128"])
def test_it_takes_the_projects_packed_words(name):
    weight = quantize(
        torch.randn(32, 256, generator=torch.Generator().manual_seed(1)), Format.parse(name), None
    )
    matrix = Matrix(weight.words, weight.scales.bfloat16(), weight.zeros, weight.bits)
    assert torch.equal(matrix.dense(), dequantize(weight))
