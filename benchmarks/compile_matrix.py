"""Compiles every kernel configuration for every supported GPU generation, without a GPU.

python -m benchmarks.compile_matrix > docs/kernels.md
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mimo_fast.kernels
from benchmarks.launches import plain_table, section
from mimo_fast.kernels.dispatch import HAS_PDL, PDL_CAPABILITY, Case, PdlTrigger

ARCHITECTURES = (80, 86, 89, 90, 120)
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
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


def kernel_modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(mimo_fast.kernels.__path__, "mimo_fast.kernels."):
        yield importlib.import_module(module.name)


def cases() -> Iterator[Case]:
    """The cases of every kernel file."""
    for module in kernel_modules():
        yield from getattr(module, "compile_cases", tuple)()


def compile_case(case: Case, architecture: int, trigger: PdlTrigger = PdlTrigger.FIRST) -> Compiled:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [
        name
        for name, kind in case.signature.items()
        if kind[0] in "*i" and name not in case.unaligned
    ]
    # In the form of a launch, so that what is compiled here is found in Triton's cache there.
    attributes = {
        (i,): [["tt.divisibility", 16]] if name in divisible else []
        for i, name in enumerate(names)
        if case.signature.get(name) != "fp32"
    }
    constexprs = dict(case.constexprs)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    if "PDL" in names:
        early = HAS_PDL and architecture >= 10 * PDL_CAPABILITY
        constexprs["PDL"] = int(trigger if early else PdlTrigger.OFF)
        options |= {"launch_pdl": True} if early and trigger & PdlTrigger.NONE else {}
    source = ASTSource(case.kernel, signature, constexprs, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    sass, usage = (_cuobjdump(kernel.asm["cubin"], option) for option in ("-sass", "-res-usage"))
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
    usage = _cuobjdump(cubin(source, architecture), "-res-usage")
    found = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return {_kernel_name(name): tuple(map(int, numbers)) for name, *numbers in found}


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
    code = _cuobjdump(cubin(source, architecture), "-sass")
    for text in code.split("Function : ")[1:]:
        yield _kernel_name(text.split(None, 1)[0]), text


def cubin(source: Path, architecture: int) -> bytes:
    """A CUDA file compiled for an architecture."""
    flags = ["-O3", "-std=c++17", f"-I{source.parent}", f"-arch=sm_{architecture}", "-cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        subprocess.run(["nvcc", *flags, source, "-o", file.name], check=True)
        return Path(file.name).read_bytes()


def _kernel_name(mangled: str) -> str:
    """Name of a kernel: its activations' type and its template's numbers follow."""
    length, rest = re.search(r"_cu_[0-9a-f]{8}(\d+)(\w+)", mangled).groups()
    name = rest[: int(length)]
    types = re.findall(r"\d(Bfloat16|Float16)", mangled)[:1]
    return " ".join([name, *types, *re.findall(r"L(?:[ib]|NS_\d+[A-Za-z]+E)(\d+)E", mangled)])


def _cuobjdump(code: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


INTRODUCTION = f"""# Kernels

Generated by `python -m benchmarks.compile_matrix > docs/kernels.md`: the launches of a layer, from
the shapes of the published model and the bytes that each op's file counts; then each op's docstring
and its configurations, compiled with Triton {triton.__version__} for every GPU generation. A cell
is registers a thread, bytes of shared memory, and bits of the widest global load; a configuration
that spills says so. The kernels of csrc/cuda come last.
"""

CUDA = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))


def section_of(
    name: str,
    essay: str,
    kind: str,
    rows: Iterable[list[str]],
    architectures: Sequence[int] = ARCHITECTURES,
) -> str:
    """A file's docstring and the table of its configurations or templates; Markdown."""
    heads = [kind, *(f"sm_{architecture}" for architecture in architectures)]
    return f"## {name}\n\n```\n{essay.strip()}\n```\n\n{plain_table(heads, [*rows])}\n"


def cell(*numbers: int, spills: bool) -> str:
    return ", ".join(map(str, numbers)) + ", SPILLS" * spills


def main() -> None:
    print(INTRODUCTION)
    print(section())
    for module in kernel_modules():
        own = getattr(module, "compile_cases", tuple)()
        compiled = ((c.name, [compile_case(c, sm) for sm in ARCHITECTURES]) for c in own)
        rows = [
            [name, *(cell(c.registers, c.shared, c.load_bits, spills=c.spilled > 0) for c in row)]
            for name, row in compiled
        ]
        if rows:
            print(
                section_of(module.__name__, module.__doc__ or "", "configuration", rows), flush=True
            )
    for source in CUDA:
        print(cuda_section(source))


def cuda_section(source: Path) -> str:
    """`section_of` a file of csrc/cuda."""
    found = re.match(r"(?://.*\n)+", source.read_text(encoding="utf-8"))
    essay = re.sub(r"(?m)^// ?", "", found[0] if found else "")
    columns = [compile_cuda(source, architecture) for architecture in CUDA_ARCHITECTURES]
    rows = [
        [name, *(cell(*c[name][::2], spills=c[name][1] > 0) for c in columns)]
        for name in sorted(columns[0])
    ]
    return section_of(f"csrc/cuda/{source.name}", essay, "template", rows, CUDA_ARCHITECTURES)


if __name__ == "__main__":
    main()
