"""Persistent launches of a random model, beside its layers one by one: bits, times, clocks.

What studies/engine.py runs on a GPU at the published dimensions. Functions give records; one that
found something wrong says so in its "failed".
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_costs import Launch
from mimo_fast.bench.synthetic import random_lm
from mimo_fast.bench.timing import durations
from mimo_fast.config import LMConfig
from mimo_fast.kernels.cuda.engine import MOST_ROWS, Tables
from mimo_fast.kernels.cuda.engine_launch import DEPTHS, THREADS, Grid, Launcher
from mimo_fast.kernels.matmul.product import matmul
from mimo_fast.kernels.sample import NOT_FINITE, SamplerTensors
from mimo_fast.runtime.lm.executor import LayerByLayer
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.persistent import (
    Persistent,
    refuses_backbone,
    refuses_decoder,
    refuses_encoder,
)
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.sampling import DEFAULT_LOCAL_SAMPLER, GREEDY, MiMoSampler, sampler_tensors

Record = dict[str, Any]

PIECES = "patch decoder", "patch encoder", "word"
REFUSES = refuses_decoder, refuses_encoder, refuses_backbone
ROWS = 1, 2, 4, MOST_ROWS
CONTEXT, CAPACITY = 254, 1024
"""Positions that a word of the times sees, and that a slot has room for."""

OFF = 2**-5
"""Of the norm of hidden states and patches: how far two ways in 16 bits may be apart after all
layers. Each layer rounds some values to 2^-8 of themselves, and ways differ in attention alone."""

ALIKE = 0.7
"""Share of the first codes of all rows that both ways draw alike, at least: near ties differ."""


def formats(bits: int) -> dict[str, str | None]:
    parts = dict.fromkeys(("backbone", "patch_decoder", "patch_encoder"), f"int{bits}")
    return {**parts, "lm_head": "int8"}


@dataclass
class Subject:
    """A model with inputs of MOST_ROWS rows; a row of the patch encoder is a patch.

    Args:
        loaded: the library with the engine.
        grid: the usual one.
        context: positions that a word sees.
    """

    lm: LM
    loaded: ctypes.CDLL
    grid: Grid
    context: int = CONTEXT
    capacity: int = CAPACITY
    _settings: dict[tuple[int, str], SamplerTensors] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        config: LMConfig,
        bits: int,
        dtype: torch.dtype,
        device: torch.device,
        loaded: ctypes.CDLL,
        grid: Grid,
        **sizes: int,
    ) -> Subject:
        return cls(random_lm(config, formats(bits), dtype, device), loaded, grid, **sizes)

    def _normal(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.lm.device).manual_seed(seed)
        made = torch.randn(*shape, generator=generator, device=self.lm.device)
        return made.to(self.lm.dtype)

    @cached_property
    def x(self) -> Tensor:
        """Of the backbone, and hidden states that codes are drawn for."""
        return self._normal(MOST_ROWS, self.lm.config.backbone.dim, seed=1)

    @cached_property
    def frames(self) -> Tensor:
        config = self.lm.config
        return self._normal(MOST_ROWS, config.group_size, config.patch_encoder.dim, seed=2)

    @cached_property
    def state(self) -> DecodeState:
        place = self.lm.dtype, self.lm.device
        made = DecodeState.allocate(self.lm.config, range(MOST_ROWS), self.capacity, *place)
        for part, seed in ((made.cache.k, 3), (made.cache.v, 4)):
            part.copy_(self._normal(*part.shape, seed=seed))
        return made

    @cached_property
    def slots(self) -> Tensor:
        return torch.arange(MOST_ROWS, device=self.lm.device)

    @cached_property
    def starts(self) -> Tensor:
        """All at the context."""
        return torch.full_like(self.slots, self.context - 1)

    @cached_property
    def mixed_starts(self) -> Tensor:
        """From the first position to the last that there is room for."""
        return self.slots * (self.capacity - 1) // (MOST_ROWS - 1)

    def settings(self, rows: int, sampler: MiMoSampler = GREEDY) -> SamplerTensors:
        key = rows, repr(sampler)
        if key not in self._settings:
            self._settings[key] = sampler_tensors([sampler] * rows, self.lm.device)
        return self._settings[key]

    def persistent(self, pause: int = 0, **grid: int) -> Persistent:
        """Launches of another grid: its fields, and what a look at what has not come waits for."""
        made = Persistent(self.lm.network, replace(self.grid, **grid), self.loaded)
        for piece, refuses in zip(PIECES, REFUSES, strict=True):
            if reason := refuses(self.lm.network):
                raise RuntimeError(f"the engine does not take the {piece}: {reason}")
        for launcher in map(launcher_of, parts(made)):
            launcher._tables.set(pause=pause)
        return made

    def divided(self, launcher: Launcher, piece: str, rows: int) -> tuple[Any, tuple[int, int]]:
        """How shared memory is divided, threads and depth."""
        capacity = self.capacity if piece == "word" else 0
        return launcher._fixed(launch_rows(self, piece, rows), capacity)

    def run(
        self,
        ways: Persistent | LayerByLayer,
        piece: str,
        rows: range,
        mixed: bool = False,
        sampler: MiMoSampler = GREEDY,
    ) -> tuple[Tensor, ...]:
        """What a piece makes of these rows: codes, patches, or hidden states and logits."""
        some = slice(rows.start, rows.stop)
        own, x, slots = self.lm.network, self.x[some], self.slots[some]
        by_layers = isinstance(ways, LayerByLayer)
        if piece == "patch decoder":
            given = self.state, slots, self.settings(len(rows), sampler)
            if by_layers:
                return (ways.decode(matmul(x, own.backbone_to_patch), *given),)
            return (ways.decoder.decode(x, *given),)
        if piece == "patch encoder":
            frames = self.frames[some]
            if by_layers:
                return (matmul(ways.encode(frames).flatten(1), own.patch_to_backbone),)
            return (ways.encoder.encode(frames),)
        given = self.state, slots, (self.mixed_starts if mixed else self.starts)[some]
        if by_layers:
            hidden = ways.step(x, *given)
            return hidden, matmul(hidden, own.text_head)
        return ways.backbone.step(x, *given)


def parts(ways: Persistent) -> tuple[Any, ...]:
    """In the order of PIECES."""
    return ways.decoder, ways.encoder, ways.backbone


def launcher_of(part: Any) -> Launcher:
    return part.launcher


def tables_of(ways: Persistent, piece: str) -> Tables:
    return launcher_of(parts(ways)[PIECES.index(piece)])._tables


def launch_rows(subject: Subject, piece: str, rows: int) -> int:
    """Rows of a launch: of the patch encoder its frames, of as many patches as one takes."""
    group = subject.lm.config.group_size
    return min(rows * group, MOST_ROWS // group * group) if piece == "patch encoder" else rows


def given_up(ways: Persistent) -> str:
    return "a launch gave up" if int(ways.error.word) else ""


def said(record: Record, *problems: str) -> Record:
    found = [problem for problem in problems if problem]
    return record | ({"failed": "; ".join(found)} if found else {})


# ---- Bits


def check_bits(subject: Subject, grids: Sequence[dict[str, int]]) -> Iterator[Record]:
    """Rows alone and together, grids, and the layers one by one."""
    usual, layers = subject.persistent(), LayerByLayer(subject.lm.network)
    for piece in PIECES:

        def run(ways: Persistent | LayerByLayer, rows: range, piece: str = piece) -> Any:
            return subject.run(ways, piece, rows, mixed=True)

        everybody = range(MOST_ROWS)
        together = run(usual, everybody)
        alone = {m: run(usual, range(m, m + 1)) for m in everybody}
        wrong = [m for m, got in alone.items() if not same(got, [x[m] for x in together])]
        problem = f"rows {wrong} have other bits alone" if wrong else ""
        yield said({"check": "a row alone", "piece": piece}, problem, given_up(usual))
        for grid in grids:
            other = subject.persistent(**grid)
            problem = "" if same(run(other, everybody), together) else "other bits"
            yield said({"check": "another grid", "piece": piece, **grid}, problem, given_up(other))
        yield _beside(subject, piece, together, run(layers, everybody))


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether these are the same values, all finite."""
    return all(
        finite(x) and torch.equal(x.reshape(y.shape), y) for x, y in zip(got, want, strict=True)
    )


