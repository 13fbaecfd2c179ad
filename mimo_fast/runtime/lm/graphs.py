"""CUDA graphs of prompts and of the two parts of a group, the backbone step and the patch.

    step    text and patches of R slots -> embed, backbone -> hidden -> text head, draw -> text
    patch   hidden of R slots -> 11 patch-decoder steps with draws -> codes -> encoder -> patches
    prompt  ids of N times up to T groups, slots, starts, lengths -> embed, backbone -> keys and
            values, hidden

Steps and patches are captured once per batch size 1, 2, 4, ... B. Between replays only
`DecodeState` and the slot numbers change, both in device memory; positions, seeds, counters,
settings and banned ids are read there. A batch between two sizes is padded with the state's scratch
row, which appends nothing and whose results are ignored.

Prompts are captured once per length in `PROMPTS` and padded to the next length, so that a result
depends on length and start alone. Prefill is then two launches: the copy of ids and numbers to the
device, and the graph; a copy more for each recording in it whose codes are on the device. Prompts
of one bucket run together, up to `PACKED` in a graph, and each has the bits that it has alone.
Prompts are captured first; all graphs share the memory that the longest one takes. A capture takes
as long as three prompts. What does not fit into `CAPTURE_SECONDS` and `CAPTURE_BYTES` is captured
when it is first used.

Of a model whose rows choose their adapter (`AdaptedLM`) each variant has graphs of its own, which
are captured when they are first used; a step replays one for each adapter among its rows, and
prompts run together with those of the same adapter.

With conditional graphs a third graph joins the two: the step, then the patch, which runs only if
one of the rows has drawn `<|empty|>`. A group is then one launch, no unused patch is computed, and
no patch waits for the host.

MIMO_FAST_NO_GRAPH=1 runs the same parts kernel by kernel. Graphs of prompts, of several prompts and
joined graphs are new paths (kernels/defaults.py).
"""

import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.kernels.cuda import graph_conditional
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import NO_POSITION, DecodeState, by_place, in_order
from mimo_fast.text.prompt import PackedPrompt

ENVIRONMENT = "MIMO_FAST_NO_GRAPH"

PROMPTS = (32, 64, 128, 256, 512)
"""Lengths of captured prompts, in groups; longer prompts run in parts of the largest length."""

PACKED = (2, 4)
"""Numbers of prompts that a graph takes beside one; together they have at most PROMPTS[-1] rows."""

CAPTURE_SECONDS = 10.0
CAPTURE_BYTES = 10**9
"""Time and device memory at load beyond which no further graph of prompts is captured; on an H100
five captures of the 7B model took 1.7 s and 0.66 GB (2026-11-28-h100-prompts.json)."""

Run = Callable[[], Tensor]
Replay = Callable[[], None]
Capture = Callable[[Run], tuple[Replay, Tensor]]
"""A function of fixed tensors -> a callable that replays it, and the tensor of its result."""


class Joined(Protocol):
    """A step and the patch that follows it if a row speaks, as one launch."""

    def launch(self) -> None: ...

    def wait(self) -> list[int]:
        """Waits for the tokens of the last launch only; they include the batch's padding."""
        ...


Join = Callable[[Replay, Replay, Tensor, Tensor, int, int], Joined]
"""Joins a step and a patch into one graph, or raises RuntimeError.

The arguments are (step, patch, the step's tokens [bucket], slots [bucket], the id of `<|empty|>`,
the scratch slot).
"""


def wanted(device: torch.device) -> bool:
    """Whether a model on this device should decode with graphs."""
    return device.type == "cuda" and os.environ.get(ENVIRONMENT, "") in ("", "0")


class SlotIndices:
    """Slot numbers [bucket] in device memory, read by graphs; the host keeps a copy."""

    def __init__(self, slots: list[int], device: torch.device) -> None:
        self.numbers, self._current = torch.tensor(slots, device=device, dtype=torch.int64), slots

    def set(self, slots: list[int]) -> None:
        if slots != self._current:
            numbers = torch.tensor(
                slots, pin_memory=self.numbers.is_cuda, dtype=torch.int64, device="cpu"
            )
            self.numbers.copy_(numbers, non_blocking=True)
            self._current = slots


@dataclass(frozen=True)
class Captured:
    """One graph: its slot numbers, and the tensor of its result [bucket, ...]."""

    indices: SlotIndices
    replay: Replay
    result: Tensor

    def run(self, slots: list[int]) -> Tensor:
        self.indices.set(slots)
        self.replay()
        return self.result


@dataclass(frozen=True)
class PromptPart:
    """Groups of a prompt that are prefilled at once, at `start` of a slot.

    Args:
        prompt: their ids [C + 1, n G]; codes that are still computed stay on the device.
    """

    prompt: PackedPrompt
    slot: int
    start: int


