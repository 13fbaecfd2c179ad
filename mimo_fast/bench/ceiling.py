"""The measured ceiling of a device: the bandwidth and arithmetic that results are compared with.

    floor of an op = max(bytes / read bandwidth, FLOP / matmul rate)

read: a sum over 2 GB. copy: 1 GB to another place, counted twice. matmul rate: a square product, in
16-bit types where the device has instructions for them. Each is the best of several runs. Other
work on the machine lowers its ceiling. Integer products (integers.py) are no part of a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from mimo_fast.bench.integers import integer_peak
from mimo_fast.bench.timing import durations
from mimo_fast.kernels.matmul.cpu import multiplies

READ_BYTES = 2**31
COPY_BYTES = 2**30
RUNS = 5


@dataclass(frozen=True)
class Ceiling:
    """Bytes a second of reading and of copying (read + written), FLOP a second of a matmul.

    FLOP a second are given by dtype name. integers: products a second of 16-bit activations with
    integer weights; None where there are no such instructions.
    """

    read_Bps: float
    copy_Bps: float
    flops: dict[str, float]
    integers: float | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP a second for activations of a dtype.

        It is the rate of float32 where that is higher, since values may be widened.
        """
        single = self.flops[name_of(torch.float32)]
        return max(self.flops.get(name_of(dtype), single), single)

    def floor_seconds(
        self, nbytes: float, flop: float = 0, dtype: torch.dtype = torch.float32
    ) -> float:
        """The least time to read so many bytes and do so much arithmetic concurrently."""
        return max(nbytes / self.read_Bps, flop / self.rate(dtype))

    def bound(self, nbytes: float, flop: float, dtype: torch.dtype) -> str:
        """Which of the two limits it: "memory" or "arithmetic"."""
        return "memory" if nbytes / self.read_Bps >= flop / self.rate(dtype) else "arithmetic"

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in self.flops.items())
        read, copied = (f"{rate / 1e9:.1f} GB/s" for rate in (self.read_Bps, self.copy_Bps))
        integers = "" if self.integers is None else f"; integer G/s: {self.integers / 1e9:,.0f}"
        return f"ceiling: reads {read}, copies {copied}; GFLOP/s: {rates}{integers}"


def ceiling(device: torch.device | str) -> Ceiling:
    """The ceiling of this device at torch's present number of threads.

    Measured once a process, which takes some seconds on a CPU.
    """
    return _measured(torch.device(device), torch.get_num_threads())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _measured(device: torch.device, _threads: int) -> Ceiling:
    rates = {name_of(dtype): matmul_rate(device, dtype) for dtype in matmul_dtypes(device)}
    integers = integer_peak() if device.type == "cpu" else None
    return Ceiling(read_bandwidth(device), copy_bandwidth(device), rates, integers)


def matmul_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes that the device multiplies at their own rate.

    Others are widened, or multiplied element by element.
    """
    if device.type == "cuda":
        return torch.float32, torch.float16, torch.bfloat16
    return (torch.float32, torch.bfloat16) if multiplies(torch.bfloat16) else (torch.float32,)


def read_bandwidth(device: torch.device, nbytes: int = READ_BYTES) -> float:
    """Bytes a second of a sum over them."""
    # Written once, so that every page is allocated.
    data = torch.ones(nbytes // 8, dtype=torch.float64, device=device)
    return nbytes / _best(data.sum, device)


def copy_bandwidth(device: torch.device, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(nbytes // 4, device=device, dtype=torch.float32)
    target = torch.ones_like(source)
    return 2 * nbytes / _best(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP a second of a square product, by default of 1024 on a CPU and 8192 elsewhere."""
    size = size or (1024 if device.type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)
    # Random: zeros draw less power, and clocks follow it.
    x, y = (
        torch.randn(size, size, device=device, generator=generator, dtype=torch.float32).to(dtype)
        for _ in range(2)
    )
    return 2 * size**3 / _best(lambda: x @ y.T, device)


def _best(call: Callable[[], object], device: torch.device) -> float:
    return min(durations(call, device, seconds=0, min_runs=RUNS, max_runs=RUNS))