def finite(made: Tensor) -> bool:
    if made.dtype == torch.int64:
        return bool((made != NOT_FINITE).all())
    return bool(made.isfinite().all())


def _beside(subject: Subject, piece: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> Record:
    record: Record = {"check": "the layers one by one", "piece": piece}
    if piece != "patch decoder":
        off = [
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(got, want, strict=True)
        ]
        # NaN is not within.
        problem = "" if all(x <= OFF for x in off) else f"off by {max(off):.3g}"
        return said(record | {"rms": off}, problem)
    config, (codes,), (others,) = subject.lm.config, got, want
    # Of the first step, before which both ways have the same input.
    first = (codes == others)[:, 0, 0].float().mean().item()
    sizes, empty = (
        torch.tensor(x, device=codes.device)[None, :, None]
        for x in (config.code_sizes, config.empty_codes)
    )
    valid = bool(((codes >= 0) & (codes < sizes) & (codes != empty)).all())
    record |= {"alike": (codes == others).float().mean().item(), "first_alike": first}
    too_few = "" if first >= ALIKE else "too few first codes are alike"
    return said(record, "" if valid else "codes that there are not", too_few)


def check_soak(subject: Subject, patches: int) -> Iterator[Record]:
    """The same patch again and again: its codes, and nobody gives up."""
    ways = subject.persistent()
    for rows, count in ((1, patches), (MOST_ROWS, patches // 10)):
        run = partial(subject.run, ways, "patch decoder", range(rows))
        (first,), wrong = run(), torch.zeros((), dtype=torch.int64, device=subject.lm.device)
        for _ in range(count):
            wrong += (run()[0] != first).any()
        different = int(wrong)
        problem = f"{different} have other codes" if different else ""
        record = {"check": "patches in a row", "rows": rows, "patches": count}
        yield said(record, problem, given_up(ways))


# ---- Times


def times(
    subject: Subject, settings: Sequence[dict[str, int]], rows: Sequence[int] = ROWS
) -> Iterator[Record]:
    """Microseconds of each piece by rows; other settings for one row and for all."""
    for setting in ({}, *settings):
        ways = subject.persistent(**setting)
        for piece in PIECES:
            for count in rows if not setting else (rows[0], rows[-1]):
                yield _timed(subject, ways, piece, count, setting)
    for piece in PIECES:
        layers = LayerByLayer(subject.lm.network)
        us = microseconds(partial(subject.run, layers, piece, range(1)), subject.lm.device)
        yield {"piece": piece, "rows": 1, "by": "layers one by one", "us": us}


def _timed(
    subject: Subject, ways: Persistent, piece: str, rows: int, setting: dict[str, int]
) -> Record:
    launcher = launcher_of(parts(ways)[PIECES.index(piece)])
    grid = replace(subject.grid, **{x: y for x, y in setting.items() if x != "pause"})
    record = {
        "piece": piece,
        "rows": rows,
        "blocks": grid.blocks,
        "pause": setting.get("pause", 0),
    }
    try:
        call = partial(subject.run, ways, piece, range(rows))
        call()
        program, (threads, depth) = subject.divided(launcher, piece, rows)
        record |= {"threads": threads, "depth": depth, "x_columns": program.x_columns}
        record["us"] = microseconds(call, subject.lm.device)
        if piece == "patch decoder" and not setting:
            drawn = partial(call, sampler=DEFAULT_LOCAL_SAMPLER)
            record["us_sampled"] = microseconds(drawn, subject.lm.device)
    except ValueError as error:
        # Shared memory does not hold it.
        return record | {"refused": str(error)}
    except RuntimeError as error:
        return said(record, str(error))
    return said(record, given_up(ways))


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    return min(durations(call, device, seconds=0, min_runs=3, max_runs=3)) * 1e6


def clocks(subject: Subject, rows: Sequence[int] = (1, MOST_ROWS)) -> Iterator[Record]:
    """Clock cycles of a phase, by its kind: the mean of all blocks, the least and the most."""
    for piece in PIECES:
        for count in rows:
            ways = subject.persistent()
            tables, given = tables_of(ways, piece), launch_rows(subject, piece, count)
            counted = torch.zeros(
                subject.grid.blocks, len(tables.phases), dtype=torch.int64, device=subject.lm.device
            )
            tables.set(clocks=counted)
            for _ in range(2):
                counted.zero_()
                subject.run(ways, piece, range(count))
            context = subject.context if piece == "word" else 0
            launch = Launch(piece, tables, subject.grid, given, context)
            yield from by_kind(launch, counted, {"piece": piece, "rows": count})


def by_kind(launch: Launch, counted: Tensor, about: Record) -> Iterator[Record]:
    """counted: int64 [blocks, phases], of all steps."""
    names = [cost.name for cost in launch.steps[0]]
    begin = launch.tables.loop.start
    for name in dict.fromkeys(names):
        phases = [i for i, x in enumerate(names) if x == name]
        comes = sum(launch.tables.steps if i >= begin else 1 for i in phases)
        each = counted[:, phases].sum(dim=1).double() / comes
        mean, least, most = (float(x) for x in (each.mean(), each.min(), each.max()))
        yield about | {"phase": name, "times": comes, "clocks": [mean, least, most]}


def settings_of(grid: Grid) -> list[dict[str, int]]:
    """What is varied: depths, threads, pauses."""
    return [
        *({"depth": depth} for depth in DEPTHS),
        {"threads": (grid.threads or THREADS[0]) // 2},
        *({"pause": pause} for pause in (20, 100)),
    ]


def other_grids(grid: Grid) -> list[dict[str, int]]:
    return [
        *({"blocks": blocks} for blocks in (grid.blocks - 1, grid.blocks // 2, 33)),
        {"threads": (grid.threads or THREADS[0]) // 2},
        {"depth": DEPTHS[-1]},
    ]
