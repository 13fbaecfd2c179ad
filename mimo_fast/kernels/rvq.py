"""Residual vector quantization with Euclidean codebooks, in IEEE float32.

    encode: r_0 = x;  i_q = argmin_j |r_q - e_qj|^2 (first index on ties);  r_{q+1} = r_q - e_q[i_q]
    decode: sum_q e_q[i_q]

Encode gives NOT_FINITE (-1) where a distance is NaN or all are infinite, so where x or a codebook
is not finite; decode gives NaN for it.

Shapes: x [T, D], codebooks [V_q, D] of any sizes, codes [Q, T] int64. The distance is expanded as
|r|^2 - 2 r.e + |e|^2 in upstream's order of operations (`EuclideanCodebook.quantize`), so that
near-ties fall on the same side: |e|^2 is computed once by the same expression, 2 r.e is exact, and
the dot product is a chain of float32 FMAs (no TF32). Implementations differ only in the order of
the D terms of the dot product and of |r|^2. The sum of decode is bitwise the reference's.

Encode is one launch. A program owns BLOCK_T frames from the first codebook to the last. For each
codebook it searches tiles of BLOCK_V rows in chunks of 32 columns, pipelined through shared memory,
then subtracts the chosen rows. At D = 1280 the residual of 16 frames is 80 KB, which would be 80
registers (padded to 128) of each of 256 threads, and registers cannot be indexed by chunk. So the
residual lies in a scratch row that no other program touches and that stays in L2. Reading it again
for every tile adds 12% (16 rows beside 128 of the codebook). Subtracting moves another 12 D bytes a
frame and codebook, in chunks of BLOCK_R = 128 columns, 16 bytes a load (chunks of 256 columns spill
registers).

Every program reads all codebooks from L2: 14.4 MB for the 8 that the language model speaks (7.2
MFLOP a frame), 22.3 MB for all 20. With 16 frames a tile does 7 FLOP a byte, 455 a clock at the 64
bytes a clock that a multiprocessor gets from L2, more than the 256 of its float32 units. With 4
frames it does 1.9 and L2 limits it to half of them, but short inputs need the four times as many
programs to fill a card. A single program takes at least 0.1 ms (14.4 MB at about 150 GB/s), which
is the floor for very few frames: to share a frame between programs takes a grid-wide barrier for
each codebook. From memory come x and the codebooks once, and the codes go there.

Decode gathers: a program sums 256 columns of a frame over the codebooks, four rows in flight.
Bytes: T (4 D Q reads + 4 D writes + 8 Q of codes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.kernels.dispatch import Case, jit, next_power_of_2, pointers, tl, use_triton
from mimo_fast.kernels.sample import NOT_FINITE

FEW_FRAMES = 512
"""Number of frames below which programs take 4 frames instead of 16."""


@dataclass(frozen=True)
class Codebooks:
    """Codebooks packed once for all calls.

    Args:
        table: [sum V_q, D] float32; codebook q is rows offsets[q] ... offsets[q + 1] - 1.
        norms: [sum V_q], |e|^2.
        offsets: int32 [Q + 1], on the table's device.
        books: each codebook as a view of the table.
    """

    table: Tensor
    norms: Tensor
    offsets: Tensor
    books: tuple[Tensor, ...]

    @classmethod
    def pack(cls, codebooks: Sequence[Tensor]) -> Codebooks:
        """Copies codebooks [V_q, D] of any float dtype into one float32 table."""
        table = torch.cat([book.float() for book in codebooks])
        sizes = [len(book) for book in codebooks]
        offsets = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(0)
        return cls(
            table, table.square().sum(-1), offsets.int().to(table.device), table.split(sizes)
        )

    def __len__(self) -> int:
        return len(self.books)

    def first(self, n: int | None) -> Codebooks:
        """The first n codebooks, sharing this one's memory; all of them for None."""
        return Codebooks(self.table, self.norms, self.offsets, self.books[:n])


