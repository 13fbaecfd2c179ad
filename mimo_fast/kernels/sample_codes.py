"""One step of the patch decoder's output: logits of the active heads, their codes, the next input.

    logits[a] = hidden heads[a]^T
    code[a]   = draw from sample.py's distribution with the empty id banned; its noise is a function
                of (seed, draw, 1 + frame, row of the table)
    codes[channel a, frame a] = code[a]
    x         = sum_a embeddings[code[a]]

A code is NOT_FINITE (-1) where its logits are; x then has row 0 in its place, and is of no use.

a runs over the channels that produce a code at this step: at most 4 in the published model.

Shapes: hidden [R, D]; heads [sum V_c, D] and embeddings [sum V_c, D'], the channels stacked; codes
int64 [R, C, G], written in place; x [R, D']. Logits are summed in float32 and rounded to hidden's
dtype, like any product of the model; the rest is float32; x is summed in float32 and rounded once.

Three kernels, the first once a patch, the others once a step:

    patch_noise_kernel  All Gumbel noise of a patch, [R, G, sum V_c] (45 KB a row), each value used
                        once. It is float64, of which a consumer card computes two a clock on each
                        multiprocessor: here the work is spread over all of them, in the step's
                        kernel it would run on one.
    head_logits_kernel  16 table rows a program, 16 hidden rows at a time, on tensor cores. With few
                        rows it is bound by reading the table, at most 2308 rows or 4.7 MB. Tiles do
                        not depend on R, so neither does a row's result.
    code_step_kernel    One row a program, its active channels side by side in registers, [4, 2048]
                        with 16 warps or [4, 256] with 4. Draws the codes, stores them and sums
                        their embeddings, without the host.

Active channels are adjacent where delays increase; otherwise head_logits_kernel also computes the
channels in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    load_float,
    next_power_of_2,
    pdl_trigger,
    pdl_wait,
    pointers,
    prefetch,
    tl,
    use_triton,
)
from mimo_fast.kernels.sample import (
    SamplerTensors,
    best_shown,
    gumbel,
    gumbel_noise,
    ordered_bits,
    sample,
)

FRAME_SLOT = 1
"""Random slot of a patch's first frame; slot 0 is the text's."""


@dataclass(frozen=True)
class CodeStep:
    """The heads that are active at one step.

    Args:
        heads: int64 [5, A], for each its channel, frame, first row in the table, size and empty id.
        first, last: the range of table rows that holds them.
        widest: the largest size.
    """

    heads: Tensor
    first: int
    last: int
    widest: int


def code_steps(
    sizes: Sequence[int],
    empty: Sequence[int],
    delays: Sequence[int],
    group_size: int,
    device: torch.device | str = "cpu",
) -> list[CodeStep]:
    """Every step of a patch: channel c produces frame t - delays[c] at step t."""
    rows = [0, *accumulate(sizes)]
    steps = []
    for t in range(group_size + max(delays)):
        active = [c for c, delay in enumerate(delays) if delay <= t < delay + group_size]
        columns = [(c, t - delays[c], rows[c], sizes[c], empty[c]) for c in active]
        first, last = (rows[active[0]], rows[active[-1] + 1]) if active else (0, 0)
        heads = torch.tensor(columns, dtype=torch.int64, device=device).reshape(-1, 5)
        widest = max((sizes[c] for c in active), default=0)
        steps.append(CodeStep(heads.T.contiguous(), first, last, widest))
    return steps


def patch_noise_ref(seeds: Tensor, draws: Tensor, group_size: int, size: int) -> Tensor:
    rows = len(seeds)
    slots = torch.arange(group_size, device=seeds.device, dtype=torch.int64) + FRAME_SLOT
    seeds, draws = (x.repeat_interleave(group_size) for x in (seeds, draws))
    return gumbel(seeds, draws, slots.repeat(rows), size).unflatten(0, (rows, group_size))


def sample_codes_ref(
    hidden: Tensor,
    step: CodeStep,
    heads: Tensor,
    settings: SamplerTensors,
    noise: Tensor | None,
    codes: Tensor,
    embeddings: Tensor,
) -> Tensor:
    rows, active = len(hidden), step.heads.shape[1]
    if not active:
        return embeddings.new_zeros(rows, embeddings.shape[1])
    channels, frames, firsts, sizes, empty = step.heads
    shape = (rows, active, step.widest)
    logits = hidden.new_full(shape, -torch.inf, dtype=torch.float32)
    local = torch.zeros(shape, device=hidden.device, dtype=torch.float32)
    for a, (_, frame, first, size, _) in enumerate(step.heads.T.tolist()):
        logits[:, a, :size] = F.linear(hidden, heads[first : first + size])
        if noise is not None:
            local[:, a, :size] = noise[:, frame, first : first + size]
    ids = torch.arange(step.widest, device=hidden.device, dtype=torch.int64)
    banned = ((ids == empty[:, None]) | (ids >= sizes[:, None])).repeat(rows, 1)
    repeated = settings.select(range(rows), repeat=active)
    added = None if noise is None else local.flatten(0, 1)
    drawn = sample(logits.flatten(0, 1), repeated, added, banned).unflatten(0, (rows, active))
    codes[:, channels, frames] = drawn
    return embeddings[drawn.clamp(min=0) + firsts].sum(1)


@jit
def patch_noise_kernel(
    noise_ptr,
    seeds_ptr,
    draws_ptr,
    V,
    FIRST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_frame, i_row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    slot = (i_frame + FIRST).to(tl.uint32)
    b_noise = gumbel_noise(tl.load(seeds_ptr + i_row), o_v, tl.load(draws_ptr + i_row), slot)
    tl.store(noise_ptr + (i_row * tl.num_programs(1) + i_frame) * V + o_v, b_noise, mask=o_v < V)


@jit
def head_logits_kernel(
    hidden_ptr,
    heads_ptr,
    logits_ptr,
    stride_hidden,
    stride_heads,
    R,
    N,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < N, o_r < R
    # One line of 128 bytes each; rows beyond the last fetch the last again.
    LINE: tl.constexpr = 128 // (heads_ptr.dtype.element_ty.primitive_bitwidth // 8)
    o_line = tl.minimum(tl.arange(0, PREFETCH // LINE) * LINE, D - 1)
    prefetch(heads_ptr + tl.minimum(o_n, N - 1)[:, None] * stride_heads + o_line[None, :], PDL)
    pdl_wait(PDL)
    hidden = hidden_ptr + o_r[:, None] * stride_hidden
    heads = heads_ptr + o_n[:, None] * stride_heads
    b_logits = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = (o_d < D)[None, :]
        b_x = tl.load(hidden + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0)
        b_w = tl.load(heads + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0)
        b_logits = tl.dot(b_x, tl.trans(b_w), b_logits, input_precision="ieee")
    o_logits = o_r[:, None] * N + o_n[None, :]
    tl.store(logits_ptr + o_logits, b_logits, mask=m_r[:, None] & m_n[None, :])


@jit
def code_step_kernel(
    logits_ptr,
    noise_ptr,
    heads_ptr,
    codes_ptr,
    embeddings_ptr,
    x_ptr,
    temperature_ptr,
    top_k_ptr,
    tail_ptr,
    greedy_ptr,
    A,
    first,
    N,
    V,
    stride_codes_r,
    stride_codes_c,
    stride_codes_g,
    stride_noise_r,
    stride_embeddings,
    DIM,
    ALL_GREEDY: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_a = tl.arange(0, BLOCK_A)
    o_v = tl.arange(0, BLOCK_V)[None, :]
    m_a = o_a < A
    channel = tl.load(heads_ptr + o_a, mask=m_a, other=0)
    frame = tl.load(heads_ptr + A + o_a, mask=m_a, other=0)
    base = tl.load(heads_ptr + 2 * A + o_a, mask=m_a, other=0)
    size = tl.load(heads_ptr + 3 * A + o_a, mask=m_a, other=0)
    empty = tl.load(heads_ptr + 4 * A + o_a, mask=m_a, other=0)
    m_v = o_v < size[:, None]
    m_allowed = m_v & (o_v != empty[:, None])
    pdl_wait(PDL)
    # Issue all reads of the draw together: one takes as long as all.
    o_logits = i_row * N + (base - first)[:, None] + o_v
    b_logits = tl.load(logits_ptr + o_logits, mask=m_v, other=-float("inf")).to(tl.float32)
    if not ALL_GREEDY:
        o_noise = i_row * stride_noise_r + (frame * V + base)[:, None] + o_v
        b_noise = tl.load(noise_ptr + o_noise, mask=m_v, other=0.0)
        greedy = tl.load(greedy_ptr + i_row)
        temperature = tl.load(temperature_ptr + i_row)
        k = tl.load(top_k_ptr + i_row)
        tail = tl.load(tail_ptr + i_row) + tl.zeros([BLOCK_A], tl.float32)
    best, code = tl.max(best_shown(b_logits, m_allowed), axis=1, return_indices=True)
    if not ALL_GREEDY:  # noqa: SIM102
        if greedy == 0:
            b_scores = tl.div_rn(b_logits, temperature)
            m_kept = b_scores > -float("inf")
            if (k > 0) & (k < BLOCK_V):
                b_bits = ordered_bits(b_scores)
                kth = tl.full([BLOCK_A], -2147483648, tl.int32)
                for i_bit in range(32):
                    trial = kth ^ (tl.full([BLOCK_A], 1, tl.int32) << (31 - i_bit))
                    count = tl.sum((b_bits >= trial[:, None]).to(tl.int32), axis=1)
                    kth = tl.where(count >= k, trial, kth)
                m_kept = m_kept & (b_bits >= kth[:, None])
            b_perturbed = tl.where(m_kept & m_allowed, b_scores + b_noise, -float("inf"))
            winner, drawn = tl.max(b_perturbed, axis=1, return_indices=True)
            top = tl.max(tl.where(m_kept, b_scores, -float("inf")), axis=1)
            top = tl.where(top == -float("inf"), 0.0, top)
            b_mass = tl.where(m_kept, tl.exp(b_scores - top[:, None]), 0.0)
            total = tl.maximum(tl.sum(b_mass, axis=1), 1e-37)
            rejected = (winner > -float("inf")) & (tail > 0)
            while tl.max(rejected.to(tl.int32), axis=0) > 0:
                score = tl.sum(tl.where(o_v == drawn[:, None], b_scores, 0.0), axis=1)[:, None]
                m_upto = (b_scores < score) | ((b_scores == score) & (o_v <= drawn[:, None]))
                m_above = m_kept & (m_upto == 0)
                share = tl.sum(tl.where(m_upto, b_mass, 0.0), axis=1) / total
                # The last id of the order is always kept.
                rejected = rejected & (share <= tail) & (tl.max(m_above.to(tl.int32), axis=1) > 0)
                b_above = tl.where(m_above, b_perturbed, -float("inf"))
                above, next_drawn = tl.max(b_above, axis=1, return_indices=True)
                winner = tl.where(rejected, above, winner)
                drawn = tl.where(rejected, next_drawn, drawn)
                # Where all above are banned, nothing is left.
                rejected = rejected & (winner > -float("inf"))
            code = tl.where(winner > -float("inf"), drawn, code)
    # Tested here, and not above, which would take more registers than there are.
    code = tl.where(tl.abs(best) < float("inf"), code, -1)
    o_codes = i_row * stride_codes_r + channel * stride_codes_c + frame * stride_codes_g
    tl.store(codes_ptr + o_codes, code.to(tl.int64), mask=m_a)
    code = tl.maximum(code, 0)
    for start in range(0, DIM, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        o_row = (base + code)[:, None] * stride_embeddings + o_d[None, :]
        b_rows = load_float(embeddings_ptr + o_row, m_a[:, None] & (o_d < DIM)[None, :])
        tl.store(x_ptr + i_row * DIM + o_d, tl.sum(b_rows, axis=0), mask=o_d < DIM)


def patch_noise(seeds: Tensor, draws: Tensor, group_size: int, size: int) -> Tensor:
    """Gumbel noise of a whole patch: seeds, draws int64 [R] -> float32 [R, G, size].

    size: rows of the table.
    """
    if not use_triton(seeds):
        return patch_noise_ref(seeds, draws, group_size, size)
    noise = torch.empty(len(seeds), group_size, size, device=seeds.device, dtype=torch.float32)
    patch_noise_kernel[(-(-size // 128), group_size, len(seeds))](
        **early_launch(seeds, "patch_noise"),
        noise_ptr=noise,
        seeds_ptr=seeds,
        draws_ptr=draws,
        V=size,
        FIRST=FRAME_SLOT,
        BLOCK_V=128,
        num_warps=1,
    )
    return noise


def head_logits(hidden: Tensor, heads: Tensor) -> Tensor:
    """hidden [R, D], heads [N, D] -> [R, N] in hidden's dtype.

    A row's result does not depend on the other rows.
    """
    rows, size = len(hidden), len(heads)
    logits = torch.empty(rows, size, dtype=hidden.dtype, device=hidden.device)
    head_logits_kernel[(-(-size // 16), -(-rows // 16))](
        **early_launch(hidden, "head_logits"),
        hidden_ptr=hidden,
        heads_ptr=heads,
        logits_ptr=logits,
        stride_hidden=hidden.stride(0),
        stride_heads=heads.stride(0),
        R=rows,
        N=size,
        D=hidden.shape[1],
        num_warps=4,
        num_stages=4,
        **_tile(hidden.shape[1]),
    )
    return logits


def sample_codes(
    hidden: Tensor,
    step: CodeStep,
    heads: Tensor,
    settings: SamplerTensors,
    noise: Tensor | None,
    codes: Tensor,
    embeddings: Tensor,
) -> Tensor:
    """Draws the codes of one step into codes [R, C, G] and returns their summed embeddings [R, D'].

    Args:
        hidden: [R, D].
        heads, embeddings: [sum V_c, D] and [sum V_c, D'].
        settings: of R rows.
        noise: [R, G, sum V_c] from `patch_noise`; None when every row is greedy.

    All but codes are contiguous over their last dimension.
    """
    if not step.heads.shape[1] or not use_triton(hidden):
        return sample_codes_ref(hidden, step, heads, settings, noise, codes, embeddings)
    wide = hidden.shape[1] == heads.shape[1]
    if not wide or len(heads) != len(embeddings) or len(hidden) != len(codes):
        raise ValueError(
            f"hidden {list(hidden.shape)}, heads {list(heads.shape)}, embeddings "
            f"{list(embeddings.shape)} and codes {list(codes.shape)} do not go together"
        )
    assert noise is not None or settings.all_greedy, "rows that sample need noise"
    logits = head_logits(hidden, heads[step.first : step.last])
    x = torch.empty(len(hidden), embeddings.shape[1], dtype=embeddings.dtype, device=hidden.device)
    block = _blocks(step.heads.shape[1], step.widest, x.shape[1])
    code_step_kernel[(len(hidden),)](
        **early_launch(hidden, "code_step"),
        logits_ptr=logits,
        noise_ptr=logits if noise is None else noise,
        heads_ptr=step.heads,
        codes_ptr=codes,
        embeddings_ptr=embeddings,
        x_ptr=x,
        **settings.pointers(),
        A=step.heads.shape[1],
        first=step.first,
        N=logits.shape[1],
        V=len(heads),
        **{f"stride_codes_{axis}": codes.stride(i) for i, axis in enumerate("rcg")},
        stride_noise_r=0 if noise is None else noise.stride(0),
        stride_embeddings=embeddings.stride(0),
        DIM=x.shape[1],
        ALL_GREEDY=settings.all_greedy,
        num_warps=_warps(block),
        **block,
    )
    return x


def _tile(dim: int) -> dict[str, int]:
    """Blocks of 16 table rows x 128 columns, three in flight; columns to prefetch."""
    columns = next_power_of_2(dim)
    return {
        "BLOCK_R": 16,
        "BLOCK_N": 16,
        "BLOCK_D": max(16, min(128, columns)),
        "PREFETCH": max(128, min(2048, columns)),
    }


def _blocks(active: int, widest: int, dim: int) -> dict[str, int]:
    return {
        "BLOCK_A": max(4, next_power_of_2(active)),
        "BLOCK_V": next_power_of_2(widest),
        "BLOCK_D": min(1024, next_power_of_2(dim)),
    }


def _warps(block: dict[str, int]) -> int:
    return max(1, min(16, block["BLOCK_A"] * block["BLOCK_V"] // 256))


def patch_noise_bytes(rows: int, group_size: int, size: int) -> int:
    """Bytes that must move: seeds and draws in, the noise out."""
    return rows * (4 * group_size * size + 16)


def sample_codes_bytes(rows: int, step: CodeStep, dim: int, next_dim: int, itemsize: int) -> int:
    """Bytes of one step: the active heads, their noise, hidden states, embeddings and the sum."""
    table = step.last - step.first
    embeddings = rows * (step.heads.shape[1] + 1) * next_dim
    return itemsize * (dim * (table + rows) + embeddings) + rows * table * (4 + 2 * itemsize)


def compile_cases() -> Iterator[Case]:
    """Steps with and without a codebook of 1025, sampled and greedy; logits in bf16 and float32."""
    yield Case(
        "patch_noise",
        patch_noise_kernel,
        pointers(fp32="noise", i64="seeds draws"),
        {"FIRST": FRAME_SLOT, "BLOCK_V": 128},
        1,
        unaligned=("V",),
    )
    for dtype in ("bf16", "fp32"):
        # A step's heads start at any row; rows of D = 1024 are always aligned.
        yield Case(
            f"head_logits {dtype}",
            head_logits_kernel,
            pointers(**{dtype: "hidden heads logits"}),
            _tile(1024),
            4,
            4,
            ieee=dtype == "fp32",
            wide_loads=True,
            unaligned=("R", "N"),
        )
    signature = pointers(
        bf16="logits embeddings x",
        fp32="noise temperature tail",
        i64="heads codes top_k",
        i1="greedy",
    )
    strides = tuple(f"stride_{name}" for name in ("codes_r", "codes_c", "codes_g", "noise_r"))
    for widest, greedy in ((1025, False), (129, False), (1025, True), (129, True)):
        block = _blocks(4, widest, 1024)
        yield Case(
            f"code_step widest={widest}{' greedy' * greedy}",
            code_step_kernel,
            signature,
            {"ALL_GREEDY": greedy} | block,
            _warps(block),
            unaligned=("A", "first", "N", "V", *strides),
        )
