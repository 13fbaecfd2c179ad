"""Measures prompts as CUDA graphs on a GPU.

    python -m benchmarks.studies.prompts

    check     hidden state, last layer's keys, next token: graphs against kernels one by one
    times     prompts of several lengths, alone and after 300 groups, both ways
    exact     both ways against float32 arithmetic over the same stored weights
    kernels   launches of the host for a prompt, and where the time of its graph goes
    settings  whole prompts with other values of MMA_ROWS and UNPACKED_AT_ONCE
    products  backbone products of few rows: tensor-core kernel against unpacking and cuBLAS

Random int4 weights of the published dimensions. Prints as it measures and writes one JSON file
after each part. A part without enough time is left out; one that fails is reported, and the others
run. `--preset tiny --device cpu` rehearses it, with graphs that repeat their work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mimo_fast.bench.synthetic import preset_configs, random_lm, random_reader
from mimo_fast.bench.timing import synchronize, time_calls
from mimo_fast.checkpoint.layout import lm_shapes
from mimo_fast.config import LMConfig
from mimo_fast.kernels.matmul import launch
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import QuantizationConfig, WeightSource
from mimo_fast.quantization.formats import stored_tensors
from mimo_fast.runtime.lm.graphs import Graphs, Run
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import DecodeState

LENGTHS = (32, 64, 100, 128, 254, 512, 1022)
STARTS = (0, 300)
LATE = (32, 4000)
"""(groups, start) of a short turn in a long dialogue: few programs loop over many keys."""

EXACT = ((254, 0), (100, 300))
CHECKED = ((32, 0), (100, 0), (254, 0), (20, 300), (254, 300))
"""(groups, start) of the prompts that are compared."""

USUAL = 254
"""Groups of the prompt that has 13 ms and three launches."""

WORD, EMPTY_ID, SEED = 5, 1, 0
LAUNCHING = (
    "cudaLaunchKernel",
    "cuLaunchKernel",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemset",
)


@dataclass
class Study:
    """Settings, results, and the end of the available time."""

    lm: LM
    formats: str
    deadline: float
    output: Path
    found: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, work: Callable[[Study], Any], least: float) -> None:
        """Runs a part if so many seconds are left for it, and keeps its results."""
        left = self.deadline - perf_counter()
        print(f"== {name}, {left:.0f} s left", flush=True)
        if left < least:
            print("left out", flush=True)
            return
        try:
            with torch.no_grad():
                self.found[name] = work(self)
        except Exception as error:
            traceback.print_exc()
            self.found[name] = {"error": f"{type(error).__name__}: {error}"}
        self.output.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    @property
    def cuda(self) -> bool:
        return self.lm.device.type == "cuda"

    def new_state(self) -> DecodeState:
        """Two slots for the longest prompt."""
        capacity = max(max(STARTS) + max(LENGTHS), sum(LATE)) + 2
        return self.lm.new_state([SEED, SEED], capacity)

    @cached_property
    def state(self) -> DecodeState:
        """Of the graphs."""
        return self.new_state()

    @cached_property
    def graphs(self) -> Graphs:
        return self.new_graphs()

    def new_graphs(self) -> Graphs:
        return Graphs(self.lm, self.state, None if self.cuda else repeated, prompts=True)


def repeated(run: Run) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a CUDA graph where there is none."""
    return lambda: (run(), None)[1], run()


def prompt(config: LMConfig, groups: int) -> Tensor:
    """Ids [C + 1, groups G]: a tenth are words, the rest is speech."""
    generator = torch.Generator().manual_seed(groups)
    text = torch.full((groups,), EMPTY_ID)
    text[::10] = WORD + torch.arange(groups)[::10] % 200
    codes = torch.stack(
        [
            torch.randint(size - 1, (groups, config.group_size), generator=generator)
            for size in config.code_sizes
        ]
    )
    codes[:, ::10] = torch.tensor(config.empty_codes)[:, None, None]
    channel = torch.full((groups, config.group_size), -100)
    channel[:, 0] = text
    return torch.cat((channel[None], codes)).flatten(1)


def timed(study: Study, run: Callable[[], None], runs: int) -> dict[str, float]:
    """Medians in ms, three of them.

    On the device's clock, of the host until the work is done, and of the host until it may go on.
    """
    device, walls, hosts, events = study.lm.device, list[float](), list[float](), list[float]()
    run()
    for _ in range(runs):
        synchronize(device)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if study.cuda else []
        began = perf_counter()
        if marks:
            marks[0].record()
        run()
        if marks:
            marks[1].record()
        hosts.append(perf_counter() - began)
        synchronize(device)
        walls.append(perf_counter() - began)
        events.append(marks[0].elapsed_time(marks[1]) / 1e3 if marks else walls[-1])
    names = ("device_ms", "wall_ms", "host_ms")
    return {
        name: round(1e3 * statistics.median(seconds), 3)
        for name, seconds in zip(names, (events, walls, hosts), strict=True)
    }


