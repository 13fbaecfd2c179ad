from enum import Enum

class Type(Enum):
    float32 = 0
    bfloat16 = 1

def runs_here() -> bool: ...
def quantized_matmul(
    *, x: int, y: int, words: int, scales: int, zeros: int, bias: int, norm: int, residual: int, eps: float,
    swiglu: bool, type: Type, bits: int, block: int, group: int, M: int, N: int, K: int,
) -> None: ...  # fmt: skip
def decode_attention(
    *, qkv: int, table: int, k: int, v: int, slots: int, starts: int, y: int, type: Type, rows: int, heads: int,
    kv_heads: int, head_dim: int, positions: int, capacity: int, row_stride: int, slot_stride: int, head_stride: int,
    position_stride: int,
) -> None: ...  # fmt: skip
