"""What a piece of work took besides time: the peak of its memory, and energy where the driver
tells."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """The most memory in use since this object was made: of the device on a GPU, of the process on
    a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_resident_peak()

    @property
    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resident_peak()


def reset_resident_peak() -> bool:
    """Lets `resident_peak` count from now; False where the system does not allow it, and it counts
    from the start."""
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def resident_peak() -> int:
    """Bytes of the largest resident set of this process."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class EnergyMeter:
    """Joules that a GPU has drawn since this object was made, as NVML counts them.

    unmeasured: why there is no figure, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self.unmeasured: str | None = "only an NVIDIA driver tells"
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            self.unmeasured = "nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            self._began = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        # Old cards, parts of a card and some virtual machines have no counter.
        except pynvml.NVMLError as error:
            self.unmeasured = f"NVML: {error}"
            return
        self._nvml, self.unmeasured = pynvml, None

    @property
    def joules(self) -> float | None:
        if self._nvml is None:
            return None
        millijoules: int = (
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._began
        )
        return millijoules / 1000
