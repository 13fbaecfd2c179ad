"""Triton's cache as archives, so that another machine need not compile its kernels again.

    python -m benchmarks.kernel_cache pack FOLDER      writes FOLDER/kernels-0.tar.gz and so on
    python -m benchmarks.kernel_cache unpack FOLDER    keeps existing entries
    python -m benchmarks.kernel_cache compile 90 120   fills the cache without a GPU, for sm_90 and
                                                       sm_120

The cache is that of TRITON_CACHE_DIR, which must be the same path on both machines: an entry names
its files by absolute paths. Intermediate forms of a kernel (Triton's and LLVM's code, PTX) are not
needed to run it; those files must exist, and are packed empty.

Without a GPU the configurations of the kernels' `compile_cases` are compiled, those of the
published dimensions; what a launch specializes otherwise is compiled on the other machine.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

BY_WAY = (".ttir", ".ttgir", ".llir", ".ptx", ".source")
PART_BYTES = 15 * 2**20
"""Bytes of one archive; transfers between machines are often limited to 16 MiB a file."""


def pack(cache: Path, folder: Path, limit: int = PART_BYTES) -> list[Path]:
    """Writes the archives, each of `limit` bytes at most where no file exceeds it; returns them."""
    for old in folder.glob("kernels-*.tar.gz"):
        old.unlink()
    written, used = list[Path](), limit
    with ExitStack() as stack:
        for path in sorted(path for path in cache.rglob("*") if path.is_file()):
            content = b"" if path.suffix in BY_WAY else path.read_bytes()
            # An incompressible entry, its header and the archive's end must still fit.
            if used + len(content) + 2**16 > limit:
                stack.close()
                written.append(folder / f"kernels-{len(written)}.tar.gz")
                file = stack.enter_context(written[-1].open("wb"))
                archive = stack.enter_context(
                    tarfile.open(fileobj=file, mode="w:gz", compresslevel=6)
                )
            entry = tarfile.TarInfo(str(path.relative_to(cache)))
            entry.size, entry.mode = len(content), path.stat().st_mode
            archive.addfile(entry, io.BytesIO(content))
            used = file.tell()
    return written


def unpack(folder: Path, cache: Path) -> int:
    """Adds the archives' entries to a cache; returns the number of new files."""
    added = 0
    for path in sorted(folder.glob("kernels-*.tar.gz")):
        with tarfile.open(path) as archive:
            for entry in archive:
                if not (cache / entry.name).exists():
                    archive.extract(entry, cache, filter="data")
                    added += 1
    return added


def compile_for(architectures: Sequence[int]) -> int:
    """Compiles every case for GPUs of these architectures into the cache; returns how many."""
    from benchmarks.compile_matrix import cases, compile_case

    done = 0
    for architecture in architectures:
        for case in cases():
            compile_case(case, architecture)
            done += 1
            print(f"sm_{architecture} {case.name}", flush=True)
    return done


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        print(f"{compile_for([int(each) for each in sys.argv[2:]])} kernels")
        sys.exit()
    triton, there = Path(os.environ["TRITON_CACHE_DIR"]), Path(sys.argv[2])
    if sys.argv[1] == "unpack":
        print(f"{unpack(there, triton)} files of compiled kernels from {there}")
    else:
        for part in pack(triton, there):
            print(f"{part.name}: {part.stat().st_size / 1e6:.1f} MB")
