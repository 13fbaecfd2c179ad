"""Sampling: temperature, exact top-k, exact top-p, banned ids, one Gumbel-max draw.

    scores = logits / temperature
    top-k:  keep scores >= the k-th largest (ties at the threshold all kept)
    top-p:  over what is left, sorted ascending, drop while the cumulative probability <= 1 - p
    banned: removed last; where nothing is left, the best id that is not banned is taken
    token = argmax(scores + gumbel)          greedy: argmax(scores)
    NOT_FINITE where a logit is NaN or +inf, or where all ids that are not banned have -inf

The order is upstream's (`MiMoSampler.process` and `.sample`). Noise is a pure function of (seed,
draw, slot, id) through Philox 4x32-10 (Salmon et al. 2011), so a draw depends on nothing around it
and can be replayed.

This file is the reference, in plain torch: `filter_scores` and `sample` for a given noise, `gumbel`
for the noise. The kernels, `sample_text` and `sample_codes`, are in files of those names and never
sort. They rest on two facts:
  - Top-k and top-p keep an upper set: in the order by (score, id), everything from some id on. So
    draw first, from all ids that top-k keeps, and test only the winner against top-p: its
    cumulative probability is one masked sum. If top-p keeps it, no other kept id can beat it. If
    not, nothing below it in the order is kept either: draw again among the ids above it, with the
    same noise. A winner is kept with probability top_p or more (the mass that top-p drops is at
    most 1 - top_p), so one sum is nearly always enough.
  - The k-th largest score is found bit by bit from counts of ordered bits, which are exact.
So the token is the reference's, ties included: the order by (score, id) is that of a stable sort.
It may differ where a cumulative probability is within float32 rounding (about 1e-6) of 1 - p, as
between any two orders of summation, and where logits are summed in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    next_power_of_2,
    pdl_trigger,
    pdl_wait,
    pointers,
    tl,
    use_triton,
)

NOT_FINITE = -1
"""The token of a row that no token can be drawn from: the model's values are not finite.

A banned id counts too, since its +inf or NaN leaves top-p no probabilities. It is a flag that costs
no launch and no read; the host finds it where it reads the tokens."""

NEAR = 1e-3
"""Error bound of `near_gumbel`: 50 times that of its formula and a GPU's fast logarithm."""

ROWS_OF = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "tail": torch.float32,
    "greedy": torch.bool,
}
"""Fields of `SamplerTensors` with a value a row, and their types."""

TAIL_OFF = -1.0
"""Tail below every cumulative probability: top-p is off."""


@dataclass(frozen=True)
class SamplerTensors:
    """Settings of N rows.

    Args:
        temperature: float32 [N].
        top_k: int64 [N], 0 for off.
        tail: float32 [N], 1 - top_p, subtracted in double before rounding, as upstream compares.
        greedy: bool [N].
        all_greedy: known on the host, so that greedy decoding skips the sort.
        any_top_k: known on the host, so that launches are skipped where no row uses top-k.
    """

    temperature: Tensor
    top_k: Tensor
    tail: Tensor
    greedy: Tensor
    all_greedy: bool
    any_top_k: bool = True

    def select(self, rows: Sequence[int] | Tensor, repeat: int = 1) -> SamplerTensors:
        """Settings of the given rows, each repeated.

        An index tensor on the device needs no copy.
        """
        index = (
            rows
            if isinstance(rows, Tensor)
            else torch.tensor(rows, device=self.greedy.device, dtype=torch.int64)
        )
        index = index.repeat_interleave(repeat) if repeat > 1 else index
        if use_triton(self.greedy):
            return self._selected(index)
        return replace(self, **{name: getattr(self, name)[index] for name in ROWS_OF})

    def _selected(self, index: Tensor) -> SamplerTensors:
        """`select` in one launch; each of torch's four would take as long as a small kernel."""
        count = len(index)
        taken = replace(self, **{name: getattr(self, name).new_empty(count) for name in ROWS_OF})
        if count:
            take_settings_kernel[(1,)](
                **early_launch(index, "take_settings"),
                **self.pointers(),
                **{f"to_{name}": tensor for name, tensor in taken.pointers().items()},
                index_ptr=index,
                N=count,
                BLOCK=next_power_of_2(count),
                num_warps=1,
            )
        return taken

    def pointers(self) -> dict[str, Tensor]:
        """Launch arguments of the kernels that read them."""
        return {f"{name}_ptr": getattr(self, name) for name in ROWS_OF}

    def write(self, row: int, settings: SamplerTensors) -> None:
        """Overwrites one row with settings of one row, in place.

        all_greedy and any_top_k do not change.
        """
        for name in ROWS_OF:
            getattr(self, name)[row] = getattr(settings, name)[0]


