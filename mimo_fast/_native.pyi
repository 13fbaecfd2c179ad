from enum import Enum

class Type(Enum):
    float32 = 0
    bfloat16 = 1

def quantized_matmul_runs() -> bool: ...
def quantized_matmul(
    *, x: int, y: int, words: int, scales: int, zeros: int, bias: int, type: Type, bits: int, block: int, group: int,
    M: int, N: int, K: int,
) -> None: ...  # fmt: skip
