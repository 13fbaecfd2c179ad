"""Attention of the persistent kernel: among few positions, and over a cache in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from engine_launches import Launches, grid_of, normed, today
from helpers import assert_rounded, slow_after
from test_cuda_kernels import random, weight_of
from torch import Tensor

from mimo_fast.kernels.cuda.engine import (
    COLUMNS,
    MOST_ROWS,
    OWN_BYTES,
    Order,
    Tables,
    job_columns,
)
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.rope import rope_table

HALF, BFLOAT = torch.float16, torch.bfloat16

SUMS = 2e-5
"""Error of the weights of attention and of the sums that they are in, relative to sums of
magnitudes: scores up to 30 in float32, each with an exponential of its own."""


def rotated(x: Tensor, table: Tensor, position: int) -> Tensor:
    """x [..., Dh] at a position, in its dtype and in the kernel's order of operations."""
    cosine, sine = table[:, position].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


def key_of(k: Tensor, table: Tensor, position: int) -> Tensor:
    """What a cache holds of a key: rotated in float32, then rounded."""
    return rotated(k.float(), table, position).to(k.dtype)


def attended(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """q [Dh] float64, keys and values [L, Dh] -> float64 [Dh], and a bound of its error."""
    weights = (keys.double() @ q / q.shape[-1] ** 0.5).softmax(0)
    return weights @ values.double(), SUMS * (weights @ values.double().abs()) + 2.0**-25


# ---- Over a cache, in parts


@dataclass(frozen=True)
class Heads:
    share: int
    kv_heads: int
    head_dim: int

    @property
    def heads(self) -> int:
        return self.share * self.kv_heads

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = (
    Heads(1, 2, 16),
    Heads(2, 2, 64),
    Heads(4, 1, 128),
    Heads(8, 2, 16),
    Heads(4, 2, 32),
    Heads(1, 4, 8),
    Heads(8, 1, 64),
)
LENGTHS = (1, 63, 64, 65, 512, 513, 1024, 1090)
CAPACITY, LAYERS, SLOTS = 1100, 2, 10


class OverCache:
    """Tables of attention alone, of qkv [R, (H + 2 Hkv) Dh]; caches of NaN but for positions before
    the new one."""

    def __init__(self, engine, shape: Heads, dtype=BFLOAT, positions: int = 1200, **grid: int):
        self.shape, self.dtype = shape, dtype
        self.rope = rope_table(shape.head_dim, 1e4, positions)
        tables = self.tables = Tables(dtype, grid.get("blocks", 5))
        identity = torch.eye(shape.columns, -(-shape.columns // COLUMNS) * COLUMNS, dtype=dtype)
        qkv = tables.product(identity, "qkv")
        self.to = tables.attend(qkv, shape.heads, shape.kv_heads, shape.head_dim, layer=1)
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        tables.set(**sizes, rope=self.rope, positions=positions)
        self.launches = Launches(engine, tables, grid_of(**{"blocks": 5, **grid}), {})

    def caches(self, starts: Sequence[int], slots: Sequence[int], capacity: int) -> list[Tensor]:
        """Keys and values [layers, slots, Hkv, capacity, Dh]."""
        made = []
        for seed in (1, 2):
            shape = LAYERS, SLOTS, self.shape.kv_heads, capacity, self.shape.head_dim
            cache = torch.full(shape, torch.nan, dtype=self.dtype)
            for start, slot in zip(starts, slots, strict=True):
                past = cache[1, slot, :, : max(start, 0)]
                past.copy_(random(*past.shape, seed=10 * slot + seed, dtype=self.dtype))
            made.append(cache)
        return made

    def run(self, qkv: Tensor, starts, slots, keys, values, seed: int = 1) -> Tensor:
        self.launches(
            len(qkv),
            {"qkv": torch.nn.functional.pad(qkv, (0, -qkv.shape[1] % COLUMNS))},
            seed,
            keys=keys,
            values=values,
            layer_stride=keys.stride(0),
            slot_stride=keys.stride(1),
            head_stride=keys.stride(2),
            capacity=keys.shape[3],
            slots=torch.tensor(slots),
            starts=torch.tensor(starts),
        )
        return self.launches.vector(self.to, len(qkv))

    def qkv(self, rows: int, seed: int = 0) -> Tensor:
        return random(rows, self.shape.columns, seed=seed + 5, dtype=self.dtype) * 1.5

    def want(self, qkv: Tensor, starts, slots, keys, values) -> tuple[Tensor, Tensor]:
        """[R, H Dh] and its bound; new keys and values are written to the caches."""
        shape = self.shape
        most = min(keys.shape[3], self.rope.shape[1])
        want, bound = (torch.zeros(len(qkv), shape.heads * shape.head_dim).double() for _ in "12")
        heads = qkv.unflatten(1, (-1, shape.head_dim))
        for row, (start, slot) in enumerate(zip(starts, slots, strict=True)):
            if not 0 <= start < most:
                continue
            q, k, v = heads[row].split([shape.heads, shape.kv_heads, shape.kv_heads])
            keys[1, slot, :, start] = key_of(k, self.rope, start)
            values[1, slot, :, start] = v
            for head in range(shape.heads):
                of, columns = head // shape.share, slice(head * shape.head_dim, None)
                past = (each[1, slot, of, : start + 1] for each in (keys, values))
                made = attended(rotated(q[head].double(), self.rope, start), *past)
                for all_heads, one in zip((want, bound), made, strict=True):
                    all_heads[row, columns][: shape.head_dim] = one
        return want, bound

    def check(
        self, starts: Sequence[int], slots: Sequence[int], capacity=CAPACITY, seed=1
    ) -> Tensor:
        qkv = self.qkv(len(starts), seed)
        got_caches, want_caches = (self.caches(starts, slots, capacity) for _ in "12")
        got = self.run(qkv, starts, slots, *got_caches, seed=seed)
        want, bound = self.want(qkv, starts, slots, *want_caches)
        assert_rounded(got, want, noise=bound)
        for mine, theirs in zip(got_caches, want_caches, strict=True):
            assert torch.equal(mine.view(torch.int16), theirs.view(torch.int16))
        return got


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("shape", slow_after(4, SHAPES), ids=str)
def test_lengths(engine, shape, dtype):
    """A part or several, the last of any length, the new position first or last in one."""
    over = OverCache(engine, shape, dtype)
    over.check([length - 1 for length in LENGTHS], [3, 1, 4, 0, 5, 9, 2, 6])


@pytest.mark.parametrize("seed", slow_after(1, range(12)))
def test_any_lengths_and_slots(engine, seed):
    rng = torch.Generator().manual_seed(seed)
    over = OverCache(
        engine, SHAPES[seed % len(SHAPES)], (BFLOAT, HALF)[seed % 2], blocks=2 + seed % 5
    )
    for rows in (1, 5, 8):
        capacity = int(torch.randint(1, CAPACITY + 1, (), generator=rng))
        starts = torch.randint(-1, capacity + 2, (rows,), generator=rng).tolist()
        slots = torch.randperm(SLOTS, generator=rng)[:rows].tolist()
        over.check(starts, slots, capacity, seed)


@pytest.mark.slow
def test_a_long_cache(engine):
    """Parts of several times the least."""
    OverCache(engine, SHAPES[2], positions=9000).check([8191, 4095, 4096], [0, 2, 1], 8200)


def test_rows_without_a_position(engine):
    """Zeros, and nothing is written: none, beyond the cache, beyond the table of rotations."""
    over = OverCache(engine, SHAPES[1], positions=70)
    got = over.check([-1, 64, 5, 69, 70, 100], [0, 1, 2, 3, 4, 5], 101)
    assert [bool((row == 0).all()) for row in got] == [True, False, False, False, True, True]
    got = over.check([-1, 63, 64, 65], [0, 1, 2, 3], 64)
    assert [bool((row == 0).all()) for row in got] == [True, False, True, True]


def test_a_row_over_a_cache_has_the_same_bits_alone_and_in_any_grid(engine):
    starts, slots = [0, 700, 64, 512, -1, 1023, 5, 128], [7, 6, 5, 4, 3, 2, 1, 0]
    for shape in (SHAPES[2], SHAPES[3]):
        over = OverCache(engine, shape)
        qkv, caches = over.qkv(8), over.caches(starts, slots, CAPACITY)
        want = over.run(qkv, starts, slots, *caches)
        for row in range(8):
            other = OverCache(engine, shape, blocks=1 + row, threads=32 + 32 * (row % 3))
            caches = other.caches(starts, slots, CAPACITY)
            given = qkv[row : row + 1], starts[row : row + 1], slots[row : row + 1]
            got = other.run(*given, *caches, seed=row)
            assert torch.equal(got[0].view(torch.int16), want[row].view(torch.int16))


# ---- Among few positions


class OwnHeads:
    """A product whose tiles are whole heads, with attention among few positions; where there are
    several steps, another product makes x of the next one.

    Args:
        together: rows that attend to each other; 0: each to its own past.
    """

    DIM = 128

    def __init__(
        self,
        engine,
        name: str,
        heads: int,
        head_dim: int,
        together=0,
        causal=True,
        steps=1,
        dtype=BFLOAT,
        **grid: int,
    ) -> None:
        self.heads, self.head_dim, self.dtype, self.steps = heads, head_dim, dtype, steps
        self.together, self.causal = together, causal
        width, blocks = heads * head_dim, grid.setdefault("blocks", 3)
        self.norm = RMSNorm(random(self.DIM, seed=3, dtype=dtype), 1e-6)
        self.rope = rope_table(head_dim, 1e4, max(together, steps))
        self.qkv = weight_of(name, 3 * width, self.DIM, bias=True, dtype=dtype)
        back = weight_of(name, self.DIM, width, dtype=dtype) if steps > 1 else None
        tables = Tables(dtype, blocks)
        self.x = tables.vector(self.DIM, looped=True)
        tables.product(torch.eye(self.DIM, dtype=dtype), "x", to=self.x)
        with tables.repeated(steps):
            how = {"norm": self.norm, "order": Order.HEADS, "job": job_columns(head_dim)}
            self.to = tables.product(self.qkv, self.x, **how)
            if back is not None:
                tables.product(back, self.to, to=self.x)
                tables.phases[-1].from_prologue |= 4
        self.cache = torch.empty(heads * MOST_ROWS * OWN_BYTES // 2, dtype=dtype)
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": head_dim}
        tables.set(
            **sizes,
            rope=self.rope,
            positions=self.rope.shape[1],
            together=together or 1,
            causal=int(causal),
            cached=int(not together),
            own_cache=self.cache,
        )
        self.launches = Launches(engine, tables, grid_of(**grid), {})

    def run(self, x: Tensor, seed: int = 1) -> list[Tensor]:
        """What attention makes in each step."""
        self.cache.fill_(torch.nan)
        # The last step makes x of one that is not there.
        columns = self.launches.tables.all_columns + self.DIM
        self.launches.launcher._room(columns * len(x))
        self.launches(len(x), {"x": x}, seed)
        steps = range(self.steps)
        return [self.launches.vector(self.to, len(x), step).clone() for step in steps]

    def check(self, emulated, rows: int, seed: int = 1) -> None:
        x = random(rows, self.DIM, seed=seed, dtype=self.dtype)
        got = self.run(x, seed)
        keys, values = list[Tensor](), list[Tensor]()
        for step, made in enumerate(got):
            x = self.launches.vector(self.x, rows, step)
            norm: RMSNorm | None = self.norm
            if self.dtype == HALF:
                x, norm = normed(self.launches.library, x, self.norm, grid_of()), None
            qkv = today(emulated, x, self.qkv, norm).view(rows, 3, self.heads, self.head_dim)
            places = [row % self.together if self.together else step for row in range(rows)]
            turned = [key_of(qkv[row, 1], self.rope, places[row]) for row in range(rows)]
            keys.append(torch.stack(turned))
            values.append(qkv[:, 2])
            for row in range(rows):
                seen = self._seen(keys, values, row)
                q = rotated(qkv[row, 0].double(), self.rope, places[row])
                each = [
                    attended(q[head], seen[0][:, head], seen[1][:, head])
                    for head in range(self.heads)
                ]
                want, bound = (torch.cat(parts) for parts in zip(*each, strict=True))
                assert_rounded(made[row], want, noise=bound)
        if not self.together:
            self._check_cache(keys, values, rows)

    def _seen(self, keys: list[Tensor], values: list[Tensor], row: int) -> tuple[Tensor, Tensor]:
        """Keys and values [L, H, Dh] that a row attends to."""
        if not self.together:
            return torch.stack(keys)[:, row], torch.stack(values)[:, row]
        first = row - row % self.together
        last = row + 1 if self.causal else first + self.together
        return keys[-1][first:last], values[-1][first:last]

    def _check_cache(self, keys: list[Tensor], values: list[Tensor], rows: int) -> None:
        cache = self.cache[: self.heads * rows * 512].view(self.heads, rows, 2, 16, 16)
        want = torch.full_like(cache, torch.nan)
        for step, (key, value) in enumerate(zip(keys, values, strict=True)):
            want[:, :, 0, step, : self.head_dim] = key.transpose(0, 1)
            want[:, :, 1, : self.head_dim, step] = value.transpose(0, 1)
        assert torch.equal(cache.view(torch.int16), want.view(torch.int16))
        rest = self.cache[self.heads * rows * 512 :]
        assert bool(rest.isnan().all())


FEW = ((16, 8), (32, 4), (32, 12), (8, 16))
"""Heads, and their dimension."""


@pytest.mark.parametrize("dtype", slow_after(1, [BFLOAT, HALF]), ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), FEW)
def test_heads_with_their_past(emulated, engine, heads, head_dim, dtype):
    own = OwnHeads(engine, "int4", heads, head_dim, steps=5, dtype=dtype)
    own.check(emulated, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int8-g128", "int4-sym"])
@pytest.mark.parametrize(("heads", "head_dim"), FEW)
def test_as_many_positions_as_there_are(emulated, engine, name, heads, head_dim):
    OwnHeads(engine, name, heads, head_dim, steps=16).check(emulated, 8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("few", slow_after(2, FEW), ids=str)
def test_rows_that_are_together(emulated, engine, few, causal):
    for together, rows in ((1, 3), (2, 6), (3, 6), (4, 4), (4, 8)):
        OwnHeads(engine, "int8", *few, together, causal).check(emulated, rows)


def test_heads_have_the_same_bits_in_any_grid_and_number_of_rows(engine):
    x = random(4, OwnHeads.DIM, seed=1)
    for heads, head_dim in FEW[:3]:
        want = OwnHeads(engine, "int4", heads, head_dim, steps=3, blocks=1).run(x)
        for row, (blocks, threads) in enumerate(((2, 32), (5, 96), (17, 64), (3, 160))):
            own = OwnHeads(engine, "int4", heads, head_dim, steps=3, blocks=blocks, threads=threads)
            got, alone = own.run(x, seed=row), own.run(x[row : row + 1], seed=row)
            for step, theirs in enumerate(want):
                assert torch.equal(got[step], theirs)
                assert torch.equal(alone[step][0], theirs[row])
