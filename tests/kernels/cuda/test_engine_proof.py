"""The exchange of the persistent kernel: thousands of orders of its threads, in which stores of a
block arrive at the others late and in any order, and one that never arrives.

A launch in which nobody can go on is STUCK, which fails; one of which a block touches what another
owns is DISOWNED. All that blocks exchange is compared, not the results alone.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_launches import DISOWNED, STUCK, OneProduct, changed, grid_of
from engine_models import DIVISIONS, PROGRAMS, Whole, everything, gpus_lm, results, same
from test_cuda_kernels import random

from mimo_fast.kernels.cuda.engine import Operation
from mimo_fast.kernels.sample import NOT_FINITE

SEEDS, MOST_SEEDS = 20, 400
"""Of each program in each division: in `make test`, and in `make check`."""

BFLOAT = torch.bfloat16


@pytest.mark.parametrize(
    "seeds",
    [range(1, 1 + SEEDS), pytest.param(range(100, 100 + MOST_SEEDS), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_order_of_threads_and_stores(emulated, engine, program, division, seeds):
    """Two layers, three steps: each seed is another order and lateness."""
    lm = gpus_lm(emulated, "smallest", "int4", BFLOAT)
    want = everything(Whole(engine, lm, blocks=1, threads=32), program)
    whole = Whole(engine, lm, **DIVISIONS[division])
    for seed in seeds:
        assert same(everything(whole, program, seed), want), seed


def test_what_only_one_block_may_touch_is_watched(emulated, engine):
    """A patch decoder whose layers keep keys and values in one place."""
    whole = Whole(engine, gpus_lm(emulated, "smallest", "int4", BFLOAT), blocks=5)
    tables = whole.decoder.launcher._tables
    assert {phase.layer for phase in tables.phases} == {0, 1}
    whole.decode()
    launcher = whole.decoder.launcher
    for program, _ in launcher._programs.values():
        # The places of a layer's heads begin at those of the one before.
        program.heads = 0
    with pytest.raises(RuntimeError, match=str(DISOWNED)):
        whole.decode()


def test_a_launch_that_the_device_refuses(engine):
    product, x = OneProduct(engine, grid_of(), torch.eye(128).bfloat16()), random(3, 128)
    engine.set_refusal(82)
    with pytest.raises(RuntimeError, match=r"a persistent launch of 3 rows.* 82"):
        product(x)
    assert torch.equal(product(x), x)


def test_divisions_that_there_are_none_of(engine):
    for blocks, threads, depth in ((2, 48, 4), (2, 544, 4), (2, 0, 4), (2, 64, 5)):
        product = OneProduct(engine, grid_of(3, 64), torch.eye(128).bfloat16())
        product.launches.launcher._grid = grid_of(blocks, threads, 512 * 1024, depth=depth)
        with pytest.raises(RuntimeError, match="a persistent launch of 1 rows"):
            product(random(1, 128))


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A build in which one piece is never published, and patience is short."""
    put = "store_relaxed(static_cast<uint2*>(to), piece);"
    changes = {
        "PATIENCE = 1 << 20;": "PATIENCE = 1 << 10;",
        put: f"if (to != lost_piece) {put}",
    }
    before = (
        "inline void* lost_piece = nullptr;\n"
        'extern "C" void set_lost_piece(void* at) { lost_piece = at; }\n'
    )
    library = changed(tmp_path_factory.mktemp("lossy"), changes, before)
    library.set_lost_piece.argtypes = [ctypes.c_void_p]
    return library


@pytest.mark.slow
class TestPatience:
    @pytest.fixture
    def whole(self, emulated, lossy) -> Iterator[Whole]:
        lossy.set_looks_in_vain(1 << 14)
        yield Whole(lossy, gpus_lm(emulated, "smallest", "int4", BFLOAT))
        lossy.set_lost_piece(None)

    def without(self, whole: Whole, program: str, share: float) -> Any:
        """What is made where one of the pieces that are exchanged is never there.

        All threads leave, and the launch after it is as the one before.

        share: of all pieces, those before it.
        """
        run, launcher = PROGRAMS[program], getattr(whole, program).launcher
        right, exchanged = run(whole)
        made = (exchanged.view(-1, 4) != -1).any(1).nonzero()[:, 0]
        last = launcher._tables.phases[-1]
        if last.operation == Operation.TEXT:
            # Nobody waits for logits where no text is drawn.
            rows = exchanged.numel() // last.partial
            made = made[made < last.from_ * rows // 4]
        place = 8 * int(made[int(share * len(made))])
        whole.library.set_lost_piece(launcher._exchanged[-1].data_ptr() + place)
        got, _ = run(whole)
        assert int(whole.error) == 1, (program, share)
        whole.error.zero_()
        whole.library.set_lost_piece(None)
        again, _ = run(whole)
        assert int(whole.error) == 0
        assert same(results(again), results(right))
        return got

    @pytest.mark.parametrize("share", [0, 0.1, 0.35, 0.5, 0.7, 0.9])
    def test_all_leave_and_nothing_passes_for_a_result(self, whole, share):
        assert bool(self.without(whole, "encoder", share).isnan().any(1).all())
        hidden, logits, *_ = self.without(whole, "backbone", share)
        assert bool(torch.cat((hidden, logits), 1).isnan().any())
        codes = self.without(whole, "decoder", share * 0.9)
        assert bool((codes == NOT_FINITE).any())

    def test_with_less_patience_of_the_fibers_it_is_stuck(self, whole):
        whole.library.set_looks_in_vain(4)
        with pytest.raises(RuntimeError, match=str(STUCK)):
            self.without(whole, "encoder", 0.5)
