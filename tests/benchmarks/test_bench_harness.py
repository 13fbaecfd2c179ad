"""Rows of an op: what is right is written with its share of the ceiling, what is wrong is refused
by name."""

import copy

import pytest
import torch

from benchmarks import harness
from benchmarks.columns import Table, duration, factor
from benchmarks.harness import Benchmark, Provider, held_bytes, run_benchmarks, widen
from benchmarks.records import JsonLines, read_records
from mimo_fast.bench.accuracy import Accuracy
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.kernels.kv_cache import LayerKV
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.kernels.norm import RMSNorm
from mimo_fast.quantization import Format, quantize

CPU = torch.device("cpu")
MACHINE = Ceiling(1e9, 1e9, {"float32": 1e9, "bfloat16": 1e9, "float16": 1e9})


def double(inputs):
    return (inputs["x"] * 2,)


def in_place(inputs):
    """Writes what it read: a second call on the same inputs gives the same, as an append to a cache
    does."""
    inputs["y"][:] = inputs["x"] * 2
    return (inputs["y"],)


def doubling(*providers: Provider, check=None) -> Benchmark:
    def make(device):
        x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
        return {"x": x, "y": torch.full_like(x, torch.nan)}

    name, work = ("double", "double", "bfloat16", 1, "N=64"), (torch.bfloat16, 256, 64)
    return Benchmark(*name, *work, make, double, providers, check)


def run(case: Benchmark, path=None, **options):
    lines: list[str] = []
    options |= {"seconds": 0, "write": lines.append}
    return run_benchmarks([case], CPU, MACHINE, JsonLines(path), **options), "\n".join(lines)


def test_a_right_op_has_a_row_with_its_share_of_the_ceiling(tmp_path):
    outcome, printed = run(
        doubling(Provider("ours", double), Provider("written", in_place)), tmp_path / "a.jsonl"
    )
    assert not outcome.refused
    first, second = read_records(tmp_path / "a.jsonl")
    assert [first, second] == outcome.records
    assert (first["provider"], second["provider"]) == ("ours", "written")
    assert (first["op"], first["bound"]) == ("double", "memory")
    assert first["floor_s"] == pytest.approx(256e-9)
    assert first["of_ceiling"] == pytest.approx(first["floor_s"] / first["seconds"]["p50"])
    assert first["seconds"]["n"] >= 5
    assert first["environment"]["device"]["type"] == "cpu"
    assert first["ceiling"]["read_Bps"] == 1e9
    assert "achieved / ceiling" in printed
    assert f"{100 * first['of_ceiling']:.1f}%" in printed


def test_a_wrong_op_is_refused_by_name(tmp_path):
    wrong = Provider("wrong", lambda inputs: (inputs["x"] * 2.1,))
    outcome, printed = run(doubling(Provider("ours", double), wrong), tmp_path / "a.jsonl")
    assert outcome.refused
    assert [record["provider"] for record in read_records(tmp_path / "a.jsonl")] == ["ours"]
    assert [line for line in printed.splitlines() if "wrong" in line] == [
        f"REFUSED {outcome.refused[0]}"
    ]
    assert "double bfloat16 N=64 wrong: error" in outcome.refused[0]


def test_the_check_is_made_on_the_inputs_that_are_timed():
    """An op that is wrong for these values alone."""
    seen = []

    def sometimes(inputs):
        seen.append(inputs["x"].clone())
        return (torch.where(inputs["x"] > 2, 0, inputs["x"] * 2),)

    outcome, _ = run(doubling(Provider("sometimes", sometimes)))
    assert outcome.refused
    assert len(seen) == 1
    never = Provider("never", lambda inputs: (seen.append(inputs["x"]), double(inputs)[0])[1:])
    outcome, _ = run(doubling(never))
    assert not outcome.refused
    assert all(torch.equal(x, seen[0]) for x in seen)
    assert len({x.data_ptr() for x in seen[1:]}) > 1, "copies, so that no cache serves them"


def test_copies_are_bounded_by_what_the_inputs_hold(monkeypatch):
    weight = Weight.stack([torch.ones(8, 8)], [torch.ones(8)])
    table = torch.ones(1000)
    held = {"w": weight, "t": (table, 1), "norm": RMSNorm(torch.ones(4), 1e-6)}
    assert held_bytes(held) == 4 * (64 + 8 + 1000 + 4)
    # 256 bytes of x and y.
    for limit, copies in ((1000, 3), (100, 1)):
        monkeypatch.setattr(harness, "COPIED_BYTES", limit)
        (record,) = run(doubling(Provider("ours", double)))[0].records
        assert record["copies"] == copies


