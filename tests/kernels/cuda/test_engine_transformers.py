"""Patch decoder, patch encoder and backbone as one launch each: as exact as torch's own layers, and
the same bits in any grid, order of threads and number of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from engine_models import SHAPES, SMALL, Whole, gpus_lm, lm_of, logits_of_codes
from helpers import assert_as_exact_as_eager, slow_after
from torch import Tensor

from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.sample import sample
from mimo_fast.kernels.sample_codes import patch_noise
from mimo_fast.runtime.lm.executor import LayerByLayer
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.teacher_forcing import code_logits

HALF, BFLOAT = torch.float16, torch.bfloat16
CASES = slow_after(
    3,
    [
        ("kit", "int8", BFLOAT),
        ("smallest", "int4", BFLOAT),
        ("other heads", None, BFLOAT),
        *product(SMALL, ("int8", "int4", None), (BFLOAT, HALF)),
    ],
)


@contextmanager
def plain_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIMO_FAST_KERNELS", "torch")
        yield


class Compared:
    """A model's persistent kernels beside torch in their dtype, and in float32."""

    def __init__(
        self, emulated, engine, name, quantization, dtype, seed, rows, **grid: int
    ) -> None:
        lm = gpus_lm(emulated, name, quantization, dtype, seed)
        self.whole = Whole(engine, lm, rows, **grid)
        with plain_torch():
            self.eager, self.exact = (
                lm_of(SHAPES[name], quantization, each, seed) for each in (dtype, torch.float32)
            )

    def both(self, of: Callable[[LM], Any]) -> tuple[Any, Any]:
        with plain_torch():
            return of(self.eager), of(self.exact)

    def check(self, got: Tensor, of: Callable[[LM], Tensor]) -> None:
        assert_as_exact_as_eager(got, *self.both(of))

    def check_encoder(self) -> None:
        got, _ = self.whole.encode()

        def encoded(lm: LM) -> Tensor:
            hidden = LayerByLayer(lm.network).encode(self.whole.frames.to(lm.dtype))
            return matmul(hidden.flatten(1), lm.patch_to_backbone)

        self.check(got, encoded)

    def check_backbone(self) -> None:
        whole = self.whole
        (hidden, logits, *caches), _ = whole.step()
        before = whole.state()

        def stepped(lm: LM):
            state = lm.new_state([3] * 8, whole.capacity)
            state.cache.k.copy_(before.cache.k)
            state.cache.v.copy_(before.cache.v)
            place = whole.x.to(lm.dtype), state, whole.slots, whole.starts
            made = LayerByLayer(lm.network).step(*place)
            return made, matmul(made, lm.text_head), state.cache.k, state.cache.v

        eager, exact = self.both(stepped)
        for i, got in enumerate((hidden, logits)):
            assert_as_exact_as_eager(got, eager[i], exact[i])
        for i, got in enumerate(caches, 2):
            for slot, start in zip(whole.slots.tolist(), whole.starts.tolist(), strict=True):
                new = [each[:, slot, :, start] for each in (got, eager[i], exact[i])]
                assert_as_exact_as_eager(*new)
                got[:, slot, :, start] = torch.nan
        # Nothing but the new positions was written.
        for got, old in zip(caches, (before.cache.k, before.cache.v), strict=True):
            assert torch.equal(got.view(torch.int16), old.view(torch.int16))

    def check_decoder(self) -> None:
        """Logits are right for the codes drawn before, and codes are drawn of the logits."""
        whole = self.whole
        codes, _ = whole.decode()
        lm, settings, state = whole.lm, whole.settings, whole.state()
        logits = logits_of_codes(whole.decoder.launcher, lm, whole.rows)
        draws = state.seeds[: whole.rows], state.draws[: whole.rows] - 1
        noise = patch_noise(*draws, lm.config.group_size, sum(lm.config.code_sizes))
        for step in lm.code_steps:
            for channel, frame, first, size, empty in step.heads.T.tolist():
                banned = torch.arange(size) == empty
                added = noise[:, frame, first : first + size]
                drawn = sample(logits[channel][:, frame], settings, added, banned)
                assert torch.equal(codes[:, channel, frame], drawn)

        def forced(lm: LM) -> Tensor:
            made = code_logits(lm, whole.hidden.to(lm.dtype), codes)
            return torch.cat([each.flatten() for each in made])

        self.check(torch.cat([each.flatten() for each in logits]), forced)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(emulated, engine, case):
    for seed, rows in ((0, 3), (1, 1)):
        compared = Compared(emulated, engine, *case, seed, rows)
        compared.check_encoder()
        compared.check_backbone()
        compared.check_decoder()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_other_seeds_and_numbers_of_rows(emulated, engine, seed):
    for name, quantization in zip(SMALL, ("int4", "int8", None, "int4"), strict=True):
        how = name, quantization, BFLOAT, seed, seed
        compared = Compared(emulated, engine, *how)
        compared.check_encoder()
        compared.check_backbone()
        compared.check_decoder()


@pytest.mark.slow
def test_the_published_widths(emulated, engine):
    grid = {"blocks": 2, "threads": 256, "shared": 227 * 1024}
    compared = Compared(emulated, engine, "published", "int8", BFLOAT, 0, 2, **grid)
    compared.check_encoder()
    compared.check_backbone()
    compared.check_decoder()


@pytest.mark.parametrize("name", slow_after(1, ["smallest", "kit", "other heads", "wide"]))
@pytest.mark.parametrize("quantization", slow_after(1, ["int4", "int8", None]))
def test_the_same_bits_in_any_grid_and_number_of_rows(emulated, engine, name, quantization):
    lm = gpus_lm(emulated, name, quantization, BFLOAT)
    want = Whole(engine, lm, rows=8, blocks=1, threads=32)
    codes, (hidden, logits, *_) = want.decode()[0], want.step()[0]
    patches = want.encode()[0]
    for rows, blocks, threads, depth in (
        (8, 4, 64, 4),
        (8, 2, 96, 8),
        (1, 3, 64, 4),
        (3, 7, 32, 8),
    ):
        whole = Whole(engine, lm, rows, blocks, threads, depth=depth)
        whole.settings = want.settings.select(range(rows))
        assert torch.equal(whole.decode(blocks)[0], codes[:rows])
        made = whole.step(blocks)[0]
        assert torch.equal(made[0], hidden[:rows])
        assert torch.equal(made[1], logits[:rows])
        got = whole.encode(blocks)[0]
        assert torch.equal(got, patches[: len(got)])
