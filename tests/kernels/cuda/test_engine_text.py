"""The text token of the persistent kernel: kernels/sample.py's, of the same logits and draws."""

import random as python_random
from dataclasses import replace

import pytest
import torch
from engine_launches import Launches, grid_of
from engine_models import Whole, gpus_lm
from helpers import slow_after
from test_engine_codes import BFLOAT, GREEDY, HALF, random_logits, random_sampler
from torch import Tensor

from mimo_fast.kernels.cuda.engine import COLUMNS, OCTET, Tables
from mimo_fast.kernels.sample import NOT_FINITE, SamplerTensors
from mimo_fast.kernels.sample_text import TEXT_SLOT, sample_text_ref
from mimo_fast.sampling import MiMoSampler, sampler_tensors

SIZES = (1, 5, 70, 1000)
SLOT = 3


class Drawing:
    """Tables that draw tokens from given logits, which a product of zeros copies."""

    def __init__(self, engine, size: int, dtype=BFLOAT, **grid: int) -> None:
        self.dtype, self.size, self.width = dtype, size, -(-size // OCTET) * OCTET
        tables = Tables(dtype, grid.setdefault("blocks", 3))
        zeros = torch.zeros(self.width, COLUMNS, dtype=dtype)
        tables._next_block = grid["blocks"] // 2
        tables.text(tables.product(zeros, "zeros", residual="logits"), size, SLOT)
        self.launches = Launches(engine, tables, grid_of(**grid), {})

    def run(
        self,
        logits: Tensor,
        settings: SamplerTensors,
        seeds: Tensor,
        draws: Tensor,
        banned: Tensor | None = None,
        seed: int = 1,
    ) -> Tensor:
        rows = len(logits)
        tokens = torch.full((rows,), 99)
        given = {
            "zeros": torch.zeros(rows, COLUMNS, dtype=self.dtype),
            "logits": torch.nn.functional.pad(logits, (0, self.width - self.size), value=77.0),
        }
        fields: dict[str, int | Tensor] = {"tokens": tokens, "seeds": seeds, "draws": draws}
        if not settings.all_greedy:
            for name in ("temperature", "top_k", "tail", "greedy"):
                fields[name] = getattr(settings, name)
        if banned is not None:
            fields |= {"banned": banned, "banned_stride": banned.stride(0)}
        self.launches(rows, given, seed, written=[tokens], **fields)
        return tokens


def random_rows(rng: python_random.Random, rows: int) -> tuple[Tensor, Tensor]:
    """Seeds and draws."""
    seeds = [rng.choice((0, 1, rng.randrange(2**62))) for _ in range(rows)]
    return torch.tensor(seeds), torch.tensor([rng.randrange(1000) for _ in range(rows)])


def text_sampler(rng: python_random.Random, size: int) -> MiMoSampler:
    if rng.random() < 0.5:
        return random_sampler(rng)
    return MiMoSampler(
        do_sample=True,
        temperature=rng.choice((0.05, 0.6, 1.0, 3.0)),
        top_k=rng.choice((None, 1, 5, 50, size - 1, size, size + 1)),
        top_p=rng.choice((None, 0.95, rng.uniform(0.001, 0.3))),
    )


def random_banned(rng: python_random.Random, rows: int, size: int) -> Tensor | None:
    share = rng.choice((None, 0.0, 0.1, 0.9, 1.0))
    if share is None:
        return None
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    return torch.rand(rows, size, generator=generator) < share


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", slow_after(1, range(8)))
def test_tokens_are_those_of_the_reference(engine, dtype, size, seed):
    """Of rows in any mix, in any grid."""
    rng = python_random.Random(seed)
    drawing = Drawing(engine, size, dtype, blocks=rng.randint(1, 9), threads=32 * rng.randint(1, 4))
    lost = 0
    for each in range(4 if seed == 0 else 30):
        rows = rng.randint(1, 8)
        logits = random_logits(rng, rows, size, dtype)
        settings = sampler_tensors([text_sampler(rng, size) for _ in range(rows)])
        around = *random_rows(rng, rows), random_banned(rng, rows, size)
        want = sample_text_ref(logits, settings, *around, SLOT)
        tokens = drawing.run(logits, settings, *around, seed=each)
        assert torch.equal(tokens, want), (each, tokens, want, settings)
        lost += int((tokens == NOT_FINITE).sum())
    assert lost > 0 or seed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_tokens_of_the_published_vocabulary(engine, dtype):
    rng, size = python_random.Random(3), 151_680
    drawing = Drawing(engine, size, dtype, blocks=33, threads=64)
    samplers = [
        GREEDY,
        MiMoSampler(True, temperature=0.6, top_k=50, top_p=0.95),
        MiMoSampler(True, temperature=1.0, top_p=0.95),
        MiMoSampler(True, temperature=1.0),
        MiMoSampler(True, temperature=2.0, top_p=0.01),
        MiMoSampler(True, temperature=1.0, top_k=500, top_p=0.5),
        MiMoSampler(True, temperature=1.0, top_k=5000),
        MiMoSampler(True, temperature=0.9, top_k=5),
    ]
    for each in range(3):
        generator = torch.Generator().manual_seed(each)
        logits = (torch.randn(8, size, generator=generator) * (1, 2.5, 6)[each]).to(dtype)
        around = *random_rows(rng, 8), torch.rand(8, size, generator=generator) < 0.1
        settings = sampler_tensors(samplers)
        want = sample_text_ref(logits, settings, *around, SLOT)
        assert torch.equal(drawing.run(logits, settings, *around, seed=each), want)


def test_a_row_draws_the_same_alone_and_in_any_grid(engine):
    rng, size = python_random.Random(5), 1000
    logits = torch.randn(8, size, generator=torch.Generator().manual_seed(1)).mul(3).bfloat16()
    samplers = [text_sampler(rng, size) for _ in range(8)]
    seeds, draws = random_rows(rng, 8)
    banned = torch.rand(8, size, generator=torch.Generator().manual_seed(2)) < 0.1
    whole = Drawing(engine, size, blocks=1, threads=32)
    tokens = whole.run(logits, sampler_tensors(samplers), seeds, draws, banned)
    assert bool((tokens >= 0).all())
    for row in range(8):
        own = slice(row, row + 1)
        drawing = Drawing(engine, size, blocks=2 + 5 * row, threads=32 + 32 * (row % 3))
        around = (each[own].clone() for each in (seeds, draws, banned))
        got = drawing.run(logits[own], sampler_tensors(samplers[own]), *around, seed=row)
        assert torch.equal(got, tokens[own])


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_lists_that_end_too_early(engine, top_p):
    """One block has all that top-k keeps, or ties at its end: more than a list holds."""
    size, sampler = 1000, MiMoSampler(True, temperature=1.0, top_k=40, top_p=top_p)
    drawing = Drawing(engine, size, blocks=4)
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits[0, 4 * 16 : 5 * 16] += 20
    logits[0, 8 * 16 : 9 * 16] += 20
    logits[1] = 0
    logits[2, ::3] = 4
    logits[3, 50:] = -torch.inf
    settings = sampler_tensors([sampler] * 4)
    for draw in range(20):
        around = torch.arange(4), torch.full((4,), draw)
        want = sample_text_ref(logits, settings, *around, slot=SLOT)
        assert torch.equal(drawing.run(logits, settings, *around, seed=draw), want)


def test_top_p_that_drops_many_winners(engine):
    """More of them than there are rounds."""
    size, rows = 1000, 8
    drawing, logits = Drawing(engine, size, blocks=5), torch.zeros(rows, size).bfloat16()
    logits[:, 1::2] = 0.5
    settings = sampler_tensors([MiMoSampler(True, temperature=1.0, top_p=0.0015)] * rows)
    for draw in range(10):
        around = torch.arange(rows), torch.full((rows,), draw)
        want = sample_text_ref(logits, settings, *around, slot=SLOT)
        assert torch.equal(drawing.run(logits, settings, *around, seed=draw), want)


def test_scores_that_a_temperature_makes_infinite(engine):
    size = 70
    drawing = Drawing(engine, size)
    logits = torch.randn(8, size, generator=torch.Generator().manual_seed(1)).mul(9).bfloat16()
    samplers = [
        MiMoSampler(True, temperature=temperature, top_k=top_k)
        for temperature in (1e-38, 1e-30)
        for top_k in (None, 1, 3, 60)
    ]
    settings = sampler_tensors(samplers)
    around = torch.arange(8), torch.arange(8)
    want = sample_text_ref(logits, settings, *around, slot=SLOT)
    assert torch.equal(drawing.run(logits, settings, *around), want)


@pytest.mark.parametrize("quantization", slow_after(1, ["int8", "int4", None]))
def test_the_backbones_launch_draws(emulated, engine, quantization):
    """From the logits of its own hidden states, and `LM.step_text` as `step` and `sample_text`."""
    whole = Whole(engine, gpus_lm(emulated, "smallest", quantization, BFLOAT), rows=8)
    (hidden, logits, *_), _ = whole.step()
    state = whole.state()
    where = state.seeds[whole.slots], state.draws[whole.slots]
    banned = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    for each in (banned, None):
        got, tokens = whole.step_text(each)
        assert torch.equal(got, hidden)
        assert torch.equal(tokens, sample_text_ref(logits, whole.settings, *where, each, TEXT_SLOT))
    whole.settings = replace(whole.settings.select([2] * 8), all_greedy=True)
    assert torch.equal(whole.step_text(None)[1], logits.float().argmax(-1))
