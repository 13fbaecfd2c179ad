"""The Triton kernels of `matmul`; product.py has the formulas, quantized_weight.py the layout.

gemv: M = 1 ... 4 rows of x. It is bound by the bytes of the weight, so a program owns BLOCK_N rows
of it and walks along K; each thread loads 16 bytes of every row at once and keeps its x in
registers for all of them. An offset of 4 or 8 bits becomes a float without a conversion
instruction: ored, where it lies, into the mantissa of 2^23, minus 2^23 and the zero point, it is q
times a power of 2^bits, which x has been divided by (exactly). Four planes of 4 bits or two of 8
fit under bit 23, hence one shift a word. Zeros enter once a group: sum q x - zero sum x. One
program sums all of K in a fixed order, so there are neither atomics nor a second pass.

dot: M from 5 on tensor cores. A tile of the weight is unpacked plane by plane, scaled, rounded to
the dtype of x, and multiplied with the columns of x that belong to the plane.

unpack: rows of the weight as dot unpacks them, into memory, for torch's own product: that of a
prompt.

With NORM, x is multiplied by the norm's weight as it is read, and its squares are summed in the
same walk: a program reads all of x anyway, so the norm costs no launch and no pass of its own.
RMSNorm scales a whole row by one number, so that number is applied to the finished sum, before the
bias; it is not known sooner. gemv rounds nothing in between; dot rounds x times the norm's weight
to the dtype of x, as tensor cores take it: relative error is that of a normed x, but range is not,
so float16 is normed before.

With SWIGLU, a program's rows alternate between gate and up, so that both halves of a result meet in
it.
"""

from __future__ import annotations

from mimo_fast.kernels.dispatch import jit, load_float, pdl_trigger, pdl_wait, prefetch, tl


@jit
def row_scale(b_squares, K, eps):
    """What RMSNorm multiplies a row by, from partial sums of its squares along the last axis."""
    return tl.rsqrt(tl.sum(b_squares, axis=-1) / K + eps)


