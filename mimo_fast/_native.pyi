from enum import Enum

class Type(Enum):
    float32 = 0
    bfloat16 = 1

def runs_here() -> bool: ...
def set_threads(threads: int) -> int: ...
def quantized_matmul(
    *, x: int, y: int, words: int, scales: int, zeros: int, bias: int, norm: int, residual: int, eps: float,
    swiglu: bool, type: Type, bits: int, block: int, group: int, M: int, N: int, K: int,
) -> None: ...  # fmt: skip
def decode_attention(
    *, qkv: int, table: int, k: int, v: int, slots: int, starts: int, y: int, type: Type, rows: int, heads: int,
    kv_heads: int, head_dim: int, positions: int, capacity: int, row_stride: int, slot_stride: int, head_stride: int,
    position_stride: int,
) -> None: ...  # fmt: skip
def sample(
    *, logits: int, ids: int, banned: int, banned_stride: int, rows: int, size: int, slot: int, temperature: int,
    top_k: int, tail: int, greedy: int, seeds: int, draws: int,
) -> None: ...  # fmt: skip
def gumbel(*, seed: int, draw: int, slot: int, first: int, count: int, noise: int) -> None: ...

class Linear:
    def __init__(self, *, columns: int) -> None: ...
    def add_block(self, *, weight: int, bias: int, rows: int) -> None: ...
    @staticmethod
    def quantized(
        *,
        words: int,
        scales: int,
        zeros: int,
        bias: int,
        bits: int,
        block: int,
        group: int,
        rows: int,
        columns: int,
    ) -> Linear: ...

class Transformer:
    def __init__(
        self,
        *,
        norm: int,
        eps: float,
        table: int,
        positions: int,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None: ...
    def add_layer(
        self,
        *,
        attention_norm: int,
        qkv: Linear,
        out: Linear,
        ffn_norm: int,
        gate_up: Linear,
        down: Linear,
    ) -> None: ...
    def step(
        self, *, x: int, y: int, k: int, v: int, slots: int, starts: int, rows: int, capacity: int, layer_stride: int,
        slot_stride: int, head_stride: int, position_stride: int,
    ) -> None: ...  # fmt: skip
    def encode(self, *, x: int, y: int, sequences: int, length: int, causal: bool) -> None: ...

class PatchDecoder:
    def __init__(
        self,
        *,
        transformer: Transformer,
        heads: int,
        embeddings: int,
        channels: int,
        group_size: int,
    ) -> None: ...
    def add_step(self, *, heads: int, active: int) -> None: ...
    def decode(
        self, *, local: int, codes: int, rows: int, temperature: int, top_k: int, tail: int, greedy: int, seeds: int,
        draws: int,
    ) -> None: ...  # fmt: skip

class CodecStack:
    def __init__(self, *, dim: int, heads: int, eps: float) -> None: ...
    def add_layer(
        self, *, attention_norm: int, attention_norm_bias: int, qkv: Linear, out: Linear, ffn_norm: int,
        ffn_norm_bias: int, up: Linear, down: Linear,
    ) -> None: ...  # fmt: skip
    def run(
        self, *, x: int, rows: int, table: int, k: int, v: int, slots: int, visible: int, places: int
    ) -> None: ...  # fmt: skip
