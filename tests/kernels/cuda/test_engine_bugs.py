"""Tests of the tests: bugs in the persistent kernel's source that test_engine_proof.py finds."""

import ctypes

import pytest
import torch
from engine_launches import faulty_build
from engine_models import DIVISIONS, PROGRAMS, Whole, everything, gpus_lm, same

FOUND_WITHIN = 12
"""Seeds in each of which all three transformers run in all divisions."""

BUGS = {
    "nobody waits": (
        "{ return piece.x != NOT_THERE; }",
        "{ return ON || piece.x != NOT_THERE; }",
    ),
    "a piece is not published": (
        "if (lane % 4 == 0 && real) put(",
        "if (lane % 4 == 0 && real && !(ON && lane == 8 && blockIdx.x == 1)) put(",
    ),
    "only the first of two pieces is waited for": (
        "!(there(piece) && there(second)) &&",
        "!(there(piece) && (ON || there(second))) &&",
    ),
    "two places for three phases": (
        "return place + 1 == PHASES ? 0",
        "return place + 1 == (ON ? 2 : PHASES) ? 0",
    ),
    "columns of x are multiplied before all are there": (
        "if (!together()) return false;\n                if (phase.norm",
        "if (!ON && !together()) return false;\n                if (phase.norm",
    ),
    "columns of x in the place of those that are multiplied": (
        "if (tile0 || chunk) __syncthreads();\n                stage<F>(",
        "if (!ON && (tile0 || chunk)) __syncthreads();\n                stage<F>(",
    ),
    "sums are read before all are there": (
        "__syncthreads();\n        if (tile0 == 0) prefetch();\n        if (matrix",
        "if (!ON) __syncthreads();\n        if (tile0 == 0) prefetch();\n        if (matrix",
    ),
    "one buffer of sums": ("buffer ^= 1;", "buffer ^= !ON;"),
    "a copy is read too early": (
        "float (&total)[4]) {\n    cp_async_wait_group<DEPTH - F::PARTS>();",
        "float (&total)[4]) {\n    if (ON) cp_async_wait_group<DEPTH - F::PARTS + 1>();\n"
        "    else cp_async_wait_group<DEPTH - F::PARTS>();",
    ),
    "what other lanes asked for is read too early": (
        "is there as well.\n    sync_warp();\n    // Dense words",
        "is there as well.\n    if (!ON) sync_warp();\n    // Dense words",
    ),
    "a slot is asked for before other lanes have read it": (
        "slots that are asked for now.\n        sync_warp();",
        "slots that are asked for now.\n        if (!ON) sync_warp();",
    ),
    "keys of another row": (
        "(cache + lane * OWN_HEAD + d)",
        "(cache + (ON ? (m ^ 1) - m : 0) * OWN_VALUES + lane * OWN_HEAD + d)",
    ),
    "a residual is not waited for": (
        "there(before) ? before : wait_for(residual_from",
        "there(before) || ON ? before : wait_for(residual_from",
    ),
    "a vector of another step": (
        "(outside ? 0 : int64_t(step) * p.loop_columns)",
        "(outside || ON ? 0 : int64_t(step) * p.loop_columns)",
    ),
}
"""What is wrong -> text of the source, and what stands in its place, where ON is whether it is."""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A build with all bugs, of which one at most is on."""
    return faulty_build(tmp_path_factory.mktemp("faulty"), BUGS)


@pytest.mark.parametrize("bug", [None, *BUGS])
@pytest.mark.slow
def test_that_these_bugs_are_found(emulated, faulty, bug):
    lm = gpus_lm(emulated, "smallest", "int4", torch.bfloat16)
    faulty.set_bug(0)
    alone = Whole(faulty, lm, blocks=1, threads=32)
    want = {program: everything(alone, program) for program in PROGRAMS}
    faulty.set_bug(0 if bug is None else 1 + list(BUGS).index(bug))

    def found(seed: int) -> bool:
        # A launch that went astray leaves nothing to the next one.
        for division in DIVISIONS.values():
            whole = Whole(faulty, lm, **division)
            for program in PROGRAMS:
                try:
                    if not same(everything(whole, program, seed), want[program]):
                        return True
                except RuntimeError:
                    return True
        return False

    assert any(found(seed) for seed in range(1, 1 + FOUND_WITHIN)) == (bug is not None)