@jit
def finish(
    b_y,
    bias_ptr,
    residual_ptr,
    y_ptr,
    o_row,
    m_row,
    m: tl.constexpr,
    N,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Epilogues and store of row m of the result: b_y [BLOCK_N]."""
    HALVED: tl.constexpr = 2 if SWIGLU else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // HALVED
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = o_out < N // HALVED
    o_y = m * (N // HALVED) + o_out
    if BIAS:
        b_y += load_float(bias_ptr + o_row, m_row)
    if SWIGLU:
        b_gate, b_up = tl.split(tl.reshape(b_y, (BLOCK_OUT, 2)))
        b_y = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    if RESIDUAL:
        b_y += load_float(residual_ptr + o_y, m_out)
    tl.store(y_ptr + o_y, b_y, mask=m_out)


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
    return b_bits.to(tl.float32, bitcast=True) - (
        8388608.0 + (1 << (BITS - 1)) * (1 << (BITS * (p % HALF)))
    )


@jit
def put(values, i: tl.constexpr, value):
    """The tuple with another value at i: one accumulator a row of x, which only unrolled loops can
    index."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005 (Triton has no stars)


@jit
def quantized_gemv_kernel(
    x_ptr,
    norm_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    levels_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    stride_xm,
    N,
    K_WORDS,
    eps,
    M: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    BLOCKS: tl.constexpr = BLOCK_W // WIDTH
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    b_accs = (tl.zeros((BLOCK_N, BLOCKS), tl.float32),) * M
    b_squares = (tl.zeros((BLOCK_W,), tl.float32),) * M
    for start in range(0, K_WORDS, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < K_WORDS
        o_words = o_row[:, None].to(tl.int64) * K_WORDS + o_w[None, :]
        b_words = tl.load(
            words_ptr + o_words,
            mask=m_row[:, None] & m_w[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        o_block = start // WIDTH + tl.arange(0, BLOCKS)
        m_group = m_row[:, None] & (o_block < K_WORDS // WIDTH)[None, :]
        o_group = o_row[:, None].to(tl.int64) * (K_WORDS // WIDTH) + o_block[None, :]
        b_scale, b_zero = 1.0, 0.0
        if GROUPED:
            b_scale = load_float(scales_ptr + o_group, m_group)
        if ZEROS:
            b_zero = load_float(zeros_ptr + o_group, m_group)
        b_dots = (tl.zeros((BLOCK_N, BLOCK_W), tl.float32),) * M
        b_sums = (tl.zeros((BLOCK_W,), tl.float32),) * M
        for p in tl.static_range(PLANES):
            o_k = o_w // WIDTH * BLOCK + o_w % WIDTH + p * WIDTH
            b_q = plane_values(b_words, levels_ptr, p, BITS, LEVELS)
            if NORM:
                b_norm = load_float(norm_ptr + o_k, m_w)
            for m in tl.static_range(M):
                b_x = load_float(x_ptr + m * stride_xm + o_k, m_w)
                if NORM:
                    b_squares = put(b_squares, m, b_squares[m] + b_x * b_x)
                    b_x *= b_norm
                if ZEROS:
                    b_sums = put(b_sums, m, b_sums[m] + b_x)
                if not LEVELS:
                    b_x *= 1.0 / (1 << (BITS * (p % (16 // BITS))))
                b_dots = put(b_dots, m, b_dots[m] + b_q * b_x[None, :])
        for m in tl.static_range(M):
            b_part = tl.sum(tl.reshape(b_dots[m], (BLOCK_N, BLOCKS, WIDTH)), axis=2)
            if ZEROS:
                b_part -= b_zero * tl.sum(tl.reshape(b_sums[m], (BLOCKS, WIDTH)), axis=1)[None, :]
            b_accs = put(b_accs, m, b_accs[m] + b_part * b_scale)
    b_scale = 1.0
    if not GROUPED:
        b_scale = load_float(scales_ptr + o_row, m_row)
    for m in tl.static_range(M):
        b_y = tl.sum(b_accs[m], axis=1) * b_scale
        if NORM:
            b_y *= row_scale(b_squares[m], K_WORDS * PLANES, eps)
        finish(
            b_y, bias_ptr, residual_ptr, y_ptr, o_row, m_row, m, N, BLOCK_N, BIAS, RESIDUAL, SWIGLU
        )


@jit
def dense_gemv_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    stride_xm,
    stride_wn,
    N,
    K,
    eps,
    M: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl_trigger(PDL)
    VECTOR: tl.constexpr = 8
    PARTS: tl.constexpr = BLOCK_K // VECTOR
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    # What of the weight fits in flight; rows and columns beyond the last fetch it once more.
    LINE: tl.constexpr = 128 // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    o_line = tl.minimum(o_row, N - 1)[:, None].to(tl.int64) * stride_wn
    o_line += tl.minimum(tl.arange(0, LINES) * LINE, K - 1)[None, :]
    prefetch(w_ptr + o_line, PDL)
    pdl_wait(PDL)
    b_accs = (tl.zeros((BLOCK_N, PARTS), tl.float32),) * M
    b_squares = (tl.zeros((PARTS,), tl.float32),) * M
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        o_w = o_row[:, None].to(tl.int64) * stride_wn + o_k[None, :]
        b_w = tl.load(
            w_ptr + o_w,
            mask=m_row[:, None] & m_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if NORM:
            b_norm = load_float(norm_ptr + o_k, m_k)
        for m in tl.static_range(M):
            b_x = load_float(x_ptr + m * stride_xm + o_k, m_k)
            if NORM:
                b_squares = put(
                    b_squares,
                    m,
                    b_squares[m] + tl.sum(tl.reshape(b_x * b_x, (PARTS, VECTOR)), axis=1),
                )
                b_x *= b_norm
            b_dot = b_w.to(tl.float32) * b_x[None, :]
            b_accs = put(
                b_accs, m, b_accs[m] + tl.sum(tl.reshape(b_dot, (BLOCK_N, PARTS, VECTOR)), axis=2)
            )
    for m in tl.static_range(M):
        b_y = tl.sum(b_accs[m], axis=1)
        if NORM:
            b_y *= row_scale(b_squares[m], K, eps)
        finish(
            b_y, bias_ptr, residual_ptr, y_ptr, o_row, m_row, m, N, BLOCK_N, BIAS, RESIDUAL, SWIGLU
        )


@jit
def quantized_dot_kernel(
    x_ptr,
    norm_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    levels_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    stride_xm,
    M,
    N,
    K_WORDS,
    eps,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    o_row = weight_rows(tl.program_id(0), N, BLOCK_N, SWIGLU)
    m_row = o_row < N
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b_squares = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, K_WORDS, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < K_WORDS
        # The weight is transposed as it is read: words [BLOCK_W, BLOCK_N].
        m_words = m_w[:, None] & m_row[None, :]
        b_words = tl.load(
            words_ptr + o_row[None, :].to(tl.int64) * K_WORDS + o_w[:, None], mask=m_words, other=0
        )
        o_group = o_row[None, :].to(tl.int64) * (K_WORDS // WIDTH) + (o_w // WIDTH)[:, None]
        b_scale, b_zero = 1.0, 0.0
        if GROUPED:
            b_scale = load_float(scales_ptr + o_group, m_words)
        if ZEROS:
            b_zero = load_float(zeros_ptr + o_group, m_words)
        for p in tl.static_range(PLANES):
            o_k = o_w // WIDTH * BLOCK + o_w % WIDTH + p * WIDTH
            o_x = o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :]
            b_x = tl.load(x_ptr + o_x, mask=m_m[:, None] & m_w[None, :], other=0.0)
            if NORM:
                b_wide = b_x.to(tl.float32)
                b_squares += b_wide * b_wide
                b_norm = load_float(norm_ptr + o_k, m_w)
                b_x = (b_wide * b_norm[None, :]).to(b_x.dtype)
            b_q = plane_values(b_words, levels_ptr, p, BITS, LEVELS)
            if not LEVELS:
                b_q *= 1.0 / (1 << (BITS * (p % (16 // BITS))))
            b_w = ((b_q - b_zero) * b_scale).to(b_x.dtype)
            b_acc = tl.dot(b_x, b_w, b_acc, input_precision="ieee")
    if not GROUPED:
        b_acc *= load_float(scales_ptr + o_row, m_row)[None, :]
    if NORM:
        b_acc *= row_scale(b_squares, K_WORDS * PLANES, eps)[:, None]
    if BIAS:
        b_acc += load_float(bias_ptr + o_row, m_row)[None, :]
    HALVED: tl.constexpr = 2 if SWIGLU else 1
    BLOCK_OUT: tl.constexpr = BLOCK_N // HALVED
    if SWIGLU:
        b_gate, b_up = tl.split(tl.reshape(b_acc, (BLOCK_M, BLOCK_OUT, 2)))
        b_acc = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_y = m_m[:, None] & (o_out < N // HALVED)[None, :]
    o_y = o_m[:, None].to(tl.int64) * (N // HALVED) + o_out[None, :]
    if RESIDUAL:
        b_acc += load_float(residual_ptr + o_y, m_y)
    tl.store(y_ptr + o_y, b_acc, mask=m_y)


@jit
def unpack_kernel(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    levels_ptr,
    out_ptr,
    START,
    R,
    K_WORDS,
    GROUPS,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    PLANES: tl.constexpr = 32 // BITS
    WIDTH: tl.constexpr = BLOCK // PLANES
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (o_r < R)[:, None] & (o_w < K_WORDS)[None, :]
    o_row = (START + o_r).to(tl.int64)[:, None]
    b_words = tl.load(words_ptr + o_row * K_WORDS + o_w[None, :], mask=mask, other=0)
    o_group = o_row * GROUPS + (o_w * GROUPS // K_WORDS)[None, :]
    b_scale = load_float(scales_ptr + o_group, mask)
    b_zero = 0.0
    if ZEROS:
        b_zero = load_float(zeros_ptr + o_group, mask)
    o_out = (
        o_r.to(tl.int64)[:, None] * (K_WORDS * PLANES)
        + (o_w // WIDTH * BLOCK + o_w % WIDTH)[None, :]
    )
    for p in tl.static_range(PLANES):
        b_q = plane_values(b_words, levels_ptr, p, BITS, LEVELS)
        if not LEVELS:
            b_q *= 1.0 / (1 << (BITS * (p % (16 // BITS))))
        b_w = (b_q - b_zero) * b_scale
        tl.store(out_ptr + o_out + p * WIDTH, b_w, mask=mask)
