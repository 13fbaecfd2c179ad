"""The text sampler for vocabularies like 151,680: sample.py's distribution without a sort.

Shapes: logits [N, V] of any float type, banned bool [N, V] or [V], seeds and draws int64 [N] -> ids
int64 [N]. Scores, exponentials and sums are float32, noise is float64 rounded to float32. Settings,
seeds and draws are read on the device, so each replay of a captured graph draws anew.

    text_digit_kernel   A chunk of a row a program, 4 launches, for the k-th largest score: counts
                        the values of the next 8 ordered bits among the scores that share the bits
                        found so far. Integer atomics, so the order does not matter. Not launched
                        where the host knows that no row uses top-k; rows without top-k exit at
                        once.
    text_draw_kernel    A chunk of a row a program: perturbs the scores that top-k keeps, with noise
                        that is accurate to NEAR, and stores the chunk's best id, its perturbed
                        score, the second, the largest score and the sum of exponentials. Where a
                        logit is NaN or +inf, the chunk's best logit is +inf, and the row draws
                        NOT_FINITE.
    text_check_kernel, text_settle_kernel    Top-p: sample_text_check.py.

Bytes: the logits once, twice with top-p, four times more with top-k; 4 V written and read for the
perturbed scores. All fit into L2 (0.9 MB a row).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.dispatch import (
    Case,
    early_launch,
    jit,
    load_float,
    next_power_of_2,
    pdl_trigger,
    pdl_wait,
    pointers,
    tl,
    use_triton,
)
from mimo_fast.kernels.sample import (
    NEAR,
    SamplerTensors,
    best_shown,
    gumbel,
    gumbel_word,
    near_gumbel,
    sample,
)
from mimo_fast.kernels.sample_text_check import (
    kept_by_top_k,
    kth_bits,
    text_check_kernel,
    text_settle_kernel,
    unsigned_bits,
)

CHUNK = 1024
"""Ids a program, which makes 149 programs a row at 151,680."""

SETTLE_BLOCK = 4096

TEXT_SLOT = 0
"""Random slot of the text draw; the frames of a patch draw in the slots after it."""


def sample_text_ref(
    logits: Tensor,
    settings: SamplerTensors,
    seeds: Tensor,
    draws: Tensor,
    banned: Tensor | None = None,
    slot: int = 0,
) -> Tensor:
    slots = torch.full_like(draws, slot)
    if settings.all_greedy:
        return sample(logits, settings, None, banned)
    if logits.device.type != "cpu":
        return sample(logits, settings, gumbel(seeds, draws, slots, logits.shape[-1]), banned)
    # Finding out which ids are kept would make the host wait for a device.
    return sample(logits, settings, lambda kept: gumbel(seeds, draws, slots, kept), banned)


@jit
def text_digit_kernel(
    logits_ptr,
    counts_ptr,
    temperature_ptr,
    top_k_ptr,
    greedy_ptr,
    stride_logits,
    V,
    PASS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_row = tl.program_id(1).to(tl.int64)
    k = tl.load(top_k_ptr + i_row)
    if (k > 0) & (k < V) & (tl.load(greedy_ptr + i_row) == 0):
        o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_logits = load_float(logits_ptr + i_row * stride_logits + o_v, m_v)
        b_bits = unsigned_bits(tl.div_rn(b_logits, tl.load(temperature_ptr + i_row)))
        counts = counts_ptr + i_row * 1024
        m_v = m_v & (b_bits >> (32 - 8 * PASS) == kth_bits(counts, k, PASS))
        b_digit = ((b_bits >> (24 - 8 * PASS)) & 255).to(tl.int32)
        b_count = tl.histogram(b_digit, 256, mask=m_v)
        tl.atomic_add(
            counts + PASS * 256 + tl.arange(0, 256), b_count, mask=b_count > 0, sem="relaxed"
        )


@jit
def text_draw_kernel(
    logits_ptr,
    banned_ptr,
    counts_ptr,
    perturbed_ptr,
    values_ptr,
    ids_ptr,
    temperature_ptr,
    top_k_ptr,
    greedy_ptr,
    seeds_ptr,
    draws_ptr,
    stride_logits,
    stride_banned,
    V,
    chunks,
    SLOT: tl.constexpr,
    BANNED: tl.constexpr,
    TOP_K: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_chunk, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_v = i_chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    m_allowed = m_v
    if BANNED:
        b_banned = tl.load(banned_ptr + i_row * stride_banned + o_v, mask=m_v, other=1)
        m_allowed = m_v & (b_banned == 0)
    logits = logits_ptr + i_row * stride_logits
    b_logits = tl.load(logits + o_v, mask=m_v, other=-float("inf")).to(tl.float32)
    values = values_ptr + (i_row * chunks + i_chunk) * 5
    ids = ids_ptr + (i_row * chunks + i_chunk) * 2
    best, i_best = tl.max(best_shown(b_logits, m_allowed), axis=0, return_indices=True)
    tl.store(values, best)
    tl.store(ids, i_chunk * BLOCK_V + i_best)
    if not ALL_GREEDY:  # noqa: SIM102
        if tl.load(greedy_ptr + i_row) == 0:
            b_scores = tl.div_rn(b_logits, tl.load(temperature_ptr + i_row))
            m_kept = kept_by_top_k(b_scores, m_v, counts_ptr, top_k_ptr, i_row, V, TOP_K)
            word = gumbel_word(tl.load(seeds_ptr + i_row), o_v, tl.load(draws_ptr + i_row), SLOT)
            b_perturbed = tl.where(m_kept & m_allowed, b_scores + near_gumbel(word), -float("inf"))
            tl.store(perturbed_ptr + i_row * V + o_v, b_perturbed, mask=m_v)
            winner, i_winner = tl.max(b_perturbed, axis=0, return_indices=True)
            m_other = tl.arange(0, BLOCK_V) != i_winner
            tl.store(values + 4, tl.max(tl.where(m_other, b_perturbed, -float("inf")), axis=0))
            top = tl.max(tl.where(m_kept, b_scores, -float("inf")), axis=0)
            some = tl.where(top == -float("inf"), 0.0, top)
            b_mass = tl.where(m_kept, tl.exp(b_scores - some), 0.0)
            tl.store(values + 1, winner)
            tl.store(values + 2, top)
            tl.store(values + 3, tl.sum(b_mass, axis=0))
            tl.store(ids + 1, i_chunk * BLOCK_V + i_winner)


def sample_text(
    logits: Tensor,
    settings: SamplerTensors,
    seeds: Tensor,
    draws: Tensor,
    banned: Tensor | None = None,
    slot: int = 0,
) -> Tensor:
    """One id a row, with the noise of `gumbel(seeds, draws, slot, V)`.

    logits [N, V]; seeds, draws int64 [N]; banned bool [N, V] or [V]. Returns int64 [N].
    """
    if not use_triton(logits):
        if native.takes_logits(logits, settings, seeds, draws, banned):
            return native.sample_text(logits, settings, seeds, draws, banned, slot)
        return sample_text_ref(logits, settings, seeds, draws, banned, slot)
    rows, size = logits.shape
    if not rows == len(seeds) == len(draws) == len(settings.greedy):
        given = f"{len(settings.greedy)} of settings, {len(seeds)} seeds and {len(draws)} draws"
        raise ValueError(f"{rows} rows of logits do not go with {given}")
    if banned is not None and banned.shape not in ((size,), (rows, size)):
        raise ValueError(f"banned {list(banned.shape)} is neither [{size}] nor [{rows}, {size}]")
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    banned = banned if banned is None or banned.stride(-1) == 1 else banned.contiguous()
    device, chunks = logits.device, -(-size // CHUNK)
    top_k = settings.any_top_k and not settings.all_greedy
    shared = {
        "logits_ptr": logits,
        "stride_logits": logits.stride(0),
        "V": size,
        "counts_ptr": settings.top_k,
        "temperature_ptr": settings.temperature,
        "top_k_ptr": settings.top_k,
        "greedy_ptr": settings.greedy,
    }
    if top_k:
        shared["counts_ptr"] = torch.zeros(rows, 4, 256, dtype=torch.int32, device=device)
        for i_pass in range(4):
            text_digit_kernel[(chunks, rows)](
                **early_launch(logits, "text_digit"),
                **shared,
                PASS=i_pass,
                BLOCK_V=CHUNK,
                num_warps=4,
            )
    values = torch.empty(rows, chunks, 5, device=device, dtype=torch.float32)
    work = {
        "values_ptr": values,
        "ids_ptr": torch.empty(rows, chunks, 2, dtype=torch.int32, device=device),
        "perturbed_ptr": values
        if settings.all_greedy
        else torch.empty(rows, size, device=device, dtype=torch.float32),
        "chunks": chunks,
        "seeds_ptr": seeds,
        "draws_ptr": draws,
        "SLOT": slot,
        "TOP_K": top_k,
        "ALL_GREEDY": settings.all_greedy,
    }
    text_draw_kernel[(chunks, rows)](
        **early_launch(logits, "text_draw"),
        **shared,
        **work,
        banned_ptr=logits if banned is None else banned.view(torch.uint8),
        stride_banned=banned.stride(0) if banned is not None and banned.ndim > 1 else 0,
        BANNED=banned is not None,
        BLOCK_V=CHUNK,
        num_warps=4,
    )
    block_c = next_power_of_2(chunks)
    checks = (
        values
        if settings.all_greedy
        else torch.empty(rows, chunks, 2, device=device, dtype=torch.float32)
    )
    if not settings.all_greedy:
        text_check_kernel[(chunks, rows)](
            **early_launch(logits, "text_check"),
            **shared,
            values_ptr=work["values_ptr"],
            ids_ptr=work["ids_ptr"],
            checks_ptr=checks,
            tail_ptr=settings.tail,
            chunks=chunks,
            TOP_K=top_k,
            BLOCK_C=block_c,
            BLOCK_V=CHUNK,
            num_warps=4,
        )
    out = torch.empty(rows, dtype=torch.int64, device=device)
    text_settle_kernel[(rows,)](
        **early_launch(logits, "text_settle"),
        **shared,
        **work,
        checks_ptr=checks,
        out_ptr=out,
        tail_ptr=settings.tail,
        NEAR=NEAR,
        BLOCK_C=block_c,
        BLOCK_V=min(SETTLE_BLOCK, next_power_of_2(size)),
        num_warps=16,
    )
    return out


def sample_text_bytes(rows: int, size: int, itemsize: int, top_k: bool, top_p: bool) -> int:
    """Bytes that must move: see above. A greedy row reads its logits once."""
    return rows * size * (itemsize * (1 + 4 * top_k + top_p) + 4 * (1 + top_p))


def compile_cases() -> Iterator[Case]:
    """V = 151,680 with and without top-k, and greedy alone."""
    signature = pointers(
        bf16="logits",
        i32="counts ids",
        fp32="temperature tail perturbed values checks",
        i64="top_k seeds draws out",
        i1="greedy",
        u8="banned",
    )
    for i_pass in range(4):
        blocks = {"PASS": i_pass, "BLOCK_V": CHUNK}
        yield Case(f"text_digit {i_pass}", text_digit_kernel, signature, blocks, 4)
    for name, top_k, greedy in (
        ("top-p", False, False),
        ("top-k, top-p", True, False),
        ("greedy", False, True),
    ):
        flags = {"SLOT": 0, "TOP_K": top_k, "ALL_GREEDY": greedy}
        draw = flags | {"BANNED": True, "BLOCK_V": CHUNK}
        check = {"TOP_K": top_k, "BLOCK_C": 256, "BLOCK_V": CHUNK}
        settle = flags | {"NEAR": NEAR, "BLOCK_C": 256, "BLOCK_V": SETTLE_BLOCK}
        for step, kernel, constexprs, warps in (
            ("draw", text_draw_kernel, draw, 4),
            ("check", text_check_kernel, check, 4),
            ("settle", text_settle_kernel, settle, 16),
        ):
            if step != "check" or not greedy:
                yield Case(
                    f"text_{step} {name}",
                    kernel,
                    signature,
                    constexprs,
                    warps,
                    unaligned=("chunks",),
                )