def test_an_own_check_decides():
    case = doubling(Provider("ours", double), check=lambda inputs, got: Accuracy(1.0, 0.5, 1.0))
    assert run(case)[0].refused


def test_what_cannot_run_is_named_and_what_breaks_does_not_stop_the_others():
    def broken(inputs):
        raise RuntimeError("no such kernel\nand more")

    outcome, printed = run(
        doubling(
            Provider("elsewhere", double, missing=lambda device: f"needs a GPU, not a {device}"),
            Provider("broken", broken),
            Provider("ours", double),
        )
    )
    assert "skipped 1 of elsewhere: needs a GPU, not a cpu" in printed
    assert "REFUSED double bfloat16 N=64 broken: RuntimeError: no such kernel" in printed
    assert [record["provider"] for record in outcome.records] == ["ours"]
    assert outcome.refused


def test_a_provider_stands_for_the_values_that_it_holds():
    """Rounded weights are no error of its arithmetic, and what it adds to them is."""

    def coarse(inputs):
        return {"x": inputs["x"].mul(4).round().div(4)}

    def exact(inputs, prepared):
        return {**inputs, **prepared}

    case = doubling(
        Provider("own", double, coarse, stands_for=exact),
        Provider("given", double, coarse),
        Provider("worse", lambda inputs: (inputs["x"] * 2 + 0.5,), coarse, stands_for=exact),
    )
    outcome, _ = run(case)
    assert [record["provider"] for record in outcome.records] == ["own"]
    assert len(outcome.refused) == 2


def test_only_what_is_wanted_runs():
    both = doubling(Provider("a", double), Provider("b", double))
    outcome, _ = run(both, providers=lambda name: name == "b")
    assert [record["provider"] for record in outcome.records] == ["b"]


def test_an_interrupt_loses_nothing(tmp_path):
    def interrupted(inputs):
        raise KeyboardInterrupt

    path = tmp_path / "a" / "b.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(doubling(Provider("ours", double), Provider("late", interrupted)), path)
    assert [record["provider"] for record in read_records(path)] == ["ours"]


def test_records_are_appended_and_a_line_that_was_cut_off_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    JsonLines(path).append({"n": 3})
    JsonLines(path).append({"n": 4})
    assert [record["n"] for record in read_records(path)] == [1, 3, 4]
    JsonLines(None).append({"n": 5})


def test_durations_have_three_digits():
    seconds = (2.5, 0.0123, 0.9994, 4.56e-4, 3e-8)
    assert [*map(duration, seconds)] == ["2.50 s", "12.3 ms", "999 ms", "456 us", "0.03 us"]


def test_a_table_keeps_its_columns():
    """Text to the left where that is its column's way, numbers to the right, a line for nothing."""
    lines: list[str] = []
    columns = (("model", "title", str), ("rtf", "metrics.rtf", factor), ("rtf", "rtf", factor))
    table = Table(columns, lines.append)
    about = {"model": "7b", "quantization": "int4"}
    table.row(about | {"metrics": {"rtf": 0.5}, "rtf": 12.3456})
    table.row(about | {"metrics": None, "rtf": 1})
    assert lines == [
        "model                   rtf        rtf",
        "7b int4               0.500     12.346",
        "7b int4                   -      1.000",
    ]


def test_widening_leaves_packed_weights_and_integers():
    weight = Weight.stack([torch.ones(2, 2).bfloat16()])
    packed = quantize(torch.randn(4, 64), Format.parse("int8"))
    cache = LayerKV(*(torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16) for _ in range(2)))
    before = {"w": weight, "q": packed, "kv": cache, "n": torch.arange(3), "s": 1e-6}
    before["t"] = (torch.ones(1).half(),)
    wide = widen(copy.deepcopy(before))
    assert wide["w"].blocks[0].dtype == wide["kv"].k.dtype == wide["t"][0].dtype == torch.float32
    assert wide["q"].scales.dtype == packed.scales.dtype
    assert wide["n"].dtype == torch.int64
    assert before["w"].blocks[0].dtype == torch.bfloat16
