"""Values that make no sense as an argument, and calls in which one of them is used."""

import decimal
import io
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import shown

NUMBERS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"), 1j),
    *(np.int64(3), np.int32(-1), np.uint8(2), np.float32(0.5), np.float64("nan"), np.bool_(True)),
    *(decimal.Decimal("0.5"), decimal.Decimal("nan")),
)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "hello",
        "tts",
        "cpu",
        "cuda",
        "meta",
        "float64",
        "int8",
        "int3",
        "a/b",
        "../x",
    ),
    *(
        "\0",
        "a\0b",
        "\ud800",
        "日本語",
        "😀",
        "e\u0301",
        "a\nb",
        "-1",
        "nan",
        "None",
        "~",
        "~nobody/x",
    ),
    *(
        "x" * 300,
        "word " * 3000,
        "<|im_end|>",
        "<|sostm|><|empty|>",
        "/dev/full",
        "/",
        ".",
        "x.opus",
    ),
    *("/nonexistent/x.wav", "\u202e", "\uffff", "{}", "%s", "https://example.com/a.wav"),
)


def odd_value(rng: random.Random) -> Any:
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    if kind < 7:
        return odd_tensor(rng)
    if kind < 8:
        dtype = rng.choice(["f4", "f8", "i2", "u2", "c8", "?", "U3", "O", "M8[s]", ">f4"])
        shape = rng.choice([(), (0,), (5,), (2, 9600), (9, 8), (1, 2, 3)])
        return np.zeros(shape, dtype)
    things: list[Callable[[], Any]] = [
        *(list, dict, set, tuple, object, io.BytesIO, io.StringIO, Exception),
        *(lambda: [None], lambda: [1], lambda: [""], lambda: {"a": 1}, lambda: {None: None}),
        *(lambda: b"", lambda: b"x", lambda: bytearray(9), lambda: Path("."), lambda: Path("/x")),
        *(lambda: int, lambda: lambda *_: None, lambda: range(3), lambda: iter([1]), lambda: ...),
        *(lambda: slice(1), lambda: [[[]]], lambda: torch.device("cpu"), lambda: torch.float64),
        *(lambda: torch.nn.Linear(1, 1), lambda: {"role": "user"}, lambda: [{}], lambda: (1, 2)),
        *(lambda: np.random.default_rng(), lambda: [0] * 10_000, lambda: frozenset([-1, "a"])),
    ]
    return rng.choice(things)()


SHAPES = (
    *((), (0,), (1,), (5,), (9600,), (2, 9600), (9, 0), (9, 4), (9, 7), (8, 4), (9, 400)),
    *((1, 36), (3, 4, 5), (1, 9, 8), (2, 9, 8), (8, 0), (20, 8), (1, 1, 1, 1)),
)


def odd_tensor(rng: random.Random) -> torch.Tensor:
    shape = rng.choice(SHAPES)
    kinds = ("float32", "float64", "float16", "bfloat16", "complex64", "bool", "uint8")
    dtype = getattr(torch, rng.choice([*kinds, "int8", "int32", "int64", "int64", "int64"]))
    value = rng.choice([0, 1, 5, -1, -100, 1000, 2**40, float("nan"), float("inf"), 1e38])
    if not dtype.is_floating_point and not dtype.is_complex:
        wide = dtype in (torch.int32, torch.int64)
        value = value if wide and value in (0, 1, 5, -1, -100, 1000) else 1
    elif dtype == torch.float16 and abs(value) > 60000:
        value = float("inf")
    how = rng.randrange(12)
    if how == 0:
        return torch.zeros(shape, dtype=dtype, device="meta")
    if how == 1:
        return torch.zeros(1).expand(2**40)
    if how == 2:
        return torch.zeros(5, 5).to_sparse()
    if how == 3 and dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)
    if how == 4:
        return torch.quantize_per_tensor(torch.zeros(5), 0.1, 0, torch.qint8)
    if how == 5:
        return torch.full(shape, value, dtype=dtype).T if len(shape) == 2 else torch.zeros(4, 4).T
    return torch.full(shape, value, dtype=dtype)


def changed(arguments: dict[str, Any], rng: random.Random) -> tuple[list[Any], dict[str, Any], str]:
    """Positional and named arguments of which something is wrong, and what that is."""
    named, said = dict(arguments), []
    for _ in range(rng.choice([1, 1, 1, 2])):
        how = rng.randrange(20)
        name = rng.choice([*named]) if named else None
        if name is None or how == 0:
            word = rng.choice(["x", "max_tokens", "maxnewtokens", "sed", "kvcache", "é", "self"])
            named[word] = odd_value(rng)
            said.append(f"unknown {word}={described(named[word])}")
        elif how == 1:
            del named[name]
            said.append(f"no {name}")
        elif how == 2:
            return [*named.values(), odd_value(rng)], {}, "one argument more"
        elif how == 3:
            other = rng.choice([*named])
            named[name], named[other] = named[other], named[name]
            said.append(f"{name} and {other} exchanged")
        elif how < 8 and isinstance(named[name], list | dict) and named[name]:
            named[name], what = inside(named[name], rng)
            said.append(f"{name}{what}")
        else:
            named[name] = odd_value(rng)
            said.append(f"{name}={described(named[name])}")
    return [], named, ", ".join(said)


def inside(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy of a list or mapping with an odd value somewhere in it."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.2:
        odd = odd_value(rng)
        return odd, f"={described(odd)}"
    copied: Any = value.copy()
    key = rng.choice([*value] if isinstance(value, Mapping) else [*range(len(value))])
    if rng.random() < 0.1:
        del copied[key]
        return copied, f"[{key!r}] deleted"
    copied[key], what = inside(value[key], rng)
    return copied, f"[{key!r}]{what}"


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} {value.device} {value.layout}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    return shown(value)
