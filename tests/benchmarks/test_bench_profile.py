"""The profile of an audio group: what is counted, per group, from a real CPU trace and from made
CUDA events."""

import json
from shlex import split
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import profile
from benchmarks.__main__ import main
from benchmarks.profile import GROUPS, OUTSIDE, Kernel, Trace, summarize, with_bytes
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.bench.floor import GroupWork
from mimo_fast.bench.target import Target

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def event(
    name: str, start: float, end: float, kind: DeviceType = DeviceType.CPU, own: float = 0
) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=kind, self_cpu_time_total=own)


EVENTS = [
    event("cudaDeviceSynchronize", 0, 5),
    event("cudaGraphLaunch", 12, 14),
    event("cudaGraphLaunch", 15, 18),
    event("cudaEventSynchronize", 20, 50),
    event(GROUPS, 10, 100),
    event("cudaDeviceSynchronize", 101, 130),
    event(GROUPS, 13, 120, DeviceType.CUDA),
    event("gemv", 13, 33, DeviceType.CUDA),
    # The last kernel runs on when the host has left.
    event("gemv", 40, 60, DeviceType.CUDA),
    event("attention", 90, 120, DeviceType.CUDA),
]


def test_kernels_launches_and_waits_are_counted_a_group() -> None:
    trace = summarize(EVENTS, 2, CUDA, "graph")
    assert trace.kernels == (Kernel("gemv", 1, 20e-6), Kernel("attention", 0.5, 15e-6))
    assert (trace.count, trace.seconds) == (1.5, pytest.approx(35e-6))
    # Waits before and after the groups are the profiler's own.
    assert trace.host_syncs == {"cudaEventSynchronize": 0.5}
    assert trace.launches == {"cudaGraphLaunch": 1}


def test_what_torch_does_not_see_on_a_cpu_has_a_row() -> None:
    events = [
        event(GROUPS, 0, 100),
        event("aten::mm", 10, 40, own=30),
        event("aten::add", 200, 240, own=40),
    ]
    trace = summarize(events, 2, CPU, "eager")
    assert trace.kernels == (Kernel(OUTSIDE, 0, 35e-6), Kernel("aten::mm", 0.5, 15e-6))
    assert (trace.count, trace.launches, trace.host_syncs) == (0.5, {}, {})


def test_bytes_are_told_where_one_kernel_reads_all() -> None:
    target = Target.random("tiny", "int8", torch.float32, CPU, with_codec=False)
    work = GroupWork.of(target.lm, 1, 50, 8)
    names = ("split_attention", "head_logits", "quantized_gemv", "merge_splits")
    trace = Trace("graph", tuple(Kernel(f"{name}_kernel", 1, 1e-6) for name in names), {}, {})
    told = {kernel.name: kernel.bytes for kernel in with_bytes(trace, target, work).kernels}
    assert told.pop("merge_splits_kernel") is None
    assert told["split_attention_kernel"] == work.audio.bytes["cache"]
    assert sum(told.values()) == work.audio.total
    two = Trace("graph", (*trace.kernels, Kernel("dense_gemv_kernel", 1, 1e-6)), {}, {})
    gemvs = [k for k in with_bytes(two, target, work).kernels if "gemv" in k.name]
    assert [kernel.bytes for kernel in gemvs] == [None, None]


def test_profile_on_the_cpu(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(profile, "ceiling", lambda device: Ceiling(1e9, 1e9, {"float32": 1e9}))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "profile.jsonl"
    arguments = split("profile --preset tiny --dtype float32 --quantization bf16 --device cpu")
    arguments += split(f"--context 24 --groups 3 --batch 2 --top 5 -o {path}")
    assert main(arguments) == 0
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (record["kind"], record["mode"], record["unit"]) == ("profile", "eager", "torch op")
    assert {"environment", "ceiling", "floor", "audio_group"} <= set(record)
    # Every step of every group: the same work each time, so whole numbers of it.
    counts = [kernel["count"] for kernel in record["kernels"] if "mm" in kernel["name"]]
    assert counts == [int(count) for count in counts] != []
    assert record["kernels_a_group"] > 100
    seconds = sum(kernel["seconds"] for kernel in record["kernels"])
    assert seconds == pytest.approx(record["kernel_seconds"])
    out = capsys.readouterr().out
    assert "an audio group takes" in out
    assert "others" in out
    assert main([*arguments[:-2], "--groups", "22"]) == 2
