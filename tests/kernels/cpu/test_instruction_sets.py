"""The CPU kernels of every instruction set that this machine has: alone against double precision,
beside each other, and how one is chosen; and the build, which compiles what has changed."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import exclusive

from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.sample import gumbel

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "csrc"), str(ROOT / "tests" / "kernels" / "cpu")]

import ninja_file  # noqa: E402
import run_kernels  # noqa: E402
from ninja_file import NinjaFile  # noqa: E402

needs_native = pytest.mark.skipif(
    not native.available(), reason=f"the native kernels are {native.state()}"
)
needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or run_kernels.default_compiler() is None,
    reason="there is no C++ compiler",
)
needs_ninja = pytest.mark.skipif(ninja_file.ninja_program() is None, reason="there is no ninja")

RESULTS = """
import sys, torch
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.quantized_weight import QuantizedWeight, pack_words
from mimo_fast.sampling import MiMoSampler, sampler_tensors
g = torch.Generator().manual_seed(0)
products = {}
for bits, group in ((4, 64), (4, 128), (8, 32), (8, 64), (8, 128)):
    q = torch.randint(2**bits, (33, 1280), generator=g)
    scales = torch.rand(33, 1280 // group, generator=g).bfloat16()
    weight = QuantizedWeight(pack_words(q, bits, group), scales, scales.half(), None, bits)
    products[bits, group] = native.quantized_matmul(torch.randn(5, 1280, generator=g), weight)
index, logits = torch.arange(50), torch.randn(50, 999, generator=g) * 4
settings = sampler_tensors([MiMoSampler(True, 0.9, 40, 0.95)] * 50)
drawn = {
    "noise": native.gumbel(5, 6, 7, 8, 5000),
    "ids": native.sample_text(logits, settings, index, index, None, 0),
}
torch.save((native.compiled().instruction_set(), products, drawn), sys.argv[1])
"""


def in_set(name: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MIMO_FAST_CPU": name, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The test program and the kernels' objects."""
    machine = os.uname().machine
    if machine not in run_kernels.SETS:
        pytest.skip(f"no kernels for {machine}")
    compiler = run_kernels.default_compiler()
    assert compiler is not None
    with exclusive(tmp_path_factory, "kernels_test"):
        built = run_kernels.build(machine, compiler)
    assert built is not None
    return built


@pytest.mark.slow
@needs_compiler
@needs_ninja
def test_every_set_against_double_precision(program):
    """tests/kernels/cpu/kernels_test.cpp, which `make aarch64` runs for the other machine."""
    run = subprocess.run([program[0]], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    tested = re.findall(r"^(\w+): \d+ checks, 0 failed$", run.stdout, re.MULTILINE)
    assert tested[-1] == "portable"
    if native.available():
        assert tested == native.compiled().instruction_sets()


@pytest.mark.slow
@needs_compiler
@needs_ninja
def test_sets_share_no_function(program):
    """The linker keeps one copy of a template or inline function: it could be the one with
    instructions that the CPU lacks."""
    shared, own = [], 0
    for path in program[1]:
        name = path.parent.name
        if name not in run_kernels.SETS[os.uname().machine]:
            continue
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for line in symbols.stdout.splitlines():
            kind, symbol = re.fullmatch(r"\S* +(\S) (.*)", line.rstrip()).groups()
            own += kind == "T" and f"mimo_fast::{name}::" in symbol
            weak = kind in "WVui" and f"mimo_fast::{name}::" not in symbol
            # What calls the handler of exceptions is a pointer, not code.
            if weak and not line.startswith(" ") and not symbol.startswith("DW.ref."):
                shared.append((name, symbol))
    assert own
    assert not shared


@needs_native
def test_sets_agree(tmp_path):
    """Sums of integers and draws to the bit; sums in float32 to their rounding."""
    found = {}
    for name in native.compiled().instruction_sets():
        run = in_set(name, RESULTS, str(tmp_path / name))
        assert run.returncode == 0, run.stderr
        used, products, drawn = torch.load(tmp_path / name)
        assert used == name
        found[name] = products, drawn
    plain = found["portable"]
    for name, (products, drawn) in found.items():
        assert all(torch.equal(drawn[key], plain[1][key]) for key in drawn)
        for key, y in products.items():
            torch.testing.assert_close(y, plain[0][key], rtol=1e-5, atol=1e-3)
            if name in ("avx2", "avx512"):
                # Both round products and sums at once, in one order.
                assert torch.equal(y, found["avx2"][0][key])


def test_the_checksum_of_the_noise_is_the_references():
    """By which kernels_test.cpp, where there is no Python, knows that draws are those of here."""
    checksum = 0xCBF29CE484222325
    for seed in (0, 7, -1, 1 << 40):
        for count in (1, 63, 64, 65, 3001):
            ids = torch.arange(514, 514 + count)
            noise = gumbel(torch.tensor([seed]), torch.tensor([5]), torch.tensor([2]), ids)[0]
            for (bits,) in struct.iter_unpack("=I", noise.numpy().tobytes()):
                checksum = (checksum ^ bits) * 0x100000001B3 % 2**64
    source = (ROOT / "tests" / "kernels" / "cpu" / "kernels_test.cpp").read_text(encoding="utf-8")
    assert f"CHECKSUM = 0x{checksum:X};" in source


@needs_native
def test_a_set_that_is_not_there_is_an_error():
    for name in ("mmx", "neon" if os.uname().machine == "x86_64" else "avx2"):
        run = in_set(name, "import mimo_fast.kernels.cpu.library")
        assert run.returncode == 1
        assert f"ImportError: MIMO_FAST_CPU={name}: this CPU runs" in run.stderr
        assert "portable" in run.stderr


@needs_native
def test_info_tells_the_set():
    run = in_set("portable", "from mimo_fast.kernels.cpu import library; print(library.state())")
    assert "by portable (" in run.stdout


@needs_ninja
def test_a_touched_file_rebuilds_itself_alone(tmp_path, capfd):
    def build() -> list[str]:
        ninja = NinjaFile(tmp_path / "out")
        ninja.rule("copy", "cp $in $out", "COPY $out")
        ninja.rule("join", "cat $in > $out", "JOIN $out")
        parts = [ninja.edge(f"{name}.o", "copy", [tmp_path / name]) for name in ("a b", "c")]
        ninja.edge("all", "join", parts, target=True)
        assert ninja.run()
        return re.findall(r"(COPY|JOIN) (.*)$", capfd.readouterr().out, re.MULTILINE)

    (tmp_path / "a b").write_text("1\n", encoding="utf-8")
    (tmp_path / "c").write_text("2\n", encoding="utf-8")
    assert len(build()) == 3
    assert (tmp_path / "out" / "all").read_text(encoding="utf-8") == "1\n2\n"
    assert build() == []
    (tmp_path / "c").write_text("3\n", encoding="utf-8")
    os.utime(tmp_path / "c", (2**31, 2**31))
    assert [name for _, name in build()] == ["c.o", "all"]


@needs_ninja
def test_a_build_that_fails_says_so(tmp_path, monkeypatch):
    ninja = NinjaFile(tmp_path)
    ninja.rule("fail", "false", "FAIL")
    ninja.edge("x", "fail", [], target=True)
    assert not ninja.run()
    monkeypatch.setattr(ninja_file, "ninja_program", lambda: None)
    assert not ninja.run()


@needs_native
@pytest.mark.parametrize("what", ["no compiler", "a broken compiler", "no ninja"])
def test_it_goes_on_without(tmp_path, what):
    """setup.py of a copy: no kernels, no error."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "mimo_fast").mkdir()
    (tmp_path / "mimo_fast" / "__init__.py").write_text('__version__ = "1"', encoding="utf-8")
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "PYTHONPATH": ""}
    environment.pop("CXX", None)
    if what != "no compiler":
        environment["CXX"] = "false"
    if what == "no ninja":
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "ninja.py").write_text("raise ImportError", encoding="utf-8")
        environment["PYTHONPATH"] = str(blocked)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "plain torch take" in run.stdout + run.stderr
    assert not list((tmp_path / "mimo_fast").glob("_native*.so"))
