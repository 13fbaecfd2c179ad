"""Measures on a GPU what a persistent engine (csrc/cuda/engine) depends on.

    python -m benchmarks.studies.engine

    exchange    microseconds for all blocks to exchange a vector: tagged data, a counter, grid.sync
    stream      GB/s of weights through a FIFO in shared memory, by how much is read repeatedly
    int8, int4  the persistent patch decoder at the published dimensions: error against a reference,
                time by settings, clocks by phase

Needs torch and, unless a library is given, nvcc. Each part is a process with a time limit, so a
part that fails does not stop the others; all start at once and measure one after the other. Prints
while it measures and writes one JSON file, also when parts have failed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.studies.common import parser_of, write

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = Path(__file__).with_name("libengine.so")
ARCHITECTURES = ("80", "90", "120")
LIMITS = {"exchange": 25, "stream": 25, "int8": 40, "int4": 40}
"""Seconds."""

DIM, FFN, LAYERS, STEPS = 1024, 4096, 16, 11
DEPTH = 4
"""Units of weights that a thread asks for ahead."""

PATCHES = 2000
SIZES = (1025, 1025, *[129] * 6)
"""Of the channels' codes."""
MB = 1_000_000
KINDS = ("tagged", "grid.sync + read", "counter + read", "grid.sync alone", "counter alone")

Record = Callable[..., None]


def build(target: Path, architectures: tuple[str, ...]) -> None:
    """Compiles csrc/cuda/engine for these compute capabilities."""
    codes = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in architectures]
    command = [
        "nvcc",
        "-O3",
        "-std=c++17",
        "-shared",
        "-cudart=static",
        "--threads=0",
        "-Xcompiler=-fPIC",
        "-DFEW_DEPTHS",
    ]
    command += [f"-I{SOURCES}", f"-I{SOURCES / 'engine'}", *codes, "-o", str(target)]
    subprocess.run([*command, *map(str, sorted((SOURCES / "engine").glob("*.cu")))], check=True)


def microseconds(run: Callable[[], int], calls: int, rounds: int = 3) -> float:
    """Of a call, the fastest of some rounds, by CUDA events.

    Raises:
        RuntimeError: a launch was refused.
    """
    import torch

    times = []
    for i in range(rounds + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls if i else 1):
            error = run()
            if error:
                raise RuntimeError(f"CUDA error {error}")
        end.record()
        end.synchronize()
        if i:
            times.append(start.elapsed_time(end) * 1000 / calls)
    return min(times)


def attempt(record: Record, what: str, part: Callable[[], None]) -> None:
    """Runs a part of a part; a failure is recorded and the next goes on."""
    try:
        part()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        record(what=what, failed=repr(error))


