"""What the persistent engine depends on, measured alone: parts of studies/engine.py.

exchange    microseconds for all blocks to exchange a vector: tagged data, a counter, grid.sync
stream      GB/s of weights through a FIFO in shared memory, by how much is read repeatedly
phases      exchanges while weights stream, as the engine has them
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

Record = Callable[..., None]

MB = 1_000_000
KINDS = ("tagged", "grid.sync + read", "counter + read", "grid.sync alone", "counter alone")

COLUMNS = (1024, 4096, 8192, 32768)
"""Of vectors of 16 bits: one row and eight of the patch decoder's."""

PHASES = 2000


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of csrc/cuda/engine/micro.cu, as far as a library has it."""
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, arguments in (
        ("exchange", [*[integer] * 6, *[pointer] * 4]),
        ("stream", [pointer, number, number, *[integer] * 4, pointer, pointer]),
        ("phases", [pointer, number, pointer, pointer, *[integer] * 7, pointer, pointer]),
    ):
        if hasattr(library, f"mimo_fast_engine_{name}"):
            function = getattr(library, f"mimo_fast_engine_{name}")
            function.argtypes, function.restype = arguments, integer
    return library


def microseconds(run: Callable[[], int], calls: int, rounds: int = 3) -> float:
    """Of a call, the fastest of some rounds, by CUDA events.

    Raises:
        RuntimeError: a launch was refused.
    """
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


class Phases:
    """Phases of csrc/cuda/engine/micro.cu over some weights.

    Args:
        megabytes: of the weights, more than L2 keeps.
    """

    def __init__(self, library: ctypes.CDLL, device: torch.device, megabytes: float = 269) -> None:
        self.library, self.device = library, device
        limits = -(2**31), 2**31 - 1
        count = int(megabytes * MB) // 4
        self.weights = torch.randint(*limits, (count,), dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int32, device=device)

    def run(
        self,
        columns: int,
        parts: int,
        waits: bool = True,
        depth: int = 8,
        blocks: int = 2,
        threads: int = 64,
        phases: int = PHASES,
    ) -> tuple[Callable[[], int], torch.Tensor]:
        """A launch, and what its threads will have summed, int32 [blocks, threads].

        columns: of a vector, four a word. parts: of 1 KB that a warp takes in a phase.
        """
        words = columns // 4
        exchanged = torch.empty(phases, words, 2, dtype=torch.int32, device=self.device)
        result = torch.zeros(blocks, threads, dtype=torch.int32, device=self.device)
        cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if cuda else None

        def launch() -> int:
            return self.library.mimo_fast_engine_phases(
                self.weights.data_ptr(),
                self.weights.nbytes,
                exchanged.data_ptr(),
                self.error.data_ptr(),
                *(words, phases, parts, int(waits), depth, blocks, threads),
                result.data_ptr(),
                stream,
            )

        return launch, result


def phases(library: ctypes.CDLL, record: Record) -> None:
    own = Phases(library, torch.device("cuda"))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    print(
        "us a phase; a warp takes `parts` KB of weights from its queue in each, 1 and 2 in the "
        "patch decoder's int4 and int8; waits: whether blocks exchange"
    )

    def measure(columns: int, parts: int, waits: bool, **how: int) -> None:
        settings = {"depth": 8, "blocks": processors, "threads": 512} | how
        launch, _ = own.run(columns, parts, waits, **settings)
        each = microseconds(launch, 1) / PHASES
        read = parts * settings["blocks"] * settings["threads"] // 32 * 1024
        record(
            columns=columns,
            parts=parts,
            waits=waits,
            **settings,
            us=each,
            GB_s=read / each / 1000,
            stuck=int(own.error),
        )

    cases = [
        *((columns, parts, True, {}) for columns in COLUMNS for parts in (0, 1, 2, 4, 8, 16)),
        *((1024, parts, False, {}) for parts in (0, 1, 2, 4, 8, 16)),
        *((1024, parts, True, {"depth": 4}) for parts in (1, 2, 4)),
        *((1024, parts, True, {"threads": 256}) for parts in (0, 2, 4)),
    ]
    for columns, parts, waits, how in cases:
        attempt(
            record,
            f"phases of {columns} columns, {parts} parts, {how}",
            partial(measure, columns, parts, waits, **how),
        )
