"""What the CPU build of the CUDA source does, by small kernels: fibers.cuh, engine/grid.cuh."""

import ctypes
from pathlib import Path

import pytest
import torch
from emulated import HEADERS, compile_for_cpu, compiled_once
from torch import Tensor

SOURCE = HEADERS / "emulation.cu"
COUNT = 8
ONES = -1
STUCK, DISOWNED, REFUSED = 719, 720, 801
SEEDS = range(200)


class Emulation:
    """Runs the kernels of emulation.cu; `out` [256] and `plain` [16] are int32."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.out = torch.zeros(256, dtype=torch.int32)
        self.plain = torch.zeros(16, dtype=torch.int32)

    def run(self, name: str, blocks: int = 2, threads: int = 32, seed: int = 1) -> int:
        self.library.set_seed_of_fibers(seed)
        self.out.fill_(-7)
        self.plain.copy_(torch.arange(16) // 4)
        pointers = ctypes.c_void_p(self.plain.data_ptr()), ctypes.c_void_p(self.out.data_ptr())
        return self.library.run(name.encode(), blocks, threads, *pointers)

    def outcomes(self, name: str, count: int, **sizes: int) -> set[tuple[int, ...]]:
        """What the first words of `out` are, under all seeds."""
        found = set()
        for seed in SEEDS:
            assert self.run(name, seed=seed, **sizes) == 0
            found.add(tuple(self.out[:count].tolist()))
        return found

    def product(self, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        """d [16, 8] + a [16, 16] b [8, 16]^T, by one warp's instruction."""
        d, half = d.clone(), a.dtype == torch.float16
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, d)]
        assert self.library.multiply_matrices(*places, int(half)) == 0
        return d

    def convert(self, name: str, values: Tensor, to: Tensor) -> None:
        places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, to)]
        getattr(self.library, name)(*places, len(values))


@pytest.fixture(scope="module", params=[None, pytest.param("BY_UCONTEXT", marks=pytest.mark.slow)])
def emulation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Emulation:
    """With this machine's change from fiber to fiber, and with that of others."""
    if request.param is None:
        return Emulation(
            compiled_once(tmp_path_factory, "emulation", [SOURCE], [HEADERS / "engine"])
        )
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / SOURCE.name
    source.write_text(f"#define {request.param}\n{SOURCE.read_text()}")
    return Emulation(compile_for_cpu([source], folder / "emulation.so", [HEADERS / "engine"]))


def test_stores_arrive_in_other_orders_except_after_a_fence(emulation):
    orders = emulation.outcomes("arrivals", COUNT)
    assert any(list(order) != sorted(order) for order in orders)
    assert len(orders) > len(SEEDS) // 2
    assert all(
        list(order) == sorted(order) for order in emulation.outcomes("fenced arrivals", COUNT)
    )


def test_stores_to_one_address_keep_their_order(emulation):
    seen = [[v for v in values if v >= 0] for values in emulation.outcomes("one address", COUNT)]
    assert all(values == sorted(values) and values[-1] == COUNT - 1 for values in seen)
    assert len(seen) > 1


def test_who_does_not_poll_may_get_what_was_there_before(emulation):
    assert emulation.outcomes("unpolled", 1) == {(5,), (ONES,)}


def test_a_block_sees_its_own_stores(emulation):
    assert emulation.outcomes("own stores", 33, blocks=1) == {(7, *[~7] * 32)}


@pytest.mark.parametrize(
    ("name", "error"),
    {
        "each its own": 0,
        "neighbours": 0,
        "all read": 0,
        "read after": DISOWNED,
        "written after": DISOWNED,
        "written twice": DISOWNED,
    }.items(),
)
def test_what_one_block_owns_no_other_may_touch(emulation, name, error):
    assert {emulation.run(name, seed=seed) for seed in SEEDS} == {error}


@pytest.mark.parametrize(
    ("name", "threads"), [("nothing comes", 32), ("lane missing", 32), ("thread missing", 64)]
)
def test_a_deadlock_is_stuck_and_the_next_launch_runs(emulation, name, threads):
    for seed in range(20):
        assert emulation.run(name, 3, threads, seed) == STUCK
        assert emulation.run("order", 1, 64, seed) == 0


def test_patience_may_end_where_looks_in_vain_are_many(emulation):
    assert emulation.run("bounded") == STUCK
    emulation.library.set_looks_in_vain(100)
    try:
        assert emulation.run("bounded") == 0
        assert emulation.out[0] == 1
        assert emulation.run("nothing comes") == STUCK
    finally:
        emulation.library.set_looks_in_vain(4)


def test_shared_memory_begins_as_nans_and_ends(emulation):
    assert emulation.run("shared at first", 1, 64) == 0
    assert bool(emulation.out[:64].view(torch.float32).isnan().all())
    assert emulation.run("beyond shared", 1) == STUCK


def test_a_launch_can_be_refused_once(emulation):
    emulation.library.set_refusal(REFUSED)
    assert emulation.run("order") == REFUSED
    assert emulation.run("order") == 0


def test_threads_come_in_an_order_of_the_seed(emulation):
    orders = emulation.outcomes("order", 64, blocks=1, threads=64)
    assert len(orders) == len(SEEDS)
    assert all(sorted(order) == [*range(64)] for order in orders)
    # All lanes of a warp before another's, and otherwise.
    split = [len({thread // 32 for thread in order[:32]}) for order in orders]
    assert {1, 2} == set(split)
    emulation.run("order", 1, 64, 5)
    first = emulation.out.clone()
    emulation.run("order", 1, 64, 5)
    assert torch.equal(first, emulation.out)


def test_a_copy_is_there_when_it_was_waited_for(emulation):
    assert emulation.outcomes("copies", 4, blocks=1) == {(ONES, 0, ONES, 1)}


def test_lanes_get_what_others_bring(emulation):
    lanes = range(32)
    want = tuple((lane * 7 + 3) % 32 + 32 * (lane ^ 5) + 1024 * 31 for lane in lanes)
    assert emulation.outcomes("shuffles", 32, blocks=1) == {want}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_are_added_one_after_the_other(emulation, dtype):
    generator = torch.Generator().manual_seed(1)
    a, b, d = (torch.randn(size, 16, generator=generator) for size in (16, 8, 8))
    a, b, d = a.to(dtype), b.to(dtype), d.T.contiguous()
    want = d.clone()
    for k in range(16):
        want += a[:, k, None].float() * b[None, :, k].float()
    assert torch.equal(emulation.product(a, b, d), want)


def same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit, but for which NaN a NaN is."""
    bits = torch.int16 if want.dtype == torch.float16 else torch.int32
    numbers = ~want.isnan()
    return torch.equal(got.isnan(), ~numbers) and torch.equal(
        got[numbers].view(bits), want[numbers].view(bits)
    )


def test_half_precision_is_converted_as_by_torch(emulation):
    every = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    wide = torch.empty(len(every))
    emulation.convert("widen_halves", every, wide)
    assert same(wide, every.float())
    # All that 19 bits can begin, and around the middle between two halves.
    heads = (torch.arange(1 << 19) << 13)[:, None]
    values = (heads + torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF])).to(torch.int32)
    values = values.view(torch.float32).flatten()
    halves = torch.empty(len(values), dtype=torch.float16)
    emulation.convert("narrow_floats", values, halves)
    assert same(halves, values.half())


def test_functions_of_three_bits(emulation):
    assert emulation.library.wrong_tables() == 0
