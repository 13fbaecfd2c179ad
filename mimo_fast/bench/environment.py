"""The environment of a measurement, part of every record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mimo_fast
from mimo_fast.bench.machine import cpu_name, usable_cores

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "numpy")
ROOT = Path(mimo_fast.__file__).parent.parent

CARD = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
)
"""Fields that nvidia-smi is asked for; clocks in MHz, power limit in watts."""


def environment(device: torch.device | str, *, root: Path = ROOT) -> dict[str, Any]:
    """Date, device, driver, clocks, versions, commit and load, as JSON values.

    Clocks and load are the present ones: ask again for each record.

    Args:
        device: the measured device.
        root: where to look for a git checkout of this project.
    """
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _cpu() if device.type == "cpu" else _card(device),
        "packages": _packages(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
    } | _commit_at_start(root)


def commit(root: Path = ROOT) -> dict[str, Any]:
    """{"commit": hash, or None without a checkout; "dirty": whether the code differs from it}."""
    # An installed copy may lie in another project's checkout.
    if _git(root, "ls-files", "--error-unmatch", "mimo_fast/__init__.py") is None:
        return {"commit": None, "dirty": None}
    code = ("mimo_fast", "csrc", "training", "benchmarks", ":(exclude)benchmarks/results")
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--", *code)),
    }


@cache
def _commit_at_start(root: Path) -> dict[str, Any]:
    """The commit at import, since the code that runs is the one that was loaded."""
    return commit(root)


def _git(root: Path, *arguments: str) -> str | None:
    return _output(["git", "-C", str(root), *arguments])


def _output(command: list[str], timeout: float | None = None) -> str | None:
    """What a program writes; None where it fails."""
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    try:
        return subprocess.run(command, timeout=timeout, **how).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _packages() -> dict[str, str]:
    found = {"mimo-fast": mimo_fast.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> dict[str, Any]:
    return {
        "type": "cpu",
        "name": cpu_name(),
        "cores": usable_cores(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _card(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(device)
    about = {
        "type": "cuda",
        "name": card.name,
        "capability": f"sm_{card.major}{card.minor}",
        "memory": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    # CUDA_VISIBLE_DEVICES changes the index of a card, but not here.
    index = f"GPU-{card.uuid}" if hasattr(card, "uuid") else str(device.index or 0)
    what = [f"--query-gpu={','.join(CARD)}", "--format=csv,noheader,nounits", f"--id={index}"]
    tool = shutil.which("nvidia-smi")
    told = (tool and _output([tool, *what], timeout=10)) or ""
    values = [value.strip() for value in told.split(",")]
    return about | dict(zip(CARD[1:], values[1:], strict=False))
