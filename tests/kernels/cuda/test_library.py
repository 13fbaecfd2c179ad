"""The library of CUDA kernels where it cannot be used, and on devices other than the first."""

import ast
import inspect
import re
import runpy
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from emulated import ROOT

from mimo_fast.kernels.cuda import library as cuda
from mimo_fast.kernels.matmul import plan as plans
from mimo_fast.quantization import Format, quantize

TOO_OLD = 35
"""cudaErrorInsufficientDriver."""

NO_CODE = 209
"""cudaErrorNoKernelImageForDevice."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper GPU, as far as the choice of kernels can see."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for cached in (cuda.library, cuda._probe, cuda._runs_on):
        cached.cache_clear()
    yield
    for cached in (cuda.library, cuda._probe, cuda._runs_on):
        getattr(cached, "cache_clear", lambda: None)()


def weight():
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    return quantize(values, Format.parse("int4"))


@pytest.mark.parametrize("error", [TOO_OLD, NO_CODE])
def test_a_device_that_does_not_run_them_gets_triton_and_a_line(card, monkeypatch, error):
    """The driver is older than the library, or the library has no code for the GPU."""
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace())
    monkeypatch.setattr(cuda, "_probe", lambda device: error)
    device = torch.device("cuda", 0)
    assert cuda.refuses(weight(), device, torch.bfloat16) == "this GPU does not run them"
    (line,) = cuda.state().splitlines()
    assert line.endswith(f"; not on gpu 0 (CUDA error {error}), where Triton's take their place")


def test_the_probe_reports_what_a_first_product_returns(card, monkeypatch):
    asked = []

    def product(*arguments):
        asked.append(arguments)
        return TOO_OLD

    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace(mimo_fast_quantized_mma=product))
    assert cuda._probe(torch.device("cpu")) == TOO_OLD
    assert len(asked) == 1
    assert len(asked[0]) == 19


@pytest.mark.parametrize("exists", [False, True])
def test_without_a_library_there_is_a_line(card, monkeypatch, tmp_path, exists):
    """nvcc was missing or too old for every architecture; or the library does not load here."""
    path = tmp_path / "library.so"
    if exists:
        path.write_bytes(b"no shared object")
    monkeypatch.setattr(cuda, "LIBRARY", path)
    cuda.library.cache_clear()
    assert cuda.library() is None
    (line,) = cuda.state().splitlines()
    assert ("does not load" in line) == exists
    assert line.endswith("Triton's take their place")
    reason = cuda.refuses(weight(), torch.device("cuda", 0), torch.bfloat16)
    assert reason == "the CUDA kernels were not built"


@pytest.mark.skipif(plans.dispatch.triton is None, reason="needs Triton")
def test_the_plan_goes_on_to_triton(card, monkeypatch):
    monkeypatch.setattr(cuda, "library", lambda: SimpleNamespace())
    monkeypatch.setattr(cuda, "_probe", lambda device: TOO_OLD)
    monkeypatch.setenv("MIMO_FAST_EXPERIMENTAL", "1")
    monkeypatch.delenv("MIMO_FAST_KERNELS", raising=False)
    setting = plans.Setting(weight(), torch.device("cuda", 0), torch.bfloat16, "", False)
    made = plans.make(setting)
    names = [made.at(rows).implementation.name for rows in (1, 5, 64, 65, 300)]
    dots = ["Triton dot"] * 2
    assert names == ["Triton gemv", *dots, "Triton unpack + mm", "Triton unpack + mm"]


def test_every_launch_is_on_the_device_of_its_tensors():
    """A launch goes to the current device; the one place that launches makes the tensor's so."""
    functions = {
        function.name: function
        for function in ast.parse(inspect.getsource(cuda)).body
        if isinstance(function, ast.FunctionDef)
    }
    called, passed_on = list[str](), set[str]()
    for function in functions.values():
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                called.append(ast.unparse(node.func))
                if called[-1] in ("_launch", "_normed_product"):
                    passed_on.add(function.name)
    asked = [name for name in called if "mimo_fast_" in name]
    assert all(re.search("mimo_fast_.*_(room|choice)", name) for name in asked)
    assert called.count("_launch") == 4
    takers = {"_probe", "quantized_mma", "row_tiles", "quantized_gemm", "unpack"}
    assert passed_on == takers | {"_normed_product"}
    (block,) = (node for node in functions["_launch"].body if isinstance(node, ast.With))
    assert ast.unparse(block.items[0]) == "_current(x)"
    assert "function(" in ast.unparse(block.body[0])


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_a_tensor_is_made_current(monkeypatch, index):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    device = torch.device("cuda", index)
    with cuda._current(SimpleNamespace(is_cuda=True, device=device)):
        assert entered == [device] * index


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """setup.py's command, whose nvcc knows the given architectures; nothing is compiled."""
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.syspath_prepend(ROOT / "csrc")
    import cuda_build
    import ninja_file

    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_build, "BUILD", tmp_path)
    monkeypatch.setattr(ninja_file.NinjaFile, "run", lambda _: False)
    monkeypatch.delenv("MIMO_FAST_CUDA_ARCHITECTURES", raising=False)
    command = object.__new__(runpy.run_path(str(ROOT / "setup.py"))["BuildAll"])

    def run(*known: str) -> None:
        listed = "".join(f"sm_{each}\n" for each in known)
        monkeypatch.setattr(
            cuda_build.subprocess,
            "run",
            lambda *_, **__: subprocess.CompletedProcess([], 0, listed),
        )
        command.inplace = True
        command.build_cuda()

    return run


@pytest.mark.parametrize(
    ("known", "line"),
    [
        (
            ["52", "70", "75"],
            "warning: nvcc compiles for none of the architectures that are wanted",
        ),
        (["75", "80", "90"], "warning: CUDA kernels were not built: Triton's take their place"),
    ],
)
def test_an_nvcc_that_is_too_old_or_fails_is_a_line(set_up, capsys, known, line):
    set_up(*known)
    assert capsys.readouterr().err.splitlines() == [line]
