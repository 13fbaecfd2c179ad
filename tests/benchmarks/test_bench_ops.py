"""The registry holds every op of the package, each case is right on the CPU, and a wrong op is
refused."""

import math
import sys
from dataclasses import replace
from shlex import split

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import cases as dimensions
from benchmarks import harness, ops, products
from benchmarks.harness import Benchmark, run_benchmarks
from benchmarks.ops import all_benchmarks, launchers, select
from benchmarks.records import JsonLines, read_records
from mimo_fast.bench.ceiling import Ceiling
from mimo_fast.kernels.swiglu import swiglu

CPU = torch.device("cpu")
MACHINE = Ceiling(1e10, 1e10, {"float32": 1e11})
CHEAP = 8 * 2**20
"""Bytes of a case that a test may run."""

CASES = all_benchmarks()
LEAST = {case.op: case for case in sorted(CASES, key=lambda case: -case.nbytes)}
CHEAP_OPS = sorted(op for op, case in LEAST.items() if case.nbytes <= CHEAP)


def run(case: Benchmark, wanted=lambda name: True, path=None):
    lines: list[str] = []
    return run_benchmarks(
        [case], CPU, MACHINE, JsonLines(path), seconds=0, providers=wanted, write=lines.append
    ), lines


def native(name: str) -> bool:
    return name == "ours-cpu"


def test_every_op_of_the_package_is_in_the_registry():
    known = "matmul rms_norm decode_attention rvq_encode sample_text attention"
    assert {*known.split()} <= launchers()
    assert {case.launcher for case in CASES} == launchers()


def test_a_new_op_would_be_missed(monkeypatch):
    import mimo_fast.kernels.swiglu as module

    monkeypatch.setattr(module, "gelu", lambda x: x, raising=False)
    assert "gelu" not in launchers()
    monkeypatch.setattr(module, "gelu_ref", lambda x: x, raising=False)
    assert launchers() - {case.launcher for case in CASES} == {"gelu"}


def test_every_case_moves_and_computes_something_and_has_a_name_of_its_own():
    for case in CASES:
        assert case.nbytes > 0
        assert case.flop > 0
        names = [provider.name for provider in case.providers]
        assert len(set(names)) == len(names)
        assert {"ours-gpu", "ours-cpu", "eager", "compile"} <= set(names)
    keys = [(case.op, case.format, case.shape) for case in CASES]
    assert len(set(keys)) == len(keys)


def test_dimensions_are_the_published_ones():
    shapes = {(case.op, case.format, case.m): case for case in CASES}
    assert shapes["backbone.qkv", "int4", 1].shape == "M=1 N=6144 K=4096"
    assert shapes["backbone.gate_up", "dense", 512].shape == "M=512 N=22016 K=4096"
    assert shapes["backbone.text_head", "int8", 64].shape == "M=64 N=151680 K=4096"
    assert shapes["patch_decoder.down", "nf4", 1].shape == "M=1 N=1024 K=4096"
    assert shapes["patch_decoder.sample_codes", "bfloat16", 1].shape == "M=1 V=2308 D=1024"
    assert [case.m for case in select("backbone.down", formats="int4")] == [*dimensions.ROWS]
    contexts = {case.shape for case in select("backbone.decode_attention", [1])}
    assert contexts == {"M=1 S=256", "M=1 S=1024", "M=1 S=4096", "M=1 S=8192"}
    # int4 at group 128: half a byte a weight, 4 for each group; then x, the norm's weight, the bias
    # and y.
    weight = 6144 * 4096 // 2 + 6144 * 32 * 4 + 6144 * 2
    assert shapes["backbone.qkv", "int4", 1].nbytes == weight + 2 * (4096 + 4096 + 6144)
    assert shapes["backbone.qkv", "int4", 1].flop == 2 * 6144 * 4096


def test_selection():
    assert {case.op for case in select("backbone.q*")} == {"backbone.qkv"}
    assert {case.m for case in select("backbone.qkv", [4, 16])} == {4, 16}
    assert {case.format for case in select("backbone.qkv", formats="int*")} == {"int4", "int8"}
    quick = select(quick=True)
    assert {case.launcher for case in quick} == launchers()
    assert len(quick) < len(CASES) / 4
    with pytest.raises(ValueError, match=r"no op matches 'backbone.z'.*backbone.qkv"):
        select("backbone.z")
    with pytest.raises(ValueError, match=r"M = \[3\]; choose from \[1, 2, 4"):
        select("backbone.qkv", [3])


def test_a_family_that_the_package_is_too_old_for_is_named(monkeypatch):
    from mimo_fast.kernels import norm

    monkeypatch.delattr(norm, "layer_norm")
    monkeypatch.setitem(sys.modules, "mimo_fast.kernels.rvq", None)
    with pytest.raises((ImportError, AttributeError)):
        all_benchmarks()
    missing: dict[str, str] = {}
    found = {case.op for case in all_benchmarks(missing)}
    assert found >= {"backbone.swiglu", "backbone.rms_norm"}
    assert not {op for op in found if "rvq" in op or "layer_norm" in op}
    assert missing.keys() == {"layer_norm", "rvq_encode", "rvq_decode"}
    assert "layer_norm" in missing["layer_norm"]
    assert "mimo_fast.kernels.rvq" in missing["rvq_encode"]


@pytest.mark.parametrize("op", CHEAP_OPS)
def test_our_op_is_right_on_the_cpu(op, tmp_path):
    path = tmp_path / "ops.jsonl"
    outcome, _ = run(LEAST[op], native, path)
    assert not outcome.refused
    (record,) = read_records(path)
    assert record["of_ceiling"] > 0
    assert math.isfinite(record["floor_s"])


