"""CUDA graphs of the two pieces of a group: the backbone step with its text draw, the patch decoder
with its encoder; and of prompts.

    step   text and patches of R slots -> embed, backbone, hidden -> text head and draw -> text
    patch  hidden of R slots -> 11 patch-decoder steps with their draws -> codes -> patch encoder
           -> patches
    prompt ids of up to T groups, their slot and start -> embed, backbone -> keys and values, hidden

Steps and patches are captured once per batch size 1, 2, 4, ... B and replayed with nothing but
`DecodeState` and the slot numbers changing, both in device memory: positions, seeds, counters,
settings and banned ids are read there. A batch between two sizes is padded with the state's scratch
row, for which nothing is appended and whose results go nowhere.

Prompts are captured once per length of `PROMPTS` and padded to the next, so that a result follows
from length and start alone. The ids and numbers of a prompt are one copy to the device, the graph
is the second launch. Prompts are captured first; all graphs share the memory that one of the
greatest length takes. A capture takes as long as three prompts.

Where conditional graphs are to be had, a third is made of the two: the step, and behind it the
patch, which runs only if one of the rows has drawn `<|empty|>`. Then a group is one launch, no
patch is computed in vain, and none waits for the host.

MIMO_FAST_NO_GRAPH=1 runs the same pieces one kernel at a time. Prompts and joined graphs are new
paths (kernels/defaults.py).
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
"""Groups of a prompt that is captured. Longer ones are computed in parts of the greatest."""

Run = Callable[[], Tensor]
Replay = Callable[[], None]
Capture = Callable[[Run], tuple[Replay, Tensor]]
"""Work on fixed tensors -> what repeats it, and the tensor where its result then lies."""


class Joined(Protocol):
    """A step and the patch that follows it where a row speaks, as one launch."""

    def launch(self) -> None: ...

    def wait(self) -> list[int]:
        """The tokens of the last launch, the batch's padding included, as soon as they are
        drawn."""
        ...


Join = Callable[[Replay, Replay, Tensor, Tensor, int, int], Joined]
"""(step, patch, the step's tokens [bucket], slots [bucket], the token of those that speak, the slot
that pads a batch) -> both as one. Raises RuntimeError where it cannot be made."""


def wanted(device: torch.device) -> bool:
    """Whether a model on this device should decode with graphs."""
    return device.type == "cuda" and os.environ.get(ENVIRONMENT, "") in ("", "0")


class SlotIndices:
    """Slot numbers [bucket] on the device that graphs read, and what they are."""

    def __init__(self, slots: list[int], device: torch.device) -> None:
        self.numbers, self._current = torch.tensor(slots, device=device), slots

    def set(self, slots: list[int]) -> None:
        if slots != self._current:
            numbers = torch.tensor(slots)
            self.numbers.copy_(
                numbers.pin_memory() if self.numbers.is_cuda else numbers, non_blocking=True
            )
            self._current = slots


@dataclass(frozen=True)
class Captured:
    """One graph: the slots that it reads, and where its result lies [bucket, ...]."""

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

    inputs int64 [(C + 1) T G + 3] on the device: ids, then slot, start and the number of groups.
    """

    inputs: Tensor
    replay: Callable[[], None]

    def run(self, ids: Tensor, slot: int, start: int) -> None:
        """ids [C + 1, n, G] in host memory, n at most T."""
        channels, groups, frames = ids.shape
        # A buffer of its own for each run: the copy of the one before may be under way.
        host = torch.zeros(len(self.inputs), dtype=torch.int64, pin_memory=self.inputs.is_cuda)
        host[:-3].view(channels, -1, frames)[:, :groups] = ids
        host[-3], host[-2], host[-1] = slot, start, groups
        self.inputs.copy_(host, non_blocking=True)
        self.replay()


