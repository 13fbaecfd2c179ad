"""Native calls of the small pair over many rows: CPU time a row, and the share of the arithmetic.

    python -m benchmarks.studies.small_rows [--threads 1] [--rows 1 4 16 48] [FILE.json]

Layers are those of the backbone and of the patch decoder over rows that attend to themselves alone,
so that products are nearly all of it; their GFLOP/s are of the products, beside those of a square
product of torch in the same run. A step, a patch and the codec's chunk of a stream (a patch of it,
with what is pending) are as a server computes them. Time is CPU time of the whole process, which
other programs disturb less than wall time; the least of several runs.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mimo_fast
from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast import MimoAudio
from mimo_fast.bench.machine import describe_machine
from mimo_fast.kernels.cpu import library as native
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.runtime.codec.together import Push
from mimo_fast.runtime.lm.executor import _native
from mimo_fast.runtime.lm.transformer import TransformerWeights
from mimo_fast.sampling import MiMoSampler, sampler_tensors

RUNS = 20
POSITIONS = 150
"""Of a row of the backbone before the step."""


def least(call: Callable[[], Any]) -> float:
    """Seconds of CPU time."""
    times = []
    for _ in range(RUNS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def weights(stack: TransformerWeights) -> int:
    """Number of weights of its matrices."""
    total = 0
    for layer in stack.layers:
        for part in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert isinstance(part, Weight)
            total += sum(block.numel() for block in part.blocks)
    return total


def layers(model: MimoAudio, rows: int) -> Iterator[tuple[str, float, float]]:
    """Name, seconds and FLOP."""
    lm, config = model.lm, model.lm.config
    for name, stack, sizes, table in (
        ("backbone layers", lm.backbone, config.backbone, lm.backbone_rope),
        ("patch decoder layers", lm.patch_decoder, config.patch_decoder, lm.decoder_rope),
    ):
        fused, x = _native(stack, sizes, table), torch.randn(rows, 1, sizes.dim)
        assert fused is not None
        seconds = least(partial(fused.encode, x, causal=True))
        yield name, seconds, 2.0 * rows * weights(stack)


def calls(model: MimoAudio, rows: int) -> Iterator[tuple[str, float, float]]:
    """Name and seconds of what a server computes of so many rows."""
    lm, slots = model.lm, torch.arange(rows)
    state = lm.new_state([0] * rows, POSITIONS + 1)
    for part in state.cache.parts:
        part.zero_()
    state.text[:] = lm.empty_id
    settings = sampler_tensors([MiMoSampler(True, 0.9, top_p=0.95)] * rows)

    def step() -> None:
        state.lengths[slots] = POSITIONS
        lm.step(state, slots)

    yield "step", least(step), 0
    local = lm.local_hidden(state.hidden[slots])
    yield "patch", least(lambda: lm.decode_patch(local, state, slots, settings)), 0
    codec = model.codec
    size = lm.config.channels, lm.config.group_size
    streams = [codec.stream(lookahead=1, again=0) for _ in range(rows)]

    def chunk() -> None:
        pushes = [Push(each, torch.randint(128, size)) for each in streams]
        for found in codec.advance(pushes):
            assert isinstance(found, torch.Tensor), found

    chunk()
    yield "codec chunk", least(chunk), 0


def study(rows: list[int]) -> Iterator[Record]:
    model = mimo_fast.load("nano", device="cpu")
    # As `bench.ceiling` measures it, but by CPU time, as the rest is.
    square = torch.randn(1024, 1024)
    ceiling = 2.0 * 1024**3 / least(lambda: square @ square)
    with torch.no_grad(), native.one_thread():
        for count in rows:
            for found in (layers, calls):
                for name, seconds, flop in found(model, count):
                    rate = flop / seconds if flop else None
                    yield {
                        "what": name,
                        "rows": count,
                        "us_a_row": round(seconds / count * 1e6, 1),
                        "gflops": rate and round(rate / 1e9, 1),
                        "share": rate and round(rate / ceiling, 3),
                    }


def line(record: Record) -> str:
    rate = ""
    if record["gflops"]:
        rate = f"{record['gflops']:8.1f} GFLOP/s, {record['share']:.0%} of a square product's"
    return f"{record['what']:22}{record['rows']:4} rows{record['us_a_row']:10.1f} us a row{rate}"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 48])
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {
        "machine": list(describe_machine()),
        "commit": os.environ.get("COMMIT"),
        "load": os.getloadavg()[0],
        "threads": args.threads,
    }
    return collect(study(args.rows), line, about, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