def capture(study: Study) -> dict[str, Any]:
    """Captures every prompt graph, the longest first: seconds of each, MB of device memory."""
    rows = dict[int, float]()
    free = torch.cuda.mem_get_info()[0] if study.cuda else 0
    for bucket in reversed(study.graphs.prompt_buckets):
        began = perf_counter()
        study.graphs.prefill(prompt(study.lm.config, min(bucket, study.state.capacity)), 0)
        synchronize(study.lm.device)
        rows[bucket] = round(perf_counter() - began, 3)
    taken = (free - torch.cuda.mem_get_info()[0]) / 1e6 if study.cuda else 0.0
    return {"seconds": rows, "total_seconds": round(sum(rows.values()), 2), "mb": round(taken)}


def difference(got: Tensor, want: Tensor) -> float:
    """Greatest, relative to the greatest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def last_keys(state: DecodeState, slot: int, end: int) -> Tensor:
    """Of the last layer: each position's hidden state has passed through all layers before."""
    return state.cache.k[-1, slot, :, :end]


def turns(study: Study, groups: int, start: int) -> Iterator[tuple[Tensor, int]]:
    """A prompt as its first `start` groups, if any, and the rest: ids and start."""
    ids, size = prompt(study.lm.config, start + groups), start * study.lm.config.group_size
    if start:
        yield ids[:, :size], 0
    yield ids[:, size:], start


def check(study: Study) -> list[dict[str, Any]]:
    lm, state, plain = study.lm, study.state, study.new_state()
    study.found["capture"] = capture(study)
    print(f"capture: {study.found['capture']}", flush=True)
    for part in state.cache.parts:
        part.fill_(torch.nan)
    rows, end = list[dict[str, Any]](), 0
    for groups, start in CHECKED:
        for ids, at in turns(study, groups, start):
            lm.prefill(ids, plain, 1, at)
            study.graphs.prefill(ids, 1, at)
        end = max(end, start + groups)
        tokens = [int(lm.text_logits(s.hidden[1:2]).argmax()) for s in (state, plain)]
        row = {
            "groups": groups,
            "start": start,
            "hidden": difference(state.hidden[1], plain.hidden[1]),
            "keys": difference(*(last_keys(s, 1, start + groups) for s in (state, plain))),
            "same token": tokens[0] == tokens[1],
            "length right": int(state.lengths[1]) == start + groups,
            "nothing beyond": bool(state.cache.k[:, 1, :, end:].isnan().all()),
            "other slot untouched": bool(state.cache.k[:, 0].isnan().all()),
        }
        rows.append(row)
        print(row, flush=True)
    rows.append({"same bits in any slot and order": same_bits(study)})
    print(rows[-1], flush=True)
    return rows


def same_bits(study: Study) -> bool:
    """Whether a prompt gives the same bits in another slot, after other prompts, and again."""
    ids, state, bits = prompt(study.lm.config, USUAL), study.state, []
    for slot in (1, 0, 0):
        study.graphs.prefill(prompt(study.lm.config, USUAL - 3 + slot), slot)
        study.graphs.prefill(ids, slot)
        bits.append((state.hidden[slot].clone(), last_keys(state, slot, USUAL).clone()))
    return all(torch.equal(x, y) for other in bits[1:] for x, y in zip(bits[0], other, strict=True))


def times(study: Study) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for groups, start in [(groups, start) for start in STARTS for groups in LENGTHS] + [LATE]:
        ids, row = prompt(study.lm.config, groups), {"groups": groups, "start": start}
        for way, runs in (("graph", 7), ("kernels", 3)):
            row[way] = timed(study, partial(prefill, study, way, ids, start), runs)
        rows.append(row)
        print(row, flush=True)
    return rows


def prefill(study: Study, way: str, ids: Tensor, start: int = 0) -> None:
    """Into the first slot, as graphs or kernel by kernel."""
    if way == "graph":
        study.graphs.prefill(ids, 0, start)
    else:
        study.lm.prefill(ids, study.state, 0, start)


def kernels(study: Study) -> dict[str, Any]:
    """A usual prompt: the host's launches both ways, and its graph's slowest kernels.

    A kernel has ms, number of launches and name.
    """
    if not study.cuda:
        return {"launches": {}}
    launches, found = dict[str, int](), []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ids = prompt(study.lm.config, USUAL)
    for way in ("kernels", "graph"):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            prefill(study, way, ids)
            torch.cuda.synchronize()
        found = profile.key_averages()
        launches[way] = sum(event.count for event in found if event.key.startswith(LAUNCHING))
    print(f"launches: {launches}", flush=True)
    on_device = (e for e in found if e.device_type == torch.autograd.DeviceType.CUDA)
    longest = sorted(on_device, key=lambda event: -event.self_device_time_total)[:16]
    rows = [
        {"ms": round(e.self_device_time_total / 1e3, 3), "count": e.count, "name": e.key[:90]}
        for e in longest
    ]
    print(*rows, sep="\n", flush=True)
    return {"launches": launches, "longest": rows}


