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
                        score, the second, the largest score and the sum of exponentials.
    text_check_kernel   A chunk of a row a program: how much probability of the chunk comes before
                        the row's winner in top-p's order. Not launched where all rows are greedy;
                        rows with top-p off or 1 exit at once, since nothing is dropped there.
    text_settle_kernel  A row a program: combines the chunks and tests the winner against top-p.
                        Where it fails (one draw in twenty at 0.95), it draws again until one
                        passes. Where the second is too near the winner for the approximate noise to
                        decide (one draw in some hundred), it computes the noise of all candidates
                        that near exactly. So the token is the reference's, and few values need
                        float64.

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
    next_power_of_2,
    pdl_trigger,
    pdl_wait,
    tl,
    use_triton,
)
from mimo_fast.kernels.sample import (
    NEAR,
    SamplerTensors,
    gumbel,
    gumbel_noise,
    gumbel_word,
    near_gumbel,
    ordered_bits,
    sample,
)

CHUNK = 1024
"""Ids a program, which makes 149 programs a row at 151,680."""

SETTLE_BLOCK = 4096


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
def unsigned_bits(x):
    """float32 -> int64 in [0, 2^32) of the same order."""
    return ordered_bits(x).to(tl.int64) + 2147483648


@jit
def kth_bits(counts_ptr, k, PASSES: tl.constexpr):
    """The first 8 PASSES ordered bits of the k-th largest score.

    Read from the counts of as many passes, [PASSES, 256].
    """
    o_digit = tl.arange(0, 256)
    found = k * 0
    for i_pass in tl.static_range(PASSES):
        b_count = tl.load(counts_ptr + i_pass * 256 + o_digit)
        b_above = tl.sum(b_count, axis=0) - tl.cumsum(b_count, axis=0)
        m_digit = (b_above < k) & (b_above + b_count >= k)
        found = found * 256 + tl.sum(tl.where(m_digit, o_digit, 0), axis=0)
        k -= tl.sum(tl.where(m_digit, b_above, 0), axis=0)
    return found


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
        b_logits = tl.load(logits_ptr + i_row * stride_logits + o_v, mask=m_v, other=0.0).to(
            tl.float32
        )
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
        m_allowed = m_v & (
            tl.load(banned_ptr + i_row * stride_banned + o_v, mask=m_v, other=1) == 0
        )
    b_logits = tl.load(logits_ptr + i_row * stride_logits + o_v, mask=m_v, other=-float("inf")).to(
        tl.float32
    )
    values, ids = (
        values_ptr + (i_row * chunks + i_chunk) * 5,
        ids_ptr + (i_row * chunks + i_chunk) * 2,
    )
    best, i_best = tl.max(tl.where(m_allowed, b_logits, -float("inf")), axis=0, return_indices=True)
    tl.store(values, best)
    tl.store(ids, i_chunk * BLOCK_V + i_best)
    if not ALL_GREEDY:  # noqa: SIM102
        if tl.load(greedy_ptr + i_row) == 0:
            b_scores = tl.div_rn(b_logits, tl.load(temperature_ptr + i_row))
            m_kept = m_v & (b_scores > -float("inf"))
            if TOP_K:
                k = tl.load(top_k_ptr + i_row)
                if (k > 0) & (k < V):
                    m_kept = m_kept & (
                        unsigned_bits(b_scores) >= kth_bits(counts_ptr + i_row * 1024, k, 4)
                    )
            word = gumbel_word(tl.load(seeds_ptr + i_row), o_v, tl.load(draws_ptr + i_row), SLOT)
            b_perturbed = tl.where(m_kept & m_allowed, b_scores + near_gumbel(word), -float("inf"))
            tl.store(perturbed_ptr + i_row * V + o_v, b_perturbed, mask=m_v)
            winner, i_winner = tl.max(b_perturbed, axis=0, return_indices=True)
            m_other = tl.arange(0, BLOCK_V) != i_winner
            tl.store(values + 4, tl.max(tl.where(m_other, b_perturbed, -float("inf")), axis=0))
            top = tl.max(tl.where(m_kept, b_scores, -float("inf")), axis=0)
            b_mass = tl.where(
                m_kept, tl.exp(b_scores - tl.where(top == -float("inf"), 0.0, top)), 0.0
            )
            tl.store(values + 1, winner)
            tl.store(values + 2, top)
            tl.store(values + 3, tl.sum(b_mass, axis=0))
            tl.store(ids + 1, i_chunk * BLOCK_V + i_winner)