@dataclass
class CapturedPrompt:
    """One graph of N prompts of up to T groups.

    Attributes:
        inputs: Its input int64 [N, (C + 1) T G + 3] on the device: ids, slot, start, number of
            groups. A prompt without groups is not there.
        scratch: The slot of such a prompt.
        shape: (C + 1, T, G).
    """

    inputs: Tensor
    replay: Replay
    scratch: int
    shape: tuple[int, int, int]

    def run(self, parts: Sequence[PromptPart]) -> None:
        """Prefills at most N parts of at most T groups from host memory."""
        channels, _, frames = self.shape
        # Each run has its own buffer: the copy of the previous one may still be running.
        host = torch.zeros(
            self.inputs.shape, dtype=torch.int64, pin_memory=self.inputs.is_cuda, device="cpu"
        )
        host[:, -3], host[:, -2] = self.scratch, NO_POSITION
        for row, part in zip(host, parts, strict=False):
            ids = part.prompt.ids
            row[:-3].view(channels, -1)[:, : ids.shape[1]] = ids
            row[-3], row[-2], row[-1] = part.slot, part.start, ids.shape[1] // frames
        self.inputs.copy_(host, non_blocking=True)
        for row, part in zip(self.inputs, parts, strict=False):
            on_device = row[:-3].view(channels, -1)
            for place, codes in part.prompt.pending:
                end = min(place + codes.frames, part.prompt.ids.shape[1])
                codes.copy_to(on_device[1:, max(place, 0) : end], max(-place, 0))
        self.replay()