def exact(study: Study) -> list[dict[str, Any]]:
    """Errors of both ways against float32 activations over the same stored weights."""
    lm, rows = study.lm, []
    formats = QuantizationConfig.parse(study.formats).formats(lm_shapes(lm.config))
    tensors = stored_tensors(lm_shapes(lm.config), formats, lm.dtype)
    stored = random_reader(tensors, lm.device, SEED)

    def read(name: str) -> Tensor:
        tensor = stored(name)
        return tensor.float() if tensor.dtype == lm.dtype else tensor

    reference = LM(lm.config, EMPTY_ID, WeightSource(read, torch.float32, formats))
    state, plain = study.state, study.new_state()
    truth = reference.new_state([SEED, SEED], state.capacity)
    for groups, start in EXACT:
        for ids, at in turns(study, groups, start):
            reference.prefill(ids, truth, 1, at)
            lm.prefill(ids, plain, 1, at)
            study.graphs.prefill(ids, 1, at)
        row: dict[str, Any] = {"groups": groups, "start": start}
        for name, own in (("graph", state), ("kernels", plain)):
            row[name] = {
                "hidden": difference(own.hidden[1], truth.hidden[1]),
                "keys": difference(*(last_keys(s, 1, start + groups) for s in (own, truth))),
            }
        logits = reference.text_logits(truth.hidden[1:2])[0]
        best = logits.topk(2)
        row["exact token"] = int(best.indices[0])
        row["its lead"] = float((best.values[0] - best.values[1]) / logits.abs().max())
        row["accepted"] = all(
            row["graph"][what] <= 2 * row["kernels"][what] for what in ("hidden", "keys")
        )
        rows.append(row)
        print(row, flush=True)
    return rows


@contextmanager
def setting(name: str, value: int) -> Iterator[None]:
    before = getattr(launch, name)
    setattr(launch, name, value)
    try:
        yield
    finally:
        setattr(launch, name, before)


def products(study: Study) -> list[dict[str, Any]]:
    """Microseconds of a layer's four products, in graphs, alternating between layers' weights."""
    lm, rows = study.lm, []
    config, layers = lm.config.backbone, lm.backbone.layers[:6]
    shared: dict[str, dict[str, Any]] = {
        "qkv": {"norm": RMSNorm(layers[0].attention_norm, config.norm_eps)},
        "out": {},
        "gate_up": {"norm": RMSNorm(layers[0].ffn_norm, config.norm_eps), "swiglu": True},
        "down": {},
    }
    for count in (32, 48, 64, 96, 128):
        row: dict[str, Any] = {"rows": count}
        for way, most in (("mma", 10**6), ("unpack", 0)):
            with setting("MMA_ROWS", most):
                for name, around in shared.items():
                    columns = getattr(layers[0], name).shape[1]
                    x = torch.randn(count, columns, dtype=lm.dtype, device=lm.device)
                    calls = [partial(matmul, x, getattr(each, name), **around) for each in layers]
                    timing = time_calls(calls, lm.device, seconds=0.03, max_runs=20)
                    row[f"{name} {way}"] = round(1e6 * timing.p50, 1)
        for way in ("mma", "unpack"):
            row[f"layer {way}"] = round(sum(row[f"{name} {way}"] for name in shared), 1)
        rows.append(row)
        print(row, flush=True)
    return rows


def settings(study: Study) -> list[dict[str, Any]]:
    rows = []
    trials = [(groups, "MMA_ROWS", value) for groups in (32, 64) for value in (0, 96)]
    trials += [(USUAL, "UNPACKED_AT_ONCE", 2**power) for power in (23, 24, 25, 26)]
    for groups, name, value in trials:
        if study.deadline < perf_counter() + 2:
            break
        with setting(name, value):
            graphs, ids = study.new_graphs(), prompt(study.lm.config, groups)
            took = timed(study, partial(graphs.prefill, ids, 0), 7)
        rows.append({"groups": groups, name: value, **took})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="7b", choices=("7b", "tiny"))
    parser.add_argument("--format", default="int4", help="of the weights [int4]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=75, help="for everything [75]")
    parser.add_argument("-o", "--output", type=Path, default=Path("prompts.json"))
    options = parser.parse_args()
    began = perf_counter()
    device = torch.device(options.device)
    config, _ = preset_configs(options.preset)
    lm = random_lm(config, options.format, torch.bfloat16, device, EMPTY_ID, SEED)
    synchronize(device)
    study = Study(lm, options.format, began + options.seconds, options.output)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    study.found["device"], study.found["format"] = name, options.format
    print(f"{name}, {options.format}, made in {perf_counter() - began:.1f} s", flush=True)
    study.part("check", check, least=5)
    study.part("times", times, least=5)
    study.part("exact", exact, least=15)
    study.part("kernels", kernels, least=8)
    study.part("settings", settings, least=4)
    study.part("products", products, least=6)
    print(json.dumps(study.found), flush=True)
    print(f"{perf_counter() - began:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
