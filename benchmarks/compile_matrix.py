"""Compiles every kernel configuration for every supported GPU generation, with no GPU, and reads what came out.

    python -m benchmarks.compile_matrix        prints the table of docs/kernels.md
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import mimo_fast.kernels
from mimo_fast.kernels.dispatch import Case

ARCHITECTURES = (80, 86, 89, 90, 120)
SHARED_LIMIT = 99 * 1024


@dataclass(frozen=True)
class Compiled:
    """What the assembler made: registers a thread, spilled bytes, shared memory, widest global load, any TF32."""

    registers: int
    spilled: int
    shared: int
    load_bits: int
    tf32: bool


def cases() -> Iterator[Case]:
    """The cases of every kernel file."""
    for module in pkgutil.iter_modules(mimo_fast.kernels.__path__):
        found = importlib.import_module(f"mimo_fast.kernels.{module.name}")
        yield from getattr(found, "compile_cases", tuple)()


def compile_case(case: Case, architecture: int) -> Compiled:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [name for name, kind in case.signature.items() if kind[0] in "*i" and name not in case.unaligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    sass = _cuobjdump(kernel.asm["cubin"], "-sass")
    usage = _cuobjdump(kernel.asm["cubin"], "-res-usage")
    loads = re.findall(r"LDG\.E(?:\.\w+)*", sass) + re.findall(r"LDGSTS\.E(?:\.\w+)*", sass)
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        # What does not fit into registers goes to local memory.
        spilled=int(re.search(r"LOCAL:(\d+)", usage)[1]) + len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=kernel.metadata.shared,
        load_bits=max((_width(load) for load in loads), default=0),
        tf32=".tf32" in kernel.asm["ptx"],
    )


def _width(load: str) -> int:
    return int(found[1]) if (found := re.search(r"\.(64|128)\b", load)) else 32


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    print("| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
    print("|---" * (len(ARCHITECTURES) + 1) + "|")
    for case in cases():
        row = [compile_case(case, architecture) for architecture in ARCHITECTURES]
        cells = (f"{c.registers} reg, {c.shared} B, {c.load_bits} bit" for c in row)
        print(f"| {case.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
