"""Compiles every kernel configuration for every supported GPU generation, without a GPU.

python -m benchmarks.compile_matrix > docs/kernels.md
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mimo_fast.kernels
from benchmarks.launches import section
from mimo_fast.kernels.dispatch import HAS_PDL, PDL_CAPABILITY, Case, PdlTrigger

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 99 * 1024


@dataclass(frozen=True)
class Compiled:
    """Properties of compiled code.

    Registers a thread, spilled bytes, shared memory, widest global load, any TF32; numbers of PDL
    waits (`griddepcontrol.wait`) and triggers (`griddepcontrol.launch_dependents`).
    """

    registers: int
    spilled: int
    shared: int
    load_bits: int
    tf32: bool
    waits: int
    triggers: int
    ptx: str


def cases() -> Iterator[Case]:
    """The cases of every kernel file."""
    for module in pkgutil.walk_packages(mimo_fast.kernels.__path__, "mimo_fast.kernels."):
        found = importlib.import_module(module.name)
        yield from getattr(found, "compile_cases", tuple)()


def compile_case(case: Case, architecture: int, trigger: PdlTrigger = PdlTrigger.FIRST) -> Compiled:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [
        name
        for name, kind in case.signature.items()
        if kind[0] in "*i" and name not in case.unaligned
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    constexprs = dict(case.constexprs)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    if "PDL" in names:
        early = HAS_PDL and architecture >= 10 * PDL_CAPABILITY
        constexprs["PDL"] = int(trigger if early else PdlTrigger.OFF)
        options |= {"launch_pdl": True} if early and trigger & PdlTrigger.NONE else {}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (_cuobjdump(file.name, option) for option in ("-sass", "-res-usage"))
    ptx = kernel.asm["ptx"]
    loads = re.findall(r"LDG\.E(?:\.\w+)*", sass) + re.findall(r"LDGSTS\.E(?:\.\w+)*", sass)
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        # Spilled registers go to local memory.
        spilled=int(re.search(r"LOCAL:(\d+)", usage)[1])
        + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=kernel.metadata.shared,
        load_bits=max((_width(load) for load in loads), default=0),
        tf32=".tf32" in ptx,
        waits=ptx.count("griddepcontrol.wait"),
        triggers=ptx.count("griddepcontrol.launch_dependents"),
        ptx=ptx,
    )


def _width(load: str) -> int:
    return int(found[1]) if (found := re.search(r"\.(64|128)\b", load)) else 32


def compile_cuda(source: Path, architecture: int) -> dict[str, tuple[int, int, int]]:
    """Registers a thread, bytes of local and of shared memory of every kernel of a CUDA file."""
    usage = _of_cuda(source, architecture, "-res-usage")
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return {
        _kernel_name(name): (int(registers), int(local), int(shared))
        for name, registers, local, shared in found
    }


def wrong_descriptors(source: Path, architecture: int) -> dict[str, list[str]]:
    """Instructions of a CUDA file's kernels that no GPU executes: the descriptor of an access to
    memory is a pair of uniform registers, the first of them even, and ptxas 13.0 has written others
    (`cp_async` in csrc/cuda/warp.cuh)."""
    return {
        name: found
        for name, text in cuda_assembly(source, architecture)
        if (found := re.findall(r"\*/\s+(.*desc\[UR\d*[13579]\].*?) *;", text))
    }


def cuda_assembly(source: Path, architecture: int) -> Iterator[tuple[str, str]]:
    """The machine instructions of every kernel of a CUDA file, by nvcc."""
    for text in _of_cuda(source, architecture, "-sass").split("Function : ")[1:]:
        yield _kernel_name(text.split(None, 1)[0]), text


def _of_cuda(source: Path, architecture: int, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(_nvcc(source, architecture))
        file.flush()
        return _cuobjdump(file.name, option)


@cache
def _nvcc(source: Path, architecture: int) -> bytes:
    """A cubin."""
    flags = ["-O3", "-std=c++17", f"-I{source.parent}", f"-arch=sm_{architecture}", "-cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        subprocess.run(["nvcc", *flags, source, "-o", file.name], check=True)
        return Path(file.name).read_bytes()


def _kernel_name(mangled: str) -> str:
    """Name of a kernel: its activations' type and its template's integers follow."""
    name = re.search(r"\d_([a-z_]+)_cu_", mangled)[1]
    types = re.findall(r"\d(Bfloat16|Float16)", mangled)[:1]
    return " ".join([name, *types, *re.findall(r"L[ib](\d+)E", mangled)])


def _cuobjdump(cubin: str, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


INTRODUCTION = f"""# Kernels

Generated by `python -m benchmarks.compile_matrix > docs/kernels.md`: the launches of a layer, from
the shapes of the published model and the bytes that each op's file counts; then each op's docstring
and its configurations, compiled with Triton {triton.__version__} for every GPU generation. A cell
is registers a thread, bytes of shared memory, and bits of the widest global load; a configuration
that spills says so. The kernels of csrc/cuda come last.
"""

CUDA = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))


def main() -> None:
    print(INTRODUCTION)
    print(section())
    for module in pkgutil.walk_packages(mimo_fast.kernels.__path__, "mimo_fast.kernels."):
        kernels = importlib.import_module(module.name)
        own = list(getattr(kernels, "compile_cases", tuple)())
        if not own:
            continue
        print(f"## {module.name}\n\n```\n{(kernels.__doc__ or '').strip()}\n```\n")
        print("| configuration | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
        print("|---" * (len(ARCHITECTURES) + 1) + "|")
        for case in own:
            row = [compile_case(case, architecture) for architecture in ARCHITECTURES]
            cells = (
                f"{c.registers}, {c.shared}, {c.load_bits}" + ", SPILLS" * (c.spilled > 0)
                for c in row
            )
            print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)
        print()
    for source in CUDA:
        _print_cuda(source)


def _print_cuda(source: Path) -> None:
    essay = re.match(r"(?://.*\n)+", source.read_text(encoding="utf-8"))[0]
    print(
        f"## csrc/cuda/{source.name}\n\n```\n" + re.sub(r"(?m)^// ?", "", essay).strip() + "\n```\n"
    )
    columns = [compile_cuda(source, architecture) for architecture in ARCHITECTURES]
    print(
        "| template | "
        + " | ".join(f"sm_{a}" for a in ARCHITECTURES)
        + " |\n"
        + "|---" * (len(columns) + 1)
        + "|"
    )
    for name in sorted(columns[0]):
        cells = (f"{c[name][0]}, {c[name][2]}" + ", SPILLS" * (c[name][1] > 0) for c in columns)
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
