"""Percentiles, turns of calls, bounds on measuring, the ceiling, and what a record says of its
machine."""

import json
import subprocess
from dataclasses import asdict
from time import sleep

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimo_fast.bench import ceiling as ceiling_module
from mimo_fast.bench import environment as environment_module
from mimo_fast.bench import timing
from mimo_fast.bench.ceiling import Ceiling, ceiling, copy_bandwidth, matmul_rate, read_bandwidth
from mimo_fast.bench.environment import commit, environment
from mimo_fast.bench.timing import CallTime, cache_bytes, copies_for, percentile, time_calls

CPU = torch.device("cpu")


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), st.floats(0, 1))
def test_percentiles_are_those_of_torch(values, share):
    want = torch.quantile(torch.tensor(values, dtype=torch.float64), share)
    assert percentile(values, share) == pytest.approx(float(want))


def test_a_timing_is_in_seconds_and_in_order():
    found = CallTime.of([0.3, 0.1, 0.2])
    assert found.p50 == 0.2
    assert 0.1 < found.p10 < found.p50 < found.p90 < 0.3
    assert found.n == 3
    with pytest.raises(ValueError, match="at least one"):
        CallTime.of([])


def test_calls_take_turns_after_a_warm_up(monkeypatch):
    order = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    assert time_calls(calls, CPU, seconds=0, min_runs=4).n == 4
    assert order == [0, 1, 2, 0, 1, 2, 0]


def test_what_is_timed_is_the_call(monkeypatch):
    """A clock that only the calls move: warm-up is not counted, each call is."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    durations = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])

    def call():
        now[0] += next(durations)

    assert time_calls(call, CPU, seconds=0, min_runs=5) == CallTime.of([1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    ("seconds", "most", "runs"), [(0, 9, 5), (3.5, 9, 5), (6.5, 9, 7), (100, 9, 9)]
)
def test_measuring_ends_in_time(monkeypatch, seconds, most, runs):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def call():
        now[0] += 1

    assert time_calls(call, CPU, seconds=seconds, min_runs=5, max_runs=most).n == runs


def test_a_slower_call_takes_longer():
    fast, slow = (
        time_calls(lambda wait=wait: sleep(wait), CPU, seconds=0, min_runs=5) for wait in (0, 0.01)
    )
    assert slow.p50 >= 0.01
    assert slow.p10 > fast.p50


def test_copies_outgrow_the_cache():
    size = cache_bytes(CPU)
    assert size >= 2**15
    assert copies_for(2 * size, CPU) == 1
    assert copies_for(size // 4, CPU) == 8
    assert copies_for(1, CPU) == timing.MAX_COPIES


def test_the_floor_is_the_larger_of_bytes_and_arithmetic():
    machine = Ceiling(1e9, 2e9, {"float32": 1e12, "bfloat16": 4e12, "float16": 1e11})
    assert machine.floor_seconds(1e9) == 1
    assert machine.floor_seconds(1e9, 8e12, torch.bfloat16) == 2
    assert machine.bound(1e9, 8e12, torch.bfloat16) == "arithmetic"
    assert machine.bound(1e9, 1e12, torch.bfloat16) == "memory"
    # Half precision that is slow may be computed in single.
    assert machine.floor_seconds(0, 1e12, torch.float16) == 1
    assert Ceiling(1e9, 1e9, {"float32": 1e12}).floor_seconds(0, 1e12, torch.bfloat16) == 1
    for number in ("1.0 GB/s", "2.0 GB/s", "1,000", "4,000"):
        assert number in str(machine)


def test_bandwidth_and_rate_are_those_of_what_was_timed(monkeypatch):
    monkeypatch.setattr(ceiling_module, "durations", lambda *_args, **_options: [0.7, 0.5, 0.6])
    assert read_bandwidth(CPU, 800) == 1600
    assert copy_bandwidth(CPU, 800) == 3200
    assert matmul_rate(CPU, torch.float32, 10) == 2 * 10**3 / 0.5


def test_the_ceiling_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        ceiling_module, "read_bandwidth", lambda device: calls.append(device) or 1e9
    )
    monkeypatch.setattr(ceiling_module, "copy_bandwidth", lambda device: 2e9)
    monkeypatch.setattr(ceiling_module, "matmul_rate", lambda device, dtype: 3e9)
    ceiling_module._measured.cache_clear()
    found = ceiling("cpu")
    assert ceiling(CPU) is found
    assert calls == [CPU]
    assert json.loads(json.dumps(asdict(found)))["flops"]["float32"] == 3e9
    ceiling_module._measured.cache_clear()


def test_the_environment_is_json_and_names_what_matters():
    found = json.loads(json.dumps(environment("cpu")))
    assert found["device"]["type"] == "cpu"
    # Of the two, either may lack the local suffix of a build, "+cpu" or "+cu130".
    named, own = found["packages"]["torch"], torch.__version__
    assert named.partition("+")[0] == own.partition("+")[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["date"].endswith("+00:00")


def test_the_commit_and_whether_the_code_is_its(tmp_path):
    def git(*arguments):
        about = ["-c", "user.name=t", "-c", "user.email=t@t", "-C", tmp_path]
        return subprocess.run(
            ["git", *about, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    package, results = tmp_path / "mimo_fast", tmp_path / "benchmarks" / "results"
    package.mkdir()
    results.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    # Somebody else's checkout, in which this project is not.
    assert commit(tmp_path) == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert commit(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (results / "new.jsonl").write_text("{}")
    assert commit(tmp_path)["dirty"] is False
    (package / "new.py").write_text("")
    assert commit(tmp_path)["dirty"] is True
    assert commit(tmp_path / "nowhere")["commit"] is None


def test_a_card_without_nvidia_smi(monkeypatch):
    card = type(
        "Card",
        (),
        {"name": "card", "major": 9, "minor": 0, "total_memory": 80, "multi_processor_count": 132},
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(environment_module.shutil, "which", lambda name: None)
    assert environment_module._card(torch.device("cuda", 0))["capability"] == "sm_90"
    reply = type("Done", (), {"stdout": "card, 570.1, 1980, 2619, 1980, 2619, 700.00\n"})
    asked = []
    monkeypatch.setattr(environment_module.shutil, "which", lambda name: "/bin/nvidia-smi")
    monkeypatch.setattr(
        environment_module.subprocess, "run", lambda query, **_: asked.append(query) or reply
    )
    found = environment_module._card(torch.device("cuda", 1))
    assert found["driver_version"] == "570.1"
    assert found["clocks.sm"] == "1980"
    assert "--id=1" in asked[0]