def exchange(library: ctypes.CDLL, record: Record) -> None:
    import torch

    iterations = 4000
    buffers = torch.zeros(8 * 1024, 4, dtype=torch.int32, device="cuda")
    words = torch.zeros(64, dtype=torch.int32, device="cuda")
    result = torch.zeros(256, dtype=torch.int32, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    whole = [(0, chunks, chunks) for chunks in (147, 512, 586, 1024)]
    parts = [(0, 512, 256), (0, 586, 293), (0, 1024, 512), (0, 1024, 256)]
    barriers = [(1, 147, 147), (1, 586, 586), (2, 147, 147), (2, 586, 586), (3, 1, 1), (4, 1, 1)]
    print("us an exchange; pieces of 16 bytes (7 bfloat16): 147 hold a vector of 1024, 586 of 4096")

    def measure(kind: int, chunks: int, reads: int, blocks: int, threads: int) -> None:
        def run() -> int:
            words.zero_()
            buffers.zero_()
            return library.mimo_fast_engine_exchange(
                kind,
                blocks,
                threads,
                chunks,
                reads,
                iterations,
                buffers.data_ptr(),
                words.data_ptr(),
                result.data_ptr(),
                stream,
            )

        each = microseconds(run, 1) / iterations
        record(
            kind=KINDS[kind],
            blocks=blocks,
            threads=threads,
            pieces=chunks,
            read=reads,
            us=each,
            stuck=int(words[0].item()),
        )

    sizes = [(2, 512), *((blocks, threads) for blocks in (64, 128, 132) for threads in (256, 512))]
    for blocks, threads in sizes:
        for kind, chunks, reads in [*whole, *(parts if blocks > 2 else []), *barriers]:
            attempt(
                record,
                f"{KINDS[kind]} {blocks} x {threads}",
                partial(measure, kind, chunks, reads, blocks, threads),
            )


def stream(library: ctypes.CDLL, record: Record) -> None:
    import torch

    weights = torch.randint(-(2**31), 2**31 - 1, (300 * MB // 4,), dtype=torch.int32, device="cuda")
    result = torch.zeros(264 * 512, dtype=torch.int32, device="cuda")
    at = torch.cuda.current_stream().cuda_stream

    def measure(megabytes: int, keep: int, depth: int, blocks: int, threads: int) -> None:
        passes = max(2, 3000 // megabytes)
        # As many pieces of 2048 bytes for every warp.
        turn = blocks * threads // 32 * 2048
        size = round(megabytes * MB / turn) * turn
        arguments = (size, keep * MB if keep >= 0 else -1, passes, depth, blocks, threads)

        def run() -> int:
            return library.mimo_fast_engine_stream(
                weights.data_ptr(), *arguments, result.data_ptr(), at
            )

        def part() -> None:
            each = microseconds(run, 1) / passes
            record(
                megabytes=size / MB,
                keep=keep,
                depth=depth,
                blocks=blocks,
                threads=threads,
                us_a_pass=each,
                GB_s=size / each / 1000,
            )

        attempt(record, f"stream of {megabytes} MB", part)

    print(
        "GB/s of weights read repeatedly; keep: MB that L2 is told to keep, -1 for no hint; "
        "depth 0: through registers"
    )
    for depth, threads in ((0, 512), (1, 512), (2, 512), (4, 256), (4, 512), (6, 512)):
        for blocks in (128, 132):
            measure(269, -1, depth, blocks, threads)
    for megabytes in (10, 20, 30, 40, 50, 60, 80, 100, 140):
        measure(megabytes, -1, 4, 128, 512)
        measure(megabytes, 0, 4, 128, 512)
    for megabytes in (143, 269):
        for keep in (0, 8, 16, 24, 32, 40):
            measure(megabytes, keep, 4, 128, 512)


def decoder(library: ctypes.CDLL, record: Record, bits: int) -> None:
    import torch

    from .engine_model import PHASES, TIMES, Decoder, random_heads, random_model, reference

    model = random_model(DIM, FFN, LAYERS, bits, grouped=bits == 4, zeros=bits == 4, device="cuda")
    inputs = torch.randn(
        STEPS, DIM, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
    ).bfloat16()
    patch = Decoder(library, model, STEPS)
    at = torch.cuda.current_stream().cuda_stream

    def run(**settings: object) -> int:
        return patch.run(inputs, **({"blocks": 128, "stream": at} | settings))

    def result(**settings: object) -> torch.Tensor:
        patch.hidden.fill_(torch.nan)
        patch.cache.fill_(torch.nan)
        error = run(**settings)
        torch.cuda.synchronize()
        vain = patch.waited_in_vain()
        if error or vain:
            raise RuntimeError(f"CUDA error {error}, blocks waited in vain: {vain}")
        return patch.hidden[:STEPS].clone()

    first = None

    def correct() -> None:
        nonlocal first
        first = result()
        wide = first.float()
        for rounded in (True, False):
            want = reference(model, inputs, rounded)
            worst = (wide - want).abs().max() / want.abs().max()
            record(
                check=f"against the reference, {'rounded alike' if rounded else 'float32'}",
                worst_of_max=worst.item(),
                rms=((wide - want).norm() / want.norm()).item(),
                by_step=[float(x) for x in (wide - want).norm(dim=1) / want.norm(dim=1)],
                nan=int(wide.isnan().sum()),
            )

    def alike() -> None:
        for blocks, threads in ((128, 512), (127, 512), (100, 256), (64, 512), (33, 512)):
            same = torch.equal(result(blocks=blocks, threads=threads), first)
            record(check="the same bits by other blocks", blocks=blocks, threads=threads, same=same)

    attempt(record, "correctness", correct)
    attempt(record, "other blocks", alike)

    heads = random_heads(DIM, SIZES, noisy=True, device="cuda")
    whole = Decoder(library, model, STEPS, heads)

    def draws() -> None:
        for _ in range(2):
            whole.codes.fill_(-1)
            error = whole.run(inputs, 128, stream=at)
            torch.cuda.synchronize()
        wanted = heads.inputs(inputs[0], whole.codes)
        want = reference(model, wanted, rounded=True)
        got = whole.hidden[:STEPS].float()
        regret = heads.regret(want, whole.codes)
        record(
            check="codes drawn within",
            error=error,
            waited_in_vain=whole.waited_in_vain(),
            hidden_rms=((got - want).norm() / want.norm()).item(),
            regret_most=regret.max().item(),
            regret_share=(regret > 0).float().mean().item(),
            codes=whole.codes.tolist(),
        )
        each = microseconds(lambda: whole.run(inputs, 128, depth=DEPTH, stream=at), 10)
        record(
            bits=bits,
            with_heads=True,
            depth=DEPTH,
            us_a_patch=each,
            us_a_layer=each / STEPS / LAYERS,
        )

    attempt(record, "draws", draws)

    def measure(settings: dict[str, int]) -> None:
        each = microseconds(lambda: run(**settings), 10)
        usual = {"blocks": 128, "threads": 512, "depth": 4, "keep": -1, "pause": 0, "without": 0}
        record(
            bits=bits,
            **usual | settings,
            us_a_patch=each,
            us_a_layer=each / STEPS / LAYERS,
            GB_s=patch.nbytes * STEPS / each / 1000,
            waited_in_vain=patch.waited_in_vain(),
        )

    def timed() -> None:
        for settings in (
            {"depth": DEPTH},
            *({"depth": DEPTH, "pause": pause} for pause in (20, 100, 300)),
            {"depth": DEPTH, "threads": 256},
            *({"depth": 4, "blocks": blocks} for blocks in (64, 96)),
            *({"depth": DEPTH, "without": without} for without in (1, 2, 3, 4, 6, 7)),
        ):
            attempt(record, f"time with {settings}", lambda settings=settings: measure(settings))
        record(bytes_a_step=patch.nbytes, floor_us_at_3120_GB_s=patch.nbytes * STEPS / 3.12e6)

    print(
        "without (the results are then wrong): 1 waiting for data, 2 copies of weights, "
        "4 reads of earlier keys and values"
    )
    attempt(record, "time", timed)

    def clocks() -> None:
        counted = torch.zeros(128, len(PHASES), len(TIMES), dtype=torch.int64, device="cuda")
        for _ in range(2):
            whole.run(inputs, 128, depth=DEPTH, clocks=counted, stream=at)
        torch.cuda.synchronize()
        each = counted.double() / STEPS
        each[:, :4] /= LAYERS
        for i, phase in enumerate(PHASES):
            for j, name in enumerate(TIMES):
                values = each[:, i, j]
                record(
                    phase=phase,
                    time=name,
                    clocks_mean=values.mean().item(),
                    clocks_least=values.min().item(),
                    clocks_most=values.max().item(),
                )

    attempt(record, "clocks", clocks)

    def soak() -> None:
        assert first is not None
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        start = time.perf_counter()
        for _ in range(PATCHES):
            run(depth=DEPTH)
            wrong += (patch.hidden[:STEPS] != first).any()
        torch.cuda.synchronize()
        record(
            check=f"{PATCHES} patches in a row",
            different=int(wrong),
            waited_in_vain=patch.waited_in_vain(),
            us_a_patch_with_check=(time.perf_counter() - start) / PATCHES * 1e6,
        )

    attempt(record, "soak", soak)

    # Last, since L2 goes on to keep what it was told to.
    for keep in (0, 1, 2, 3, 4, 6):
        settings = {"depth": DEPTH, "keep": keep}
        attempt(record, f"time with {settings}", lambda settings=settings: measure(settings))


def child(part: str, target: Path) -> None:
    """One part: imports first, measures when told to."""
    import torch

    from .engine_model import declared

    library = declared(ctypes.CDLL(str(target)))
    torch.zeros(1, device="cuda")
    print("ready", flush=True)
    sys.stdin.readline()

    def record(**values: object) -> None:
        print("RECORD " + json.dumps(values), flush=True)

    device = torch.cuda.get_device_properties(0)
    record(
        device=device.name,
        processors=device.multi_processor_count,
        l2_bytes=getattr(device, "L2_cache_size", None),
    )

    parts = {"exchange": exchange, "stream": stream}
    bits = {"int8": 8, "int4": 4}
    attempt(
        record,
        part,
        lambda: (
            parts[part](library, record) if part in parts else decoder(library, record, bits[part])
        ),
    )


def shown(values: dict[str, object]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="built if it is not there")
    parser.add_argument("--build", action="store_true", help="builds the library and ends")
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build or not arguments.library.exists():
        build(arguments.library, ARCHITECTURES)
    if arguments.build:
        return 0
    try:
        ctypes.CDLL(str(arguments.library))
    except OSError as error:
        arguments.library = Path(tempfile.mkdtemp()) / "libengine.so"
        print(f"built here, since {error}")
        build(arguments.library, ("90",))
    if arguments.child:
        child(arguments.child, arguments.library)
        return 0
    command = [
        sys.executable,
        "-u",
        "-m",
        "benchmarks.studies.engine",
        "--library",
        str(arguments.library),
        "--child",
    ]
    children = {
        part: subprocess.Popen(
            [*command, part],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for part in arguments.parts
    }
    results: dict[str, object] = {}
    failed = False
    begin = time.perf_counter()
    for part, process in children.items():
        print(f"== {part}", flush=True)
        records: list[dict[str, object]] = []
        results[part] = records
        timer = threading.Timer(LIMITS[part], process.kill)
        timer.start()
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write("go\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("RECORD "):
                    records.append(json.loads(line[7:]))
                    print(shown(records[-1]), flush=True)
                else:
                    print(line, end="", flush=True)
        except BrokenPipeError:
            pass
        code = process.wait()
        timer.cancel()
        failed |= code != 0 or any("failed" in each for each in records)
        print(
            f"== {part}: exit {code}, {time.perf_counter() - begin:.1f} s since the start",
            flush=True,
        )
        results[part + " exit"] = code
        write(arguments.out, results)
    print(f"written: {arguments.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