class Graphs:
    """The captured pieces of one state.

    Args:
        capture: how work becomes a graph; CUDA's by default.
        join: how a step and a patch become one; with CUDA's graphs by default what is there.
        prompts: whether prompts are captured; what the environment says by default.
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
            capture, join = CudaCapture(keep=joins), joined if joins else None
        self._capture, self._join = capture, join
        self._steps: dict[int, Captured] = {}
        self._patches: dict[int, Captured] = {}
        self._prompts: dict[int, CapturedPrompt] = {}
        self.takes_prompts = (
            enabled(NewPath.PROMPT_GRAPHS, lm.device) if prompts is None else prompts
        )
        self._joined: dict[int, Joined] = {}

    @property
    def buckets(self) -> list[int]:
        """Batch sizes that get a graph: the powers of two below the number of slots, and that
        number."""
        slots = self._state.slots
        return [*(1 << i for i in range((slots - 1).bit_length())), slots]

    @property
    def prompt_buckets(self) -> list[int]:
        """Lengths of prompts that get a graph: those up to the first that holds a whole slot."""
        if not self.takes_prompts:
            return []
        enough = next((size for size in PROMPTS if size >= self._state.capacity), PROMPTS[-1])
        return [size for size in PROMPTS if size <= enough]

    @torch.no_grad()
    def warmup(self, progress: bool = True) -> None:
        """Captures everything, the largest first, so that smaller ones fit into its memory."""
        # On a terminal only.
        show = None if progress else True
        total = 2 * len(self.buckets) + len(self.prompt_buckets)
        with tqdm(total=total, desc="capturing", unit="graph", leave=False, disable=show) as bar:
            for bucket in reversed(self.prompt_buckets):
                if bucket not in self._prompts:
                    self._prompts[bucket] = self._captured_prompt(bucket)
                bar.update(1)
            for bucket in reversed(self.buckets):
                if bucket not in self._patches:
                    step = self._captured(bucket, self._step)
                    indices = step.indices if self._join else None
                    self._steps[bucket] = step
                    self._patches[bucket] = self._captured(bucket, self._patch, indices)
                    self._join_both(bucket)
                bar.update(2)

    @property
    def conditional(self) -> bool:
        """Whether there is `group`."""
        if self._join is not None and not self._joined:
            self.warmup(progress=False)
        return self._join is not None

    def group(self, slots: Sequence[int]) -> tuple[Callable[[], list[int]], Tensor]:
        """`step` and, if any of the slots draws `<|empty|>`, `patch`, in one launch.

        Returns:
            What waits for the tokens of the slots, to be called before the next call of this, if at
            all; and codes int64 [R, C, G], the caller's own, to be used of slots that speak.
        """
        bucket, padded = self._padded(slots)
        both = self._joined[bucket]
        self._steps[bucket].indices.set(padded)
        both.launch()
        codes = self._patches[bucket].result[: len(slots)].clone()
        return lambda: both.wait()[: len(slots)], codes

    def step(self, slots: Sequence[int]) -> Tensor:
        """`LM.step` and `LM.sample_text` of these slots: text int64 [R], valid until the next
        call."""
        return self._replay(self._steps, slots)

    def patch(self, slots: Sequence[int]) -> Tensor:
        """`LM.sample_patch` of these slots: codes int64 [R, C, G], the caller's own."""
        return self._replay(self._patches, slots).clone()

    @torch.no_grad()
    def prefill(self, ids: Tensor, slot: int, start: int = 0) -> None:
        """`LM.prefill` of ids [C + 1, T G], as graphs where prompts have some."""
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
        """The size of the graphs for so many slots, and the slots of its batch."""
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
        numbers, empty, scratch = step.indices.numbers, self._lm.empty_id, self._state.slots
        try:
            self._joined[bucket] = self._join(
                step.replay, patch.replay, step.result, numbers, empty, scratch
            )
        except RuntimeError as error:
            warnings.warn(f"decoding goes on without conditional graphs: {error}", stacklevel=2)
            self._join = None
            self._joined.clear()

    def _captured_prompt(self, bucket: int) -> CapturedPrompt:
        config = self._lm.config
        shape = (config.channels + 1, bucket, config.group_size)
        inputs = torch.zeros(math.prod(shape) + 3, dtype=torch.int64, device=self._lm.device)
        # Nothing, for the scratch row.
        inputs[-3], inputs[-2] = self._state.slots, NO_POSITION
        ids, place = inputs[:-3].view(shape), inputs[-3:]
        self._lm.backbone_rope  # noqa: B018
        replay, _ = self._capture(lambda: self._lm.prefill_padded(ids, place, self._state))
        return CapturedPrompt(inputs, replay)

    def _step(self, slots: Tensor) -> Tensor:
        state = self._state
        self._lm.step(state, slots)
        return self._lm.sample_text(
            state, slots, state.text_sampler.select(slots), state.banned[slots]
        )

    def _patch(self, slots: Tensor) -> Tensor:
        return self._lm.sample_patch(self._state, slots, self._state.code_sampler.select(slots))


@dataclass(frozen=True)
class CudaReplay:
    """Launches a captured graph."""

    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


class CudaCapture:
    """Records work into a CUDA graph; all graphs share one pool of memory, since no two run at
    once.

    Args:
        keep: whether the graph can be made a part of another; it is then made ready to run alone
            when it first does so.
    """

    _underway = threading.Lock()
    """A process may capture one graph at a time."""

    def __init__(self, keep: bool = False) -> None:
        self._pool: Any = None
        self._keep = keep

    def __call__(self, run: Run) -> tuple[Replay, Tensor]:
        with self._underway:
            return self._captured(run)

    def _captured(self, run: Run) -> tuple[Replay, Tensor]:
        # Kernels are compiled and libraries set up outside the capture, which forbids both.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True) if self._keep else torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use the device meanwhile, and what they allocate does not belong to the
        # graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return CudaReplay(graph), result


class CudaJoined:
    """Two captured graphs as one, which keeps their memory."""

    def __init__(
        self,
        step: CudaReplay,
        patch: CudaReplay,
        tokens: Tensor,
        slots: Tensor,
        empty: int,
        scratch: int,
    ) -> None:
        self._parts = step, patch
        first, then = step.graph.raw_cuda_graph(), patch.graph.raw_cuda_graph()
        graph = graph_conditional.ConditionalGraph(first, then, tokens, slots, empty, scratch)
        self.launch, self.wait = graph.launch, graph.wait


def joined(
    step: Replay, patch: Replay, tokens: Tensor, slots: Tensor, empty: int, scratch: int
) -> Joined:
    """The step and the patch that `CudaCapture(keep=True)` has captured."""
    assert isinstance(step, CudaReplay)
    assert isinstance(patch, CudaReplay)
    return CudaJoined(step, patch, tokens, slots, empty, scratch)
