"""A spoken reply as upstream runs the model and as we do: same weights, same prompt, same run.

Each baseline must first agree with us: on a tiny float32 model in every greedy token, then on the
measured model, at every text token and code, with our tokens as its input. In float32 every choice
must be ours. In 16 bits two orders of summation may decide a near-tie differently: a choice that is
not ours passes if the baseline's score of our token is within TIES of its best, relative to its
largest score. The record has how many were equal, and how far the worst was. A baseline that does
not agree is refused: no speed is printed, and the exit code is 1.

All tokens are greedy; text and speech follow one schedule. A baseline's audio is decoded after its
last token, ours as it comes.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.columns import BASELINES, Table
from benchmarks.harness import Refused
from benchmarks.records import JsonLines, add_run_options, machine_fields
from mimo_fast.bench.ceiling import Ceiling, ceiling, name_of
from mimo_fast.bench.floor import GroupWork
from mimo_fast.bench.groups import GroupTimes, time_groups
from mimo_fast.bench.machine import useful_threads
from mimo_fast.bench.meters import EnergyMeter, PeakMemory
from mimo_fast.bench.pipeline import (
    Metrics,
    TimedRequest,
    Trace,
    measure,
    plan_of,
    prompt_ids,
    summarize,
)
from mimo_fast.bench.target import Target, user_speech
from mimo_fast.bench.timing import CallTime, synchronize
from mimo_fast.runtime.lm.decode import Group, Limits, Samplers
from mimo_fast.runtime.loading import default_device, parse_dtype
from mimo_fast.sampling import GREEDY

if TYPE_CHECKING:
    from benchmarks.upstream import Upstream

TRANSFORMERS = 5
"""Major version of transformers, whose modules the baselines are made of."""

CHECKED_GROUPS = 6

TIES = {torch.float32: 0.0, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Largest gap of a tie, relative to the largest score.

The best and the second best of 1,000 random scores are 7% apart in the median; a random choice is
100% off.
"""


@dataclass(frozen=True)
class Agreement:
    """Number of choices compared, how many were ours, and the largest gap of the others.

    The gap is relative to the largest score.
    """

    choices: int
    equal: int
    worst_gap: float
    bound: float

    def __str__(self) -> str:
        if self.equal == self.choices:
            return f"all {self.choices} greedy choices equal ours"
        return (
            f"{self.equal} of {self.choices} greedy choices equal ours, the others are ties: "
            f"within {100 * self.worst_gap:.2f}% of the largest score (bound {100 * self.bound:g}%)"
        )


class Judge:
    """Takes our tokens one after the other and compares them with the best by the scores."""

    def __init__(self, tokens: Iterator[int | None]) -> None:
        self._tokens = tokens
        self.choices = self.equal = 0
        self.worst_gap = 0.0

    def __call__(self, scores: Tensor) -> int:
        best, ours = int(scores.argmax()), next(self._tokens)
        if ours is None:
            return best
        self.choices += 1
        self.equal += best == ours
        allowed = scores[scores != -torch.inf].float()
        gap = float((scores[best].float() - scores[ours].float()) / allowed.abs().max())
        # NaN is kept.
        if gap > self.worst_gap or gap != gap:
            self.worst_gap = gap
        return ours


def agreement(target: Target, baseline: Upstream, ids: Tensor, groups: int) -> Agreement:
    """Compares the text tokens of a reply that runs freely, and the codes of one that only speaks.

    Args:
        ids: a prompt [C + 1, T G]; the target must have room for it and the groups.

    Raises:
        Refused: a token is neither equal nor a tie.
    """
    judged = []
    for plan in ([], [target.lm.empty_id] * groups):
        ours = our_groups(target, ids, groups, plan)
        judge = Judge(_choices(ours, bool(plan), baseline))
        for _ in baseline.generate(ids, groups, judge, plan):
            pass
        judged.append(judge)
    bound = TIES[target.lm.dtype]
    found = Agreement(
        sum(judge.choices for judge in judged),
        sum(judge.equal for judge in judged),
        max((judge.worst_gap for judge in judged), key=lambda gap: (gap != gap, gap)),
        bound,
    )
    if not found.worst_gap <= bound:
        raise Refused(
            f"{found.choices - found.equal} of {found.choices} greedy choices differ from ours, "
            f"by up to {100 * found.worst_gap:.1f}% of the largest score"
        )
    return found


