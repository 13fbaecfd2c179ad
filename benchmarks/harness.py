"""What every measurement goes through: one row and record for each provider of an op, and none for
a wrong result.

A provider is timed on the inputs on which its result has just been checked. Where the check fails
there is no row and
no record: the provider is named as refused, and the run ends with exit code 1. Providers that
cannot run here are named with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.records import JsonLines, Table, duration
from mimo_fast.bench.accuracy import Accuracy, worst
from mimo_fast.bench.ceiling import Ceiling, name_of
from mimo_fast.bench.environment import environment
from mimo_fast.bench.timing import CallTime, copies_for, time_calls
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight

Inputs = dict[str, Any]
"""Tensors, weights, caches and settings of one call, by name; `copy.deepcopy` gives another of the
same values."""

Outputs = tuple[Tensor, ...]

MIN_RUNS = 5
COPIED_BYTES = 2**30
"""What the copies of a case's inputs may take: some hold tables of which a call reads a few
rows."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an op.

    Args:
        run: prepared inputs -> outputs; called again on the same inputs it must give the same.
        prepare: the case's inputs -> what `run` takes, such as weights in another form; not timed.
        missing: device -> why it cannot run there, or None.
        stands_for: (case's inputs, prepared) -> the inputs whose result `run` should give, where
            its own rounding of weights or activations is no error of its arithmetic; None: the
            case's own.
    """

    name: str
    run: Callable[[Any], Outputs]
    prepare: Callable[[Inputs], Any] = lambda inputs: inputs
    missing: Callable[[torch.device], str | None] = lambda device: None
    stands_for: Callable[[Inputs, Any], Inputs] | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: name in the registry. launcher: the function of mimo_fast.kernels that it measures.
        format: of the weights or the cache; the activations' dtype where there is none.
        m: rows. shape: for people. nbytes, flop: what one call must move and compute.
        make: device -> inputs. reference: the op in plain torch, in the dtype of its inputs.
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
    reference: Callable[[Inputs], Outputs]
    providers: tuple[Provider, ...]
    check: Callable[[Inputs, Outputs], Accuracy] | None = None


@dataclass(frozen=True)
class Record:
    """One row: what was timed, how long it took, and how near to the ceiling that is."""

    op: str
    provider: str
    format: str
    m: int
    shape: str
    dtype: str
    bytes: int
    flop: int
    time: CallTime
    ceiling: Ceiling
    accuracy: Accuracy
    copies: int
    environment: dict[str, Any]

    @property
    def floor(self) -> float:
        """Seconds below which this machine cannot do it."""
        return self.ceiling.floor_seconds(self.bytes, self.flop, getattr(torch, self.dtype))

    @property
    def bound(self) -> str:
        return self.ceiling.bound(self.bytes, self.flop, getattr(torch, self.dtype))

    @property
    def of_ceiling(self) -> float:
        """Achieved over ceiling; 1 is as fast as the machine allows."""
        return self.floor / self.time.p50

    def as_dict(self) -> dict[str, Any]:
        """As it is written."""
        own = {
            key: value
            for key, value in vars(self).items()
            if key not in ("time", "ceiling", "accuracy")
        }
        return {
            "kind": "op",
            **own,
            "seconds": vars(self.time),
            "floor_s": self.floor,
            "bound": self.bound,
            "of_ceiling": self.of_ceiling,
            "ceiling": self.ceiling.as_dict(),
            "accuracy": vars(self.accuracy),
        }


@dataclass
class Outcome:
    """What came of a run: records, "op format provider: why" of what was refused, reason -> what
    was skipped for it."""

    records: list[Record] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 1 if self.refused else 0


class Refused(Exception):
    """A provider's result is wrong."""


def widen(tree: Any) -> Any:
    """The same inputs with 16-bit floats in float32; packed weights stay, for they are unpacked to
    what x is."""
    if isinstance(tree, Tensor):
        return tree.float() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: widen(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(widen(value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, QuantizedWeight):
        return type(tree)(**{name: widen(value) for name, value in vars(tree).items()})
    return tree


def held_bytes(tree: Any) -> int:
    """Of all tensors in it."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(map(held_bytes, tree.values()))
    if isinstance(tree, (list, tuple)):
        return sum(map(held_bytes, tree))
    return held_bytes(vars(tree)) if dataclasses.is_dataclass(tree) else 0


def fresh(inputs: Inputs) -> Inputs:
    """A copy of all that an op may write into; weights are shared."""
    kept = (Weight, QuantizedWeight)
    return {
        name: value if isinstance(value, kept) else copy.deepcopy(value)
        for name, value in inputs.items()
    }


def prepare(
    case: Case, provider: Provider, inputs: Inputs, device: torch.device
) -> tuple[list[Callable[[], Outputs]], Accuracy]:
    """Calls to be timed in turn, each on inputs of its own, once the first has shown its result to
    be right.

    Raises:
        Refused: it is wrong.
    """
    # Ops that write into a cache or into codes find them as the case made them.
    prepared = provider.prepare(fresh(inputs))
    got = tuple(x.clone() for x in provider.run(prepared))
    stands_for = inputs if provider.stands_for is None else provider.stands_for(inputs, prepared)
    found = _accuracy(case, stands_for, got)
    if not found.accepted:
        raise Refused(str(found))
    copies = min(
        copies_for(case.nbytes, device), max(1, COPIED_BYTES // max(1, held_bytes(prepared)))
    )
    turns = [prepared, *(copy.deepcopy(prepared) for _ in range(copies - 1))]
    return [partial(provider.run, turn) for turn in turns], found


def measure(
    case: Case,
    provider: Provider,
    inputs: Inputs,
    device: torch.device,
    machine: Ceiling,
    seconds: float,
) -> Record:
    """Checks and times one provider on one case.

    Raises:
        Refused: its result is wrong.
    """
    calls, found = prepare(case, provider, inputs, device)
    time = time_calls(calls, device, seconds=seconds, min_runs=MIN_RUNS)
    return Record(
        case.op,
        provider.name,
        case.format,
        case.m,
        case.shape,
        name_of(case.dtype),
        case.nbytes,
        case.flop,
        time,
        machine,
        found,
        len(calls),
        environment(device),
    )


def _accuracy(case: Case, inputs: Inputs, got: Outputs) -> Accuracy:
    if case.check is not None:
        return case.check(fresh(inputs), got)
    eager = case.reference(fresh(inputs))
    return worst(got, eager, case.reference(widen(fresh(inputs))))


COLUMNS = {
    "op": -30,
    "provider": -17,
    "format": -8,
    "shape": -24,
    "p50": 9,
    "p10": 9,
    "p90": 9,
    "GB/s": 7,
    "GFLOP/s": 7,
    "achieved/ceiling": 16,
}


@torch.no_grad()
def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    machine: Ceiling,
    output: JsonLines,
    *,
    seconds: float = 0.5,
    providers: Callable[[str], bool] = lambda name: True,
    write: Callable[[str], object] | None = None,
) -> Outcome:
    """Measures every wanted provider of every case; rows and records come as they are made.

    Args:
        seconds: of measuring, for each row.
        providers: which names are wanted.
        write: takes the table's lines; standard output by default.
    """
    outcome, table = Outcome(), Table(COLUMNS, write)
    for case in tqdm(cases, unit="case", disable=None, leave=False):
        inputs = None
        for provider in (p for p in case.providers if providers(p.name)):
            title = f"{case.op} {case.format} {case.shape} {provider.name}"
            if (reason := provider.missing(device)) is not None:
                outcome.skipped.setdefault(f"{provider.name}: {reason}", []).append(title)
                continue
            inputs = case.make(device) if inputs is None else inputs
            try:
                record = measure(case, provider, inputs, device, machine, seconds)
            except Refused as refused:
                outcome.refused.append(f"{title}: {refused}")
                continue
            except Exception as error:
                # A provider that breaks says so, and the others go on.
                outcome.refused.append(
                    f"{title}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                )
                continue
            outcome.records.append(record)
            output.append(record.as_dict())
            table.row(*_cells(record))
    return outcome


def _cells(record: Record) -> Iterable[str]:
    time = record.time
    times = (duration(value) for value in (time.p50, time.p10, time.p90))
    rates = f"{record.bytes / time.p50 / 1e9:.1f}", f"{record.flop / time.p50 / 1e9:.0f}"
    return (
        record.op,
        record.provider,
        record.format,
        record.shape,
        *times,
        *rates,
        f"{100 * record.of_ceiling:.1f}%",
    )


def print_outcome(outcome: Outcome, write: Callable[[str], object] = print) -> None:
    """What has no row, and why."""
    for reason, titles in outcome.skipped.items():
        write(f"skipped {len(titles)} of {reason}")
    for line in outcome.refused:
        write(f"REFUSED {line}")
