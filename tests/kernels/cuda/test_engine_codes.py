"""Codes of the persistent kernel: drawn as kernels/sample.py draws them, of the same logits and
noise; the sums of their embeddings."""

import random as python_random
from collections.abc import Sequence

import pytest
import torch
from engine_launches import Launches, grid_of
from helpers import slow_after
from test_cuda_kernels import random
from torch import Tensor

from mimo_fast.kernels.cuda.engine import COLUMNS, OCTET, Tables
from mimo_fast.kernels.sample import NOT_FINITE, SamplerTensors, sample
from mimo_fast.kernels.sample_codes import code_steps
from mimo_fast.sampling import MiMoSampler, sampler_tensors

HALF, BFLOAT = torch.float16, torch.bfloat16
GREEDY = MiMoSampler(do_sample=False)
SIZES = (33, 70, 9, 9, 17, 1, 128, 5)
DIM = 24


class Drawing:
    """Tables that draw codes of given logits, which a product of zeros copies: two steps, in the
    second of which some channels are at their second frame, and others begin."""

    def __init__(self, engine, dtype=BFLOAT, sizes: Sequence[int] = SIZES, **grid: int) -> None:
        self.dtype, self.sizes = dtype, sizes
        self.empty = [size - 1 for size in sizes]
        self.frames = 2
        # Channels are adjacent: those that are active in a step are a range.
        delays = [0] * (len(sizes) - 2) + [1, 1]
        self.steps = code_steps(sizes, self.empty, delays, self.frames)[:2]
        self.width = -(-sum(sizes) // OCTET) * OCTET
        self.embeddings = random(sum(sizes), DIM, seed=3, dtype=dtype)
        tables = Tables(dtype, grid.setdefault("blocks", 3))
        self.x = tables.vector(DIM, looped=True)
        zeros = torch.zeros(self.width, COLUMNS, dtype=dtype)
        with tables.repeated(2):
            logits = tables.product(zeros, "zeros", residual="logits")
            self.drawn = tables.draw(logits)
            tables.embed(self.drawn, to=self.x)
        tables.code_steps = self.steps
        tables.set(
            embeddings=self.embeddings,
            table_rows=len(self.embeddings),
            embed_dim=DIM,
            channels=len(sizes),
            frames=self.frames,
        )
        # All channels' logits are there in every step.
        self.launches = Launches(engine, tables, grid_of(**grid), {})

    def run(
        self, logits: Tensor, settings: SamplerTensors, noise: Tensor | None, seed: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Codes int64 [R, C, G], and x of the second step."""
        rows = len(logits)
        codes = torch.full((rows, len(self.sizes), self.frames), 99)
        given = {
            "zeros": torch.zeros(rows, COLUMNS, dtype=self.dtype),
            "logits": torch.nn.functional.pad(logits, (0, self.width - logits.shape[1])),
        }
        fields: dict[str, int | Tensor] = {"codes": codes}
        if noise is not None:
            fields["noise"] = noise
            for name in ("temperature", "top_k", "tail", "greedy"):
                fields[name] = getattr(settings, name)
        self.launches(rows, given, seed, written=[codes], **fields)
        return codes, self.launches.vector(self.x, rows, 1).clone()

    def want(
        self, logits: Tensor, settings: SamplerTensors, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        codes = torch.full((len(logits), len(self.sizes), self.frames), NOT_FINITE)
        sums = torch.zeros(len(logits), DIM)
        for number, step in enumerate(self.steps):
            for channel, frame, first, size, empty in step.heads.T.tolist():
                columns = slice(first, first + size)
                banned = torch.arange(size) == empty
                added = None if noise is None else noise[:, frame, columns]
                drawn = sample(logits[:, columns], settings, added, banned)
                codes[:, channel, frame] = drawn
                if number == 0:
                    sums += self.embeddings[first + drawn.clamp(min=0)].float()
        return codes, sums.to(self.dtype)


def random_logits(rng: python_random.Random, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Of many kinds: wide and narrow, with ties, and with values that are not finite."""
    made = random(rows, columns, seed=rng.randrange(10**6)) * rng.choice((0.3, 2.0, 8.0))
    if rng.random() < 0.4:
        made = (made * 2).round() / 2
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    for value, share in ((-torch.inf, 0.3), (torch.nan, 0.02), (torch.inf, 0.02)):
        if rng.random() < 0.3:
            made[torch.rand(rows, columns, generator=generator) < share] = value
    if rng.random() < 0.1:
        made[rng.randrange(rows)] = -torch.inf
    if rng.random() < 0.1:
        made[rng.randrange(rows)] = 0
    return made.to(dtype)


def random_sampler(rng: python_random.Random) -> MiMoSampler:
    if rng.random() < 0.2:
        return GREEDY
    # No share that sums of equal weights could meet.
    return MiMoSampler(
        do_sample=True,
        temperature=rng.uniform(0.2, 2),
        top_k=rng.choice((None, 1, 2, 7, 16, 500)),
        top_p=rng.choice((None, 1.0, rng.uniform(0.05, 0.99), rng.uniform(0.9, 0.999))),
    )


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("seed", slow_after(1, range(8)))
def test_draws_are_those_of_the_reference(engine, dtype, seed):
    """Of rows in any mix: 120 draws of several kinds a launch."""
    rng = python_random.Random(seed)
    drawing = Drawing(engine, dtype, blocks=rng.randint(1, 9), threads=32 * rng.randint(1, 4))
    lost = 0
    for each in range(8 if seed == 0 else 40):
        logits = random_logits(rng, 8, sum(SIZES), dtype)
        settings = sampler_tensors([random_sampler(rng) for _ in range(8)])
        uniform = torch.rand(8, 2, sum(SIZES), generator=torch.Generator().manual_seed(each))
        noise = -(-uniform.log()).log()
        codes, x = drawing.run(logits, settings, noise, seed=each)
        want, sums = drawing.want(logits, settings, noise)
        assert torch.equal(codes, want), (each, (codes != want).nonzero().tolist())
        assert torch.equal(x, sums)
        lost += int((codes == NOT_FINITE).sum())
    assert lost > 0


def test_greedy_draws_take_no_noise(engine):
    drawing = Drawing(engine)
    settings = sampler_tensors([GREEDY] * 8)
    for seed in range(4):
        logits = random_logits(python_random.Random(seed), 8, sum(SIZES), BFLOAT)
        codes, x = drawing.run(logits, settings, None, seed)
        want, sums = drawing.want(logits, settings, None)
        assert torch.equal(codes, want)
        assert torch.equal(x, sums)


def test_the_best_may_be_banned_or_all_that_is_kept(engine):
    """Where nothing is left, the best id that is not banned is taken; a channel whose only id is
    banned has no code."""
    drawing = Drawing(engine)
    logits = torch.zeros(2, sum(SIZES)).bfloat16()
    for _, _, first, _, empty in drawing.steps[0].heads.T.tolist():
        logits[:, first + empty] = 9
    settings = sampler_tensors([MiMoSampler(True, temperature=1.0, top_k=1), GREEDY])
    codes, _ = drawing.run(logits, settings, torch.zeros(2, 2, sum(SIZES)))
    want, _ = drawing.want(logits, settings, torch.zeros(2, 2, sum(SIZES)))
    assert torch.equal(codes, want)
    assert bool((codes[:, 5, 0] == NOT_FINITE).all())
    assert bool((codes[:, 0, 0] == 0).all())


def test_a_row_draws_the_same_alone_and_in_any_grid(engine):
    rng = python_random.Random(5)
    logits = random_logits(rng, 8, sum(SIZES), BFLOAT)
    samplers = [random_sampler(rng) for _ in range(8)]
    noise = -(-torch.rand(8, 2, sum(SIZES), generator=torch.Generator().manual_seed(1)).log()).log()
    codes, x = Drawing(engine, blocks=1, threads=32).run(logits, sampler_tensors(samplers), noise)
    for row in range(8):
        own = slice(row, row + 1)
        drawing = Drawing(engine, blocks=2 + 3 * row, threads=32 + 32 * (row % 3))
        got = drawing.run(logits[own], sampler_tensors(samplers[own]), noise[own].clone(), row)
        assert torch.equal(got[0][0], codes[row])
        assert torch.equal(got[1][0], x[row])
