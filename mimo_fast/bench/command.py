"""`mimo-fast bench`: what to expect on this machine, in two minutes and one table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter

import torch
from tqdm import tqdm

from mimo_fast.audio.paths import write_whole
from mimo_fast.bench.advice import Measured, Measurement, advise, computed
from mimo_fast.bench.cards import beside
from mimo_fast.bench.ceiling import Ceiling, ceiling, name_of
from mimo_fast.bench.environment import environment
from mimo_fast.bench.floor import GroupWork
from mimo_fast.bench.integers import layer_matrices, prompt_shares
from mimo_fast.bench.machine import describe_machine, useful_threads
from mimo_fast.bench.pipeline import Metrics, TimedRequest, measure, prompt_ids
from mimo_fast.bench.shared import public_name, shared
from mimo_fast.bench.synthetic import preset_configs, preset_setup, weightless_lm
from mimo_fast.bench.target import Target, shortfall, user_speech
from mimo_fast.config import PathLike
from mimo_fast.errors import DeviceMemoryError
from mimo_fast.runtime.loading import LoadOptions, default_device, parse_dtype
from mimo_fast.runtime.memory import GB, free_bytes

BUDGET = 120.0
"""Seconds for the whole command."""

OF_FLOOR, PROMPT_OF_FLOOR = 1 / 8, 1 / 2
"""Least expected share of their floor that decoding and a prompt reach.

