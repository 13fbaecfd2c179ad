"""From what was said to the first sound of the answer: what is new on that way, on a GPU.

    python -m benchmarks.studies.turns --out benchmarks/results/DATE-turns.json

    encode   recordings of several lengths: kernel by kernel and as a graph; are the codes equal?
    turn     a recording to the hidden state that the reply begins with: codes by way of the host,
             and from graph to graph; launches of the host
    packed   prompts of one bucket one after the other and in one graph; are they equal bit for bit?
    first    first audio and longest gap of a spoken sentence, with exact and elastic look-ahead

Random weights of the published dimensions. Each record is written as it is made; the exit code is 1
where two ways differ that must not. `--preset tiny --device cpu` rehearses it, with graphs that
repeat their work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast.bench.environment import environment
from mimo_fast.bench.schedule import spoken_reply
from mimo_fast.bench.target import Target, user_speech
from mimo_fast.bench.timing import synchronize
from mimo_fast.history import History
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.codec.encoder_graphs import EncoderGraphs, code_frames
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.lm.graphs import PACKED, Graphs, PromptPart, Run
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.runtime.loading import default_device, parse_dtype
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.sampling import DEFAULT_GLOBAL_SAMPLER, DEFAULT_LOCAL_SAMPLER
from mimo_fast.text.prompt import PackedPrompt

SECONDS = (1.0, 2.5, 5.0, 10.0, 15.0)
TURN = 5.0
LENGTHS = (20, 32, 60, 100, 128, 254)
"""Groups of prompts that are packed."""

WORDS, PATCHES = 6, 30
RUNS = 7
LAUNCHING = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")


def repeated(run: Run) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a CUDA graph where there is none."""
    result = run().clone()
    return lambda: (result.copy_(run()), None)[1], result