def filter_scores(logits: Tensor, settings: SamplerTensors) -> Tensor:
    """logits [N, V] -> scores [N, V] float32, -inf where top-k or top-p removes the id.

    Ties are ordered by id, the lower first.
    """
    scores = logits.float() / settings.temperature[:, None]
    ascending, order = scores.sort(dim=-1, stable=True)
    size = scores.shape[-1]
    kth = torch.where(settings.top_k > 0, settings.top_k.clamp(max=size), size)
    threshold = ascending.gather(-1, (size - kth)[:, None])
    ascending = ascending.masked_fill(ascending < threshold, -torch.inf)
    dropped = ascending.softmax(-1).cumsum(-1) <= settings.tail[:, None]
    dropped[:, -1] = False
    dropped |= ascending == -torch.inf
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def sample(
    logits: Tensor,
    settings: SamplerTensors,
    noise: Tensor | Callable[[Tensor], Tensor] | None,
    banned: Tensor | None,
) -> Tensor:
    """One id a row, int64 [N], or NOT_FINITE.

    Args:
        logits: [N, V].
        noise: [N, V] from `gumbel`, or a function from ascending ids [K] to [N, K]; None when every
            row is greedy.
        banned: bool [N, V] or [V], or None.
    """
    allowed = logits.float() if banned is None else logits.float().masked_fill(banned, -torch.inf)
    best = allowed.argmax(-1)
    # Written so that NaN fails.
    finite = (logits < torch.inf).all(-1)
    finite &= allowed.gather(-1, best[:, None])[:, 0] > -torch.inf
    best = best.where(finite, NOT_FINITE)
    if settings.all_greedy:
        return best
    scores = filter_scores(logits, settings)
    if banned is not None:
        scores = scores.masked_fill(banned, -torch.inf)
    assert noise is not None, "rows that sample need noise"
    if isinstance(noise, Tensor):
        drawn = (scores + noise).argmax(-1)
    else:
        kept = (scores > -torch.inf).any(0).nonzero()[:, 0]
        # Where nothing is kept, any id will do: the result is not used.
        kept = kept if len(kept) else kept.new_zeros(1)
        drawn = kept[(scores[:, kept] + noise(kept)).argmax(-1)]
    nothing_left = ~(scores > -torch.inf).any(-1)
    return torch.where(settings.greedy | nothing_left | ~finite, best, drawn)


def gumbel(seeds: Tensor, draws: Tensor, slots: Tensor, ids: int | Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [N, K].

    seeds, draws, slots: int64 [N]. ids: int64 [K], or their number. The noise of id v in row n
    depends only on (seeds[n], draws[n], slots[n], v).
    """
    ids = torch.arange(ids, device=seeds.device, dtype=torch.int64) if isinstance(ids, int) else ids
    word = philox(seeds[:, None], ids, draws[:, None], slots[:, None])
    # w in (0, 1); log1p keeps all 32 bits where w is small, which is where the winners are.
    uniform = (word.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform)).float()


def philox(key: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word of Philox 4x32-10 for a 64-bit key and the counter (c0, c1, c2, 0).

    uint32 values are held in int64.
    """
    low = 0xFFFFFFFF
    k0, k1 = key & low, (key >> 32) & low
    x0, x1, x2, x3 = torch.broadcast_tensors(c0 & low, c1 & low, c2 & low, torch.zeros_like(key))
    for _ in range(10):
        # Products wrap in int64, but the masked bits are right.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((p1 >> 32) & low) ^ x1 ^ k0,
            p1 & low,
            ((p0 >> 32) & low) ^ x3 ^ k1,
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return x0


@jit
def take_settings_kernel(
    index_ptr,
    temperature_ptr,
    top_k_ptr,
    tail_ptr,
    greedy_ptr,
    to_temperature_ptr,
    to_top_k_ptr,
    to_tail_ptr,
    to_greedy_ptr,
    N,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    o_row = tl.load(index_ptr + o_n, mask=m_n, other=0)
    b_temperature = tl.load(temperature_ptr + o_row, mask=m_n, other=0.0)
    b_top_k = tl.load(top_k_ptr + o_row, mask=m_n, other=0)
    b_tail = tl.load(tail_ptr + o_row, mask=m_n, other=0.0)
    b_greedy = tl.load(greedy_ptr + o_row, mask=m_n, other=0)
    tl.store(to_temperature_ptr + o_n, b_temperature, mask=m_n)
    tl.store(to_top_k_ptr + o_n, b_top_k, mask=m_n)
    tl.store(to_tail_ptr + o_n, b_tail, mask=m_n)
    tl.store(to_greedy_ptr + o_n, b_greedy, mask=m_n)


@jit
def best_shown(b_logits, m_allowed):
    """Logits whose maximum is finite unless no id can be drawn: +inf for NaN and +inf, of banned
    ids too, and -inf for other banned ids. Whether a maximum sees NaN depends on the platform."""
    b_allowed = tl.where(m_allowed, b_logits, -float("inf"))
    return tl.where(b_logits < float("inf"), b_allowed, float("inf"))


@jit
def gumbel_word(seed, ids, draw, slot):
    """The 32 random bits, uint32, from which the noise of these ids is computed."""
    o_id = ids.to(tl.uint32)
    o_zero = o_id * 0
    word, _, _, _ = tl.philox(seed, o_id, o_zero + draw.to(tl.uint32), o_zero + slot, o_zero)
    return word


@jit
def near_gumbel(word):
    """Gumbel noise of these bits in float32, within NEAR of `gumbel_noise`.

    Consumer cards compute one float64 operation for every 64 in float32.
    """
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # -log(1 - u), by its series where the logarithm would cancel.
    series = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.03125, series, -tl.log(rest)))


@jit
def gumbel_noise(seed, ids, draw, slot):
    """`gumbel` for a block of ids of one row.

    seed and draw: int64 scalars. slot: uint32 scalar or constexpr.
    """
    word = gumbel_word(seed, ids, draw, slot)
    # 1 - w is exact in float64, so that its logarithm is as good as log1p(-w).
    rest = 1.0 - (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-tl.log(rest)).to(tl.float32)


@jit
def ordered_bits(x):
    """float32 -> int32 of the same order; -0.0 is 0.0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def compile_cases() -> Iterator[Case]:
    """Settings of 1 row and of 64."""
    settings = pointers(fp32="temperature tail", i64="top_k index", i1="greedy")
    taken = pointers(fp32="to_temperature to_tail", i64="to_top_k", i1="to_greedy")
    for rows in (1, 64):
        yield Case(
            f"take_settings rows={rows}",
            take_settings_kernel,
            settings | taken,
            {"BLOCK": rows},
            1,
            unaligned=("N",),
        )