@pytest.mark.parametrize("output", [0, -1])
@pytest.mark.parametrize("op", CHEAP_OPS)
def test_one_wrong_value_is_refused(op, output):
    """In the first output, or in what was written into a cache or into codes."""
    case = LEAST[op]

    def wrong(function):
        def run(inputs):
            outputs = [x.clone() for x in function(inputs)]
            x = outputs[output]
            values = x.view(-1) if x.is_contiguous() else x[0, 0, 0]
            values[len(values) // 2] += 0.5 * x.abs().max() if x.is_floating_point() else 3
            return tuple(outputs)

        return run

    broken = tuple(replace(p, run=wrong(p.run)) for p in case.providers if native(p.name))
    outcome, lines = run(replace(case, providers=broken))
    assert outcome.refused
    assert not outcome.records
    assert outcome.refused[0].startswith(op)
    assert lines[1:] == [f"REFUSED {outcome.refused[0]}"], "no row"


TINY = (
    products.Product("qkv", (128, 64, 64), 256, (1, 4), bias=True, norm=True),
    products.Product("gate_up", (128, 128), 256, (1, 4), norm=True, swiglu=True),
    products.Product("down", (64,), 512, (1, 4), residual=True),
)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("form", products.FORMATS)
@pytest.mark.parametrize("product", TINY, ids=[product.name for product in TINY])
def test_every_provider_of_a_product_computes_it(product, form, m):
    products.weight_of.cache_clear()
    case = products.product_benchmark(product, form, m)
    outcome, _ = run(case, lambda name: name != "compile")
    products.weight_of.cache_clear()
    assert not outcome.refused
    others = {
        "dense": {"linear"},
        "int8": {"eager", "unpacked", "torch-int8", "bitsandbytes-int8"},
        "int4": {"eager", "unpacked", "torch-int4"},
        "nf4": {"eager", "bitsandbytes-nf4"},
    }[form]
    here = {p.name for p in case.providers if p.missing(CPU) is None} - {"compile"}
    assert here <= {"ours-cpu", *others}
    assert {record["provider"] for record in outcome.records} == here
    assert "ours-cpu" in here
    skipped = " ".join(outcome.skipped)
    assert "ours-gpu: needs a CUDA device" in skipped
    assert ("torch-int4-cuda: needs a CUDA device" in skipped) == (form == "int4")


@pytest.mark.slow
def test_torch_compile_computes_it():
    if (reason := harness.needs_compiler(CPU)) is not None:
        pytest.skip(reason)
    outcome, _ = run(LEAST["patch_decoder.swiglu"], lambda name: name == "compile")
    assert not outcome.refused
    assert [record["provider"] for record in outcome.records] == ["compile"]


def test_without_a_compiler_or_a_package_the_provider_is_skipped_by_name(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    monkeypatch.setattr(products, "find_spec", lambda name: None)
    products.weight_of.cache_clear()
    outcome, _ = run(
        products.product_benchmark(TINY[0], "nf4", 1),
        lambda name: not native(name) and name != "eager",
    )
    assert outcome.records == outcome.refused == []
    named = (
        "compile: no C++ compiler is installed",
        "bitsandbytes-nf4: bitsandbytes is not installed",
    )
    assert {*named} < set(outcome.skipped)


def test_a_path_that_is_turned_off_is_not_timed_under_its_name(monkeypatch):
    """MIMO_FAST_KERNELS chooses the path of an op, whatever the device."""
    cuda = torch.device("cuda")
    monkeypatch.delenv("MIMO_FAST_KERNELS", raising=False)
    assert harness.needs_plain_path(CPU) is None
    assert harness.needs_triton(CPU) == "needs a CUDA device"
    assert harness.needs_plain_path(cuda) == "needs the CPU"
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    assert "turns it off" in harness.needs_triton(cuda)
    monkeypatch.setenv("MIMO_FAST_KERNELS", "triton")
    assert "turns it off" in harness.needs_plain_path(CPU)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(ops, "ceiling", lambda device: MACHINE)


def test_a_wrong_op_ends_the_command_with_1(machine, monkeypatch, tmp_path, capsys):
    def slightly_wrong(gate_up):
        return swiglu(gate_up) * 1.02

    arguments = split("ops --op patch_decoder.swiglu --m 1 --provider ours-* --seconds 0")
    arguments += ["--device", "cpu", "-o", str(tmp_path / "ops.jsonl")]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.index("ceiling: reads 10.0 GB/s") < printed.index("patch_decoder.swiglu")
    assert "achieved / ceiling" in printed
    slightly_wrong.__name__, slightly_wrong.__module__ = "swiglu", "mimo_fast.kernels.swiglu"
    monkeypatch.setattr("mimo_fast.kernels.swiglu.swiglu", slightly_wrong)
    assert command.main(arguments) == 1
    assert "REFUSED patch_decoder.swiglu bfloat16 M=1 F=4096 ours-cpu" in capsys.readouterr().out
    assert len(read_records(tmp_path / "ops.jsonl")) == 1


def test_bad_usage_is_one_line(machine, capsys):
    assert command.main(["ops", "--op", "nothing", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    nowhere = split("ops --op backbone.swiglu --provider ours-gpu --device cpu")
    assert command.main(nowhere) == 1
    captured = capsys.readouterr()
    assert "ours-gpu: needs a CUDA device" in captured.out
    assert "nothing was measured" in captured.err
