"""Top-p of `sample_text`: whether it keeps the winner of a row's draw, and the next if not.

text_check_kernel   A chunk of a row a program: how much probability of the chunk comes before
                    the row's winner in top-p's order. Not launched where all rows are greedy;
                    rows with top-p off or 1 exit at once, since nothing is dropped there.
text_settle_kernel  A row a program: combines the chunks and tests the winner against top-p.
                    Where it fails (one draw in twenty at 0.95), it draws again until one
                    passes. Where the second is too near the winner for the approximate noise to
                    decide (one draw in some hundred), it computes the noise of all candidates
                    that near exactly. So the token is the reference's, and few values need
                    float64.
"""

from __future__ import annotations

from mimo_fast.kernels.dispatch import jit, pdl_trigger, pdl_wait, tl
from mimo_fast.kernels.sample import gumbel_noise, ordered_bits


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
def kept_by_top_k(b_scores, m_v, counts_ptr, top_k_ptr, i_row, V, TOP_K: tl.constexpr):
    """Which of a row's scores top-k keeps, of those that are not -inf."""
    m_kept = m_v & (b_scores > -float("inf"))
    if TOP_K:
        k = tl.load(top_k_ptr + i_row)
        if (k > 0) & (k < V):
            kth = kth_bits(counts_ptr + i_row * 1024, k, 4)
            m_kept = m_kept & (unsigned_bits(b_scores) >= kth)
    return m_kept


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
            m_kept = kept_by_top_k(b_scores, m_v, counts_ptr, top_k_ptr, i_row, V, TOP_K)
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
    best, i_best = tl.max(b_best, axis=0, return_indices=True)
    finite = tl.abs(best) < float("inf")
    token = tl.load(ids_ptr + (i_row * chunks + i_best) * 2)
    if not ALL_GREEDY:  # noqa: SIM102
        if (tl.load(greedy_ptr + i_row) == 0) & finite:
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
    tl.store(out_ptr + i_row, tl.where(finite, token, -1).to(tl.int64))
