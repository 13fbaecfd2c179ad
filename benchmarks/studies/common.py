"""What the studies share: CUDA graphs and their time, command lines, files of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """With a study's docstring as it stands for a description."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def card() -> Record:
    return {"device": torch.cuda.get_device_name(0), "torch": torch.__version__}


def write(path: Path | None, found: object) -> None:
    """As JSON, where there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def collect(
    records: Iterable[Record], line: Callable[[Record], str], about: Record, out: Path | None
) -> int:
    """Prints each record as it comes and writes all so far; 1 where one of them has faults."""
    found: list[Record] = []
    for record in records:
        found.append(record)
        print(line(record), flush=True)
        write(out, {**about, "records": found})
    return int(any(record.get("faults") for record in found))


def median_replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Microseconds on the current stream, after one replay that is not timed."""
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[replays // 2]


def microseconds(launches: Sequence[Callable[[], Any]], replays: int = 3) -> float:
    """Of a launch, in a graph of all of them; the median of several replays."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches[0]()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        return median_replay(graph, replays) / len(launches)
