"""Launches of a layer at decode, and the bytes of each: the table in docs/kernels.md.

`tests/interpreted/test_launches.py` runs the layers and compares them with `kernels`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks import products
from benchmarks.cases import BACKBONE, DECODER, ENCODER, LM, SIZE
from mimo_fast.config import TransformerConfig
from mimo_fast.kernels.attention import rotary_attention_bytes
from mimo_fast.kernels.decode_attention import decode_attention_bytes

FORMATS = ("dense", "int8", "int4")
CACHED = 1024
"""Positions of the backbone's cache for which the bytes of attention are given."""

PRODUCTS = {
    "qkv": ("rms_norm(x, n1) W_qkv^T + b", 2),
    "out": ("x + a W_o^T", 1),
    "gate_up": ("swiglu(rms_norm(x, n2) W_gate_up^T)", 2),
    "down": ("x + h W_down^T", 1),
}
"""Product of a layer -> what it computes, and its launches when norms had their own; n1 and n2 are
the weights of the two norms."""


@dataclass(frozen=True)
class Layer:
    """A layer of one of the transformers: M rows at once, each attending to `length` positions.

    Args:
        attention: the kernels that compute it.
        attention_before: launches when rotations and appends had their own.
    """

    name: str
    config: TransformerConfig
    rows: int
    length: int
    attention: tuple[str, ...]
    attention_before: int

    @property
    def kernels(self) -> list[str]:
        return ["gemv_kernel", *self.attention, *["gemv_kernel"] * 3]

    def launches(self) -> Iterator[tuple[str, str, list[int], int, int]]:
        """What each step computes, its shapes, bytes for each of FORMATS, launches before and
        now."""
        config, m = self.config, self.rows
        for product in products.layer(self.name, config, (m,)):
            formula, before = PRODUCTS[product.name.rpartition(".")[2]]
            n, k = sum(product.blocks), product.columns
            shapes = f"[{m}, {k}] x [{n}, {k}] -> [{m}, {product.outputs}]"
            yield formula, shapes, [product.nbytes(form, m) for form in FORMATS], before, 1
            if product.name.endswith("qkv"):
                shapes = (
                    f"[{m}, {n}] -> [{m}, {config.heads * config.head_dim}], {self.length} keys"
                )
                formula, nbytes = "attention(rope(q), rope(k), v)", [self.attention_bytes()] * 3
                yield formula, shapes, nbytes, self.attention_before, len(self.attention)

    def attention_bytes(self) -> int:
        config, m = self.config, self.rows
        heads = (config.heads, config.kv_heads, config.head_dim)
        if m == self.length:
            return rotary_attention_bytes(1, m, *heads, SIZE)
        activations = m * (2 * config.heads + 2 * config.kv_heads) * config.head_dim * SIZE
        cache = decode_attention_bytes([self.length], *heads[1:], SIZE, quantized=False)
        return activations + 4 * config.head_dim + cache


def layers() -> tuple[Layer, ...]:
    """One layer of each transformer, at the published dimensions and batch 1."""
    decode, rotary = ("split_attention_kernel", "merge_splits_kernel"), ("rotary_attention_kernel",)
    return (
        Layer("backbone", BACKBONE, 1, CACHED, decode, 3),
        Layer("patch decoder", DECODER, 1, LM.patch_steps, ("small_decode_kernel",), 2),
        Layer("patch encoder", ENCODER, LM.group_size, LM.group_size, rotary, 3),
    )


def section() -> str:
    """The tables as Markdown."""
    text = f"""## Launches a layer

At decode, batch 1, {SIZE}-byte activations, {CACHED} positions in the \
backbone's cache. MB: what must
be read and written, with weights that are {", ".join(FORMATS)}. Before:
norms, rotations and appends as launches.
"""
    heads = ("computes", "shapes", *(f"MB {name}" for name in FORMATS), "before", "now")
    for layer in layers():
        steps = list(layer.launches())
        sums = [
            sum(column) for column in zip(*(nbytes for _, _, nbytes, _, _ in steps), strict=True)
        ]
        totals = (sum(step[i] for step in steps) for i in (3, 4))
        rows = [
            [formula, shapes, *(f"{n / 1e6:.3f}" for n in nbytes), str(before), str(now)]
            for formula, shapes, nbytes, before, now in [*steps, ("all", "", sums, *totals)]
        ]
        text += f"\n{layer.name.capitalize()}, {layer.config.layers} layers:\n\n"
        text += plain_table(heads, rows) + "\n"
    return text


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *others = ("| " + " | ".join(row) + " |" for row in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *others])
