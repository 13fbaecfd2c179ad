"""Measures ops: a row and a record for each provider, and none for a wrong result.

A provider is timed on the inputs on which its result has just been checked. Where the check fails
there is no row and no record: the provider is named as refused, and the exit code is 1. Providers
that cannot run here are named with the reason. Every op has:

    ours-gpu    the op's launcher on a CUDA device: a kernel of csrc/cuda where it was built and
                takes the case, else Triton
    ours-cpu    the same launcher on a CPU: a kernel of csrc/cpu where it was built and takes the
                case, else plain torch
    eager       the op's reference in plain torch; quantized weights are unpacked for each call
    compile     torch.compile of that
"""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.columns import COLUMNS, Table
from benchmarks.records import JsonLines, machine_fields
from mimo_fast.bench.accuracy import Accuracy, worst
from mimo_fast.bench.ceiling import Ceiling, name_of
from mimo_fast.bench.timing import copies_for, time_calls
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.dispatch import ENVIRONMENT, triton
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight

Inputs = dict[str, Any]
"""Tensors, weights, caches and settings of one call, by name.

`copy.deepcopy` gives another with the same values.
"""

Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

MIN_RUNS = 5
COPIED_BYTES = 2**30
"""Most bytes of the copies of a benchmark's inputs, of whose tables a call may read a few rows."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Args:
        run: prepared inputs -> outputs; the same inputs must give the same outputs again.
        prepare: the benchmark's inputs -> what `run` takes, such as weights in another form; not
            timed.
        missing: device -> why it cannot run there, or None.
        stands_for: (benchmark's inputs, prepared) -> the inputs whose exact result `run` is
            compared with, where its own rounding of weights or activations is not an error of its
            arithmetic; None: the benchmark's own.
    """

    name: str
    run: Callable[[Any], Outputs]
    prepare: Callable[[Inputs], Any] = lambda inputs: inputs
    missing: Callable[[torch.device], str | None] = lambda device: None
    stands_for: Callable[[Inputs, Any], Inputs] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One op at one shape.

    Args:
        op: name in the registry.
        launcher: the function of mimo_fast.kernels that it measures.
        format: of the weights or the cache; the activations' dtype where there is none.
        m: rows.
        shape: for people.
        nbytes, flop: what one call must move and compute.
        make: device -> inputs.
        reference: the op in plain torch, in the dtype of its inputs.
        check: (inputs, outputs) -> accuracy, in place of the comparison with the reference.
    """

    op: str
    launcher: str
    format: str
    m: int
    shape: str
    dtype: torch.dtype
    nbytes: int
    flop: int
    make: Callable[[torch.device], Inputs]
    reference: Run
    providers: tuple[Provider, ...]
    check: Callable[[Inputs, Outputs], Accuracy] | None = None

    @property
    def title(self) -> str:
        return f"{self.op} {self.format} {self.shape}"


@dataclass
class Outcome:
    """Records; "op format shape provider: why" of refused providers; reason -> what was skipped for
    it."""

    records: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)


class Refused(Exception):
    """A provider's result is wrong."""


def ours(run: Run) -> tuple[Provider, ...]:
    """The provider of an op's launcher, named by the path that it takes."""
    return (
        Provider("ours-gpu", run, missing=needs_triton),
        Provider("ours-cpu", run, missing=needs_plain_path),
    )


def plain(reference: Run, *, ours_on_cpu: bool = True) -> tuple[Provider, ...]:
    """Plain torch and torch.compile of it.

    ours_on_cpu: whether our op on a CPU is plain torch as well.
    """

    def missing(device: torch.device) -> str | None:
        return "is what ours-cpu runs" if device.type == "cpu" and ours_on_cpu else None

    def compiled(inputs: Inputs) -> tuple[Run, Inputs]:
        # After eight shapes of one function dynamo would silently run it uncompiled.
        torch._dynamo.reset()
        return torch.compile(reference, dynamic=False), inputs

    return (
        Provider("eager", reference, missing=missing),
        Provider("compile", lambda prepared: prepared[0](prepared[1]), compiled, needs_compiler),
    )


def needs_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "needs the CPU"


def needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def needs_triton(device: torch.device) -> str | None:
    return "triton is not installed" if triton is None else _off("torch") or needs_cuda(device)


def needs_plain_path(device: torch.device) -> str | None:
    return _off("triton") or needs_cpu(device)


def _off(path: str) -> str | None:
    chosen = os.environ.get(ENVIRONMENT) == path
    return f"{ENVIRONMENT}={path} turns it off" if chosen else None


def needs_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if triton is not None else "triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "no C++ compiler is installed"
    return None


