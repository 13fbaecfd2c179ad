"""Rows of logits of every kind, and samplers for them."""

import math

import torch
from torch import Tensor

from mimo_fast.sampling import MiMoSampler

ROWS, SIZE = 1000, 129
SAMPLERS = [
    MiMoSampler(True, 0.6, 50, 0.95),
    MiMoSampler(True, 0.9, None, 0.95),
    MiMoSampler(True, 1.0, 5),
    MiMoSampler(True, 1.0, 1, 0.5),
    MiMoSampler(True, 2.0, None, 0.02),
    MiMoSampler(True, 0.7, 200, 0.3),
    MiMoSampler(True, 0.25, 20, 0.999),
    MiMoSampler(True, 1.0, None, 1.0),
    MiMoSampler(True, 1.3, 129, 1e-9),
]


def rows_of(kind: str, count: int = ROWS, size: int = SIZE, seed: int = 0) -> Tensor:
    """Logits [count, size]; their maximum is finite in every row."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, kind)))
    normal = torch.randn(count, size, generator=generator) * 3
    chance, place = (torch.rand(count, n, generator=generator) for n in (size, 1))
    some = (place * size).long()
    rows = {
        "normal": normal,
        "steep": normal * 20,
        "narrow": normal * 1e-3,
        "ties": normal.round(),
        "zeros": torch.where(normal > 0, 0.0, -0.0),
        "-inf": normal.masked_fill(chance > 0.1, -math.inf).scatter(1, some, -1.0),
        "one-hot": torch.full((count, size), -math.inf).scatter(1, some, 2.0),
        "flat": place.expand(-1, size) * 9,
    }
    if kind == "pairs":
        return normal.sort(dim=1).values.view(count, -1, 3)[:, :, :1].expand(-1, -1, 3).flatten(1)
    return rows[kind]


def rows_not_finite(size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, size], banned bool [n, size], and whether a row has no token, bool [n].

    The rows that have one are the same in front of, between and behind those that have none.
    """
    generator = torch.Generator().manual_seed(size)
    usual = torch.randn(size, generator=generator) * 3
    places = sorted({0, 1, size // 2, size - 1})
    rows, bans, lost = [usual], [()], [False]
    for value in (math.nan, math.inf):
        for place in places:
            for ban in ((), (place,)):
                broken = usual.clone()
                broken[place] = value
                rows += [broken, usual]
                bans += [ban, ()]
                lost += [True, False]
    nothing = torch.full((size,), -math.inf)
    only = nothing.clone()
    only[places[-1]] = 1.0
    rows += [nothing, torch.full((size,), math.nan), only, only, usual]
    bans += [(), (), (), (places[-1],), ()]
    lost += [True, True, False, True, False]
    banned = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, ids in enumerate(bans):
        banned[row, list(ids)] = True
    return torch.stack(rows), banned, torch.tensor(lost)
