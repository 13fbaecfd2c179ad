"""Calls every native function with right arguments, then with each of them wrong in every way.

It runs in a process of its own, which a wrong address would end:

    python wrong_arguments.py [LIBRARY]      another build of the native module, as with ASan

Prints a line for each wrong call that raised nothing, and the number of calls.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

if len(sys.argv) > 1:
    spec = importlib.util.spec_from_file_location("mimo_fast._native", sys.argv[1])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["mimo_fast._native"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["mimo_fast._native"])

import torch
from torch import Tensor

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cpu.codec_stack import CodecStack
from mimo_fast.kernels.cpu.transformer import PatchDecoder, Product, Transformer
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.matmul.adapted import AdaptedWeight, Rows
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.kernels.rope import rope_table
from mimo_fast.quantization import Format, quantize
from mimo_fast.sampling import MiMoSampler, sampler_tensors

DIM, HEADS, KV_HEADS, HEAD_DIM, POSITIONS, SLOTS = 32, 4, 2, 8, 10, 3
WIDTH = (HEADS + 2 * KV_HEADS) * HEAD_DIM
ROWS = 2
OUT_OF_RANGE = (-1, SLOTS, 2**31, 2**62, -(2**62))


SAME_VALUES = ("every second value", "reversed dims")
"""Layouts that a function may read or refuse, but not read wrongly."""

RIGHT = (
    *(f"*, *, {layout}" for layout in (*SAME_VALUES, "first row expanded")),
    # Sizes that are the caller's choice.
    *("*, table, dim 1 longer", "*, table, dim 1 shorter", "attention*, table, dim 1 empty"),
    *("adapted, x, dim 0 *", "adapted, x, dim ? twice"),
    *(f"encode, x, dim {dim} {change}" for dim in (0, 1) for change in ("longer", "shorter")),
    *("encode, x, dim ? empty", "patch, step, dim 1 *", "text, banned, dim 0 missing"),
    *("product *, x, dim ? twice", "product *, residual, dim 0 *"),
    # A scale for twice as many columns.
    "product *, scales, dim 1 shorter",
    # The empty id of a head, which none of its ids need be; rows and sizes that are in the tables.
    *("patch, step, place * at [89]", "patch, step, place 3 at [4567]"),
    # Converted first.
    *("text, logits, torch.float*", "text, logits, another float"),
    *(
        f"product *, {name}, {kind}"
        for name in ("x", "bias", "norm", "residual")
        for kind in ("torch.float*", "another float")
    ),
)
"""Patterns of calls with a changed argument that are right."""


@dataclass
class Case:
    """A function of tensors by name; right ones; names whose values are places in a cache."""

    call: Callable[..., Any]
    arguments: dict[str, Tensor]
    places: tuple[str, ...] = ()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def transformer_of(**p: Tensor) -> Transformer:
    def weight(name: str) -> Weight:
        return Weight((p[name],), (p.get(f"{name}_bias"),))

    layer = (
        p["attention_norm"],
        *(weight(name) for name in ("qkv", "out")),
        p["ffn_norm"],
        *(weight(name) for name in ("gate_up", "down")),
    )
    return Transformer([layer], p["norm"], 1e-5, p["table"], HEADS, KV_HEADS)


PARTS = {
    "attention_norm": torch.ones(DIM),
    "qkv": normal(WIDTH, DIM),
    "qkv_bias": normal(WIDTH),
    "out": normal(DIM, HEADS * HEAD_DIM),
    "ffn_norm": torch.ones(DIM),
    "gate_up": normal(96, DIM),
    "down": normal(DIM, 48),
    "norm": torch.ones(DIM),
    "table": rope_table(HEAD_DIM, 1e4, POSITIONS),
}
INDEX = {"slots": torch.arange(ROWS), "starts": torch.arange(ROWS)}
CACHE = (1, SLOTS, KV_HEADS, 6, HEAD_DIM)
STEP = torch.tensor([[0, 1], [0, 2], [0, 20], [20, 12], [19, 11]])


def whole_transformer(x: Tensor, k: Tensor, v: Tensor, slots: Tensor, starts: Tensor, **parts: Any):
    return transformer_of(**parts).step(x, k, v, slots, starts)


def encoded(x: Tensor, **parts: Tensor) -> Tensor:
    return transformer_of(**parts).encode(x, True)


def attention(qkv: Tensor, table: Tensor, k: Tensor, v: Tensor, slots: Tensor, starts: Tensor):
    return native.decode_attention(qkv, table, LayerKV(k, v), slots, starts, HEADS)


def product(kind: str, **p: Tensor) -> Tensor:
    weight = replace(
        quantize(normal(16, 256), Format.parse(kind)),
        words=p["words"],
        scales=p["scales"],
        zeros=p.get("zeros"),
        bias=p["bias"],
    )
    return native.quantized_matmul(
        p["x"], weight, RMSNorm(p["norm"], 1e-5), p["residual"], swiglu=True
    )


def adapted(**p: Tensor) -> Tensor:
    rows = (Rows(16, None), Rows(24, Weight((p["b"],), (None,))))
    base, a = (Weight((p[name],), (None,)) for name in ("w", "a"))
    return Product(AdaptedWeight(base, a, rows, p["factor"], p["bias"]))(p["x"])


def settings(p: dict[str, Tensor]):
    known = sampler_tensors([MiMoSampler(True, 0.9, 5, 0.9)] * ROWS)
    return replace(known, **{name: p[name] for name in ("temperature", "top_k", "tail", "greedy")})


def text(**p: Tensor) -> Tensor:
    return native.sample_text(p["logits"], settings(p), p["seeds"], p["draws"], p["banned"], 0)


def patch(**p: Tensor) -> Tensor:
    model = transformer_of(**{name: p[name] for name in PARTS})
    decoder = PatchDecoder(model, p["heads"], p["embeddings"], [p["step"]], 2, 3)
    return decoder.decode(p["local"], settings(p), p["seeds"], p["draws"])


def stack(**p: Tensor) -> Tensor:
    norm = (p["gain"], p["offset"])
    weights = [Weight((p[name],), (None,)) for name in ("qkv", "out", "up", "down")]
    made = CodecStack([(norm, *weights[:2], norm, *weights[2:])], HEADS, 1e-5)
    return made.run(*(p[name] for name in ("x", "table", "k", "v", "slots", "visible")))


def sequences(**p: Tensor) -> Tensor:
    norm = (p["gain"], p["offset"])
    weights = [Weight((p[name],), (None,)) for name in ("qkv", "out", "up", "down")]
    made = CodecStack([(norm, *weights[:2], norm, *weights[2:])], HEADS, 1e-5)
    return torch.cat(made.run_sequences([p["x"], p["other"]], p["table"], (2, -1), 1))


def sampler_parts() -> dict[str, Tensor]:
    known = sampler_tensors([MiMoSampler(True, 0.9, 5, 0.9)] * ROWS)
    values = {name: getattr(known, name) for name in ("temperature", "top_k", "tail", "greedy")}
    return values | {"seeds": torch.arange(ROWS), "draws": torch.arange(ROWS)}


def product_case(kind: str) -> Case:
    weight = quantize(normal(16, 256), Format.parse(kind))
    parts = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros}
    arguments = {name: part for name, part in parts.items() if part is not None}
    arguments |= {"x": normal(ROWS, 256), "bias": normal(16), "norm": torch.ones(256)}
    arguments["residual"] = normal(ROWS, 8)
    return Case(lambda **given: product(kind, **given), arguments)


def cases() -> dict[str, Case]:
    kv = {"k": torch.zeros(CACHE), "v": torch.zeros(CACHE)}
    one = {name: part[0] for name, part in kv.items()}
    qkv = {"qkv": normal(ROWS, 1, WIDTH), "table": PARTS["table"]}
    codec = {
        "gain": torch.ones(DIM),
        "offset": torch.zeros(DIM),
        "qkv": normal(3 * DIM, DIM),
        "out": normal(DIM, DIM),
        "up": normal(48, DIM),
        "down": normal(DIM, 48),
        "x": normal(ROWS, DIM),
        "table": normal(2, ROWS, HEAD_DIM // 2),
        "k": torch.zeros(1, HEADS, SLOTS, HEAD_DIM),
        "v": torch.zeros(1, HEADS, SLOTS, HEAD_DIM),
        "slots": torch.arange(ROWS),
        "visible": torch.ones(ROWS, SLOTS, dtype=torch.bool),
    }
    patches = {"heads": normal(32, DIM), "embeddings": normal(32, DIM), "step": STEP}
    half = {name: part.bfloat16() for name, part in (one | {"qkv": qkv["qkv"]}).items()}
    return {
        "attention": Case(attention, qkv | one | INDEX, ("slots",)),
        "attention in bfloat16": Case(attention, qkv | half | INDEX, ("slots",)),
        "step": Case(whole_transformer, {"x": normal(ROWS, DIM)} | kv | INDEX | PARTS, ("slots",)),
        "encode": Case(encoded, {"x": normal(ROWS, 3, DIM)} | PARTS),
        "patch": Case(
            patch, PARTS | patches | {"local": normal(ROWS, DIM)} | sampler_parts(), ("step",)
        ),
        "codec stack": Case(stack, codec, ("slots",)),
        "codec sequences": Case(
            sequences,
            {name: codec[name] for name in ("gain", "offset", "qkv", "out", "up", "down", "x")}
            | {"other": normal(2, DIM), "table": normal(2, ROWS + 2, HEAD_DIM // 2)},
        ),
        "text": Case(
            text,
            sampler_parts()
            | {"logits": normal(ROWS, 7), "banned": torch.zeros(ROWS, 7, dtype=torch.bool)},
        ),
        "adapted": Case(
            adapted,
            {"x": normal(ROWS, DIM), "w": normal(40, DIM), "a": normal(8, DIM), "b": normal(24, 8)}
            | {"factor": normal(40), "bias": normal(40)},
        ),
        **{f"product {kind}": product_case(kind) for kind in ("int4", "int4-sym", "int8-g128")},
    }


def wrong(tensor: Tensor, places: bool) -> Iterator[tuple[str, Tensor]]:
    """A tensor of each other shape, dtype, device and layout, and with other places in it."""
    for dim, size in enumerate(tensor.shape):
        yield f"dim {dim} longer", torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim).contiguous()
        yield f"dim {dim} shorter", tensor.narrow(dim, 0, size - 1).contiguous()
        yield f"dim {dim} empty", tensor.narrow(dim, 0, 0).contiguous()
        yield f"dim {dim} missing", tensor.select(dim, 0).contiguous()
        yield f"dim {dim} twice", torch.stack((tensor, tensor), dim).contiguous()
    for dtype in (torch.float64, torch.float16, torch.int8, torch.complex64, torch.bool):
        if dtype != tensor.dtype:
            yield str(dtype), tensor.to(dtype)
    other = torch.float32 if tensor.dtype == torch.bfloat16 else torch.bfloat16
    yield "another float", tensor.to(other)
    yield "on meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    if tensor.numel() > 1:
        # The same values, in memory that is nothing like the shape says.
        yield "every second value", torch.stack((tensor, tensor), -1).contiguous()[..., 0]
        back = range(tensor.ndim)[::-1]
        yield "reversed dims", tensor.permute(*back).contiguous().permute(*back)
        yield "first row expanded", tensor[:1].expand_as(tensor)
    if places:
        for value in OUT_OF_RANGE:
            for index in range(tensor.numel()):
                changed = tensor.clone()
                changed.view(-1)[index] = value
                yield f"place {value} at {index}", changed


def accepted(name: str, argument: str, change: str) -> bool:
    """Whether a changed argument is right as well, for the reasons of RIGHT."""
    call = f"{name}, {argument}, {change}"
    return any(fnmatchcase(call, pattern) for pattern in RIGHT)


def tried(case: Case, changed: dict[str, Tensor]) -> Tensor | None:
    """What the call gives; None for an error that says what is wrong."""
    arguments = {name: value.clone() for name, value in case.arguments.items()}
    try:
        return case.call(**(arguments | changed))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        # Torch's own, of shapes and layouts, are as good as ours.
        if not str(error):
            raise AssertionError("an error without words") from error
        return None


def main() -> None:
    calls = 0
    for name, case in cases().items():
        want = tried(case, {})
        assert want is not None, f"{name} refuses right arguments"
        for argument, value in case.arguments.items():
            for change, changed in wrong(value, argument in case.places):
                # Where it crashes, this is the last line.
                print(f"{name}, {argument}, {change}", file=sys.stderr, flush=True)
                got, calls = tried(case, {argument: changed}), calls + 1
                if got is None:
                    continue
                if not accepted(name, argument, change):
                    print(f"{name}, {argument}, {change}: no error")
                if change in SAME_VALUES and not torch.equal(got, want):
                    print(f"{name}, {argument}, {change}: another result")
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