def rvq_encode_ref(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    residual, codes = x, []
    for codebook in codebooks:
        norms = codebook.square().sum(-1)
        distance = residual.square().sum(-1, keepdim=True) - 2 * residual @ codebook.T + norms
        rows = distance.argmin(-1)
        # Of a row of distances, argmin takes NaN.
        finite = distance.gather(-1, rows[:, None])[:, 0].isfinite()
        codes.append(rows.where(finite, NOT_FINITE))
        residual = residual - codebook[rows]
    return (
        torch.stack(codes) if codes else torch.empty(0, len(x), dtype=torch.int64, device=x.device)
    )


def rvq_decode_ref(codes: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    first, *others = codes.clamp(min=0)
    total = codebooks[0][first]
    for indices, codebook in zip(others, codebooks[1:], strict=False):
        total = total + codebook[indices]
    return total.masked_fill((codes < 0).any(0)[:, None], torch.nan)


@jit
def rvq_encode_kernel(
    x_ptr,
    residual_ptr,
    table_ptr,
    norms_ptr,
    offsets_ptr,
    codes_ptr,
    stride_x,
    T,
    D,
    Q,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    o_wide = tl.arange(0, BLOCK_R)
    m_t = o_t < T
    b_square = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    x = x_ptr + o_t[:, None] * stride_x
    for i_d in range(0, D, BLOCK_R):
        m_r = m_t[:, None] & (i_d + o_wide < D)[None, :]
        b_r = tl.load(x + (i_d + o_wide)[None, :], mask=m_r, other=0.0)
        tl.store(residual_ptr + o_t[:, None] * D + (i_d + o_wide)[None, :], b_r, mask=m_r)
        b_square += b_r * b_r

    for i_q in range(Q):
        i_first = tl.load(offsets_ptr + i_q)
        i_last = tl.load(offsets_ptr + i_q + 1)
        b_norm_r = tl.sum(b_square, axis=1)
        b_least = tl.full([BLOCK_T], float("inf"), tl.float32)
        b_row = tl.zeros([BLOCK_T], tl.int32) + i_first
        # From here on, threads read what other threads of this program stored.
        tl.debug_barrier()
        for i_v in range(i_first, i_last, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            m_v = o_v < i_last
            b_dot = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            for i_d in range(0, D, BLOCK_D):
                m_d = (i_d + o_d < D)[None, :]
                o_r = o_t[:, None] * D + (i_d + o_d)[None, :]
                b_r = tl.load(residual_ptr + o_r, mask=m_t[:, None] & m_d, other=0.0)
                o_e = o_v[:, None] * D + (i_d + o_d)[None, :]
                b_e = tl.load(table_ptr + o_e, mask=m_v[:, None] & m_d, other=0.0)
                b_dot = tl.dot(b_r, tl.trans(b_e), b_dot, input_precision="ieee")
            b_norm_e = tl.load(norms_ptr + o_v, mask=m_v, other=float("inf"))
            b_distance = b_norm_r[:, None] - 2 * b_dot + b_norm_e[None, :]
            # NaN compares with nothing; this way it is the least distance, as for argmin.
            b_distance = tl.where(b_distance == b_distance, b_distance, -float("inf"))
            b_tile_least, b_tile_row = tl.min(b_distance, axis=1, return_indices=True)
            # Strict comparison: an earlier tile wins a tie, as an earlier row does inside a tile.
            b_row = tl.where(b_tile_least < b_least, i_v + b_tile_row, b_row)
            b_least = tl.minimum(b_tile_least, b_least)
        b_code = tl.where(tl.abs(b_least) < float("inf"), b_row - i_first, -1)
        tl.store(codes_ptr + i_q * T + o_t, b_code.to(tl.int64), mask=m_t)

        tl.debug_barrier()
        b_square = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        chosen = table_ptr + b_row[:, None] * D
        for i_d in range(0, D, BLOCK_R):
            m_r = m_t[:, None] & (i_d + o_wide < D)[None, :]
            o_r = o_t[:, None] * D + (i_d + o_wide)[None, :]
            b_r = tl.load(residual_ptr + o_r, mask=m_r, other=0.0)
            b_r -= tl.load(chosen + (i_d + o_wide)[None, :], mask=m_r, other=0.0)
            tl.store(residual_ptr + o_r, b_r, mask=m_r)
            b_square += b_r * b_r


@jit
def rvq_decode_kernel(
    codes_ptr, table_ptr, offsets_ptr, y_ptr, stride_cq, stride_ct, D, Q, BLOCK_D: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    codes_ptr += i_t * stride_ct
    least = tl.load(codes_ptr)
    b_y = tl.load(table_ptr + tl.maximum(least, 0) * D + o_d, mask=m_d, other=0.0)
    for i_q in tl.range(1, Q, loop_unroll_factor=4):
        b_code = tl.load(codes_ptr + i_q * stride_cq)
        least = tl.minimum(least, b_code)
        b_row = tl.maximum(b_code, 0) + tl.load(offsets_ptr + i_q)
        b_y += tl.load(table_ptr + b_row * D + o_d, mask=m_d, other=0.0)
    tl.store(y_ptr + i_t * D + o_d, tl.where(least < 0, float("nan"), b_y), mask=m_d)


def rvq_encode(x: Tensor, codebooks: Codebooks | Sequence[Tensor]) -> Tensor:
    """x [T, D] float32, codebooks [V_q, D] float32 -> codes [Q, T] int64.

    A plain sequence of codebooks is packed at every call; a `Codebooks` is not, nor its `first`.
    """
    if not use_triton(x) or not len(codebooks):
        return rvq_encode_ref(x, _books(codebooks))
    packed = codebooks if isinstance(codebooks, Codebooks) else Codebooks.pack(codebooks)
    frames, dim = x.shape
    if x.dtype != torch.float32 or dim != packed.table.shape[1]:
        raise ValueError(
            f"x must be float32 [T, {packed.table.shape[1]}], not {x.dtype} {list(x.shape)}"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(len(packed), frames, dtype=torch.int64, device=x.device)
    if frames:
        tile, warps, stages = _tile(frames)
        rvq_encode_kernel[(-(-frames // tile["BLOCK_T"]),)](
            x_ptr=x,
            residual_ptr=torch.empty(frames, dim, device=x.device, dtype=torch.float32),
            table_ptr=packed.table,
            norms_ptr=packed.norms,
            offsets_ptr=packed.offsets,
            codes_ptr=codes,
            stride_x=x.stride(0),
            T=frames,
            D=dim,
            Q=len(packed),
            **tile,
            num_warps=warps,
            num_stages=stages,
        )
    return codes


def rvq_decode(codes: Tensor, codebooks: Codebooks | Sequence[Tensor]) -> Tensor:
    """codes [Q, T] -> [T, D] float32.

    There may be fewer rows than codebooks; each code must be inside its codebook, or NOT_FINITE.
    """
    if not 1 <= len(codes) <= len(codebooks):
        raise ValueError(
            f"codes must have 1 to {len(codebooks)} rows, one a codebook, not {len(codes)}"
        )
    books = _books(codebooks)
    if not use_triton(books[0]):
        return rvq_decode_ref(codes, books)
    packed = codebooks if isinstance(codebooks, Codebooks) else Codebooks.pack(codebooks)
    codes = codes.long()
    (channels, frames), dim = codes.shape, packed.table.shape[1]
    y = torch.empty(frames, dim, device=packed.table.device, dtype=torch.float32)
    if frames:
        block = min(256, next_power_of_2(dim))
        rvq_decode_kernel[(frames, -(-dim // block))](
            codes_ptr=codes,
            table_ptr=packed.table,
            offsets_ptr=packed.offsets,
            y_ptr=y,
            stride_cq=codes.stride(0),
            stride_ct=codes.stride(1),
            D=dim,
            Q=channels,
            BLOCK_D=block,
            num_warps=2,
        )
    return y


def rvq_encode_bytes(frames: int, dim: int, sizes: Sequence[int]) -> int:
    """Bytes that must come from or go to memory: x and the codebooks in, the codes out."""
    return 4 * dim * (frames + sum(sizes)) + 8 * frames * len(sizes)


def rvq_decode_bytes(frames: int, dim: int, channels: int) -> int:
    """Bytes that must move: a row a code in, the sums out, and the codes."""
    return frames * (4 * dim * (channels + 1) + 8 * channels)


def _books(codebooks: Codebooks | Sequence[Tensor]) -> Sequence[Tensor]:
    return codebooks.books if isinstance(codebooks, Codebooks) else codebooks


def _tile(frames: int) -> tuple[dict[str, int], int, int]:
    """(block sizes, warps, stages)."""
    if frames < FEW_FRAMES:
        return {"BLOCK_T": 4, "BLOCK_V": 64, "BLOCK_D": 32, "BLOCK_R": 128}, 4, 4
    return {"BLOCK_T": 16, "BLOCK_V": 128, "BLOCK_D": 32, "BLOCK_R": 128}, 8, 3


def compile_cases() -> Iterator[Case]:
    """Both search configurations and the gather; D = 1280 is a multiple of 16."""
    for frames in (FEW_FRAMES - 1, FEW_FRAMES):
        tile, warps, stages = _tile(frames)
        yield Case(
            f"rvq_encode BLOCK_T={tile['BLOCK_T']}",
            rvq_encode_kernel,
            pointers(fp32="x residual table norms", i32="offsets", i64="codes"),
            tile,
            warps,
            stages,
            ieee=True,
            wide_loads=True,
            unaligned=("T", "Q"),
        )
    yield Case(
        "rvq_decode",
        rvq_decode_kernel,
        pointers(fp32="table y", i32="offsets", i64="codes"),
        {"BLOCK_D": 256},
        2,
        wide_loads=True,
        unaligned=("stride_cq", "stride_ct", "Q"),
    )