Used to judge what ends in time.
"""

STREAMS = (1, 2, 4, 8, 16, 32, 64)

WORDS, PATCHES = 4, 16
"""Groups of text and patches of a reply on a slow device; audio starts with patch eleven."""

LONG_WORDS, LONG_PATCHES = 12, 50
"""Groups of text and patches of a reply where that takes less than FAST seconds."""

FAST = 2.0
TEXT_GROUPS = 60
"""Groups of the prompt: about as many as the shortest request to speak has."""


def bench(
    args: argparse.Namespace, pair: tuple[PathLike, PathLike] | None, options: LoadOptions
) -> int:
    """The command: the table on stdout, everything else on stderr.

    Args:
        pair: language model and codec to measure; None for random weights.
    """
    began = perf_counter()
    device = torch.device(args.device or default_device())
    wanted = ("cpu", "gpu") if device.type == "cuda" else ("cpu",)
    print("\n".join(line for line in describe_machine() if line.startswith(wanted)), flush=True)
    machine = ceiling(device)
    print(machine, flush=True)
    free = free_bytes(device)
    target, about = _target(args, pair, options, device, machine)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(useful_threads(target.lm.config))
    work = GroupWork.of(target.lm, 1, TEXT_GROUPS, quantized_cache=target.quantized_cache)
    print(work.describe(machine), flush=True)
    matrices = layer_matrices(target.lm.backbone) if machine.integers else []
    shares = prompt_shares(matrices, target.lm.dtype) if matrices else {}
    if shares:
        reached = "; ".join(f"{rows} rows {100 * share:.0f}%" for rows, share in shares.items())
        print(f"products of a prompt, of the integer peak: {reached}", flush=True)
    print(
        f"\n{'streams':>7}{'real-time factor':>18}{'of floor':>10}{'first audio':>13}"
        f"{'next chunk (p95)':>18}{'worst silence':>15}{'memory':>10}",
        flush=True,
    )
    rows = list(_rows(args, target, machine, began))
    print("\n" + "\n".join(beside()), flush=True)
    line = _line(args, target, about, rows, machine, free)
    print(f"\nthis machine: {line}", flush=True)
    if args.json:
        record = shared(
            args,
            about,
            environment(device),
            [asdict(row) for row in rows],
            ceiling=asdict(machine),
            dtype=name_of(target.lm.dtype),
            of_integer_peak=shares,
            streams=max((row.streams for row in rows if row.carried), default=0),
            line=line,
        )
        write_whole(args.json, (json.dumps(record, indent=1) + "\n").encode())
    return 0


@dataclass(frozen=True)
class Row:
    """A number of simultaneous speech streams, and what they took; floor in seconds."""

    streams: int
    metrics: Metrics
    floor: float

    @property
    def carried(self) -> bool:
        """Whether each stream was faster than real time."""
        return self.metrics.audio_rtf is not None and self.metrics.audio_rtf < 1

    def __str__(self) -> str:
        found = self.metrics
        assert found.itl is not None
        assert found.e2el is not None
        first = "-" if found.audio_ttfp is None else f"{1e3 * found.audio_ttfp.p50:,.0f} ms"
        factor = "-" if found.audio_rtf is None else f"{found.audio_rtf:.3f}"
        silence = "-" if found.audio_underrun is None else f"{1e3 * found.audio_underrun:,.0f} ms"
        share = f"{100 * self.floor / found.e2el.p50:.1f}%"
        return (
            f"{self.streams:>7}{factor:>18}{share:>10}{first:>13}{1e3 * found.itl.p95:>15,.0f} ms"
            f"{silence:>15}{found.peak_bytes / GB:>7.1f} GB"
        )


def _rows(
    args: argparse.Namespace, target: Target, machine: Ceiling, began: float
) -> Iterator[Row]:
    """More and more streams, until they are slower than real time, or time or memory ends; each is
    printed as it comes."""
    request = _request(target, machine, args.max_seq_len or 0)
    prompt = prompt_ids(target, request).shape[1] // target.lm.config.group_size
    last, warm = 0.0, target.lm.device.type == "cuda"
    with tqdm(STREAMS, desc="streams", leave=False, disable=None) as bar:
        for streams in bar:
            unmeasured = f"not measured: {streams} streams and more"
            left = BUDGET - (perf_counter() - began)
            # Twice as many take at most twice as long.
            if streams > 1 and 2 * last > left:
                print(f"{unmeasured}, for want of time", file=sys.stderr)
                return
            gc.collect()
            try:
                sized = target.sized(streams, prompt + request.words + request.patches + 2)
                metrics = measure(sized, request, streams, warm=warm, seconds=left)
            except DeviceMemoryError as error:
                if streams == 1:
                    raise
                print(f"{unmeasured}: {error}", file=sys.stderr)
                return
            last = metrics.wall
            words, patches = metrics.text_groups / streams, metrics.audio_groups / streams
            floor = target.request_floor(machine, streams, prompt, words, patches)
            row = Row(streams, metrics, floor)
            tqdm.write(str(row), file=sys.stdout)
            if metrics.audio_underrun is None:
                silence = f"the worst silence of {streams}"
                reason = metrics.unmeasured["audio_underrun"]
                print(f"not measured: {silence}: {reason}", file=sys.stderr)
            yield row
            if not row.carried:
                return


def _line(
    args: argparse.Namespace,
    target: Target,
    about: dict[str, str | None],
    rows: list[Row],
    machine: Ceiling,
    free: int | None,
) -> str:
    """What to expect and which format to take, in one line."""
    timed = list[Measured]()
    for row in rows:
        first, factor = row.metrics.audio_ttfp, row.metrics.audio_rtf
        if factor is not None:
            timed.append(Measured(row.streams, factor, None if first is None else first.p50))
    if about["preset"] == "tiny" or (about["preset"] and not timed):
        return computed(_published_dtype(args), target.lm.device, machine, free)
    if not timed:
        return f"no stream in real time: no audio came in the {BUDGET:.0f} s of this command"
    one = rows[0].metrics
    groups = one.prompt_groups, one.text_groups, one.audio_groups
    quantization = about["quantization"]
    made = Measurement(target.setup, target.codec, quantization, machine, free, *groups)
    return advise(made, timed)


def _request(target: Target, machine: Ceiling, context: int) -> TimedRequest:
    """A sentence to be said, at the end of a context where one is given.

    It is longer on a fast device.
    """
    floor = target.request_floor(machine, 1, TEXT_GROUPS, LONG_WORDS, LONG_PATCHES) / OF_FLOOR
    words, patches = (LONG_WORDS, LONG_PATCHES) if floor <= FAST else (WORDS, PATCHES)
    return TimedRequest("tts", user_speech(1.0), words, patches, context - words - patches - 2)


def _target(
    args: argparse.Namespace,
    pair: tuple[PathLike, PathLike] | None,
    options: LoadOptions,
    device: torch.device,
    machine: Ceiling,
) -> tuple[Target, dict[str, str | None]]:
    """The target, and what a record says of it.

    It is also described in words, which are printed before it is made and may name folders.
    """

    def announced(
        preset: str | None, quantization: str | None, what: str, name: str | None = None
    ) -> dict[str, str | None]:
        print(f"model: {what}", flush=True)
        return {"model": name or what, "preset": preset, "quantization": quantization}

    if pair is not None:
        lm, codec = pair
        quantized = f", {args.quantization}" if args.quantization else ""
        what = f"{lm}{quantized}, replies of a set length"
        about = announced(None, args.quantization, what, public_name(lm))
        return Target.load(lm, codec, args.quantization, args.dtype, device, True, **options), about
    quantization, dtype = args.quantization or "int4", _published_dtype(args)
    published = f"the published dimensions in {quantization}"
    reason = _unfit(quantization, dtype, device, machine)
    if reason is None:
        what = f"{published}, random weights: real speed, no real speech"
        about = announced("7b", quantization, what)
        return Target.random("7b", quantization, dtype, device), about
    what = f"a tiny one with random weights, since {published} {reason}"
    about = announced("tiny", None, f"{what}; its figures say nothing about theirs")
    return Target.random("tiny", None, parse_dtype(args.dtype) or torch.float32, device), about


def _published_dtype(args: argparse.Namespace) -> torch.dtype:
    """What the published dimensions are computed in."""
    return parse_dtype(args.dtype) or torch.bfloat16


def _unfit(
    quantization: str, dtype: torch.dtype, device: torch.device, machine: Ceiling
) -> str | None:
    """Why the published dimensions cannot be measured here in time, or None."""
    lack = shortfall(preset_setup("7b", quantization, dtype), device)
    if lack is not None:
        return f"do not fit: {lack}"
    config, _ = preset_configs("7b")
    lm = weightless_lm(config, quantization, dtype)
    prompt, word, patch = GroupWork.of(lm, 1, TEXT_GROUPS).floors(machine)
    expected = prompt / PROMPT_OF_FLOOR + (WORDS * word + PATCHES * patch) / OF_FLOOR
    # Making the weights takes as long again.
    return f"would take about {expected:,.0f} s for one sentence" if expected > BUDGET / 2 else None