class Graphs:
    """The captured graphs of one state.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
        join: joins a step and a patch; by default conditional graphs, where they are available.
        prompts, packed: whether prompts are captured, and graphs of several; by default as
            `NewPath.PROMPT_GRAPHS` and `NewPath.PACKED_PROMPTS` are enabled.
    """

    def __init__(
        self,
        lm: LM,
        state: DecodeState,
        capture: Capture | None = None,
        join: Join | None = None,
        prompts: bool | None = None,
        packed: bool | None = None,
    ) -> None:
        self._lm, self._state = lm, state
        if capture is None:
            joins = enabled(NewPath.CONDITIONAL_GRAPHS, lm.device) and graph_conditional.available()
            capture, join = CudaCapture(keep=joins), CudaJoined if joins else None
        self._capture, self._join = capture, join
        # By place of the adapter, then by size.
        self._steps: dict[tuple[int, int], Captured] = {}
        self._patches: dict[tuple[int, int], Captured] = {}
        self._prompts: dict[tuple[int, int, int], CapturedPrompt] = {}
        default = enabled(NewPath.PROMPT_GRAPHS, lm.device)
        self.takes_prompts = default if prompts is None else prompts
        default = enabled(NewPath.PACKED_PROMPTS, lm.device)
        self.packs_prompts = self.takes_prompts and (default if packed is None else packed)
        self._joined: dict[tuple[int, int], Joined] = {}

    @property
    def buckets(self) -> list[int]:
        """Batch sizes that have a graph: the number of slots and the powers of two below it."""
        slots = self._state.slots
        return [*(1 << i for i in range((slots - 1).bit_length())), slots]

    @property
    def prompt_buckets(self) -> list[int]:
        """Prompt lengths that have a graph: those up to the first that holds a whole slot."""
        if not self.takes_prompts:
            return []
        enough = next((size for size in PROMPTS if size >= self._state.capacity), PROMPTS[-1])
        return [size for size in PROMPTS if size <= enough]

    def bucket_of(self, groups: int) -> int:
        """The length of the graph that takes a prompt of so many groups; 0 if none does."""
        return next((size for size in self.prompt_buckets if size >= groups), 0)

    def most_packed(self, bucket: int) -> int:
        """How many prompts of one bucket a graph takes."""
        sizes = (count for count in PACKED if count * bucket <= PROMPTS[-1])
        return max((n for n in sizes if self.packs_prompts and n <= self._state.slots), default=1)

    def _prompt_graphs(self) -> list[tuple[int, int]]:
        """(number of prompts, length) of every graph of prompts; the smallest first."""
        found = [
            (count, bucket)
            for bucket in self.prompt_buckets
            for count in (1, *PACKED)
            if count <= self.most_packed(bucket)
        ]
        return sorted(found, key=lambda graph: (graph[0] * graph[1], graph))

    @torch.no_grad()
    def warmup(self, progress: bool = True) -> None:
        """Captures all graphs without an adapter, the largest first, so that smaller ones reuse its
        memory."""
        # tqdm shows the bar only on a terminal.
        show = None if progress else True
        prompts, began, before = self._prompt_graphs(), perf_counter(), self._reserved()
        total = 2 * len(self.buckets) + len(prompts)
        with tqdm(total=total, desc="capturing", unit="graph", leave=False, disable=show) as bar:
            for graph in reversed(prompts):
                taken = perf_counter() - began, self._reserved() - before
                if taken[0] < CAPTURE_SECONDS and taken[1] < CAPTURE_BYTES:
                    self._prompt(0, *graph)
                bar.update(1)
            for bucket in reversed(self.buckets):
                self._capture_group(0, bucket)
                bar.update(2)

    def _capture_group(self, place: int, bucket: int) -> None:
        """Captures step and patch of one adapter and batch size, unless they are."""
        if (place, bucket) in self._patches:
            return
        lm = self._lm.variant(place)
        step = self._captured(bucket, partial(self._step, lm))
        indices = step.indices if self._join else None
        patch = self._captured(bucket, partial(self._patch, lm), indices)
        self._steps[place, bucket], self._patches[place, bucket] = step, patch
        self._join_both(place, bucket)

    def forget_groups(self) -> None:
        """Drops the graphs of steps and patches; they are captured anew when they are next used."""
        for graphs in (self._joined, self._steps, self._patches):
            graphs.clear()

    def _reserved(self) -> int:
        """Bytes that the allocator holds on a GPU."""
        device = self._lm.device
        return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0

    @property
    def conditional(self) -> bool:
        """Whether `group` can be used without an adapter."""
        if self._join is not None and not self._joined:
            self.warmup(progress=False)
        return self._join is not None

    def joins(self, slots: Sequence[int]) -> bool:
        """Whether `group` takes these slots, of which there are some; captures what that needs."""
        return self.conditional and bool(self._parts(slots)) and self._join is not None

    def group(self, slots: Sequence[int]) -> tuple[Callable[[], list[int]], Tensor]:
        """`step` and, if any of the slots draws `<|empty|>`, `patch`, a launch for each
        adapter.

        Returns:
            A function that waits for the slots' tokens, to be called before the next `group`, if at
            all; and a copy of the codes int64 [R, C, G], valid for slots that speak.
        """
        parts, codes = self._parts(slots), list[Tensor]()
        for part in parts:
            self._steps[part.graph].indices.set(part.padded)
            self._joined[part.graph].launch()
            # The graphs share memory: the next one may overwrite it.
            codes.append(self._patches[part.graph].result[: len(part.rows)].clone())

        rows = [part.rows for part in parts]

        def wait() -> list[int]:
            drawn = [self._joined[part.graph].wait()[: len(part.rows)] for part in parts]
            return in_order(rows, drawn)

        return wait, codes[0] if len(parts) == 1 else torch.stack(in_order(rows, codes))

    def step(self, slots: Sequence[int]) -> Tensor:
        """`LM.step` and `LM.sample_text` of these slots: int64 [R], valid until the next call."""
        return self._replay(self._steps, slots)

    def patch(self, slots: Sequence[int]) -> Tensor:
        """`LM.sample_patch` of these slots: a copy of the codes, int64 [R, C, G]."""
        return self._replay(self._patches, slots).clone()

    def prefill(self, ids: Tensor | PackedPrompt, slot: int, start: int = 0) -> None:
        """`LM.prefill` of ids [C + 1, T G], by graphs if prompts are captured."""
        prompt = ids if isinstance(ids, PackedPrompt) else PackedPrompt(ids.cpu())
        size = self._lm.config.group_size
        step = self.prompt_buckets[-1] if self.takes_prompts else prompt.ids.shape[1] // size
        for first in range(0, prompt.ids.shape[1], max(step * size, 1)):
            part = prompt.part(first, min(first + step * size, prompt.ids.shape[1]))
            self.prefill_parts([PromptPart(part, slot, start + first // size)])

    @torch.no_grad()
    def prefill_parts(self, parts: Sequence[PromptPart]) -> None:
        """Prefills parts of one bucket, at most `most_packed` of it, in one graph."""
        if not self.takes_prompts:
            for part in parts:
                self._lm.prefill(part.prompt.settled(), self._state, part.slot, part.start)
            return
        size = self._lm.config.group_size
        for place, rows in by_place(self._state, [part.slot for part in parts]).items():
            own = [parts[row] for row in rows]
            bucket = max(self.bucket_of(part.prompt.ids.shape[1] // size) for part in own)
            count = next(n for n in (1, *PACKED) if n >= len(own))
            self._prompt(place, count, bucket).run(own)

    def _replay(self, graphs: dict[tuple[int, int], Captured], slots: Sequence[int]) -> Tensor:
        parts = self._parts(slots)
        if len(parts) == 1:
            return graphs[parts[0].graph].run(parts[0].padded)[: len(slots)]
        # The graphs share memory: the next one may overwrite a result.
        made = [graphs[part.graph].run(part.padded)[: len(part.rows)].clone() for part in parts]
        return torch.stack(in_order((part.rows for part in parts), made))

    def _parts(self, slots: Sequence[int]) -> list["_Part"]:
        """The slots by adapter; graphs for all of them are captured before one is launched."""
        parts = list[_Part]()
        for place, rows in by_place(self._state, slots).items():
            bucket = next(size for size in self.buckets if size >= len(rows))
            if not self._patches:
                self.warmup(progress=False)
            self._capture_group(place, bucket)
            padding = [self._state.slots] * (bucket - len(rows))
            parts.append(_Part((place, bucket), rows, [*(slots[row] for row in rows), *padding]))
        return parts

    def _captured(
        self, bucket: int, work: Callable[[Tensor], Tensor], indices: SlotIndices | None = None
    ) -> Captured:
        indices = indices or SlotIndices([self._state.slots] * bucket, self._lm.device)
        replay, result = self._capture(lambda: work(indices.numbers))
        return Captured(indices, replay, result)

    def _join_both(self, place: int, bucket: int) -> None:
        if self._join is None:
            return
        step, patch = self._steps[place, bucket], self._patches[place, bucket]
        rows = step.result, step.indices.numbers, self._lm.empty_id, self._state.slots
        try:
            self._joined[place, bucket] = self._join(step.replay, patch.replay, *rows)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without conditional graphs: {error}", stacklevel=2)
            self._join = None
            self._joined.clear()

    def _prompt(self, place: int, count: int, bucket: int) -> CapturedPrompt:
        """The graph of `count` prompts of one adapter and length, captured if it has not been."""
        graph = place, count, bucket
        if graph not in self._prompts:
            self._prompts[graph] = self._captured_prompt(self._lm.variant(place), count, bucket)
        return self._prompts[graph]

    def _captured_prompt(self, lm: LM, count: int, bucket: int) -> CapturedPrompt:
        config, device = self._lm.config, self._lm.device
        shape = (config.channels + 1, bucket, config.group_size)
        inputs = torch.zeros(count, math.prod(shape) + 3, dtype=torch.int64, device=device)
        # The capture runs on the scratch row with no groups.
        inputs[:, -3], inputs[:, -2] = self._state.slots, NO_POSITION
        ids, places = inputs[:, :-3].unflatten(1, shape), inputs[:, -3:]
        self._lm.backbone_rope  # noqa: B018
        replay, _ = self._capture(lambda: lm.prefill_packed(ids, places, self._state))
        return CapturedPrompt(inputs, replay, self._state.slots, shape)

    def _step(self, lm: LM, slots: Tensor) -> Tensor:
        state = self._state
        settings = state.text_sampler.select(slots)
        return lm.step_text(state, slots, settings, state.banned[slots])

    def _patch(self, lm: LM, slots: Tensor) -> Tensor:
        return lm.sample_patch(self._state, slots, self._state.code_sampler.select(slots))


class _Part(NamedTuple):
    """Rows of one adapter, the graph that takes them, and their slots padded to its size."""

    graph: tuple[int, int]
    rows: list[int]
    padded: list[int]


@dataclass(frozen=True)
class CudaReplay:
    """Launches a captured graph."""

    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Captures CUDA graphs that share one memory pool, since no two of them run at once.

    Args:
        keep: whether a graph can become part of another; it is then instantiated at its first
            replay.
    """

    _underway = threading.Lock()
    """Lock of the process: one capture at a time."""

    def __init__(self, keep: bool = False) -> None:
        self._pool: Any = None
        self._keep = keep

    def __call__(self, run: Run) -> tuple[Replay, Tensor]:
        with self._underway:
            return self._captured(run)

    def _captured(self, run: Run) -> tuple[Replay, Tensor]:
        # Compiling kernels and setting up libraries are forbidden in a capture, so they come first.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self._keep else torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use the device meanwhile; their allocations are not part of the graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return CudaReplay(graph), result


class CudaJoined:
    """A step and a patch that `CudaCapture(keep=True)` has captured, joined into one graph.

    It keeps both alive for their memory.
    """

    def __init__(
        self, step: Replay, patch: Replay, tokens: Tensor, slots: Tensor, empty: int, scratch: int
    ) -> None:
        assert isinstance(step, CudaReplay)
        assert isinstance(patch, CudaReplay)
        self._parts = step, patch
        first, then = step.graph.raw_cuda_graph(), patch.graph.raw_cuda_graph()
        graph = graph_conditional.ConditionalGraph(first, then, tokens, slots, empty, scratch)
        self.launch, self.wait = graph.launch, graph.wait
