"""The sampling kernels under Triton's interpreter: the reference's tokens for the same seeds."""

import math

import pytest
import torch
from helpers import assert_as_exact_as_eager, refuses, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import rows_not_finite, rows_of
from torch import Tensor
from torch.testing import assert_close

from mimo_fast.kernels import sample_text as text_module
from mimo_fast.kernels.dispatch import jit, tl
from mimo_fast.kernels.sample import (
    NEAR,
    NOT_FINITE,
    SamplerTensors,
    filter_scores,
    gumbel,
    near_gumbel,
)
from mimo_fast.kernels.sample_codes import (
    code_steps,
    head_logits,
    patch_noise,
    patch_noise_ref,
    sample_codes,
    sample_codes_ref,
)
from mimo_fast.kernels.sample_text import sample_text, sample_text_ref
from mimo_fast.sampling import GREEDY, MiMoSampler, sampler_tensors

SETTINGS = [(), (0.6, 50, 0.95), (0.9, None, 0.95), (0.5, 3), (2.0, None, 0.02), (1.0, 1, 0.5)]
MORE = [(0.6, None, 1.0), (1.3, 10**6, 0.5), (1.0, None, 1e-9), (0.7, 7, 0.3)]
SAMPLERS = [MiMoSampler(True, *each) for each in SETTINGS]
SAMPLERS += [GREEDY, *(MiMoSampler(True, *each) for each in MORE)]
KINDS = ["normal", "ties", "-inf", "one-hot", "flat", "steep", "zeros"]
pytestmark = pytest.mark.usefixtures("poisoned")


def random_seeds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = seeded(seed + 999)
    return torch.randint(2**62, (n,), generator=rng), torch.randint(2**33, (n,), generator=rng)


def undecided(logits, batch: SamplerTensors, got: Tensor, want: Tensor, slack=1e-5) -> Tensor:
    """Rows in which float32 rounding of 1 - top_p decides whether the drawn token is kept."""
    settings = batch.temperature, batch.top_k
    kept = []
    for tail in (batch.tail - slack, batch.tail + slack):
        moved = SamplerTensors(*settings, tail, batch.greedy, False)
        kept.append(filter_scores(logits, moved) > -math.inf)
    moved = kept[0] != kept[1]
    at = torch.stack((got, want), dim=1).clamp(min=0)
    return (batch.tail > 0) & moved.gather(1, at).any(1)


