"""Times cases of one version of the package on request: one process of `compare.py`, which has one
for each version.

Started in the tree of its version. Requests and answers are JSON, a line each, on standard input
and output:

    at the start                 -> {"cases": [names], "missing": {family: why}}
    {"case": name, "seconds": s} -> {"seconds": median} or {"refused": why}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import MIN_RUNS, Case, Provider, Refused, prepare
from benchmarks.ops import select
from mimo_fast.bench.timing import time_calls


def named_cases(
    arguments: dict[str, Any], device: torch.device, missing: dict[str, str]
) -> dict[str, tuple[Case, Provider]]:
    """Our own providers that run on the device, by "op format shape"; missing: see
    `ops.all_cases`."""
    found = {}
    wanted = (arguments[name] for name in ("op", "m", "format"))
    try:
        cases = select(*wanted, quick=arguments["quick"], missing=missing)
    except ValueError:
        # The other side has some, or there would have been an error before.
        return {}
    for case in cases:
        for provider in case.providers:
            if provider.name.startswith("ours-") and provider.missing(device) is None:
                found[f"{case.op} {case.format} {case.shape}"] = case, provider
    return found


class Timer:
    """Times one case at a time; its inputs are kept until another is asked for."""

    def __init__(self, cases: dict[str, tuple[Case, Provider]], device: torch.device) -> None:
        self._cases, self._device = cases, device
        self._name, self._calls = "", list[Callable[[], object]]()

    def __call__(self, name: str, seconds: float) -> dict[str, Any]:
        if name != self._name:
            # Two large cases at once might not fit.
            self._name, self._calls = "", []
            case, provider = self._cases[name]
            try:
                calls, _ = prepare(case, provider, case.make(self._device), self._device)
            except Refused as refused:
                return {"refused": str(refused)}
            self._name, self._calls = name, list(calls)
        return {
            "seconds": time_calls(self._calls, self._device, seconds=seconds, min_runs=MIN_RUNS).p50
        }


@torch.no_grad()
def main() -> None:
    arguments = json.loads(sys.argv[1])
    # Whatever else prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(arguments["threads"])
    device = torch.device(arguments["device"])
    missing: dict[str, str] = {}
    cases = named_cases(arguments, device, missing)
    timer = Timer(cases, device)
    answers.write(json.dumps({"cases": list(cases), "missing": missing}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(timer(request["case"], request["seconds"])) + "\n")


if __name__ == "__main__":
    main()
