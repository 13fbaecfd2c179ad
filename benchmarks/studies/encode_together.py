"""Several recordings encoded in one call beside one after the other, on a CPU.

    python -m benchmarks.studies.encode_together [--threads 2] [FILE.json]

CPU time of the whole process, the least of several runs of both in turn, for nano's codec (a native
call), nano's in plain torch, and two encoder layers of the published dimensions with random weights
(plain torch). Weights: bytes of the encoder's layers that are read from wherever they lie, which is
a copy to the device where they are in host memory. A difference in any code is a fault.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast.bench.machine import describe_machine
from mimo_fast.bench.synthetic import preset_configs, random_codec
from mimo_fast.kernels.matmul.product import Weight
from mimo_fast.runtime.codec.layers import LayerByLayer
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.network import passes

RUNS = 10

RECORDINGS = {
    "16 of 0.5 s": [0.5] * 16,
    "8 of 2 to 5 s": [2.0, 2.4, 2.9, 3.3, 3.7, 4.1, 4.6, 5.0],
    "4 of 20 s": [20.0] * 4,
}


def codecs() -> Iterator[tuple[str, Codec]]:
    nano = mimo_fast.load("nano", device="cpu").codec
    yield "nano", nano
    plain = copy.copy(nano)
    plain.encoder = replace(nano.encoder)
    plain.encoder.__dict__["executor"] = LayerByLayer(plain.encoder)
    yield "nano in torch", plain
    config = replace(preset_configs("7b")[1], encoder_layers=2, decoder_layers=1, skip_layer=1)
    yield "published, 2 layers", random_codec(config, None, torch.float32)


def layer_bytes(codec: Codec) -> int:
    total = 0
    for layer in codec.encoder.layers:
        for part in (layer.qkv, layer.out, layer.up, layer.down):
            assert isinstance(part, Weight)
            total += part.nbytes
    return total


def timed(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def list_of(encode: Callable[[Tensor], Tensor], waves: list[Tensor]) -> list[Tensor]:
    return [encode(wav) for wav in waves]


def passes_of(codec: Codec, waves: list[Tensor]) -> int:
    rows = [row for mel in map(codec.log_mel, waves) for row in codec.mel_rows(mel, [len(mel)])]
    return sum(1 for _ in passes(rows))


def study() -> Iterator[Record]:
    generator = torch.Generator().manual_seed(0)
    for name, codec in codecs():
        for what, seconds in RECORDINGS.items():
            lengths = [round(each * codec.sample_rate) for each in seconds]
            waves = [0.1 * torch.randn(length, generator=generator) for length in lengths]
            alone, together = list[float](), list[float]()
            for _ in range(RUNS if name.startswith("nano") else 3):
                alone.append(timed(lambda waves=waves, codec=codec: [*map(codec.encode, waves)]))
                together.append(
                    timed(lambda waves=waves, codec=codec: codec.encode_together(waves))
                )
            codes = zip(map(codec.encode, waves), codec.encode_together(waves), strict=True)
            same = all(isinstance(got, Tensor) and torch.equal(want, got) for want, got in codes)
            size = layer_bytes(codec)
            yield {
                "codec": name,
                "recordings": what,
                "ms_alone": round(1e3 * min(alone), 2),
                "ms_together": round(1e3 * min(together), 2),
                "ratio": round(min(alone) / min(together), 3),
                "weights_mb_alone": round(len(waves) * size / 1e6, 1),
                "weights_mb_together": round(passes_of(codec, waves) * size / 1e6, 1),
                "faults": [] if same else ["codes differ"],
            }


def line(record: Record) -> str:
    times = f"alone {record['ms_alone']:8.1f} ms, together {record['ms_together']:8.1f} ms"
    weights = f"{record['weights_mb_alone']:.0f} and {record['weights_mb_together']:.0f} MB"
    wrong = ", WRONG" * bool(record["faults"])
    name = f"{record['codec']:20}{record['recordings']:14}"
    return f"{name} {times} ({record['ratio']:.2f} x), weights {weights}{wrong}"


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = {
        "machine": list(describe_machine()),
        "commit": os.environ.get("COMMIT"),
        "load": os.getloadavg()[0],
        "threads": args.threads,
    }
    with torch.no_grad():
        return collect(study(), line, about, args.output)


if __name__ == "__main__":
    raise SystemExit(main())
