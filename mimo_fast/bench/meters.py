"""Peak memory and energy of a piece of work."""

from __future__ import annotations

import resource
import shutil
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class PeakMemory:
    """Peak memory since this object was made: the device's on a GPU, the process's on a CPU."""

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
    """Restarts the count of `resident_peak`.

    False where the system does not allow it; then it counts from the start of the process.
    """
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
    """Joules that a GPU has drawn since this object was made.

    source: where the figure comes from: NVML's energy counter or, without nvidia-ml-py or on cards
        without that counter, nvidia-smi's power integrated over time.
    unmeasured: why there is no figure, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.source: str | None = None
        self.unmeasured: str | None = "only an NVIDIA driver tells"
        self._read: Callable[[], float | None] = lambda: None
        if device.type != "cuda":
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self.unmeasured = self._count(uuid)
        if self.unmeasured is not None and (tool := shutil.which("nvidia-smi")) is not None:
            self._read = PowerLog(tool, uuid).joules
            self.source, self.unmeasured = "power by nvidia-smi", None

    def _count(self, uuid: str) -> str | None:
        """Why NVML's counter cannot be used, or None."""
        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is not installed"
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            began = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        # Old cards, MIG instances and some virtual machines have no counter.
        except pynvml.NVMLError as error:
            return f"NVML: {error}"
        count = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._read, self.source = lambda: (count(handle) - began) / 1000, "NVML's counter"
        return None

    @property
    def joules(self) -> float | None:
        return self._read()


class PowerLog:
    """nvidia-smi in a process, which writes the card's power several times a second."""

    EVERY_MS = 50

    def __init__(self, tool: str, uuid: str) -> None:
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        command = [tool, f"--id={uuid}", *query, f"--loop-ms={self.EVERY_MS}"]
        self._began = perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        # The process ends with this object, even if the measurement fails.
        weakref.finalize(self, self._process.kill)

    def joules(self) -> float | None:
        """Mean power times the seconds since the beginning; None where none was written.

        Ends the process.
        """
        seconds = perf_counter() - self._began
        self._process.terminate()
        written, _ = self._process.communicate()
        watts = [float(line) for line in written.split() if line.replace(".", "", 1).isdigit()]
        return seconds * sum(watts) / len(watts) if watts else None
