"""Several processes that train one model: each takes its share of every batch.

Their gradients are averaged. Steps this small gain nothing from a second thread, but do from a
second process with half of the batch. The first process starts the others with its own command
line; it alone writes files and shows progress.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

RANK, STORE = "MIMO_FAST_TRAINING_RANK", "MIMO_FAST_TRAINING_STORE"
PATIENCE = timedelta(days=1)
"""Seconds that the others wait while the first makes the data."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_worker() -> bool:
    """Whether the first process started this one."""
    return RANK in os.environ


def share(count: int) -> int:
    """Share of a batch for each process."""
    return -(-count // dist.get_world_size()) if dist.is_initialized() else count


def seed_of(seed: int) -> int:
    """Seed of a process's own draws."""
    return seed + 1_000_000_007 * rank()


@contextmanager
def workers(count: int, arguments: Sequence[str]) -> Iterator[None]:
    """A context in which `count` processes run `python -m training` with these arguments."""
    if count == 1:
        yield
        return
    place = int(os.environ.get(RANK, 0))
    if place:
        with _group(Path(os.environ[STORE]), place, count):
            yield
        return
    with tempfile.TemporaryDirectory() as directory:
        store, command = Path(directory, "store"), [sys.executable, "-m", "training", *arguments]
        shared = os.environ | {STORE: str(store), "TQDM_DISABLE": "1"}
        started = [subprocess.Popen(command, env=shared | {RANK: str(i)}) for i in range(1, count)]
        try:
            with _group(store, 0, count):
                yield
        except BaseException:
            for process in started:
                process.terminate()
            raise
        finally:
            for process in started:
                process.wait()


@contextmanager
def _group(store: Path, place: int, count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=place, world_size=count, timeout=PATIENCE
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


def together() -> None:
    """Waits for every process, so what the first wrote before exists."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first() -> Iterator[None]:
    """The first process runs this block before the others, which then find its results."""
    if rank():
        together()
    yield
    if not rank():
        together()


def agreed(text: str) -> str:
    """The first process's text, in all of them."""
    texts = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(texts, 0)
    return texts[0]


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    flags = torch.tensor([float(flag)])
    if dist.is_initialized():
        dist.all_reduce(flags)
    return bool(flags)


@torch.no_grad()
def average_gradients(leaves: Sequence[Tensor]) -> None:
    """Replaces each leaf's gradient, if any process has one, by its mean over the processes."""
    if not dist.is_initialized():
        return
    present = torch.tensor([float(leaf.grad is not None) for leaf in leaves])
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    flat = torch.cat([present, *(gradient.flatten().cpu() for gradient in gradients)])
    dist.all_reduce(flat)
    _scatter(flat[len(leaves) :] / dist.get_world_size(), gradients)
    for leaf, gradient, count in zip(leaves, gradients, flat[: len(leaves)].tolist(), strict=True):
        leaf.grad = gradient if count else None


@torch.no_grad()
def follow(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by the first process's."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten().cpu() for tensor in tensors])
    dist.broadcast(flat, 0)
    _scatter(flat, tensors)


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, values in zip(tensors, parts, strict=True):
        tensor.copy_(values.view_as(tensor))
