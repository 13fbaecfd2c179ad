"""How the families of the registry make their cases: published dimensions, random inputs, one op
with its providers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, Outputs
from benchmarks.providers import ours, plain
from mimo_fast.bench.accuracy import Accuracy
from mimo_fast.bench.ceiling import name_of
from mimo_fast.config import CodecConfig, LMConfig, read_json
from mimo_fast.kernels.cpu import library as native

ROWS = (1, 2, 4, 8, 16, 64, 512)
STREAMS = ROWS[:-1]
"""Rows of an op that only decodes: more streams than 64 share no step."""

DTYPE = torch.bfloat16
POSITIONS = 8192
"""Of rotation tables: the published model's context."""

Collect = Callable[[Inputs, Any], Outputs]


def _preset(name: str) -> dict[str, Any]:
    return read_json(files("mimo_fast").joinpath(f"presets/{name}.json"))


LM = LMConfig.from_dict(_preset("7b-lm"))
CODEC = CodecConfig.from_dict(_preset("7b-codec"))


def normal(
    device: torch.device, *shape: int, dtype: torch.dtype = DTYPE, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Gaussian values, the same for a shape and seed."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)


def integers(device: torch.device, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 in 0 ... high - 1."""
    return torch.randint(
        high, shape, device=device, generator=torch.Generator(device).manual_seed(seed + sum(shape))
    )


def op_case(
    op: str,
    run: Callable[..., Any],
    reference: Callable[..., Any],
    make: Callable[[torch.device], Inputs],
    *,
    m: int,
    shape: str,
    nbytes: int,
    flop: int,
    form: str | None = None,
    dtype: torch.dtype = DTYPE,
    collect: Collect = lambda inputs, result: (result,),
    check: Callable[[Inputs, Outputs], Accuracy] | None = None,
    has_native: bool = False,
) -> Case:
    """A case whose inputs are the arguments of a launcher and of its reference, by name.

    collect: (inputs, what the op returned) -> all that it gave, with what it wrote in place.
    has_native: on a CPU the launcher runs a kernel of csrc/ where it was built, not the reference.
    """

    def called(function: Callable[..., Any]) -> Callable[[Inputs], Outputs]:
        return lambda inputs: collect(inputs, function(**inputs))

    is_plain = not (has_native and native.available())
    providers = (*ours(called(run)), *plain(called(reference), ours_on_cpu=is_plain))
    return Case(
        op,
        run.__name__,
        form or name_of(dtype),
        m,
        shape,
        dtype,
        nbytes,
        flop,
        make,
        called(reference),
        providers,
        check,
    )