def assert_same_tokens(logits: Tensor, picked: list[MiMoSampler], seed: int, banned=None) -> int:
    """Compares and returns how many rows rounding left undecided."""
    batch = sampler_tensors(picked)
    seeds, draws = random_seeds(len(logits), seed)
    got = sample_text(logits, batch, seeds, draws, banned)
    want = sample_text_ref(logits, batch, seeds, draws, banned)
    assert got.dtype == torch.int64
    differ = got != want
    assert not (differ & ~undecided(logits, batch, got, want)).any(), (got, want)
    return int(differ.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_text_tokens_are_the_references(kind):
    logits = rows_of(kind, len(SAMPLERS), 1100, seed=3)
    assert assert_same_tokens(logits, SAMPLERS, 1) == 0


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_text_tokens_with_banned_ids(kind):
    logits = rows_of(kind, len(SAMPLERS), 300, seed=1)
    banned = torch.rand(len(SAMPLERS), 300, generator=seeded(2)) < 0.5
    assert assert_same_tokens(logits, SAMPLERS, 5, banned) == 0
    assert assert_same_tokens(logits, SAMPLERS, 6, banned[0]) == 0
    # A row whose best ids are all banned, so that often nothing is left.
    best = logits >= logits.quantile(0.99, dim=1, keepdim=True)
    assert assert_same_tokens(logits, SAMPLERS, 7, best) == 0


@pytest.mark.parametrize("size", [2, 1100, 5000])
def test_logits_that_are_no_numbers_draw_nothing(size):
    """In every chunk, with rows beside them that are not touched, and no loop without an end."""
    logits, banned, lost = rows_not_finite(size)
    picked = [SAMPLERS[row % len(SAMPLERS)] for row in range(len(logits))]
    for ban in (banned, None):
        where = (
            lost if ban is not None else ~(logits < math.inf).all(1) | (logits == -math.inf).all(1)
        )
        for chosen in (picked, [GREEDY] * len(logits)):
            ids = sample_text(
                logits, sampler_tensors(chosen), *random_seeds(len(logits), size), ban
            )
            assert torch.equal(ids == NOT_FINITE, where)
            assert assert_same_tokens(logits, chosen, size, ban) == 0


def test_text_tokens_at_the_published_vocabulary():
    logits = rows_of("normal", 1, 151_680, seed=3).half()
    for sampler in (MiMoSampler(True, 0.9, 500, 0.4), GREEDY):
        assert assert_same_tokens(logits, [sampler], 1) == 0


def test_only_kept_ids_are_drawn():
    """Of the best id and one other, the other is drawn if and only if it is kept."""
    row = rows_of("ties", 1, 12, seed=8)[0]
    ids = torch.arange(12)
    banned = (ids != ids[:, None]) & (ids != int(row.argmax()))
    for sampler in (MiMoSampler(True, 9.0, 4), MiMoSampler(True, 9.0, 8, 0.6)):
        kept = filter_scores(row[None], sampler_tensors([sampler]))[0] > -math.inf
        batch, tokens = sampler_tensors([sampler] * 12), set()
        for draw in range(6):
            drawn = sample_text(row.expand(12, -1), batch, ids + 50, ids * 0 + draw, banned)
            tokens.update(drawn.tolist())
        assert tokens == set(ids[kept].tolist())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_text_tokens_of_any_rows(data):
    n, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    floats = st.floats(-30, 30, width=32)
    value = st.one_of(st.integers(-3, 3).map(float), floats, st.just(-math.inf))
    row = st.lists(value, min_size=size, max_size=size).filter(lambda x: max(x) > -math.inf)
    logits = torch.tensor(data.draw(st.lists(row, min_size=n, max_size=n)))
    temperatures, shares = st.sampled_from([0.3, 1.0, 2.5]), st.floats(0, 1)
    sampler = st.builds(MiMoSampler, st.booleans(), temperatures, st.integers(0, 45), shares)
    picked = [data.draw(sampler) for _ in range(n)]
    masks = st.lists(st.booleans(), min_size=size, max_size=size)
    banned = torch.tensor([data.draw(masks) for _ in range(n)])
    ban, seed = data.draw(st.sampled_from([None, banned])), data.draw(st.integers(0, 100))
    assert_same_tokens(logits, picked, seed, ban)


def test_a_text_draw_depends_on_nothing_around_it():
    logits = rows_of("normal", len(SAMPLERS), 500, seed=4)
    seeds, draws = random_seeds(len(SAMPLERS), 3)
    batch = sampler_tensors(SAMPLERS)
    together = sample_text(logits, batch, seeds, draws)
    strided = sample_text(logits.T.contiguous().T, batch, seeds, draws)
    assert torch.equal(together, strided)
    for row in (2, 0, 10):
        one = slice(row, row + 1)
        alone = sample_text(logits[one], batch.select([row]), seeds[one], draws[one])
        assert torch.equal(alone, together[one])


def test_settings_of_rows_are_taken_in_one_launch():
    batch, index = sampler_tensors(SAMPLERS), torch.tensor([10, 0, 6, 6, 3])
    taken = batch.select(index)
    for name in ("temperature", "top_k", "tail", "greedy"):
        assert torch.equal(getattr(taken, name), getattr(batch, name)[index]), name
    twice = batch.select([2, 0], repeat=2)
    assert torch.equal(twice.temperature, batch.temperature[[2, 2, 0, 0]])


def test_the_host_may_say_that_nobody_uses_top_k(monkeypatch):
    logits = rows_of("normal", 2, 300, seed=4)
    batch = sampler_tensors([SAMPLERS[2]] * 2)
    seeds, draws = random_seeds(2, 3)
    want = sample_text(logits, batch, seeds, draws)
    monkeypatch.setattr(text_module, "text_digit_kernel", None)
    settings = batch.temperature, batch.top_k, batch.tail, batch.greedy
    told = SamplerTensors(*settings, False, any_top_k=False)
    assert torch.equal(sample_text(logits, told, seeds, draws), want)


@pytest.mark.parametrize("kind", KINDS)
def test_winners_that_are_near_each_other_are_told_apart(kind, monkeypatch):
    """A bound so wide that the exact noise decides every draw."""
    monkeypatch.setattr(text_module, "NEAR", 100.0)
    logits = rows_of(kind, len(SAMPLERS), 300, seed=3)
    banned = torch.rand(len(SAMPLERS), 300, generator=seeded(2)) < 0.2
    assert assert_same_tokens(logits, SAMPLERS, 1, banned) == 0


@jit
def near_noise_kernel(words_ptr, noise_ptr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(noise_ptr + o, near_gumbel(tl.load(words_ptr + o).to(tl.uint32)))


def test_near_noise_is_near():
    ends = torch.arange(1024)
    near = [ends, 2**32 - 1 - ends, 2**27 - 512 + ends, 2**31 - 512 + ends]
    anywhere = torch.randint(2**32, (64 * 1024,), generator=seeded(0))
    words = torch.cat([*near, 1 << torch.arange(1024) % 32, anywhere])
    noise = torch.zeros(len(words))
    near_noise_kernel[(len(words) // 1024,)](words, noise, BLOCK=1024)
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    # A GPU's logarithm is less exact than the interpreter's: NEAR has room for both.
    assert (noise - exact).abs().max() < NEAR / 50


def test_text_arguments_that_do_not_match_are_refused():
    logits, (seeds, draws) = torch.zeros(2, 5), random_seeds(2, 0)
    refuses("1 of settings", sample_text, logits, sampler_tensors([GREEDY]), seeds, draws)
    banned, two = torch.zeros(4, dtype=torch.bool), sampler_tensors([GREEDY] * 2)
    refuses("banned", sample_text, logits, two, seeds, draws, banned)


def test_patch_noise_is_gumbels_bit_for_bit():
    seeds = torch.tensor([0, 2**63 - 1, 12345, 1 << 32])
    draws = torch.tensor([0, 2**31, 7, 2**32 - 1])
    noise = patch_noise(seeds, draws, 4, 300)
    assert torch.equal(noise, patch_noise_ref(seeds, draws, 4, 300))
    frame_3 = gumbel(seeds, draws, torch.full((4,), 4), 300)
    assert torch.equal(noise[:, 3], frame_3)


@pytest.mark.parametrize("shape", [(1, 33, 64), (17, 129, 200), (2, 16, 5), (3, 65, 1024)])
def test_head_logits(shape, dtype):
    rows, size, dim = shape
    rng = seeded(size)
    hidden, heads = (torch.randn(n, dim, generator=rng).to(dtype) for n in (rows, size))
    got = head_logits(hidden, heads)
    assert_as_exact_as_eager(got, hidden @ heads.T, hidden.double() @ heads.double().T)
    assert torch.equal(head_logits(hidden[:1], heads), got[:1]), "a row depends on its neighbours"


SIZES = {"published": (1025, 1025, *[129] * 6), "tiny": (65, 65, *[17] * 6), "odd": (9, 30, 17)}
DELAYS = {"published": tuple(range(8)), "tiny": tuple(range(8)), "odd": (3, 0, 7)}


def check_patch(name: str, picked: list[MiMoSampler], seed: int, scale: float) -> None:
    """All steps of a patch of random hidden states: codes and embeddings are the reference's."""
    sizes, rng = SIZES[name], seeded(seed)
    empty = [(c * 5) % size for c, size in enumerate(sizes)]
    rows, table = len(picked), sum(sizes)
    steps = code_steps(sizes, empty, DELAYS[name], group_size=4)
    # Small integers times a power of two: sums are exact, whatever their order, and ties are many.
    values = (torch.randint(-2, 3, (n, 24), generator=rng).float() for n in (rows, table))
    hidden, heads = (x * scale for x in values)
    embeddings = torch.randn(table, 40, generator=rng)
    batch, (seeds, draws) = sampler_tensors(picked), random_seeds(rows, seed)
    noise = None if batch.all_greedy else patch_noise(seeds, draws, 4, table)
    got, want = (torch.full((rows, len(sizes), 4), -1) for _ in range(2))
    for step in steps:
        x = sample_codes(hidden, step, heads, batch, noise, got, embeddings)
        y = sample_codes_ref(hidden, step, heads, batch, noise, want, embeddings)
        assert_close(x, y, rtol=1e-6, atol=1e-6)
        hidden = hidden.roll(1, dims=1)
    assert torch.equal(got, want)
    assert bool((got >= 0).all())
    assert not bool((got == torch.tensor(empty)[:, None]).any())


SCALES = [("published", 0.25), ("tiny", 0.25), ("odd", 1.0), ("odd", 0.125)]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_codes_are_the_references(name, scale):
    check_patch(name, [SAMPLERS[1]] if name == "published" else SAMPLERS, 3, scale)


def test_codes_of_a_row_depend_on_nothing_around_it():
    sizes = SIZES["tiny"]
    step = code_steps(sizes, [0] * 8, DELAYS["tiny"], 4)[3]
    rng = seeded(0)
    width = sum(sizes)
    hidden, heads, embeddings = (torch.randn(n, 32, generator=rng) for n in (5, width, width))
    seeds, draws = random_seeds(5, 1)
    batch = sampler_tensors(SAMPLERS[:5])

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        codes = torch.full((len(rows), 8, 4), -1)
        noise = patch_noise(seeds[rows], draws[rows], 4, sum(sizes))
        given = hidden[rows], step, heads, batch.select(rows), noise, codes, embeddings
        return sample_codes(*given), codes

    x, codes = run([0, 1, 2, 3, 4])
    for row in (3, 0):
        alone_x, alone_codes = run([row])
        assert torch.equal(alone_x[0], x[row])
        assert torch.equal(alone_codes[0], codes[row])
    written = {(c, 3 - c) for c in range(4)}
    assert {tuple(at) for at in (codes[0] >= 0).nonzero().tolist()} == written


def test_codes_are_written_into_any_strides():
    sizes = SIZES["tiny"]
    step = code_steps(sizes, [0] * 8, DELAYS["tiny"], 4)[5]
    hidden = torch.ones(2, 16)
    table = torch.randn(sum(sizes), 16, generator=seeded(1))
    codes = torch.full((4, 8, 2), -1).permute(2, 1, 0)
    want = codes.contiguous()
    batch = sampler_tensors([GREEDY] * 2)
    sample_codes(hidden, step, table, batch, None, codes, table)
    sample_codes_ref(hidden, step, table, batch, None, want, table)
    assert torch.equal(codes, want)


def test_a_step_without_active_heads_gives_zeros():
    steps = code_steps((5, 5), (0, 0), (0, 9), group_size=4)
    assert [step.heads.shape[1] for step in steps] == [1] * 4 + [0] * 5 + [1] * 4
    table, codes = torch.ones(10, 8), torch.full((1, 2, 4), -1)
    greedy = sampler_tensors([GREEDY])
    x = sample_codes(torch.ones(1, 8), steps[5], table, greedy, None, codes, table)
    assert torch.equal(x, torch.zeros(1, 8))
    assert bool((codes == -1).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["one head", "one row", "the empty code"])
def test_codes_of_logits_that_are_no_numbers_are_none(value, place):
    """Only those, in rows and channels; and no address is out of the table."""
    sizes, rows = SIZES["tiny"], len(SAMPLERS)
    empty = [size - 1 for size in sizes]
    step = code_steps(sizes, empty, DELAYS["tiny"], 4)[3]
    generator = torch.Generator().manual_seed(0)
    hidden, heads, embeddings = (
        torch.randn(n, 32, generator=generator) for n in (rows, sum(sizes), sum(sizes))
    )
    lost = torch.zeros(rows, 8, dtype=torch.bool)
    first = sizes[0]
    if place == "one row":
        hidden[2], lost[2, :4] = math.nan, True
    else:
        heads[first + (empty[1] if place == "the empty code" else 7)] = math.nan
        lost[:, 1] = True
    if value == math.inf:
        heads, hidden = heads.nan_to_num(math.inf), hidden.nan_to_num(math.inf)
        hidden = hidden.abs() if place != "one row" else hidden
        heads = heads.abs() if place == "one row" else heads
    got, want = (torch.full((rows, 8, 4), -7) for _ in range(2))
    for picked in (SAMPLERS, [GREEDY] * rows):
        batch = sampler_tensors(picked)
        seeds, draws = random_seeds(rows, 1)
        noise = None if batch.all_greedy else patch_noise(seeds, draws, 4, sum(sizes))
        x = sample_codes(hidden, step, heads, batch, noise, got, embeddings)
        y = sample_codes_ref(hidden, step, heads, batch, noise, want, embeddings)
        assert torch.equal(got, want)
        frames = 3 - torch.arange(4)
        assert torch.equal(got[:, torch.arange(4), frames] == NOT_FINITE, lost[:, :4])
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        assert x.isfinite().all()


def test_code_arguments_that_do_not_match_are_refused():
    step, table = code_steps((5,), (0,), (0,), 4)[0], torch.ones(5, 8)
    given = step, table, sampler_tensors([GREEDY]), None, torch.zeros(1, 1, 4).long(), table
    refuses("go together", sample_codes, torch.ones(1, 7), *given)