def our_groups(target: Target, ids: Tensor, groups: int, plan: Sequence[int] = ()) -> list[Group]:
    """Our greedy groups after a prompt."""
    target.lm.follow(plan)
    sequence = target.engine.sequence(seed=0)
    sequence.add(ids)
    return list(target.engine.start(sequence, Limits(groups), Samplers(GREEDY, GREEDY)))


def _choices(groups: Sequence[Group], planned: bool, baseline: Upstream) -> Iterator[int | None]:
    """Our tokens in the order in which the baseline asks for them.

    None for text that a plan decided.
    """
    config = baseline.config
    for group in groups:
        yield None if planned else group.text
        if group.text == baseline.empty_id:
            codes = group.codes.tolist()
            for step in range(config.patch_steps):
                for channel, delay in enumerate(config.delays):
                    if delay <= step < delay + config.group_size:
                        yield codes[channel][step - delay]


def missing(name: str) -> str | None:
    """Why a baseline cannot run here, or None."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    if int(version("transformers").partition(".")[0]) < TRANSFORMERS:
        return f"it is made for transformers {TRANSFORMERS}, here is {version('transformers')}"
    if name == "compiled" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler"
    return None


def baseline(name: str, target: Target, longest: int) -> Upstream:
    from benchmarks.upstream import Compiled, Upstream

    return {"eager": Upstream, "compiled": Compiled}[name](target.lm, longest)


def check_in_float32(name: str) -> str:
    """The comparison on a tiny model on the CPU.

    Raises:
        Refused: a token differs.
    """
    device = torch.device("cpu")
    target = Target.random("tiny", None, torch.float32, device, with_codec=False).sized(1, 64)
    return str(agreement(target, baseline(name, target, 64), target.filler(32), CHECKED_GROUPS))


def measure_baseline(
    target: Target, runner: Upstream, request: TimedRequest
) -> tuple[Metrics, GroupTimes]:
    """One request at batch 1: all groups, then all audio."""
    plan, device = plan_of(target, request), target.lm.device
    both = [target.word_id, target.lm.empty_id]
    for _ in runner.generate(prompt_ids(target, request), 2, plan=both):
        pass
    memory, energy, trace, began = PeakMemory(device), EnergyMeter(device), Trace(), perf_counter()
    ids = prompt_ids(target, request)
    trace.encoded = perf_counter() - began
    trace.prompt_groups = ids.shape[1] // target.lm.config.group_size
    patches: list[Tensor] = []
    for token, codes in runner.generate(ids, len(plan), plan=plan):
        synchronize(device)
        trace.chunks.append((perf_counter() - began, 0))
        trace.spoken.append(token == target.lm.empty_id)
        patches += [codes] if trace.spoken[-1] else []
    trace.first_group = trace.prefilled = trace.chunks[0][0]
    gaps = [after - before for (before, _), (after, _) in pairwise(trace.chunks)]
    times = list(zip(trace.spoken[1:], gaps, strict=True))
    # The last group ends the reply.
    trace.spoken.pop()
    if target.codec is not None:
        audio = target.codec.decode(torch.cat(patches, dim=1)).cpu()
        trace.chunks.append((perf_counter() - began, len(audio)))
    trace.ended = perf_counter() - began
    said, spoke = ([gap for spoken, gap in times if spoken is kind] for kind in (False, True))
    metrics = summarize(target, request, 1, [trace], trace.ended, memory.bytes, energy)
    return metrics, GroupTimes(trace.prefilled, CallTime.of(said), CallTime.of(spoke))


@dataclass
class Comparison:
    """One target and one request, and the table that collects their rows."""

    args: argparse.Namespace
    target: Target
    request: TimedRequest
    machine: Ceiling
    output: JsonLines

    @property
    def prompt(self) -> int:
        """Groups of the prompt."""
        return prompt_ids(self.target, self.request).shape[1] // self.target.lm.config.group_size

    @property
    def work(self) -> GroupWork:
        groups = self.request.words + self.request.patches
        return GroupWork.of(self.target.lm, 1, self.prompt, groups)

    def baseline(self, name: str) -> tuple[Upstream, dict[str, Any]]:
        """A baseline, and its agreement with us in float32 and on the target.

        Raises:
            Refused: a token differs.
        """
        print(f"{name}, tiny, float32: {check_in_float32(name)}", flush=True)
        runner = baseline(name, self.target, self.target.setup.max_seq_len)
        found = agreement(self.target, runner, self.target.filler(16), CHECKED_GROUPS)
        print(f"{name}, {name_of(self.target.lm.dtype)}: {found}", flush=True)
        return runner, vars(found)

    def row(
        self, table: Table, provider: str, metrics: Metrics, groups: GroupTimes, **more: Any
    ) -> None:
        floors, parts = self.work.floors(self.machine), ("prefill", "text_group", "audio_group")
        record = {
            "kind": "baseline",
            "provider": provider,
            "model": self.args.model or self.args.preset,
            "random_weights": not self.args.model,
            "dtype": name_of(self.target.lm.dtype),
            **more,
            **metrics.as_dict(),
            "prefill": groups.prefill,
            "text_group": vars(groups.text),
            "audio_group": vars(groups.audio),
            "floor": dict(zip(parts, floors, strict=True)),
            "of_floor": floors[2] / groups.audio.p50,
            **machine_fields(self.machine, self.target.lm.device),
        }
        self.output.append(record)
        table.row(record)


def run(args: argparse.Namespace) -> int:
    if bool(args.model) != bool(args.codec):
        raise ValueError("--model and --codec go together")
    machine = ceiling(args.device or default_device())
    print(machine, flush=True)
    found = _comparison(args, machine)
    print(found.work.describe(machine), flush=True)
    accepted, refused = [], []
    for name in args.baseline:
        if (reason := missing(name)) is not None:
            print(f"skipped {name}: {reason}")
            found.output.append({"kind": "skipped", "name": name, "reason": reason})
            continue
        try:
            accepted.append(found.baseline(name))
        except Exception as error:
            # A failing baseline is reported, and the next one runs.
            refused.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    table, target, samplers = Table(BASELINES), found.target, Samplers(GREEDY, GREEDY)
    ours = time_groups(target, 1, found.prompt, args.patches, samplers)
    found.row(table, "ours", measure(target, found.request), ours)
    for runner, agreed in accepted:
        measured = measure_baseline(target, runner, found.request)
        found.row(table, runner.name, *measured, agreement=agreed)
    for line in refused:
        print(f"REFUSED {line}")
    return 1 if refused else 0


def _comparison(args: argparse.Namespace, machine: Ceiling) -> Comparison:
    device, dtype = torch.device(args.device or default_device()), parse_dtype(args.dtype)
    if args.model:
        target = Target.load(args.model, args.codec, None, dtype, device, steered=True)
        target = replace(target, codec=None) if args.no_codec else target
    else:
        assert dtype is not None
        target = Target.random(args.preset, None, dtype, device, not args.no_codec)
    torch.set_num_threads(args.threads or useful_threads(target.lm.config))
    request = TimedRequest("tts", user_speech(1.0), args.words, args.patches, greedy=True)
    unsized = Comparison(args, target, request, machine, JsonLines(args.output))
    return replace(unsized, target=target.sized(1, unsized.prompt + args.words + args.patches + 8))


def add_options(add: Callable[..., object]) -> None:
    names, model = ("eager", "compiled"), "directory or hub id of a language model"
    add("--baseline", nargs="+", default=names, choices=names)
    add("--preset", default="7b", choices=("tiny", "7b"))
    add("--model", help=f"{model}, in place of a preset with random weights")
    add("--codec", help="directory or hub id of its codec")
    add("--dtype", default="bfloat16", help="of weights and activations")
    add("--no-codec", action="store_true", help="leave audio out")
    add("--words", type=int, default=12, help="of the reply")
    add("--patches", type=int, default=25, help="of 160 ms, of the reply")
    add_run_options(add, each="row")
