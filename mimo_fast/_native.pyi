"""csrc/cpu/bindings.cpp. Integers are addresses, sizes and strides in elements; an address of 0 is
none. Constructors raise ValueError for what cannot be, calls for slots and lengths out of range."""

from enum import Enum

class Type(Enum):
    float32 = 0
    bfloat16 = 1

def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def narrow() -> None: ...
def widen() -> None: ...
def available_threads() -> int: ...
def multiply_registers(rounds: int) -> int: ...

class QuantizedWeight:
    def __init__(
        self,
        *,
        words: int,
        scales: int,
        zeros: int,
        bits: int,
        block: int,
        group: int,
        rows: int,
        columns: int,
    ) -> None: ...

class QuantizedMatmul:
    def __init__(
        self,
        *,
        weight: QuantizedWeight,
        type: Type,
        bias: int,
        norm: int,
        eps: float,
        swiglu: bool,
    ) -> None: ...
    def run(self, *, x: int, y: int, residual: int, rows: int) -> None: ...

class Linear:
    def __init__(self, *, columns: int) -> None: ...
    def add_block(self, *, weight: int, bias: int, rows: int) -> None: ...
    @staticmethod
    def quantized(*, weight: QuantizedWeight, bias: int) -> Linear: ...
    def adapt(self, *, a: int, b: int, rank: int, first: int, rows: int) -> None: ...
    def scale(self, *, factor: int, bias: int) -> None: ...

class Cache:
    def __init__(
        self,
        *,
        k: int,
        v: int,
        layers: int,
        slots: int,
        capacity: int,
        layer_stride: int,
        slot_stride: int,
        head_stride: int,
        position_stride: int,
    ) -> None: ...

class Positions:
    def __init__(self, *, slots: int, starts: int, rows: int) -> None: ...

class DecodeAttention:
    def __init__(
        self,
        *,
        type: Type,
        heads: int,
        kv_heads: int,
        head_dim: int,
        table: int,
        positions: int,
    ) -> None: ...
    def run(self, *, qkv: int, row_stride: int, y: int, cache: Cache, at: Positions) -> None: ...

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
    def step(self, *, x: int, y: int, cache: Cache, at: Positions) -> None: ...
    def encode(self, *, x: int, y: int, sequences: int, length: int, causal: bool) -> None: ...

class SamplerRows:
    def __init__(
        self,
        *,
        temperature: int,
        top_k: int,
        tail: int,
        greedy: int,
        seeds: int,
        draws: int,
        rows: int,
    ) -> None: ...

class Logits:
    def __init__(
        self, *, values: int, banned: int, banned_stride: int, size: int, slot: int
    ) -> None: ...

def sample(*, logits: Logits, settings: SamplerRows, ids: int) -> None: ...
def gumbel(*, seed: int, draw: int, slot: int, first: int, count: int, noise: int) -> None: ...

class PatchDecoder:
    def __init__(
        self,
        *,
        transformer: Transformer,
        heads: int,
        embeddings: int,
        table_rows: int,
        channels: int,
        group_size: int,
    ) -> None: ...
    def add_step(self, *, heads: int, active: int) -> None: ...
    def decode(self, *, local: int, codes: int, settings: SamplerRows) -> None: ...

class Norm:
    def __init__(self, *, weight: int, bias: int) -> None: ...

class CodecAttention:
    def __init__(
        self, *, table: int, k: int, v: int, slots: int, visible: int, places: int
    ) -> None: ...

class CodecSequences:
    def __init__(self, *, lengths: int, count: int, table: int, left: int, right: int) -> None: ...

class CodecStack:
    def __init__(self, *, dim: int, heads: int, eps: float) -> None: ...
    def add_layer(
        self,
        *,
        attention_norm: Norm,
        qkv: Linear,
        out: Linear,
        ffn_norm: Norm,
        up: Linear,
        down: Linear,
    ) -> None: ...
    def run(self, *, x: int, rows: int, attention: CodecAttention) -> None: ...
    def run_sequences(self, *, x: int, rows: int, sequences: CodecSequences, skip: int) -> None: ...