class Study:
    """One model, with graphs of everything that the ways to be compared need."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device or default_device())
        form = None if args.quantization == "bf16" else args.quantization
        dtype = parse_dtype(args.dtype)
        assert dtype is not None
        self.target = Target.random(args.preset, form, dtype, self.device)
        assert self.target.codec is not None
        self.codec, self.lm = self.target.codec, self.target.lm
        self.capture = None if self.device.type == "cuda" else repeated
        self.engine = Engine(self.lm, max(PACKED), args.capacity)
        self.graphs = self.new_graphs(self.engine.state)
        self.engine.decoder.graphs = self.graphs
        self.encoder = EncoderGraphs(self.codec, self.capture)
        setup = replace(self.target.setup, max_batch=max(PACKED), max_seq_len=args.capacity)
        self.pipeline = Pipeline(self.lm, self.codec, self.target.tokenizer, setup, self.engine)

    def new_graphs(self, state: DecodeState) -> Graphs:
        join = {} if self.capture is None else {"capture": self.capture}
        return Graphs(self.lm, state, **join, prompts=True, packed=True)

    def timed(self, work: Callable[[], object]) -> dict[str, float]:
        """Medians in ms: until the work is done, and until the host may go on."""
        work()
        walls, hosts = list[float](), list[float]()
        for _ in range(RUNS):
            synchronize(self.device)
            began = perf_counter()
            work()
            hosts.append(perf_counter() - began)
            synchronize(self.device)
            walls.append(perf_counter() - began)
        return {
            "ms": round(1e3 * statistics.median(walls), 3),
            "host_ms": round(1e3 * statistics.median(hosts), 3),
        }

    def launches(self, work: Callable[[], object]) -> int | None:
        """What the host asks of the device, without the waits."""
        if self.device.type != "cuda":
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        synchronize(self.device)
        with torch.profiler.profile(activities=activities) as profile:
            work()
            synchronize(self.device)
        events = profile.key_averages()
        return sum(event.count for event in events if event.key.startswith(LAUNCHING))

    def encode(self) -> Iterator[Record]:
        config, channels = self.codec.config, self.lm.config.channels
        began = perf_counter()
        self.encoder.warmup(channels, progress=False)
        yield {"part": "encode", "capture_s": round(perf_counter() - began, 2)}
        for seconds in SECONDS:
            wav = user_speech(seconds)
            self.codec.encoder_graphs = None
            plain = partial(self.codec.encode, wav, channels)
            want = plain()
            found: Record = {"part": "encode", "seconds": seconds, "kernels": self.timed(plain)}
            self.codec.encoder_graphs = self.encoder
            later = partial(self.codec.encode_later, wav, channels)
            pending = later()
            assert pending is not None
            got = pending.on_device()
            found["graph"] = self.timed(later)
            found["launches"] = self.launches(later)
            found["equal_codes"] = round(float((got == want).float().mean()), 5)
            found["equal_first_codebook"] = round(float((got[0] == want[0]).float().mean()), 5)
            frames = code_frames(config, len(wav))
            # 16-bit products are rounded otherwise for another number of rows, so codes may differ
            # where two rows of a codebook are about as near; a wrong mask changes most of them.
            wrong = got.shape != want.shape or got.shape[1] != frames or int(got.min()) < 0
            wrong = wrong or found["equal_first_codebook"] < 0.9
            found["faults"] = ["other codes"] if wrong else []
            yield found

    def turn(self) -> Iterator[Record]:
        wav, pipeline = user_speech(TURN), self.pipeline

        def said(graphs: bool) -> None:
            self.codec.encoder_graphs = self.encoder if graphs else None
            segments = ["<|im_start|>user\n", pipeline.speech_later(wav), "<|im_end|>\n"]
            prompt = pipeline.packed(segments)
            self.graphs.prefill(prompt, 0)

        found: Record = {"part": "turn", "seconds": TURN, "groups": 0}
        hidden = list[Tensor]()
        for name, graphs in (("by the host", False), ("graph to graph", True)):
            work = partial(said, graphs)
            found[name] = {**self.timed(work), "launches": self.launches(work)}
            hidden.append(self.engine.state.hidden[0].float().clone())
            found["groups"] = int(self.engine.state.lengths[0])
        error = (hidden[0] - hidden[1]).abs().max() / hidden[0].abs().max()
        found["difference"] = float(error)
        found["faults"] = [] if bool(hidden[1].isfinite().all()) else ["not finite"]
        yield found

    def packed(self) -> Iterator[Record]:
        lm, size = self.lm, self.lm.config.group_size
        began = perf_counter()
        self.graphs.warmup(progress=False)
        yield {"part": "packed", "capture_s": round(perf_counter() - began, 2)}
        other = lm.new_state([0] * self.engine.state.slots, self.engine.capacity)
        lone = self.new_graphs(other)
        for length in LENGTHS:
            bucket = self.graphs.bucket_of(length)
            for count in (n for n in PACKED if n <= self.graphs.most_packed(bucket)):
                ids = [
                    self.target.filler(length - i)[:, : (length - i) * size] for i in range(count)
                ]
                for i, each in enumerate(ids):
                    each[0, ::size] += i
                parts = [PromptPart(PackedPrompt(each), i, 0) for i, each in enumerate(ids)]

                def one_by_one(graphs: Graphs, parts: list[PromptPart]) -> None:
                    for part in parts:
                        graphs.prefill_parts([part])

                found: Record = {"part": "packed", "groups": length, "prompts": count}
                found["one by one"] = self.timed(partial(one_by_one, self.graphs, parts))
                found["together"] = self.timed(partial(self.graphs.prefill_parts, parts))
                one_by_one(lone, parts)
                states = self.engine.state, other
                same = torch.equal(*(state.hidden[:count] for state in states)) and all(
                    torch.equal(x[:, i, :, : length - i], y[:, i, :, : length - i])
                    for x, y in zip(*(state.cache.parts for state in states), strict=True)
                    for i in range(count)
                )
                found["same_bits"] = same
                found["faults"] = [] if same else ["bits differ"]
                yield found

    def first(self) -> Iterator[Record]:
        target, special = self.target, self.target.tokenizer.special
        plan = spoken_reply(PATCHES, WORDS, target.word_id, self.lm.empty_id, special.eostm)
        target.plan(plan)
        # A model of files has the same, and a warm-up.
        model = object.__new__(MimoAudio)
        model.__dict__.update(
            pipeline=self.pipeline,
            setup=self.pipeline.setup,
            _history=History(),
            device=self.device,
            default_global_sampler=DEFAULT_GLOBAL_SAMPLER,
            default_local_sampler=DEFAULT_LOCAL_SAMPLER,
            task_sampler_configs=self.pipeline.presets,
        )
        ways: list[tuple[str, dict[str, Any]]] = [("exact", {})]
        if "lookahead" in signature(MimoAudio.stream).parameters:
            ways.append(("elastic", {"lookahead": "elastic"}))
        for name, options in ways:
            firsts, gaps = list[float](), list[float]()
            for seed in range(4):
                chunks = list(model.stream("tts", "It works.", seed=seed, **options))
                heard = [chunk.timing.elapsed for chunk in chunks if len(chunk.audio)]
                firsts.append(heard[0])
                gaps.append(max(after - before for before, after in pairwise(heard)))
            yield {
                "part": "first",
                "lookahead": name,
                # The first reply captures what is missing.
                "first_audio_ms": round(1e3 * statistics.median(firsts[1:]), 2),
                "longest_gap_ms": round(1e3 * statistics.median(gaps[1:]), 2),
                "faults": [],
            }


def line(record: Record) -> str:
    return "  ".join(f"{name} {value}" for name, value in record.items())


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--quantization", default="int4", choices=("int4", "int8", "bf16"))
    parser.add_argument("--capacity", type=int, default=512, help="groups of a slot [512]")
    parser.add_argument("--part", nargs="+", default=["encode", "turn", "packed", "first"])
    args = parser.parse_args()
    study = Study(args)

    def records() -> Iterator[Record]:
        for part in args.part:
            with torch.no_grad():
                yield from getattr(study, part)()

    return collect(records(), line, {"environment": environment(study.device)}, args.out)


if __name__ == "__main__":
    sys.exit(main())
