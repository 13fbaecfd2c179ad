"""The persistent kernel as the published model has it on each card, without one: shared memory, and
the accesses of its PTX."""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from engine_launches import SOURCE
from test_engine_tables import network

from mimo_fast.kernels.cuda.engine import Tables
from mimo_fast.kernels.cuda.engine_launch import DEPTHS, THREADS, Grid, Launcher
from mimo_fast.runtime.lm.programs import (
    backbone_tables,
    patch_decoder_tables,
    patch_encoder_tables,
)

CARDS = {
    "A100": Grid(108, 163 * 1024),
    "A10": Grid(72, 99 * 1024),
    "4090": Grid(128, 99 * 1024),
    "H100": Grid(132, 227 * 1024),
    "B200": Grid(148, 227 * 1024),
    "5090": Grid(170, 99 * 1024),
}
"""Of sm_80, 86, 89, 90, 100, 120: multiprocessors, and shared memory that a block may have."""

KERNELS = 8
"""Transformers in two types, and the two programs of the codec; each with two depths."""

POSITIONS = 8192
"""Of a row of the backbone."""


def programs(blocks: int, bits: int) -> dict[str, Tables]:
    given = network(bits=bits)
    return {
        "decoder": patch_decoder_tables(given, blocks),
        "encoder": patch_encoder_tables(given, blocks),
        "backbone": backbone_tables(given, blocks),
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("card", CARDS)
def test_the_published_programs_fit_into_shared_memory(engine, card, bits):
    grid, error = CARDS[card], torch.zeros(1, dtype=torch.int32)
    for name, tables in programs(grid.blocks, bits).items():
        launcher = Launcher(tables, grid, error, engine)
        for rows in (1, 8):
            capacity = POSITIONS if name == "backbone" else 0
            program, (threads, depth) = launcher._fixed(rows, capacity)
            taken = engine.mimo_fast_engine_shared(ctypes.byref(program), threads, depth)
            assert taken <= grid.shared, name
            assert (threads, depth) in product(THREADS, DEPTHS)


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of each kernel, by its mangled name."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    target = tmp_path_factory.mktemp("ptx") / "engine.ptx"
    flags = ["-std=c++17", "-O3", f"-I{SOURCE.parent}", "-arch=sm_80", "-ptx"]
    subprocess.run(["nvcc", *flags, SOURCE, "-o", target], check=True)
    entries = re.split(r"(?m)^\.(?:visible \.)?entry |^\.func ", Path(target).read_text())[1:]
    return {text.split("(", 1)[0]: text for text in entries}


@pytest.mark.slow
def test_what_blocks_exchange_is_read_and_written_as_one_value(ptx):
    """Pieces by relaxed accesses of 64 bits, the word of errors by those of 32; nothing else has an
    order or is seen by the whole GPU. What else is written: outputs, keys and values, codes."""
    assert len(ptx) == KERNELS
    for name, code in ptx.items():
        found = Counter(
            re.findall(r"\b(?:ld|st)\.(?:relaxed|acquire|release|volatile)[\w.]*", code)
        )
        assert {*found} == {
            f"{access}.relaxed.gpu.global.{kind}"
            for access in ("ld", "st")
            for kind in ("b64", "u32")
        }, name
        # Who looks again looks at the error, too, and may set it.
        words = (found[f"{access}.relaxed.gpu.global.u32"] for access in ("ld", "st"))
        assert len({*words}) == 1
        assert not re.findall(r"\b(?:atom|red\.(?:gpu|release|global)|fence|membar)\b", code), name
        plain = Counter(re.findall(r"\bst\.global\.[\w.]+", code))
        kinds = ("u16", "b16", "u64", "v2.u32", "v4.u32")
        assert {*plain} <= {f"st.global.{kind}" for kind in kinds}
        # A normed output; what the codec keeps of a stream.
        assert plain["st.global.v2.u32"] + plain["st.global.v4.u32"] <= 1


def test_all_blocks_are_launched_at_once():
    text = (SOURCE.parent / "engine" / "grid.cuh").read_text()
    launch = text[text.index("int start_together(") :]
    assert "together.id = cudaLaunchAttributeCooperative;" in launch
    assert "together.val.cooperative = 1;" in launch
    assert launch.index("config.attrs = &together;") < launch.index("cudaLaunchKernelEx(")
