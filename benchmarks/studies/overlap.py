"""In which order should a device get a reply's groups and codec chunks, and who branches?

    python -m benchmarks.studies.overlap -o benchmarks/results/DATE-overlap.json

Ways, each measured with the same random weights, schedules and seeds:

    waits          waits for a chunk's samples, then launches the next group
    overlap        launches the next group, then waits for the samples
    conditional    "waits", with each group as one conditional graph
    both           "overlap" with conditional graphs
    side           "overlap" with the codec on a second stream, which uses idle time of the first

Replies: "tts", 6 words and 30 patches; "cycle", 5 words and 5 patches alternating, which changes
from one to the other 12 times. All ways must give the same tokens; samples are compared as well.

busy is the share of a reply in which the device had work, by events around each piece of work (with
a second stream, the codec's share is counted apart and busy is left out). ms of a step, a patch,
both as one graph, and a codec chunk are the device's own, by the same events; time between them,
such as waiting for the host, is not included.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.studies.common import write
from mimo_fast.bench.environment import environment
from mimo_fast.bench.pipeline import TimedRequest, plan_of, prompt_ids
from mimo_fast.bench.target import Target, user_speech
from mimo_fast.bench.timing import percentile
from mimo_fast.kernels.cuda import graph_conditional
from mimo_fast.kernels.defaults import ENVIRONMENT as EXPERIMENTAL
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.together import Push
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.engine import voicing
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.stream import stream_reply
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.loading import default_device
from mimo_fast.sampling import TASK_SAMPLERS
from mimo_fast.text.tasks import find_task

BEGAN = perf_counter()
CAPACITY = 256
BUDGET = 65.0
"""Seconds after which no measurement starts."""


@dataclass(frozen=True)
class Way:
    name: str
    overlaps: bool
    conditional: bool = False
    side: bool = False


WAYS = (
    Way("waits", overlaps=False),
    Way("overlap", overlaps=True),
    Way("both", overlaps=True, conditional=True),
    Way("side", overlaps=True, side=True),
    Way("conditional", overlaps=False, conditional=True),
)

REPLIES = (("tts", 6, 30, 1), ("cycle", 30, 30, 1), ("tts", 6, 30, 4))
"""Name, words, patches and number of streams, the least important last."""


GROUPS = ("step", "patch", "group")


class Meter:
    """Events around each piece of work that the device is given."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pieces: list[tuple[str, Any, Any]] = []

    def measured(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._cuda:
                return inner(*arguments, **options)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = inner(*arguments, **options)
            end.record()
            self._pieces.append((name, begin, end))
            return result

        return call

    def take(self) -> tuple[float | None, dict[str, list[float]]]:
        """Share of busy time, and ms of each piece by kind, since the last call.

        The share is that of the time from the first group on in which the device had work, None
        without a GPU.
        """
        pieces, self._pieces = self._pieces, []
        spans = defaultdict[str, list[float]](list)
        if not pieces:
            return None, spans
        torch.cuda.synchronize()
        origin = pieces[0][1]
        intervals = []
        for name, begin, end in pieces:
            spans[name].append(begin.elapsed_time(end))
            intervals.append((origin.elapsed_time(begin), origin.elapsed_time(end), name))
        first = min((begin for begin, _, name in intervals if name in GROUPS), default=0.0)
        covered, reached = 0.0, first
        for begin, end, _ in sorted(intervals):
            covered += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return covered / (reached - first) if reached > first else None, spans


class SideStream:
    """Puts the codec's chunks, and the copies of their samples, on a stream of their own."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream()

    def chunks(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(codec: Codec, pushes: Sequence[Push]) -> Any:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                waves = inner(codec, pushes)
                for push in pushes:
                    if push.codes is not None:
                        push.codes.record_stream(self._stream)
            return waves

        return call

    def copy(self, waves: Sequence[Tensor]) -> HostCopy:
        with torch.cuda.stream(self._stream):
            return HostCopy(torch.cat([*waves]).float())


@dataclass
class Heard:
    """One reply: when its chunks came, which brought audio, and what it said."""

    times: list[float] = field(default_factory=list)
    audible: list[bool] = field(default_factory=list)
    first_audio: float | None = None
    tokens: str = ""
    samples: str = ""
    ended: float = 0.0


def answer(target: Target, engine: Engine, request: TimedRequest, seed: int) -> Heard:
    """One request through the runtime's own path."""
    heard, task, began = Heard(), find_task(request.task), perf_counter()
    ids = prompt_ids(target, request)
    sequence = engine.sequence(seed)
    sequence.add(ids)
    preset = TASK_SAMPLERS[task.sampler]
    stops = task.stop_ids(target.tokenizer.special)
    reply = engine.decode(
        sequence,
        Limits(request.words + request.patches + 1, stop_ids=stops),
        Samplers(preset["global"], preset["local"]),
    )
    reader = voicing.ReplyReader(target.tokenizer, speaking=True)
    assert target.codec is not None
    parts = []
    for chunk in stream_reply(reply, reader, target.codec, began):
        heard.times.append(perf_counter() - began)
        heard.audible.append(len(chunk.audio) > 0)
        heard.first_audio = chunk.timing.first_audio
        parts.append(chunk.audio)
    heard.ended = perf_counter() - began
    heard.tokens, heard.samples = digest(sequence.ids), digest(torch.cat(parts))
    return heard


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def together(target: Target, engine: Engine, request: TimedRequest, count: int) -> list[Heard]:
    """So many of them at once, each in a thread."""
    if count == 1:
        return [answer(target, engine, request, 0)]
    heard: dict[int, Heard] = {}
    gate = threading.Barrier(count)

    def run(seed: int) -> None:
        gate.wait()
        heard[seed] = answer(target, engine, request, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(heard) < count:
        raise RuntimeError("a reply failed; its error is printed above")
    return [heard[seed] for seed in range(count)]


@contextmanager
def instrumented(meter: Meter, side: SideStream | None) -> Iterator[None]:
    """Work is metered and, with a stream for it, the codec's put there."""
    with (
        patch.object(Graphs, "step", meter.measured("step", Graphs.step)),
        patch.object(Graphs, "patch", meter.measured("patch", Graphs.patch)),
        patch.object(Graphs, "group", meter.measured("group", Graphs.group)),
        patch.object(LM, "prefill_together", meter.measured("prompt", LM.prefill_together)),
        patch.object(Codec, "advance", _chunks(meter, side, Codec.advance)),
        patch.object(voicing, "to_host", voicing.to_host if side is None else side.copy),
    ):
        yield


def _chunks(meter: Meter, side: SideStream | None, inner: Callable[..., Any]) -> Callable[..., Any]:
    if side is not None:
        return side.chunks(inner)
    return meter.measured("codec", inner)


def summary(rounds: list[list[Heard]], walls: list[float]) -> dict[str, Any]:
    """What listeners had; seconds."""
    replies = [heard for some in rounds for heard in some]
    gaps = [after - before for heard in replies for before, after in pairwise(heard.times)]
    audible = [
        after - before
        for heard in replies
        for (before, _), (after, sounds) in pairwise(zip(heard.times, heard.audible, strict=True))
        # The last chunk flushes the codec, which is no group.
        if sounds and after != heard.times[-1]
    ]
    firsts = [heard.first_audio for heard in replies if heard.first_audio is not None]
    return {
        "chunk_p50": percentile(gaps, 0.5),
        "audio_chunk_p50": percentile(audible, 0.5) if audible else None,
        "audio_chunk_p95": percentile(audible, 0.95) if audible else None,
        "first_audio": percentile(firsts, 0.5) if firsts else None,
        "wall": percentile(walls, 0.5),
        "tokens": [heard.tokens for heard in rounds[0]],
        "samples": [heard.samples for heard in rounds[0]],
    }


def line(record: dict[str, Any]) -> str:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{1e3 * value:.2f}"

    pieces = ", ".join(
        f"{name} {piece['ms']:.2f} ms x {piece['n']}" for name, piece in record["pieces"].items()
    )
    busy = "-" if record["busy"] is None else f"{100 * record['busy']:.1f}%"
    return (
        f"{record['reply']:<6}{record['streams']} x {record['way']:<12}"
        f"audio chunk p50 {ms(record['audio_chunk_p50'])} p95 {ms(record['audio_chunk_p95'])} ms, "
        f"first audio {ms(record['first_audio'])}, reply {ms(record['wall'])}, busy {busy}; "
        f"{pieces}; at {record['at']:.1f} s"
    )


def engine_of(target: Target, conditional: bool) -> Engine | None:
    """An engine whose groups are conditional graphs, or not; None where they cannot be."""
    os.environ[EXPERIMENTAL] = str(int(conditional))
    engine = Engine(target.lm, target.setup.max_batch, CAPACITY)
    engine.warmup(progress=False)
    graphs = engine.decoder.graphs
    return None if conditional and (graphs is None or not graphs.conditional) else engine


def study(options: argparse.Namespace, began: float) -> dict[str, Any]:
    device = torch.device(options.device or default_device())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantization = None if options.quantization == "none" else options.quantization
    target = Target.random(options.preset, quantization, dtype, device).sized(4, CAPACITY)
    assert target.codec is not None
    print(f"weights at {perf_counter() - began:.1f} s", flush=True)
    target.codec.warmup(4, progress=False)
    result: dict[str, Any] = {
        "kind": "overlap",
        "preset": options.preset,
        "quantization": options.quantization,
        "random_weights": True,
        "conditional_available": graph_conditional.available(),
        "environment": environment(device),
        "records": [],
        "left_out": [],
    }
    engines: dict[bool, Engine | None] = {}
    for name, words, patches, count in REPLIES:
        request = TimedRequest("tts", user_speech(1.0), words, patches)
        target.plan(plan_of(target, request))
        for way in WAYS:
            label = f"{name} {count} x {way.name}"
            if way.conditional not in engines:
                engines[way.conditional] = engine_of(target, way.conditional)
                print(f"graphs at {perf_counter() - began:.1f} s", flush=True)
            engine = engines[way.conditional]
            impossible = engine is None or (way.side and device.type != "cuda")
            if engine is None or impossible or perf_counter() - began > options.budget:
                result["left_out"].append(label)
                print(f"left out: {label}", flush=True)
                continue
            engine.overlaps = way.overlaps
            record: dict[str, Any] = {"reply": name, "streams": count, "way": way.name}
            record |= measured(target, engine, request, count, way, options.rounds)
            record["at"] = perf_counter() - began
            result["records"].append(record)
            print(line(record), flush=True)
            write(options.output, result)
    result["equal"] = equality(result["records"])
    print(f"equal to the first way: {result['equal']}", flush=True)
    write(options.output, result)
    return result


def measured(
    target: Target, engine: Engine, request: TimedRequest, count: int, way: Way, rounds: int
) -> dict[str, Any]:
    """One way of one kind of reply, after one that is not counted."""
    meter, heard, walls = Meter(target.lm.device), list[list[Heard]](), list[float]()
    busy, pieces = list[float](), defaultdict[str, list[float]](list)
    with instrumented(meter, SideStream() if way.side else None):
        together(target, engine, request, count)
        meter.take()
        for _ in range(rounds):
            start = perf_counter()
            heard.append(together(target, engine, request, count))
            walls.append(perf_counter() - start)
            share, spans = meter.take()
            busy += [share] if share is not None else []
            for name, values in spans.items():
                pieces[name] += values
    kinds = {
        name: {"ms": percentile(values, 0.5), "n": len(values)} for name, values in pieces.items()
    }
    known = busy and not way.side
    return summary(heard, walls) | {
        "busy": percentile(busy, 0.5) if known else None,
        "pieces": kinds,
    }


def equality(records: list[dict[str, Any]]) -> dict[str, dict[str, bool]]:
    """Whether each way's tokens and samples are those of the first that was measured."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    equal: dict[str, dict[str, bool]] = {}
    for record in records:
        reference = first.setdefault((record["reply"], record["streams"]), record)
        label = f"{record['reply']} {record['streams']} x {record['way']}"
        equal[label] = {key: record[key] == reference[key] for key in ("tokens", "samples")}
    return equal


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="7b", choices=("tiny", "7b"))
    parser.add_argument("--quantization", default="int4", help="or none, int8, nf4")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return study(parser.parse_args(arguments), BEGAN if arguments is None else perf_counter())


if __name__ == "__main__":
    main()
