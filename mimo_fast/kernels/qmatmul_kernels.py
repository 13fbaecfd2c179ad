"""The Triton kernels of `qmatmul`, whose formulas and packed layout are in qmatmul.py.

gemv: M = 1 ... 4 rows of x. It is bound by the bytes of the weight, so a program owns BLOCK_N rows of it and walks
along K; each thread loads 16 bytes of every row at once and keeps its x in registers for all of them. An offset of 4 or
8 bits becomes a float without a conversion instruction: ored, where it lies, into the mantissa of 2^23, minus 2^23 and
the zero point, it is q times a power of 2^bits, which x has been divided by (exactly). Four planes of 4 bits or two of
8 fit under bit 23, hence one shift a word. Zeros enter once a group: sum q x - zero sum x. One program sums all of K in
a fixed order, so there are neither atomics nor a second pass.

dot: M from 5 on tensor cores, prefill included. A tile of the weight is unpacked plane by plane, scaled, rounded to the
dtype of x, and multiplied with the columns of x that belong to the plane.

With SWIGLU, a program's rows alternate between gate and up, so that both halves of a result meet in it.
"""

from __future__ import annotations

from .dispatch import jit, tl


@jit
def finish(
    b_y, bias_ptr, residual_ptr, y_ptr, o_row, m_row, o_out, m_out,
    BLOCK_N: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """Epilogues and store of one row of the result: b_y [BLOCK_N]."""
    if BIAS:
        b_y += tl.load(bias_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
    if SWIGLU:
        b_gate, b_up = tl.split(tl.reshape(b_y, (BLOCK_N // 2, 2)))
        b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    if RESIDUAL:
        b_y += tl.load(residual_ptr + o_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_out, b_y.to(y_ptr.dtype.element_ty), mask=m_out)


@jit
def weight_rows(i_block, N, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Rows of the weight that a program owns: consecutive, or gate and up in turn."""
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    return o_n // 2 + (o_n % 2) * (N // 2) if SWIGLU else o_n


@jit
def plane_values(b_words, levels_ptr, p: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """q of plane p, as float32, times 2^(BITS * (p % HALF)); a table's levels are not scaled."""
    HALF: tl.constexpr = 16 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    if LEVELS:
        return tl.load(levels_ptr + ((b_words >> (BITS * p)) & MASK))
    b_half = b_words >> 16 if p >= HALF else b_words
    b_bits = (b_half & (MASK << (BITS * (p % HALF)))) | 0x4B000000
    return b_bits.to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)) * (1 << (BITS * (p % HALF))))


@jit
def quantized_gemv_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, levels_ptr, bias_ptr, residual_ptr, y_ptr, stride_xm, N, K_WORDS,
    M: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    LEVELS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    BLOCKS: tl.constexpr = BLOCK_W // WIDTH
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    b_acc0 = tl.zeros((BLOCK_N, BLOCKS), tl.float32)
    b_acc1, b_acc2, b_acc3 = b_acc0, b_acc0, b_acc0
    for start in range(0, K_WORDS, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < K_WORDS
        o_words = o_row[:, None].to(tl.int64) * K_WORDS + o_w[None, :]
        b_words = tl.load(
            words_ptr + o_words, mask=m_row[:, None] & m_w[None, :], other=0, eviction_policy="evict_first"
        )
        o_block = start // WIDTH + tl.arange(0, BLOCKS)
        o_k = o_w // WIDTH * BLOCK + o_w % WIDTH
        m_group = m_row[:, None] & (o_block < K_WORDS // WIDTH)[None, :]
        o_group = o_row[:, None].to(tl.int64) * (K_WORDS // WIDTH) + o_block[None, :]
        b_scale, b_zero = 1.0, 0.0
        if GROUPED:
            b_scale = tl.load(scales_ptr + o_group, mask=m_group, other=0.0).to(tl.float32)
        if ZEROS:
            b_zero = tl.load(zeros_ptr + o_group, mask=m_group, other=0.0).to(tl.float32)
        for m in tl.static_range(M):
            b_dot = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
            b_sum = tl.zeros((BLOCK_W,), tl.float32)
            for p in tl.static_range(PLANES):
                b_x = tl.load(x_ptr + m * stride_xm + o_k + p * WIDTH, mask=m_w, other=0.0).to(tl.float32)
                b_sum += b_x
                if not LEVELS:
                    b_x *= 1.0 / (1 << (BITS * (p % (16 // BITS))))
                b_dot += plane_values(b_words, levels_ptr, p, BITS, LEVELS) * b_x[None, :]
            b_part = tl.sum(tl.reshape(b_dot, (BLOCK_N, BLOCKS, WIDTH)), axis=2)
            if ZEROS:
                b_part -= b_zero * tl.sum(tl.reshape(b_sum, (BLOCKS, WIDTH)), axis=1)[None, :]
            b_part *= b_scale
            if m == 0:
                b_acc0 += b_part
            if m == 1:
                b_acc1 += b_part
            if m == 2:
                b_acc2 += b_part
            if m == 3:
                b_acc3 += b_part
    HALVED: tl.constexpr = 2 if SWIGLU else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // HALVED
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    for m in tl.static_range(M):
        b_acc = b_acc0 if m == 0 else b_acc1 if m == 1 else b_acc2 if m == 2 else b_acc3
        b_y = tl.sum(b_acc, axis=1)
        if not GROUPED:
            b_y *= tl.load(scales_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
        o_y = m * (N // HALVED) + o_out
        finish(b_y, bias_ptr, residual_ptr, y_ptr, o_row, m_row, o_y, o_out < N // HALVED, BLOCK_N, BIAS, RESIDUAL,
               SWIGLU)  # fmt: skip


@jit
def dense_gemv_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, stride_xm, stride_wn, N, K,
    M: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 8
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    b_acc0 = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    b_acc1, b_acc2, b_acc3 = b_acc0, b_acc0, b_acc0
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_w = o_row[:, None].to(tl.int64) * stride_wn + o_k[None, :]
        b_w = tl.load(w_ptr + o_w, mask=m_row[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
        for m in tl.static_range(M):
            b_x = tl.load(x_ptr + m * stride_xm + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_dot = b_w.to(tl.float32) * b_x[None, :]
            b_part = tl.sum(tl.reshape(b_dot, (BLOCK_N, BLOCK_K // VECTOR, VECTOR)), axis=2)
            if m == 0:
                b_acc0 += b_part
            if m == 1:
                b_acc1 += b_part
            if m == 2:
                b_acc2 += b_part
            if m == 3:
                b_acc3 += b_part
    HALVED: tl.constexpr = 2 if SWIGLU else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // HALVED
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    for m in tl.static_range(M):
        b_acc = b_acc0 if m == 0 else b_acc1 if m == 1 else b_acc2 if m == 2 else b_acc3
        o_y = m * (N // HALVED) + o_out
        finish(tl.sum(b_acc, axis=1), bias_ptr, residual_ptr, y_ptr, o_row, m_row, o_y, o_out < N // HALVED, BLOCK_N,
               BIAS, RESIDUAL, SWIGLU)  # fmt: skip


@jit
def quantized_dot_kernel(
    x_ptr, words_ptr, scales_ptr, zeros_ptr, levels_ptr, bias_ptr, residual_ptr, y_ptr, stride_xm, M, N, K_WORDS,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, LEVELS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K_WORDS, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < K_WORDS
        # The weight is transposed as it is read: words [BLOCK_W, BLOCK_N].
        m_words = m_w[:, None] & m_row[None, :]
        b_words = tl.load(words_ptr + o_row[None, :].to(tl.int64) * K_WORDS + o_w[:, None], mask=m_words, other=0)
        o_group = o_row[None, :].to(tl.int64) * (K_WORDS // WIDTH) + (o_w // WIDTH)[:, None]
        b_scale, b_zero = 1.0, 0.0
        if GROUPED:
            b_scale = tl.load(scales_ptr + o_group, mask=m_words, other=0.0).to(tl.float32)
        if ZEROS:
            b_zero = tl.load(zeros_ptr + o_group, mask=m_words, other=0.0).to(tl.float32)
        o_x = o_m[:, None].to(tl.int64) * stride_xm + (o_w // WIDTH * BLOCK + o_w % WIDTH)[None, :]
        for p in tl.static_range(PLANES):
            b_x = tl.load(x_ptr + o_x + p * WIDTH, mask=m_m[:, None] & m_w[None, :], other=0.0)
            b_q = plane_values(b_words, levels_ptr, p, BITS, LEVELS)
            if not LEVELS:
                b_q *= 1.0 / (1 << (BITS * (p % (16 // BITS))))
            b_w = ((b_q - b_zero) * b_scale).to(b_x.dtype)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    if not GROUPED:
        b_acc *= tl.load(scales_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        b_acc += tl.load(bias_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)[None, :]
    HALVED: tl.constexpr = 2 if SWIGLU else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // HALVED
    if SWIGLU:
        b_gate, b_up = tl.split(tl.reshape(b_acc, (BLOCK_M, BLOCK_OUT, 2)))
        b_acc = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_y = m_m[:, None] & (o_out < N // HALVED)[None, :]
    o_y = o_m[:, None].to(tl.int64) * (N // HALVED) + o_out[None, :]
    if RESIDUAL:
        b_acc += tl.load(residual_ptr + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_y, b_acc.to(y_ptr.dtype.element_ty), mask=m_y)
