"""CUDA graphs of prompts and of the two parts of a group, the backbone step and the patch.

    step    text and patches of R slots -> embed, backbone -> hidden -> text head, draw -> text
    patch   hidden of R slots -> 11 patch-decoder steps with draws -> codes -> encoder -> patches
    prompt  ids of up to T groups, slot and start -> embed, backbone -> keys and values, hidden

Steps and patches are captured once per batch size 1, 2, 4, ... B. Between replays only
`DecodeState` and the slot numbers change, both in device memory; positions, seeds, counters,
settings and banned ids are read there. A batch between two sizes is padded with the state's scratch
row, which appends nothing and whose results are ignored.

Prompts are captured once per length in `PROMPTS` and padded to the next length, so that a result
depends on length and start alone. Prefill is then two launches: the copy of ids and numbers to the
device, and the graph. Prompts are captured first; all graphs share the memory that the longest one
takes. A capture takes as long as three prompts.

With conditional graphs a third graph joins the two: the step, then the patch, which runs only if
one of the rows has drawn `<|empty|>`. A group is then one launch, no unused patch is computed, and
no patch waits for the host.

MIMO_FAST_NO_GRAPH=1 runs the same parts kernel by kernel. Graphs of prompts and joined graphs are
new paths (kernels/defaults.py).
"""

import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.kernels.cuda import graph_conditional
from mimo_fast.kernels.defaults import NewPath, enabled
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import NO_POSITION, DecodeState

ENVIRONMENT = "MIMO_FAST_NO_GRAPH"

PROMPTS = (32, 64, 128, 256, 512)
"""Lengths of captured prompts, in groups; longer prompts run in parts of the largest length."""

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


@dataclass
class CapturedPrompt:
    """One graph of a prompt of up to T groups.

    Attributes:
        inputs: Its input int64 [(C + 1) T G + 3] on the device: ids, slot, start, number of groups.
    """

    inputs: Tensor
    replay: Replay

    def run(self, ids: Tensor, slot: int, start: int) -> None:
        """Prefills ids [C + 1, n, G] from host memory, n at most T."""
        channels, groups, frames = ids.shape
        # Each run has its own buffer: the copy of the previous one may still be running.
        host = torch.zeros(
            len(self.inputs), dtype=torch.int64, pin_memory=self.inputs.is_cuda, device="cpu"
        )
        host[:-3].view(channels, -1, frames)[:, :groups] = ids
        host[-3], host[-2], host[-1] = slot, start, groups
        self.inputs.copy_(host, non_blocking=True)
        self.replay()