@jit
def joined_winner(values_ptr, ids_ptr, BLOCK_C: tl.constexpr, chunks):
    """Of all chunks of a row: the largest perturbed score, its chunk and id; the largest score."""
    o_chunk = tl.arange(0, BLOCK_C)
    values, m_chunk = values_ptr + o_chunk * 5, o_chunk < chunks
    b_winner = tl.load(values + 1, mask=m_chunk, other=-float("inf"))
    winner, i_winner = tl.max(b_winner, axis=0, return_indices=True)
    top = tl.max(tl.load(values + 2, mask=m_chunk, other=-float("inf")), axis=0)
    return winner, i_winner, tl.load(ids_ptr + i_winner * 2 + 1), top


@jit
def text_check_kernel(
    logits_ptr,
    counts_ptr,
    values_ptr,
    ids_ptr,
    checks_ptr,
    temperature_ptr,
    top_k_ptr,
    tail_ptr,
    greedy_ptr,
    stride_logits,
    V,
    chunks,
    TOP_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_chunk, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if (tl.load(greedy_ptr + i_row) == 0) & (tl.load(tail_ptr + i_row) > 0):
        logits = logits_ptr + i_row * stride_logits
        o_v = i_chunk * BLOCK_V + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_logits = tl.load(logits + o_v, mask=m_v, other=-float("inf")).to(tl.float32)
        temperature = tl.load(temperature_ptr + i_row)
        winner, _, drawn, top = joined_winner(
            values_ptr + i_row * chunks * 5, ids_ptr + i_row * chunks * 2, BLOCK_C, chunks
        )
        if winner > -float("inf"):
            b_scores = tl.div_rn(b_logits, temperature)
            score = tl.div_rn(tl.load(logits + drawn).to(tl.float32), temperature)
            m_kept = m_v & (b_scores > -float("inf"))
            if TOP_K:
                k = tl.load(top_k_ptr + i_row)
                if (k > 0) & (k < V):
                    m_kept = m_kept & (
                        unsigned_bits(b_scores) >= kth_bits(counts_ptr + i_row * 1024, k, 4)
                    )
            m_upto = m_kept & ((b_scores < score) | ((b_scores == score) & (o_v <= drawn)))
            m_above = m_kept & (m_upto == 0)
            checks = checks_ptr + (i_row * chunks + i_chunk) * 2
            tl.store(checks, tl.sum(tl.where(m_upto, tl.exp(b_scores - top), 0.0), axis=0))
            tl.store(checks + 1, tl.max(m_above.to(tl.int32), axis=0).to(tl.float32))


@jit
def least_near(winner, NEAR: tl.constexpr):
    """The lowest perturbed score that may be the winner's, given the largest.

    Both are off by at most NEAR and their rounding.
    """
    return winner - (2 * NEAR + tl.abs(winner) * 1e-6)


@jit
def exact_winner(
    logits_ptr,
    perturbed_ptr,
    V,
    temperature,
    seed,
    draw,
    least,
    score,
    last,
    SLOT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The winner by exact noise, and its id.

    Candidates are the ids above (score, last) in the order whose perturbed score is near the
    largest.
    """
    winner = tl.full([], -float("inf"), tl.float32)
    drawn = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        b_near = tl.load(perturbed_ptr + o_v, mask=m_v, other=-float("inf"))
        b_logits = tl.load(logits_ptr + o_v, mask=m_v, other=-float("inf"))
        b_scores = tl.div_rn(b_logits.to(tl.float32), temperature)
        m_near = (b_scores > score) | ((b_scores == score) & (o_v > last))
        # An infinite winner gives no bound, so all ids are near.
        m_near = m_near & (b_near > -float("inf")) & ((b_near < least) == 0)
        if tl.max(m_near.to(tl.int32), axis=0) > 0:
            b_exact = b_scores + gumbel_noise(seed, o_v, draw, SLOT)
            b_exact = tl.where(m_near, b_exact, -float("inf"))
            largest, i_largest = tl.max(b_exact, axis=0, return_indices=True)
            drawn = tl.where(largest > winner, (start + i_largest).to(tl.int32), drawn)
            winner = tl.maximum(winner, largest)
    return winner, drawn


@jit
def text_settle_kernel(
    logits_ptr,
    counts_ptr,
    perturbed_ptr,
    values_ptr,
    ids_ptr,
    checks_ptr,
    out_ptr,
    temperature_ptr,
    top_k_ptr,
    tail_ptr,
    greedy_ptr,
    seeds_ptr,
    draws_ptr,
    stride_logits,
    V,
    chunks,
    SLOT: tl.constexpr,
    NEAR: tl.constexpr,
    TOP_K: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    pdl_wait(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_chunk = tl.arange(0, BLOCK_C)
    m_chunk = o_chunk < chunks
    values = values_ptr + (i_row * chunks + o_chunk) * 5
    b_best = tl.load(values, mask=m_chunk, other=-float("inf"))
    _, i_best = tl.max(b_best, axis=0, return_indices=True)
    token = tl.load(ids_ptr + (i_row * chunks + i_best) * 2)
    if not ALL_GREEDY:  # noqa: SIM102
        if tl.load(greedy_ptr + i_row) == 0:
            b_winner = tl.load(values + 1, mask=m_chunk, other=-float("inf"))
            b_second = tl.load(values + 4, mask=m_chunk, other=-float("inf"))
            winner, i_winner = tl.max(b_winner, axis=0, return_indices=True)
            second = tl.max(tl.where(o_chunk == i_winner, b_second, b_winner), axis=0)
            seed, draw = tl.load(seeds_ptr + i_row), tl.load(draws_ptr + i_row)
            logits, perturbed = logits_ptr + i_row * stride_logits, perturbed_ptr + i_row * V
            drawn = tl.load(ids_ptr + (i_row * chunks + i_winner) * 2 + 1)
            checked = drawn
            b_top = tl.load(values + 2, mask=m_chunk, other=-float("inf"))
            top = tl.max(b_top, axis=0)
            b_decay = tl.exp(b_top - tl.where(top == -float("inf"), 0.0, top))
            total = tl.sum(tl.load(values + 3, mask=m_chunk, other=0.0) * b_decay, axis=0)
            temperature, tail = tl.load(temperature_ptr + i_row), tl.load(tail_ptr + i_row)
            least = least_near(winner, NEAR)
            if (winner > -float("inf")) & ((second < least) == 0):
                winner, drawn = exact_winner(
                    logits,
                    perturbed,
                    V,
                    temperature,
                    seed,
                    draw,
                    least,
                    -float("inf"),
                    -1,
                    SLOT,
                    BLOCK_V,
                )
            threshold = tl.full([], 0, tl.int64)
            if TOP_K:
                k = tl.load(top_k_ptr + i_row)
                if (k > 0) & (k < V):
                    threshold = kth_bits(counts_ptr + i_row * 1024, k, 4)
            rejected = (winner > -float("inf")) & (tail > 0)
            # The chunks have been checked against that id.
            if rejected & (drawn == checked):
                checks = checks_ptr + (i_row * chunks + o_chunk) * 2
                upto = tl.sum(tl.load(checks, mask=m_chunk, other=0.0), axis=0)
                above = tl.max(tl.load(checks + 1, mask=m_chunk, other=0.0), axis=0)
                rejected = (upto / total <= tail) & (above > 0)
            while rejected:
                logit = tl.load(logits + drawn).to(tl.float32)
                score = tl.div_rn(logit, temperature)
                b_mass = tl.zeros([BLOCK_V], tl.float32)
                b_above = tl.zeros([BLOCK_V], tl.int32)
                b_next = tl.full([BLOCK_V], -float("inf"), tl.float32)
                b_after = tl.full([BLOCK_V], -float("inf"), tl.float32)
                b_id = tl.zeros([BLOCK_V], tl.int32)
                for start in range(0, V, BLOCK_V):
                    o_v = start + tl.arange(0, BLOCK_V)
                    m_v = o_v < V
                    b_logits = tl.load(logits + o_v, mask=m_v, other=-float("inf"))
                    b_scores = tl.div_rn(b_logits.to(tl.float32), temperature)
                    m_kept = m_v & (b_scores > -float("inf"))
                    if TOP_K:
                        m_kept = m_kept & (unsigned_bits(b_scores) >= threshold)
                    m_upto = m_kept & ((b_scores < score) | ((b_scores == score) & (o_v <= drawn)))
                    m_above = m_kept & (m_upto == 0)
                    b_mass += tl.where(m_upto, tl.exp(b_scores - top), 0.0)
                    b_above = b_above | m_above.to(tl.int32)
                    b_perturbed = tl.load(perturbed + o_v, mask=m_above, other=-float("inf"))
                    b_after = tl.maximum(b_after, tl.minimum(b_next, b_perturbed))
                    b_id = tl.where(b_perturbed > b_next, o_v, b_id)
                    b_next = tl.maximum(b_next, b_perturbed)
                # The last id of the order is always kept.
                rejected = (tl.sum(b_mass, axis=0) / total <= tail) & (tl.max(b_above, axis=0) > 0)
                if rejected:
                    last = drawn
                    winner = tl.max(b_next, axis=0)
                    drawn = tl.min(tl.where(b_next == winner, b_id, V), axis=0)
                    b_others = tl.where((b_next == winner) & (b_id == drawn), b_after, b_next)
                    least = least_near(winner, NEAR)
                    near = (tl.max(b_others, axis=0) < least) == 0
                    if (winner > -float("inf")) & near:
                        winner, drawn = exact_winner(
                            logits,
                            perturbed,
                            V,
                            temperature,
                            seed,
                            draw,
                            least,
                            score,
                            last,
                            SLOT,
                            BLOCK_V,
                        )
                    # Where all above are banned, nothing is left.
                    rejected = winner > -float("inf")
            token = tl.where(winner > -float("inf"), drawn, token)
    tl.store(out_ptr + i_row, token.to(tl.int64))


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
    values = torch.empty(rows, chunks, 5, device=device)
    work = {
        "values_ptr": values,
        "ids_ptr": torch.empty(rows, chunks, 2, dtype=torch.int32, device=device),
        "perturbed_ptr": values if settings.all_greedy else torch.empty(rows, size, device=device),
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
    checks = values if settings.all_greedy else torch.empty(rows, chunks, 2, device=device)
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
    tensors = {
        "logits_ptr": "*bf16",
        "counts_ptr": "*i32",
        "temperature_ptr": "*fp32",
        "top_k_ptr": "*i64",
        "greedy_ptr": "*i1",
        "stride_logits": "i32",
        "V": "i32",
    }
    work = {"perturbed_ptr": "*fp32", "values_ptr": "*fp32", "ids_ptr": "*i32", "chunks": "i32"}
    work |= {"seeds_ptr": "*i64", "draws_ptr": "*i64"}
    draw = {"banned_ptr": "*u8", "stride_banned": "i32"}
    for i_pass in range(4):
        yield Case(
            f"text_digit {i_pass}",
            text_digit_kernel,
            tensors,
            {"PASS": i_pass, "BLOCK_V": CHUNK},
            4,
        )
    for name, top_k, greedy in (
        ("top-p", False, False),
        ("top-k, top-p", True, False),
        ("greedy", False, True),
    ):
        flags = {"SLOT": 0, "TOP_K": top_k, "ALL_GREEDY": greedy}
        yield Case(
            f"text_draw {name}",
            text_draw_kernel,
            tensors | work | draw,
            flags | {"BANNED": True, "BLOCK_V": CHUNK},
            4,
            unaligned=("chunks",),
        )
        checks = {"tail_ptr": "*fp32", "checks_ptr": "*fp32"}
        if not greedy:
            joined = {key: work[key] for key in ("values_ptr", "ids_ptr", "chunks")}
            yield Case(
                f"text_check {name}",
                text_check_kernel,
                tensors | joined | checks,
                {"TOP_K": top_k, "BLOCK_C": 256, "BLOCK_V": CHUNK},
                4,
                unaligned=("chunks",),
            )
        yield Case(
            f"text_settle {name}",
            text_settle_kernel,
            tensors | work | checks | {"out_ptr": "*i64"},
            flags | {"NEAR": NEAR, "BLOCK_C": 256, "BLOCK_V": SETTLE_BLOCK},
            16,
            unaligned=("chunks",),
        )
