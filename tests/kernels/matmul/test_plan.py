"""The plan of a weight against a table written by hand; a plan is made once."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import gaussian, quantized
from torch.testing import assert_close

from mimo_fast.kernels import dispatch
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul import cpu
from mimo_fast.kernels.matmul import plan as module
from mimo_fast.kernels.matmul.cpu import pack_for_torch
from mimo_fast.kernels.matmul.plan import TABLE, explain, plan
from mimo_fast.kernels.matmul.product import QuantizedWeight, Weight, matmul, matmul_ref
from mimo_fast.kernels.norm import RMSNorm

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (0, 1, 4, 5, 7, 8, 9, 64, 65, 96, 97, 256, 257, 4096)

MMA, FUSED, UNPACK = "CUDA mma", "CUDA fused gemm", "CUDA unpack + mm"
TILES, DENSE_TILES = "CUDA tiles", "CUDA dense tiles"
GEMV, DOT, TRITON = "Triton gemv", "Triton dot", "Triton unpack + mm"
DENSE_GEMV, BLOCKS, DENSE = "Triton dense gemv", "Triton dense gemv by block", "torch dense"
NATIVE, PACKED, UNPACKED, WIDE = "CPU native", "torch packed", "torch unpacked", "torch widened"

ON_CUDA = ((96, MMA), (None, UNPACK))
ON_CUDA_NEW = ((8, MMA), (256, TILES), (None, UNPACK))
ON_CUDA_FUSED = ((8, MMA), (256, TILES), (None, FUSED))
ON_TRITON = ((4, GEMV), (64, DOT), (None, TRITON))
ON_DENSE = ((0, DENSE), (4, DENSE_GEMV), (None, DENSE))
ON_DENSE_NEW = ((0, DENSE), (256, DENSE_TILES), (None, DENSE))
ON_BLOCKS = ((0, DENSE), (4, BLOCKS), (None, DENSE))
ON_TORCH = ((0, UNPACKED), (64, PACKED), (None, UNPACKED))

# (weight, device, dtype, MIMO_FAST_KERNELS, MIMO_FAST_EXPERIMENTAL) -> (rows up to which, what)
EXPECTED = {
    ("int4", CPU, FP32, "", ""): ((None, NATIVE),),
    ("int4", CPU, BF16, "", ""): ((None, NATIVE),),
    ("int4", CPU, FP16, "", ""): ((None, NATIVE),),
    ("int8", CPU, FP32, "", ""): ((None, NATIVE),),
    ("int8-g32", CPU, BF16, "", ""): ((None, NATIVE),),
    ("int4-sym-g32", CPU, FP32, "", ""): ((None, UNPACKED),),
    ("nf4", CPU, BF16, "", ""): ((None, UNPACKED),),
    ("packed int4", CPU, BF16, "", ""): ON_TORCH,
    ("packed int4", CPU, FP32, "", ""): ((None, UNPACKED),),
    ("packed int8", CPU, BF16, "torch", ""): ON_TORCH,
    ("int4", CPU, BF16, "torch", ""): ((None, UNPACKED),),
    ("int4", CPU, FP32, "triton", ""): ON_TRITON,
    ("int4", CPU, FP32, "triton", "1"): ON_TRITON,
    ("nf4", CPU, FP16, "triton", ""): ON_TRITON,
    ("int8", CPU, BF16, "triton", ""): ON_TRITON,
    ("int4-g96", CPU, FP32, "triton", ""): ((None, UNPACKED),),
    ("dense", CPU, FP32, "", ""): ((None, DENSE),),
    ("dense", CPU, BF16, "", ""): ((7, DENSE), (None, WIDE)),
    ("dense", CPU, FP16, "torch", ""): ((7, DENSE), (None, WIDE)),
    ("dense", CPU, FP32, "triton", ""): ON_DENSE,
    ("dense", CPU, BF16, "triton", ""): ((0, DENSE), (4, DENSE_GEMV), (7, DENSE), (None, WIDE)),
    ("blocks", CPU, FP32, "triton", ""): ON_BLOCKS,
    ("int4", GPU, BF16, "", ""): ON_CUDA,
    ("int4", GPU, BF16, "", "1"): ON_CUDA_FUSED,
    ("int8", GPU, BF16, "", "1"): ON_CUDA_NEW,
    ("int8-g128", GPU, BF16, "", ""): ON_CUDA,
    ("int4", GPU, FP16, "", ""): ON_TRITON,
    ("int4 fp16", GPU, FP16, "", ""): ON_CUDA,
    ("int4", GPU, FP32, "", ""): ON_TRITON,
    ("int4-g64", GPU, BF16, "", ""): ON_TRITON,
    ("int8-g32", GPU, BF16, "", "1"): ON_TRITON,
    ("nf4", GPU, BF16, "", ""): ON_TRITON,
    ("int4-g96", GPU, BF16, "", ""): ((None, UNPACKED),),
    ("int4", GPU, BF16, "triton", "1"): ON_TRITON,
    ("int4", GPU, BF16, "torch", "1"): ((None, UNPACKED),),
    ("dense", GPU, BF16, "", ""): ON_DENSE,
    ("dense", GPU, BF16, "", "1"): ON_DENSE_NEW,
    ("dense", GPU, FP16, "", "1"): ON_DENSE,
    ("blocks", GPU, BF16, "", "1"): ON_BLOCKS,
    ("blocks", GPU, FP16, "", ""): ON_BLOCKS,
    ("dense", GPU, BF16, "torch", ""): ((None, DENSE),),
}


def weight_of(name: str, dtype: torch.dtype) -> Weight | QuantizedWeight:
    kind, _, scales = name.partition(" ")
    values = gaussian(64, 288 if "g96" in name else 256)
    if kind == "dense":
        return Weight.stack([values.to(dtype)])
    if kind == "blocks":
        return Weight.stack([values[:32].to(dtype), values[32:].to(dtype)])
    if kind == "packed":
        return pack_for_torch(quantized(values, scales))
    if kind == "int4-g96":
        # No format of ours: what another tool may have stored.
        made = quantized(values, "int4-g32")
        return replace(made, scales=made.scales[:, ::3], zeros=made.zeros[:, ::3])
    made = quantized(values, kind)
    return replace(made, scales=made.scales.half()) if scales == "fp16" else made


@pytest.fixture
def machine(monkeypatch):
    """One with native kernels, Triton, a GPU that runs the CUDA kernels, and a CPU that has no
    instructions for 16-bit products; weights are tensors on the CPU."""
    monkeypatch.setattr(native, "_native", native._native or object())
    monkeypatch.setattr(dispatch, "triton", dispatch.triton or object())
    monkeypatch.setattr(cuda, "library", lambda: object())
    monkeypatch.setattr(cuda, "_runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)
    return monkeypatch


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: "-".join(map(str, case)))
def test_the_plan_is_what_the_rules_were(machine, case):
    name, device, dtype, kernels, experimental = case
    if device == GPU:
        # A weight on a GPU is none of the native kernels'.
        machine.setattr(native, "refuses", lambda weight: "the weight is not on a CPU")
    for variable, value in (("KERNELS", kernels), ("EXPERIMENTAL", experimental)):
        machine.setenv(f"MIMO_FAST_{variable}", value)
    weight = weight_of(name, dtype)
    made = plan(weight, device, dtype)
    for rows in ROWS:
        want = next(what for most, what in EXPECTED[case] if most is None or rows <= most)
        assert made.at(rows).implementation.name == want, rows
        assert explain(weight, device, dtype, rows)[0] == want


INSIDE = dict.fromkeys((GEMV, DENSE_GEMV, BLOCKS, NATIVE), (FP32, BF16, FP16))
INSIDE |= dict.fromkeys((TILES, DENSE_TILES, MMA, DOT), (FP32, BF16))
INSIDE |= dict.fromkeys((FUSED, UNPACK, TRITON, PACKED, DENSE), ())


@pytest.mark.parametrize("name", INSIDE)
def test_where_the_norm_is_inside(name):
    found = next(each for each in TABLE if each.name == name)
    assert tuple(dtype for dtype in (FP32, BF16, FP16) if dtype in found.norm) == INSIDE[name]


@pytest.mark.parametrize("kernels", ["", "torch", "triton"])
@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "dense", "blocks"])
def test_gradients_go_through_plain_torch(machine, name, kernels):
    machine.setenv("MIMO_FAST_KERNELS", kernels)
    made = plan(weight_of(name, BF16), CPU, BF16, True)
    names = {step.implementation.name for step in made.steps}
    assert names == {UNPACKED if name in ("int4", "int8", "nf4") else DENSE}


@pytest.mark.parametrize("name", ["int4", "int8", "nf4", "dense", "blocks", "packed int4"])
@pytest.mark.parametrize("rows", [0, 1, 8, 65])
@pytest.mark.parametrize("swiglu", [False, True])
def test_results_are_those_of_the_reference(name, rows, swiglu):
    weight, x = weight_of(name, FP32), gaussian(rows, 256, 1)
    norm, residual = RMSNorm(gaussian(1, 256, 2)[0], 1e-6), gaussian(rows, 32 if swiglu else 64, 3)
    for dtype, tolerance in ((FP32, 1e-3), (BF16, 5e-2)):
        if dtype == BF16 and isinstance(weight, Weight):
            continue
        around = {"residual": residual.to(dtype), "swiglu": swiglu}
        around["norm"] = RMSNorm(norm.weight.to(dtype), norm.eps)
        got = matmul(x.to(dtype), weight, **around)
        want = matmul_ref(x.to(dtype), weight, **around)
        assert got.dtype == dtype
        atol = tolerance * float(want.abs().max()) if rows else 0
        assert_close(got, want, rtol=tolerance, atol=atol)


def test_a_plan_is_made_once(monkeypatch):
    made = []
    make = module.make
    monkeypatch.setattr(module, "make", lambda setting: made.append(setting) or make(setting))
    weight, x = weight_of("int4", FP32), gaussian(3, 256)
    for _ in range(3):
        matmul(x, weight)
        matmul(x[:1], weight, residual=torch.zeros(1, 64))
    assert len(made) == 1
    matmul(x.bfloat16(), weight)
    assert len(made) == 2
    monkeypatch.setenv("MIMO_FAST_KERNELS", "torch")
    matmul(x, weight)
    matmul(x, weight)
    assert len(made) == 3
    # Copies have tensors of their own, so they are asked about anew.
    for copied in (copy.deepcopy(weight), replace(weight)):
        assert not copied.plans
    assert not copy.deepcopy(weight_of("dense", FP32)).plans


def test_explanations_name_everything_that_was_passed_over():
    name, passed_over = explain(weight_of("nf4", BF16), CPU, BF16, 1)
    assert name == UNPACKED
    named = {each for names in passed_over.values() for each in names}
    assert named == {TILES, MMA, FUSED, UNPACK, GEMV, DOT, TRITON, NATIVE, PACKED}
    assert all(passed_over)


@pytest.mark.parametrize(("name", "first"), [("nf4", DOT), ("int4-g64", GEMV)])
def test_a_triton_that_spills_on_tables_multiplies_few_rows_by_dot(machine, name, first):
    machine.setattr("mimo_fast.kernels.matmul.plan.TABLES_FIT", False)
    for variable in ("KERNELS", "EXPERIMENTAL"):
        machine.setenv(f"MIMO_FAST_{variable}", "")
    made = plan(weight_of(name, BF16), GPU, BF16)
    names = [made.at(rows).implementation.name for rows in (0, 1, 4, 5, 64, 65)]
    assert names == [first] * 3 + [DOT] * 2 + [TRITON]


@pytest.mark.parametrize(
    ("parts", "rows", "calls"), [(3, 4, 1), (2, 9, 1), (20, 9, 1), (3, 100, 3)]
)
def test_parts_are_one_product_where_their_order_of_sums_is_that_of_all(
    machine, parts, rows, calls
):
    """Tiles and mma share one; a library's product has none that is known."""
    machine.setenv("MIMO_FAST_EXPERIMENTAL", "1")
    machine.setenv("MIMO_FAST_KERNELS", "")
    made = plan(weight_of("int8", BF16), GPU, BF16)
    called = []

    def run(x, *around):
        called.append(x.shape)
        return x[..., :64]

    steps = (replace(s, implementation=replace(s.implementation, run=run)) for s in made.steps)
    counted = replace(made, steps=tuple(steps))
    x = torch.randn(parts, rows, 256, dtype=BF16)
    assert torch.equal(counted.by_part(x, weight_of("int8", BF16)), x[..., :64])
    assert len(called) == calls
