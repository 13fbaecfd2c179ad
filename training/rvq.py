"""Training of residual codebooks: straight-through gradients and moving averages.

    r_0 = x,  i_q = nearest row of codebook q to r_q,  r_{q+1} = r_q - e_q[i_q]

A codebook's rows are the averages of the residuals that chose them (as in upstream's training,
whose files carry `cluster_size` and `embed_avg`). A row that fewer than `DEAD_SHARE` of its fair
share choose is replaced by a residual of the current batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.config import CodecConfig
from mimo_fast.kernels.rvq import rvq_encode

from .parameters import Tensors, codebook_names

DECAY = 0.99
DEAD_SHARE = 0.1
NEW_SHARE = 0.3
"""Share of its fair usage with which a new row starts: soon its own average, or replaced."""

USUAL_SIZE = 4.0
"""Initial moving average of a row where it is unknown: positions of a batch that choose it."""

EPSILON = 1e-5
PARTS = ("embed", "cluster_size", "embed_avg", "inited")


@dataclass(frozen=True)
class Quantized:
    """rows [T, D] with the gradient of what was quantized, codes [n, T], a loss to minimize."""

    rows: Tensor
    codes: Tensor
    commitment: Tensor


def known_usage(config: CodecConfig, tensors: Tensors) -> Tensors:
    """Averages of trained codebooks [size, D] in `tensors`, with all rows as equally used."""
    found, sizes = {}, config.codebook_sizes
    for name, size in zip(codebook_names(len(sizes)), sizes, strict=True):
        used = torch.full((size,), USUAL_SIZE)
        found |= {
            f"{name}.cluster_size": used,
            f"{name}.embed_avg": tensors[f"{name}.embed"] * used[:, None],
            f"{name}.inited": torch.ones(1),
        }
    return found


def unquantized(x: Tensor) -> Quantized:
    """x [T, D] as it is, with no codes."""
    return Quantized(x, torch.empty(0, len(x), dtype=torch.int64, device=x.device), x.new_zeros(()))


class Quantizer:
    """Codebooks in training; they are the given tensors, under upstream's names."""

    def __init__(self, config: CodecConfig, tensors: Tensors) -> None:
        self._tensors, self._config = tensors, config
        self._names = codebook_names(len(config.codebook_sizes))
        for name, size in zip(self._names, config.codebook_sizes, strict=True):
            books = tensors[f"{name}.embed"]
            tensors.setdefault(f"{name}.cluster_size", books.new_zeros(size))
            tensors.setdefault(f"{name}.embed_avg", books.new_zeros(books.shape))
            tensors.setdefault(f"{name}.inited", books.new_zeros(1))

    @property
    def books(self) -> list[Tensor]:
        return [self._tensors[f"{name}.embed"] for name in self._names]

    @property
    def state(self) -> list[Tensor]:
        """All tensors that `update` changes."""
        return [self._tensors[f"{name}.{part}"] for name in self._names for part in PARTS]

    def __call__(self, x: Tensor, n_q: Tensor | None = None) -> Quantized:
        """x [T, D] -> its nearest sums of rows; n_q int64 [T]: codebooks used, None for all."""
        books = self.books
        codes = rvq_encode(x.detach(), books)
        levels = torch.stack([book[indices] for book, indices in zip(books, codes, strict=True)])
        if n_q is not None:
            levels = levels * (torch.arange(len(books), device=x.device)[:, None] < n_q)[..., None]
        sums = levels.cumsum(0)
        commitment = (x - sums).square().mean()
        return Quantized(x + (sums[-1] - x).detach(), codes, commitment)

    def prefix(self, x: Tensor, codes: Tensor, n: int) -> Tensor:
        """The first n codebooks' sum [T, D], with the gradient of x."""
        rows = sum(book[indices] for book, indices in zip(self.books[:n], codes, strict=False))
        return x + (rows - x).detach()

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """Updates the codebooks with x [T, D] by codes [Q, T]; returns how many rows are new."""
        residual, replaced = x.detach(), 0
        for name, indices in zip(self._names, codes, strict=True):
            embed, size, average, inited = (self._tensors[f"{name}.{part}"] for part in PARTS)
            before = embed[indices]
            if not inited:
                self._restart(torch.arange(len(embed)), residual, name, generator)
                inited.fill_(1)
                before = embed[rvq_encode(residual, [embed])[0]]
            else:
                ones = torch.ones_like(indices, dtype=size.dtype)
                counts = torch.zeros_like(size).index_add_(0, indices, ones)
                size.lerp_(counts, 1 - DECAY)
                average.lerp_(torch.zeros_like(average).index_add_(0, indices, residual), 1 - DECAY)
                embed.copy_(average / (size[:, None] + EPSILON))
                dead = (size < DEAD_SHARE * size.mean()).nonzero()[:, 0]
                self._restart(dead, residual, name, generator)
                replaced += len(dead)
            residual = residual - before
        return replaced

    def _restart(
        self, rows: Tensor, residual: Tensor, name: str, generator: torch.Generator
    ) -> None:
        """Replaces rows by residuals drawn from the batch."""
        drawn = torch.randint(len(residual), (len(rows),), generator=generator)
        chosen = residual[drawn.to(residual.device)]
        size = self._tensors[f"{name}.cluster_size"]
        share = NEW_SHARE * max(float(size.mean()), 1e-2)
        size[rows] = share
        self._tensors[f"{name}.embed"][rows] = chosen
        self._tensors[f"{name}.embed_avg"][rows] = chosen * share
