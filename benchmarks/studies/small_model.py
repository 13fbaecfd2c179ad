"""CPU time of speech from a small pair, through the public API: a group, the first audio.

    python -m benchmarks.studies.small_model LM CODEC [--threads 1] [--quantization int8]
        [--patches 60] [FILE.json]

Words and patches alternate by fives, whatever the weights say. Time is CPU time of all threads of
the process, which other programs disturb less than wall time; the least of several runs. FILE.json
collects one record a call.
"""

import argparse
import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import mimo_fast
from benchmarks.studies.common import parser_of, write
from mimo_fast import MimoAudio
from mimo_fast.bench.machine import describe_machine
from mimo_fast.bench.schedule import ScheduledLM, spoken_reply

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests."
RUNS = 3


def prepare(args: argparse.Namespace) -> MimoAudio:
    model = MimoAudio(args.lm, args.codec, "cpu", quantization=args.quantization)
    special = model.tokenizer.special
    words = min(len(model.tokenizer.encode(TEXT)), args.patches)
    plan = spoken_reply(
        args.patches, words, model.tokenizer.encode("a")[0], special.empty, special.eostm
    )
    model.lm = ScheduledLM.of(model.lm, len(plan))
    model.lm.follow(plan)
    return model


def measure(model: MimoAudio, groups: int) -> dict[str, float]:
    """Milliseconds of one reply: to its first chunk, to the first audio, and of later audio chunks.

    The last is their median.
    """
    began, spent, audible = time.process_time(), [], []
    for chunk in model.stream("tts", TEXT, seed=1, max_new_tokens=groups, min_new_tokens=groups):
        spent.append((time.process_time() - began) * 1e3)
        audible.append(len(chunk.audio) > 0)
    first = audible.index(True)
    costs = [now - before for before, now in pairwise(spent)]
    # The last chunk ends the stream.
    steady = [
        cost for cost, heard in zip(costs[first:-1], audible[first + 1 : -1], strict=True) if heard
    ]
    return {
        "first_chunk_ms": spent[0],
        "first_audio_ms": spent[first],
        "patch_ms": statistics.median(steady),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    model = prepare(args)
    groups = len(model.lm.schedule) - 1
    measure(model, groups)
    runs = [measure(model, groups) for _ in range(RUNS)]
    least = {name: round(min(each[name] for each in runs), 2) for name in runs[0]}
    return {
        "machine": list(describe_machine()),
        "commit": os.environ.get("COMMIT"),
        "load": os.getloadavg()[0],
        "lm": Path(args.lm).name,
        "quantization": args.quantization or "float32",
        "threads": args.threads or f"torch's own {torch.get_num_threads()}",
        "patches": args.patches,
        "cpu": least,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("lm")
    parser.add_argument("codec")
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization")
    parser.add_argument("--patches", type=int, default=60)
    args = parser.parse_args()
    record = run(args)
    print(mimo_fast.__version__, record["quantization"], record["threads"], record["cpu"])
    if args.output:
        records = json.loads(args.output.read_text()) if args.output.exists() else []
        write(args.output, [*records, record])


if __name__ == "__main__":
    main()
