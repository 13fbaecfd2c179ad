"""End to end: steady-state groups by batch and context, whole requests by task and batch.

    python -m benchmarks e2e --preset tiny 7b --quantization bf16 int8 int4 \\
        -o benchmarks/results/DATE-e2e.jsonl
    python -m benchmarks e2e --model DIR --codec DIR --quantization stored int4

Presets get random weights, made on the device, and replies with a fixed schedule of text and
speech, which the record has. A floor is the bytes to read over this machine's measured read
bandwidth, or the time of the arithmetic where that is longer. It is printed before each
measurement; `of floor` is floor over measured time, 100% being as fast as the machine allows.
Rows that do not fit into memory, or cannot end within --limit, are skipped by name.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks.columns import COLUMNS, Table
from benchmarks.records import JsonLines, add_run_options, machine_fields
from mimo_fast.bench.ceiling import ceiling, name_of
from mimo_fast.bench.floor import GroupWork
from mimo_fast.bench.groups import SETTLING, GroupTimes, time_groups
from mimo_fast.bench.machine import useful_threads
from mimo_fast.bench.pipeline import PROMPTS, TimedRequest, measure, prompt_ids
from mimo_fast.bench.target import Target, user_speech
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.runtime.loading import default_device, parse_dtype
from mimo_fast.text.tasks import find_task

Result = TypeVar("Result")

QUANTIZATIONS = ("bf16", "int8", "int4", "nf4", "stored")
PARTS = ("prefill", "text_group", "audio_group")


class Sweep:
    """One invocation, and what it has found.

    excess: seconds by which a group of the present model last exceeded its floor; used to estimate
    the next row.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device or default_device())
        self.machine, self.output = ceiling(self.device), JsonLines(args.output)
        self.excess = 0.0
        self.skipped: list[str] = []
        self.failed: list[str] = []

    def run(self) -> None:
        """All models, one after the other."""
        threads = torch.get_num_threads()
        for about, make in self.models():
            title = f"{Path(about['model']).name} {about['quantization']}"
            doing = "making it" if about["random_weights"] else "loading it"
            target = self.attempt(title, 0, 0, doing, make)
            if target is None:
                continue
            self.excess = 0.0
            if self.device.type == "cpu" and not self.args.threads:
                torch.set_num_threads(threads)
                torch.set_num_threads(useful_threads(target.lm.config))
            about["dtype"] = name_of(target.lm.dtype)
            self.steady_state(title, about, target)
            self.requests(title, about, target)
            del target
            release(self.device)

    def models(self) -> Iterator[tuple[dict[str, Any], Callable[[], Target]]]:
        """Each model of the sweep: its description, and what makes it."""
        args, dtype = self.args, parse_dtype(self.args.dtype)
        names = [str(args.model)] if args.model else args.preset
        for name, form in product(names, args.quantization):
            about = {
                "model": name,
                "quantization": form,
                "random_weights": args.model is None,
                "steered": args.model is None or args.steer,
                "with_codec": not args.no_codec,
            }
            chosen = None if form in ("bf16", "stored") else form
            if args.model:
                wanted = None if form == "stored" else dtype
                pair = (args.model, args.codec, chosen, wanted, self.device, args.steer)
                yield about, partial(Target.load, *pair)
            elif form != "stored":
                made = (name, chosen, dtype, self.device, not args.no_codec)
                yield about, partial(Target.random, *made)

    def attempt(
        self, name: str, floor: float, groups: float, about: str, work: Callable[[], Result]
    ) -> Result | None:
        """Announces a row and measures it.

        None where it would take too long, does not fit into memory, or fails.

        Args:
            floor, groups: least seconds that it takes, and how many groups are decoded in them.
        """
        expected = floor + groups * self.excess
        if expected > self.args.limit:
            limit = f"more than --limit {self.args.limit:g}"
            self.skip(name, f"it would take {expected:,.0f} s, {limit}")
            return None
        say(f"{name}: {about}")
        try:
            return work()
        except (DeviceMemoryError, torch.OutOfMemoryError) as error:
            self.skip(name, str(error).partition("\n")[0])
        except Exception as error:
            # The other rows are still measured.
            self.failed.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            release(self.device)
        return None

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        self.output.append({"kind": "skipped", "name": name, "reason": reason})

    def record(self, kind: str, table: Table | None, fields: dict[str, Any]) -> Table:
        """Writes a record and its row, the first of a table with the table's head."""
        record = {"kind": kind, **fields, **machine_fields(self.machine, self.device)}
        self.output.append(record)
        table = table or Table(COLUMNS[kind])
        table.row(record)
        return table

    def steady_state(self, title: str, about: dict[str, Any], target: Target) -> None:
        """Groups of words and of speech, by context and batch."""
        args, table = self.args, None
        for context, batch in product(args.context, args.batch):
            name = f"{title}, groups at batch {batch}, context {context}"
            context = min(context, target.lm.config.max_positions)
            prompt = context - args.groups - SETTLING
            if prompt < 1:
                self.skip(name, f"{args.groups} groups do not fit into it")
                continue
            work = GroupWork.of(target.lm, batch, prompt, args.groups, target.quantized_cache)
            floors = work.floors(self.machine)
            count = args.groups + SETTLING
            times = self.attempt(
                name,
                floors[0] + count * (floors[1] + floors[2]),
                2 * count,
                work.describe(self.machine),
                lambda batch=batch, context=context, prompt=prompt: time_groups(
                    target.sized(batch, context), batch, prompt, args.groups
                ),
            )
            if times is None:
                continue
            self.excess = times.audio.p50 - floors[2]
            seconds = times.prefill, times.text.p50, times.audio.p50
            shares = (floor / spent for floor, spent in zip(floors, seconds, strict=True))
            counts = {"batch": batch, "prompt_groups": prompt, "groups": args.groups}
            results = {
                "audio_rtf": times.audio.p50 / target.patch_seconds,
                "bytes": work.audio.bytes,
                "cached_bytes": work.audio.cached,
                "of_floor": dict(zip(PARTS, shares, strict=True)),
            }
            fields = about | {"steered": True} | counts | group_fields(times, floors) | results
            table = self.record("groups", table, fields)

    def requests(self, title: str, about: dict[str, Any], target: Target) -> None:
        """Whole requests, by batch and task."""
        args, table, audio = self.args, None, user_speech(self.args.seconds, self.args.audio)
        asked = []
        for task, context in product(args.task, args.prompt or [None]):
            patches, cut = args.patches if find_task(task).speaks else 0, context is not None
            asked.append(TimedRequest(task, audio, args.words, patches, context or 0, cut=cut))
        size = target.lm.config.group_size
        prompts = [prompt_ids(target, request).shape[1] // size for request in asked]
        capacity = max(prompts, default=0) + args.words + args.patches + 2
        rooms: dict[int, Target] = {}

        def room(batch: int) -> Target:
            """Makes the engine that serves all tasks of a batch size.

            That of the last batch is freed before memory is checked for the next.
            """
            if batch not in rooms:
                rooms.clear()
                release(self.device)
                rooms[batch] = target.sized(batch, capacity)
            return rooms[batch]

        for batch, (request, prompt) in product(args.batch, zip(asked, prompts, strict=True)):
            words, patches = request.words, request.patches
            floor = target.request_floor(self.machine, batch, prompt, words, patches)
            what = f"{prompt} groups of prompt, {words} words, {patches} patches"
            metrics = self.attempt(
                f"{title}, {batch} x {request.task} after {prompt} groups",
                floor * args.rounds,
                args.rounds * (words + patches),
                f"floor of {what}: {floor:.3f} s",
                lambda batch=batch, request=request: measure(
                    room(batch), request, batch, args.rounds
                ),
            )
            if metrics is None:
                continue
            if not target.steered:
                counts = (metrics.text_groups, metrics.audio_groups)
                said = (count / metrics.requests for count in counts)
                floor = target.request_floor(self.machine, batch, prompt, *said)
            share = floor / metrics.e2el.p50 if metrics.e2el else None
            fields = {"input_seconds": args.seconds, "floor": floor, "of_floor": share}
            table = self.record("request", table, about | asdict(metrics) | fields)


def group_fields(times: GroupTimes, floors: tuple[float, float, float]) -> dict[str, Any]:
    """The fields of a record about groups: their times and floors."""
    measured = (times.prefill, vars(times.text), vars(times.audio))
    return dict(zip(PARTS, measured, strict=True)) | {
        "floor": dict(zip(PARTS, floors, strict=True))
    }


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def release(device: torch.device) -> None:
    """Frees unused memory before the next size is checked against what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def add_options(add: Callable[..., object]) -> None:
    formats = f"{', '.join(QUANTIZATIONS)} (as --model is stored) [bf16 int8 int4]"
    steered = "with --model: replies on a schedule, as with random weights"
    prompt = "of each request: filled up with words in front, or cut there [the task's own]"
    limit = "seconds that a row may take, as far as can be told before [%(default)g]"
    several = {"type": int, "nargs": "+"}
    add("--preset", nargs="+", default=["tiny", "7b"], choices=("tiny", "7b"))
    add("--model", help="directory or hub id of a language model, in place of presets")
    add("--codec", help="directory or hub id of its codec")
    add("--steer", action="store_true", help=steered)
    given = {"choices": QUANTIZATIONS, "metavar": "FORMAT", "help": formats}
    add("--quantization", nargs="+", default=["bf16", "int8", "int4"], **given)
    add("--dtype", default="bfloat16", help="of activations and dense weights")
    add("--no-codec", action="store_true", help="leave audio out: no first audio, no underruns")
    add("--batch", default=[1, 4, 16, 64], **several)
    contexts = {"default": [256, 2048, 8192], "help": "groups, for the steady state"}
    add("--context", type=int, nargs="*", **contexts)
    tasks = {"choices": [*PROMPTS], "metavar": "TASK", "help": f"{', '.join(PROMPTS)} [all]"}
    add("--task", nargs="*", default=[*PROMPTS], **tasks)
    add("--prompt", type=int, nargs="*", default=[], metavar="GROUPS", help=prompt)
    add("--groups", type=int, default=24, help="timed in the steady state")
    add("--words", type=int, default=12, help="of a reply")
    add("--patches", type=int, default=25, help="of 160 ms, of a spoken reply")
    add("--seconds", type=float, default=3.0, help="of the user's speech")
    add("--audio", type=Path, help="a recording of it [noise]")
    add("--rounds", type=int, default=1, help="of each batch of requests")
    add("--limit", type=float, default=120.0, help=limit)
    add_run_options(add, each="row")


def run(args: argparse.Namespace) -> int:
    if bool(args.model) != bool(args.codec):
        raise ValueError("--model and --codec go together")
    counts = [args.groups, args.words, args.patches, args.rounds]
    if min([*args.batch, *args.context, *args.prompt, *counts]) < 1:
        what = "batches, contexts, prompts, groups, words, patches and rounds"
        raise ValueError(f"{what} must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    sweep = Sweep(args)
    print(sweep.machine, flush=True)
    sweep.run()
    for line in sweep.skipped:
        say(f"skipped {line}")
    for line in sweep.failed:
        say(f"FAILED {line}")
    return 1 if sweep.failed else 0
