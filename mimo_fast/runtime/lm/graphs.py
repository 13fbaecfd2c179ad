"""CUDA graphs of the two pieces of a group: the backbone step with its text draw, the patch decoder
with its encoder.

    step   text and patches of R slots -> embed, backbone, hidden -> text head and draw -> text
    patch  hidden of R slots -> 11 patch-decoder steps with their draws -> codes -> patch encoder -> patches

Each is captured once per batch size 1, 2, 4, ... B and replayed with nothing but `DecodeState` and
the slot numbers
changing, both in device memory: positions, seeds, counters, settings and banned ids are read there.
A batch between two sizes is padded with the state's scratch row, for which nothing is appended and
whose results go nowhere.

MIMO_FAST_NO_GRAPH=1 runs the same pieces one kernel at a time.
"""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import DecodeState

ENVIRONMENT = "MIMO_FAST_NO_GRAPH"

Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]
"""Work on fixed tensors -> what repeats it, and the tensor where its result then lies."""


def wanted(device: torch.device) -> bool:
    """Whether a model on this device should decode with graphs."""
    return device.type == "cuda" and os.environ.get(ENVIRONMENT, "") in ("", "0")


@dataclass
class Captured:
    """One graph: its slot numbers [bucket] on the device, what they are, and where its result lies
    [bucket, ...]."""

    slots: Tensor
    current: list[int]
    replay: Callable[[], None]
    result: Tensor

    def run(self, slots: list[int]) -> Tensor:
        if slots != self.current:
            numbers = torch.tensor(slots)
            self.slots.copy_(
                numbers.pin_memory() if self.slots.is_cuda else numbers, non_blocking=True
            )
            self.current = slots
        self.replay()
        return self.result


class Graphs:
    """The captured pieces of one state.

    Args:
        capture: how work becomes a graph; CUDA's by default.
    """

    def __init__(self, lm: LM, state: DecodeState, capture: Capture | None = None) -> None:
        self._lm, self._state = lm, state
        self._capture = capture or CudaCapture()
        self._steps: dict[int, Captured] = {}
        self._patches: dict[int, Captured] = {}

    @property
    def buckets(self) -> list[int]:
        """Batch sizes that get a graph: the powers of two below the number of slots, and that
        number."""
        slots = self._state.slots
        return [*(1 << i for i in range((slots - 1).bit_length())), slots]

    @torch.no_grad()
    def warmup(self, progress: bool = True) -> None:
        """Captures everything, the largest batch first, so that smaller ones fit into its
        memory."""
        # On a terminal only.
        show = None if progress else True
        with tqdm(
            total=2 * len(self.buckets), desc="capturing", unit="graph", leave=False, disable=show
        ) as bar:
            for bucket in reversed(self.buckets):
                for graphs, work in ((self._steps, self._step), (self._patches, self._patch)):
                    if bucket not in graphs:
                        graphs[bucket] = self._captured(bucket, work)
                    bar.update(1)

    def step(self, slots: Sequence[int]) -> Tensor:
        """`LM.step` and `LM.sample_text` of these slots: text int64 [R], valid until the next
        call."""
        return self._replay(self._steps, slots)

    def patch(self, slots: Sequence[int]) -> Tensor:
        """`LM.sample_patch` of these slots: codes int64 [R, C, G], the caller's own."""
        return self._replay(self._patches, slots).clone()

    def _replay(self, graphs: dict[int, Captured], slots: Sequence[int]) -> Tensor:
        bucket = next(size for size in self.buckets if size >= len(slots))
        if bucket not in graphs:
            self.warmup(progress=False)
        padding = [self._state.slots] * (bucket - len(slots))
        return graphs[bucket].run([*slots, *padding])[: len(slots)]

    def _captured(self, bucket: int, work: Callable[[Tensor], Tensor]) -> Captured:
        scratch = [self._state.slots] * bucket
        slots = torch.tensor(scratch, device=self._lm.device)
        replay, result = self._capture(lambda: work(slots))
        return Captured(slots, scratch, replay, result)

    def _step(self, slots: Tensor) -> Tensor:
        state = self._state
        self._lm.step(state, slots)
        return self._lm.sample_text(
            state, slots, state.text_sampler.select(slots), state.banned[slots]
        )

    def _patch(self, slots: Tensor) -> Tensor:
        return self._lm.sample_patch(self._state, slots, self._state.code_sampler.select(slots))


class CudaCapture:
    """Records work into a CUDA graph; all graphs share one pool of memory, since no two run at
    once."""

    _underway = threading.Lock()
    """A process may capture one graph at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        with self._underway:
            return self._captured(run)

    def _captured(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        # Kernels are compiled and libraries set up outside the capture, which forbids both.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use the device meanwhile, and what they allocate does not belong to the
        # graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result