def normal(
    device: torch.device,
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Gaussian values, the same for the same shape and seed."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)


def integers(device: torch.device, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 in 0 ... high - 1."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randint(high, shape, device=device, generator=generator)


def of_op(
    op: str,
    run: Callable[..., Any],
    dims: dict[str, int],
    inputs: dict[str, Any],
    nbytes: int,
    flop: int,
    *,
    form: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    reference: Callable[..., Any] | None = None,
    collect: Callable[[Inputs, Any], Outputs] = lambda inputs, result: (result,),
    check: Callable[[Inputs, Outputs], Accuracy] | None = None,
    has_native: bool = False,
) -> Benchmark:
    """A benchmark of a launcher, and of its neighbour NAME_ref unless another reference is given.

    Args:
        dims: of its shape; the first is the number of rows.
        inputs: the arguments of both, by name: a shape of Gaussian values, a function of the
            device, or a value as it is.
        collect: (inputs, what the op returned) -> all that it gave, with what it wrote in place.
        has_native: on a CPU the launcher runs a kernel of csrc/ where it was built, not the
            reference.
    """
    plainly = reference or getattr(sys.modules[run.__module__], f"{run.__name__}_ref", run)

    def make(device: torch.device) -> Inputs:
        def value(seed: int, told: Any) -> Any:
            if isinstance(told, tuple):
                return normal(device, *told, seed=seed)
            return told(device) if callable(told) else told

        return {name: value(i, told) for i, (name, told) in enumerate(inputs.items())}

    def called(function: Callable[..., Any]) -> Run:
        return lambda inputs: collect(inputs, function(**inputs))

    own = plain(called(plainly), ours_on_cpu=not (has_native and native.available()))
    m, shape = next(iter(dims.values())), " ".join(f"{name}={n}" for name, n in dims.items())
    about = (dtype, nbytes, flop, make, called(plainly), (*ours(called(run)), *own))
    return Benchmark(op, run.__name__, form or name_of(dtype), m, shape, *about, check)


def mapped(tree: Any, leaf: Callable[[Tensor], Tensor], kept: tuple[type, ...] = ()) -> Any:
    """The same inputs with `leaf` of each tensor, except those of `kept` types."""
    if isinstance(tree, Tensor):
        return leaf(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, leaf, kept) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(value, leaf, kept) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, kept):
        # Without what it caches.
        own = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return type(tree)(**mapped(own, leaf, kept))
    return tree


def widen(tree: Any) -> Any:
    """The same inputs with 16-bit floats in float32.

    Packed weights stay, since they are unpacked to the dtype of x.
    """
    return mapped(tree, lambda x: x.float() if x.is_floating_point() else x, (QuantizedWeight,))


def held_bytes(tree: Any) -> int:
    """Bytes of all tensors in it."""
    sizes: list[int] = []
    mapped(tree, lambda x: sizes.append(x.nbytes) or x)
    return sum(sizes)


def fresh(inputs: Inputs) -> Inputs:
    """A copy of the tensors that an op may write into; weights are shared."""
    kept = (Weight, QuantizedWeight)
    return {
        name: value if isinstance(value, kept) else copy.deepcopy(value)
        for name, value in inputs.items()
    }


def prepare(
    benchmark: Benchmark, provider: Provider, inputs: Inputs, device: torch.device
) -> tuple[list[Callable[[], Outputs]], Accuracy]:
    """Calls to be timed alternately, each on its own inputs; the first has been checked.

    Raises:
        Refused: its result is wrong.
    """
    # Ops that write into a cache or into codes find them as the benchmark made them.
    prepared = provider.prepare(fresh(inputs))
    got = tuple(x.clone() for x in provider.run(prepared))
    exact = inputs if provider.stands_for is None else provider.stands_for(inputs, prepared)
    if benchmark.check is not None:
        found = benchmark.check(fresh(exact), got)
    else:
        eager = benchmark.reference(fresh(exact))
        found = worst(got, eager, benchmark.reference(widen(fresh(exact))))
    if not found.accepted:
        raise Refused(str(found))
    room = max(1, COPIED_BYTES // max(1, held_bytes(prepared)))
    copies = min(copies_for(benchmark.nbytes, device), room)
    turns = [prepared, *(copy.deepcopy(prepared) for _ in range(copies - 1))]
    return [partial(provider.run, turn) for turn in turns], found


@torch.no_grad()
def run_benchmarks(
    benchmarks: Sequence[Benchmark],
    device: torch.device,
    machine: Ceiling,
    output: JsonLines,
    *,
    seconds: float = 0.5,
    providers: Callable[[str], bool] = lambda name: True,
    write: Callable[[str], object] | None = None,
) -> Outcome:
    """Checks and times every wanted provider; rows and records come as they are made.

    `floor_s` of a record is the least time on this machine; `of_ceiling` is achieved over ceiling,
    1 being as fast as the machine allows. At the end it tells what has no row, and why.

    Args:
        seconds: of measuring, for each row.
        providers: which names are wanted.
        write: takes lines; standard output by default.
    """
    outcome, write = Outcome(), write or partial(tqdm.write, file=sys.stdout)
    table = Table(COLUMNS["op"], write)
    for benchmark in tqdm(benchmarks, unit="case", disable=None, leave=False):
        inputs = None
        for provider in (p for p in benchmark.providers if providers(p.name)):
            title = f"{benchmark.title} {provider.name}"
            if (reason := provider.missing(device)) is not None:
                outcome.skipped.setdefault(f"{provider.name}: {reason}", []).append(title)
                continue
            inputs = benchmark.make(device) if inputs is None else inputs
            try:
                calls, found = prepare(benchmark, provider, inputs, device)
                time = time_calls(calls, device, seconds=seconds, min_runs=MIN_RUNS)
            except Exception as error:
                # A failing provider is reported, and the others run.
                kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
                outcome.refused.append(f"{title}: {kind}{str(error).partition(chr(10))[0]}")
                continue
            floor = machine.floor_seconds(benchmark.nbytes, benchmark.flop, benchmark.dtype)
            record = {
                "kind": "op",
                "op": benchmark.op,
                "provider": provider.name,
                "format": benchmark.format,
                "m": benchmark.m,
                "shape": benchmark.shape,
                "dtype": name_of(benchmark.dtype),
                "bytes": benchmark.nbytes,
                "flop": benchmark.flop,
                "copies": len(calls),
                "seconds": vars(time),
                "floor_s": floor,
                "bound": machine.bound(benchmark.nbytes, benchmark.flop, benchmark.dtype),
                "of_ceiling": floor / time.p50,
                "accuracy": vars(found),
                **machine_fields(machine, device),
            }
            outcome.records.append(record)
            output.append(record)
            table.row(record)
    for reason, titles in outcome.skipped.items():
        write(f"skipped {len(titles)} of {reason}")
    for line in outcome.refused:
        write(f"REFUSED {line}")
    return outcome
