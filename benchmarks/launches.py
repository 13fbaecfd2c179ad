"""Launches of a layer at decode, and the bytes of each: the table in docs/kernels.md.

`tests/interpreted/test_launches.py` runs the layers and compares them with `kernels`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

from benchmarks.synthetic import shape_weight
from mimo_fast.config import LMConfig, TransformerConfig
from mimo_fast.kernels.attention import rotary_attention_bytes
from mimo_fast.kernels.decode_attention import decode_attention_bytes
from mimo_fast.kernels.matmul.product import qmatmul_bytes

FORMATS = ("dense", "int8", "int4")
ITEMSIZE = 2
CACHED = 1024
"""Positions of the backbone's cache for which the bytes of attention are given."""


@dataclass(frozen=True)
class Launch:
    """One step of a layer.

    Args:
        formula: what it computes; n1 and n2 are the weights of the two norms.
        shapes: of its inputs and outputs.
        nbytes: bytes to move, for each of FORMATS.
        before: launches when norms, rotations and appends had their own.
        kernels: what is launched now.
    """

    formula: str
    shapes: str
    nbytes: tuple[int, ...]
    before: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A layer of one of the transformers: M rows at once, each attending to `length` positions."""

    name: str
    config: TransformerConfig
    rows: int
    length: int
    attention: tuple[str, ...]
    attention_before: int

    @property
    def kernels(self) -> list[str]:
        return [kernel for launch in self.launches() for kernel in launch.kernels]

    def launches(self) -> Iterator[Launch]:
        config, m = self.config, self.rows
        d, f, heads = config.dim, config.ffn_dim, config.heads + 2 * config.kv_heads
        qkv, attended = heads * config.head_dim, config.heads * config.head_dim
        yield _product("rms_norm(x, n1) W_qkv^T + b", m, qkv, d, qkv, 2, bias=True, norm=True)
        if m == self.length:
            nbytes = rotary_attention_bytes(
                1, m, config.heads, config.kv_heads, config.head_dim, ITEMSIZE
            )
        else:
            activations = m * (qkv + attended) * ITEMSIZE + 4 * config.head_dim
            nbytes = activations + decode_attention_bytes(
                [self.length], config.kv_heads, config.head_dim, ITEMSIZE, quantized=False
            )
        yield Launch(
            "attention(rope(q), rope(k), v)",
            f"[{m}, {qkv}] -> [{m}, {attended}], {self.length} keys",
            (nbytes,) * len(FORMATS),
            self.attention_before,
            self.attention,
        )
        yield _product("x + a W_o^T", m, d, attended, d, 1, residual=True)
        yield _product("swiglu(rms_norm(x, n2) W_gate_up^T)", m, 2 * f, d, f, 2, norm=True)
        yield _product("x + h W_down^T", m, d, f, d, 1, residual=True)


def layers() -> tuple[Layer, ...]:
    """One layer of each transformer, at the published dimensions and batch 1."""
    lm = LMConfig.from_dict(
        json.loads(files("mimo_fast").joinpath("presets/7b-lm.json").read_text(encoding="utf-8"))
    )
    return (
        Layer(
            "backbone", lm.backbone, 1, CACHED, ("split_attention_kernel", "merge_splits_kernel"), 3
        ),
        Layer("patch decoder", lm.patch_decoder, 1, lm.patch_steps, ("small_decode_kernel",), 2),
        Layer(
            "patch encoder",
            lm.patch_encoder,
            lm.group_size,
            lm.group_size,
            ("rotary_attention_kernel",),
            3,
        ),
    )


def section() -> str:
    """The tables as Markdown."""
    lines = [
        "## Launches a layer",
        "",
        f"At decode, batch 1, {ITEMSIZE}-byte activations, {CACHED} positions in the backbone's "
        "cache. MB: what must",
        f"be read and written, with weights that are {', '.join(FORMATS)}. Before:",
        "norms, rotations and appends as launches.",
    ]
    heads = " | ".join(f"MB {name}" for name in FORMATS)
    for layer in layers():
        launches = list(layer.launches())
        lines += [
            "",
            f"{layer.name.capitalize()}, {layer.config.layers} layers:",
            "",
            f"| computes | shapes | {heads} | before | now |",
            "|---" * (len(FORMATS) + 4) + "|",
        ]
        lines += [_row(x.formula, x.shapes, x.nbytes, x.before, len(x.kernels)) for x in launches]
        sums = [sum(column) for column in zip(*(x.nbytes for x in launches), strict=True)]
        lines.append(_row("all", "", sums, sum(x.before for x in launches), len(layer.kernels)))
    return "\n".join(lines) + "\n"


def _row(
    formula: str, shapes: str, nbytes: tuple[int, ...] | list[int], before: int, now: int
) -> str:
    megabytes = " | ".join(f"{n / 1e6:.3f}" for n in nbytes)
    return f"| {formula} | {shapes} | {megabytes} | {before} | {now} |"


def _product(
    formula: str,
    m: int,
    n: int,
    k: int,
    outputs: int,
    before: int,
    *,
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
) -> Launch:
    nbytes = tuple(
        qmatmul_bytes(
            m, shape_weight(name, n, k, bias), outputs, ITEMSIZE, norm=norm, residual=residual
        )
        for name in FORMATS
    )
    return Launch(
        formula, f"[{m}, {k}] x [{n}, {k}] -> [{m}, {outputs}]", nbytes, before, ("gemv_kernel",)
    )