class Graphs:
    """The captured graphs of one state.

    Args:
        capture: makes a graph of a function; CUDA graphs by default.
        join: joins a step and a patch; by default conditional graphs, where they are available.
        prompts: whether prompts are captured; by default as `NewPath.PROMPT_GRAPHS` is enabled.
    """

    def __init__(
        self,
        lm: LM,
        state: DecodeState,
        capture: Capture | None = None,
        join: Join | None = None,
        prompts: bool | None = None,
    ) -> None:
        self._lm, self._state = lm, state
        if capture is None:
            joins = enabled(NewPath.CONDITIONAL_GRAPHS, lm.device) and graph_conditional.available()
            capture, join = CudaCapture(keep=joins), CudaJoined if joins else None
        self._capture, self._join = capture, join
        self._steps: dict[int, Captured] = {}
        self._patches: dict[int, Captured] = {}
        self._prompts: dict[int, CapturedPrompt] = {}
        default = enabled(NewPath.PROMPT_GRAPHS, lm.device)
        self.takes_prompts = default if prompts is None else prompts
        self._joined: dict[int, Joined] = {}

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

    @torch.no_grad()
    def warmup(self, progress: bool = True) -> None:
        """Captures all graphs, the largest first, so that smaller ones reuse its memory."""
        # tqdm shows the bar only on a terminal.
        show = None if progress else True
        total = 2 * len(self.buckets) + len(self.prompt_buckets)
        with tqdm(total=total, desc="capturing", unit="graph", leave=False, disable=show) as bar:
            for bucket in reversed(self.prompt_buckets):
                if bucket not in self._prompts:
                    self._prompts[bucket] = self._captured_prompt(bucket)
                bar.update(1)
            for bucket in reversed(self.buckets):
                if bucket not in self._patches:
                    step = self._steps[bucket] = self._captured(bucket, self._step)
                    indices = step.indices if self._join else None
                    self._patches[bucket] = self._captured(bucket, self._patch, indices)
                    self._join_both(bucket)
                bar.update(2)

    @property
    def conditional(self) -> bool:
        """Whether `group` can be used."""
        if self._join is not None and not self._joined:
            self.warmup(progress=False)
        return self._join is not None

    def group(self, slots: Sequence[int]) -> tuple[Callable[[], list[int]], Tensor]:
        """`step` and, if any of the slots draws `<|empty|>`, `patch`, in one launch.

        Returns:
            A function that waits for the slots' tokens, to be called before the next `group`, if at
            all; and a copy of the codes int64 [R, C, G], valid for slots that speak.
        """
        bucket, padded = self._padded(slots)
        both = self._joined[bucket]
        self._steps[bucket].indices.set(padded)
        both.launch()
        codes = self._patches[bucket].result[: len(slots)].clone()
        return lambda: both.wait()[: len(slots)], codes

    def step(self, slots: Sequence[int]) -> Tensor:
        """`LM.step` and `LM.sample_text` of these slots: int64 [R], valid until the next call."""
        return self._replay(self._steps, slots)

    def patch(self, slots: Sequence[int]) -> Tensor:
        """`LM.sample_patch` of these slots: a copy of the codes, int64 [R, C, G]."""
        return self._replay(self._patches, slots).clone()

    @torch.no_grad()
    def prefill(self, ids: Tensor, slot: int, start: int = 0) -> None:
        """`LM.prefill` of ids [C + 1, T G], by graphs if prompts are captured."""
        if not self.takes_prompts:
            self._lm.prefill(ids, self._state, slot, start)
            return
        buckets = self.prompt_buckets
        groups = ids.cpu().unflatten(1, (-1, self._lm.config.group_size))
        for part in groups.split(buckets[-1], dim=1):
            length = part.shape[1]
            bucket = next(size for size in buckets if size >= length)
            if bucket not in self._prompts:
                self._prompts[bucket] = self._captured_prompt(bucket)
            self._prompts[bucket].run(part, slot, start)
            start += length

    def _replay(self, graphs: dict[int, Captured], slots: Sequence[int]) -> Tensor:
        bucket, padded = self._padded(slots)
        return graphs[bucket].run(padded)[: len(slots)]

    def _padded(self, slots: Sequence[int]) -> tuple[int, list[int]]:
        """The batch size of the graph for these slots, and the slots padded to it."""
        bucket = next(size for size in self.buckets if size >= len(slots))
        if bucket not in self._patches:
            self.warmup(progress=False)
        return bucket, [*slots, *[self._state.slots] * (bucket - len(slots))]

    def _captured(
        self, bucket: int, work: Callable[[Tensor], Tensor], indices: SlotIndices | None = None
    ) -> Captured:
        indices = indices or SlotIndices([self._state.slots] * bucket, self._lm.device)
        replay, result = self._capture(lambda: work(indices.numbers))
        return Captured(indices, replay, result)

    def _join_both(self, bucket: int) -> None:
        if self._join is None:
            return
        step, patch = self._steps[bucket], self._patches[bucket]
        rows = step.result, step.indices.numbers, self._lm.empty_id, self._state.slots
        try:
            self._joined[bucket] = self._join(step.replay, patch.replay, *rows)
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without conditional graphs: {error}", stacklevel=2)
            self._join = None
            self._joined.clear()

    def _captured_prompt(self, bucket: int) -> CapturedPrompt:
        config = self._lm.config
        shape = (config.channels + 1, bucket, config.group_size)
        inputs = torch.zeros(math.prod(shape) + 3, dtype=torch.int64, device=self._lm.device)
        # The capture runs on the scratch row with no groups.
        inputs[-3], inputs[-2] = self._state.slots, NO_POSITION
        ids, place = inputs[:-3].view(shape), inputs[-3:]
        self._lm.backbone_rope  # noqa: B018
        replay, _ = self._capture(lambda: self._lm.prefill_padded(ids, place, self._state))
        return CapturedPrompt(inputs, replay)

    def _step(self, slots: Tensor) -> Tensor:
        state = self._state
        self._lm.step(state, slots)
        settings = state.text_sampler.select(slots)
        return self._lm.sample_text(state, slots, settings, state.banned[slots])

    def _patch(self, slots: Tensor) -> Tensor:
        return self._lm.sample_patch(self._state, slots, self._state.code_sampler.select(slots))


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
