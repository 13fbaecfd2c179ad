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
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.columns import COLUMNS, Table
from benchmarks.e2e import group_fields
from benchmarks.harness import Refused
from benchmarks.records import JsonLines, add_run_options, machine_fields
from mimo_fast.bench.ceiling import ceiling, name_of
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
GREEDILY = Samplers(GREEDY, GREEDY)

TIES = {torch.float32: 0.0, torch.bfloat16: 0.03, torch.float16: 0.005}
"""Largest gap of a tie, relative to the largest score.

The best and the second best of 1,000 random scores are 7% apart in the median; a random choice is
100% off.
"""


@dataclass
class Agreement:
    """Number of choices compared, how many were ours, and the largest gap of the others.

    The gap is relative to the largest score.
    """

    bound: float
    choices: int = 0
    equal: int = 0
    worst_gap: float = 0.0

    def __str__(self) -> str:
        if self.equal == self.choices:
            return f"all {self.choices} greedy choices equal ours"
        return (
            f"{self.equal} of {self.choices} greedy choices equal ours, the others are ties: "
            f"within {100 * self.worst_gap:.2f}% of the largest score (bound {100 * self.bound:g}%)"
        )

    def judge(self, tokens: Iterator[int | None]) -> Callable[[Tensor], int]:
        """Takes our tokens one after the other and compares them with the best by the scores."""

        def choose(scores: Tensor) -> int:
            best, ours = int(scores.argmax()), next(tokens)
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

        return choose


def agreement(target: Target, baseline: Upstream, ids: Tensor, groups: int) -> Agreement:
    """Compares the text tokens of a reply that runs freely, and the codes of one that only speaks.

    Args:
        ids: a prompt [C + 1, T G]; the target must have room for it and the groups.

    Raises:
        Refused: a token is neither equal nor a tie.
    """
    found = Agreement(TIES[target.lm.dtype])
    for plan in ([], [target.lm.empty_id] * groups):
        target.lm.follow(plan)
        sequence = target.engine.sequence(seed=0)
        sequence.add(ids)
        ours = list(target.engine.start(sequence, Limits(groups), GREEDILY))
        judge = found.judge(_choices(ours, bool(plan), baseline))
        for _ in baseline.generate(ids, groups, judge, plan):
            pass
    # NaN is no agreement.
    if not found.worst_gap <= found.bound:
        raise Refused(
            f"{found.choices - found.equal} of {found.choices} greedy choices differ from ours, "
            f"by up to {100 * found.worst_gap:.1f}% of the largest score"
        )
    return found


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


def accepted(name: str, target: Target) -> tuple[Upstream, Agreement]:
    """A baseline, and its agreement with us on the target; on a tiny model in float32 it is checked
    before.

    Raises:
        Refused: a token differs.
    """
    cpu = torch.device("cpu")
    tiny = Target.random("tiny", None, torch.float32, cpu, with_codec=False).sized(1, 64)
    found = agreement(tiny, baseline(name, tiny, 64), tiny.filler(32), CHECKED_GROUPS)
    print(f"{name}, tiny, float32: {found}", flush=True)
    runner = baseline(name, target, target.setup.max_seq_len)
    found = agreement(target, runner, target.filler(16), CHECKED_GROUPS)
    print(f"{name}, {name_of(target.lm.dtype)}: {found}", flush=True)
    return runner, found


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


def run(args: argparse.Namespace) -> int:
    if bool(args.model) != bool(args.codec):
        raise ValueError("--model and --codec go together")
    device, dtype = torch.device(args.device or default_device()), parse_dtype(args.dtype)
    machine, output = ceiling(device), JsonLines(args.output)
    print(machine, flush=True)
    if args.model:
        target = Target.load(args.model, args.codec, None, dtype, device, steered=True)
        target = replace(target, codec=None) if args.no_codec else target
    else:
        target = Target.random(args.preset, None, dtype, device, not args.no_codec)
    torch.set_num_threads(args.threads or useful_threads(target.lm.config))
    request = TimedRequest("tts", user_speech(1.0), args.words, args.patches, greedy=True)
    prompt = prompt_ids(target, request).shape[1] // target.lm.config.group_size
    groups = args.words + args.patches
    target = target.sized(1, prompt + groups + 8)
    work = GroupWork.of(target.lm, 1, prompt, groups)
    print(work.describe(machine), flush=True)
    chosen, refused = [], []
    for name in args.baseline:
        if (reason := missing(name)) is not None:
            print(f"skipped {name}: {reason}")
            output.append({"kind": "skipped", "name": name, "reason": reason})
            continue
        try:
            chosen.append(accepted(name, target))
        except Exception as error:
            # A failing baseline is reported, and the next one runs.
            refused.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    table, floors = Table(COLUMNS["baseline"]), work.floors(machine)

    def row(provider: str, metrics: Metrics, times: GroupTimes, **more: Any) -> None:
        record = {
            "kind": "baseline",
            "provider": provider,
            "model": args.model or args.preset,
            "random_weights": not args.model,
            "dtype": name_of(target.lm.dtype),
            **more,
            **asdict(metrics),
            **group_fields(times, floors),
            "of_floor": floors[2] / times.audio.p50,
            **machine_fields(machine, device),
        }
        output.append(record)
        table.row(record)

    ours = time_groups(target, 1, prompt, args.patches, GREEDILY)
    row("ours", measure(target, request), ours)
    for runner, agreed in chosen:
        row(runner.name, *measure_baseline(target, runner, request), agreement=vars(agreed))
    for line in refused:
        print(f"REFUSED {line}")
    return 1 if refused else 0


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
