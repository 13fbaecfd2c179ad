"""One training run: steps, learning rate, progress, and a state on disk to resume from.

A resumed run is the same as one that never stopped: the input of a step is a function of the seed,
the step's number and the process alone. The state is written atomically every `SAVE_EVERY` steps,
at the end, and on Ctrl-C; `<name>.jsonl` beside it has the losses.
"""

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from mimo_fast.errors import CheckpointError

from . import parallel
from .data import save_whole
from .parameters import Tensors

SAVE_EVERY = 200
WARMUP = 100
FINAL_SHARE = 0.02
"""Factor of the learning rate at the last step."""

MAX_GRADIENT = 1.0
SMOOTHING = 0.95
"""Decay of the moving average of the displayed losses."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""State entries of the optimizers in a saved state."""

ORTHOGONAL = re.compile(r"layers\..*weight$")
"""Leaves that Muon updates where they are matrices; AdamW updates all others."""

NEWTON_SCHULZ_STEPS = 3
"""Iterations of Muon: two fewer than usual, which saves a tenth of a step at these sizes."""

Losses = dict[str, Tensor | float]


@dataclass(frozen=True)
class Schedule:
    """Number of steps and learning rate."""

    steps: int
    rate: float
    validate_every: int = 500
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01


class Run:
    """A run in a directory.

    Args:
        trained: leaves for the optimizer.
        fixed: everything else that the state must hold.
    """

    def __init__(
        self, directory: Path, name: str, trained: Tensors, fixed: Tensors, schedule: Schedule
    ) -> None:
        self.directory, self.name, self.schedule = directory, name, schedule
        self.trained, self.fixed, self.step = trained, fixed, 0
        self.optimizers = optimizers_of(trained, schedule)
        self._states = {
            leaf: each.state
            for each in self.optimizers
            for group in each.param_groups
            for leaf in group["params"]
        }
        directory.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            self._restore()

    @property
    def state_path(self) -> Path:
        return self.directory / f"{self.name}.safetensors"

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.steps

    def train(
        self, losses_of: Callable[[int], Losses], validate: Callable[[], dict[str, float]]
    ) -> None:
        """Runs the remaining steps.

        losses_of(step) gives "loss", which is minimized, and others to be displayed.

        Raises:
            KeyboardInterrupt: after the state was saved.
        """
        shown: dict[str, float] = {}
        checked: dict[str, float] = {}
        steps = {"total": self.schedule.steps, "initial": self.step, "unit": "step"}
        bar = tqdm(desc=self.name, smoothing=0.05, **steps)
        with bar, _interruptible() as stopped:
            while not self.finished:
                began = time.perf_counter()
                losses = self._advance(losses_of)
                stop = parallel.any_of(bool(stopped))
                if parallel.rank():
                    if stop:
                        raise KeyboardInterrupt
                    continue
                for name, value in losses.items():
                    shown[name] = SMOOTHING * shown.get(name, value) + (1 - SMOOTHING) * value
                if self.step % self.schedule.validate_every == 0 or self.finished:
                    checked = {f"valid_{name}": value for name, value in validate().items()}
                    self._log({"step": self.step, **checked})
                seconds = round(time.perf_counter() - began, 3)
                self._log({"step": self.step, "seconds": seconds, **losses})
                bar.update(1)
                texts = [f"{name} {value:.3f}" for name, value in (shown | checked).items()]
                bar.set_postfix_str(" ".join(texts))
                if stop or self.finished or self.step % SAVE_EVERY == 0:
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        parallel.together()

    def _advance(self, losses_of: Callable[[int], Losses]) -> dict[str, float]:
        rate = self._rate()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        losses = losses_of(self.step)
        losses["loss"].backward()  # type: ignore[union-attr]
        parallel.average_gradients([*self.trained.values()])
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT)
        if norm.isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        losses["gradient"] = norm
        return {name: float(torch.as_tensor(value).detach()) for name, value in losses.items()}

    def _rate(self) -> float:
        schedule, share = self.schedule, self.step / self.schedule.steps
        cosine = FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * share)) / 2
        return schedule.rate * cosine * min(1.0, (self.step + 1) / WARMUP)

    def save(self) -> None:
        """Writes weights, everything fixed, and the optimizer's moments, atomically."""
        moments = Tensors()
        for name, leaf in self.trained.items():
            state = self._states[leaf].get(leaf, {})
            moments |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
        save_state(self.state_path, self.trained | self.fixed, self.step, moments)

    def _restore(self) -> None:
        with safe_open(self.state_path, framework="pt") as file:
            names = set(file.keys())
            expected = {f"tensor.{name}" for name in (*self.trained, *self.fixed)}
            if missing := expected - names:
                lacking = f"{len(missing)} tensors of this model ({min(missing)})"
                raise CheckpointError(f"{self.state_path} lacks {lacking}: delete it to start anew")
            self.step = int(file.metadata()["step"])
            with torch.no_grad():
                for name, tensor in (self.trained | self.fixed).items():
                    tensor.copy_(file.get_tensor(f"tensor.{name}"))
            for name, leaf in self.trained.items():
                saved = {}
                for moment in MOMENTS:
                    if (key := f"{moment}.{name}") in names:
                        device = "cpu" if moment == "step" else leaf.device
                        saved[moment] = file.get_tensor(key).to(device)
                if saved:
                    self._states[leaf][leaf] = saved

    def _log(self, record: dict[str, Any]) -> None:
        with open(self.directory / f"{self.name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({key: round(v, 5) for key, v in record.items()}) + os.linesep)


def optimizers_of(trained: Tensors, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon (kellerjordan.github.io/posts/muon) for the layers' matrices, AdamW for the rest."""
    layers, matrices, vectors = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, leaf in trained.items():
        orthogonal = leaf.ndim == 2 and ORTHOGONAL.search(name)
        (layers if orthogonal else matrices if leaf.ndim > 1 else vectors).append(leaf)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    usual = {"lr": schedule.rate, "weight_decay": schedule.weight_decay}
    # Its steps are as large as AdamW's.
    muon = {"ns_steps": NEWTON_SCHULZ_STEPS, "adjust_lr_fn": "match_rms_adamw"}
    return [
        torch.optim.Muon(layers, **usual, **muon),
        torch.optim.AdamW(groups, betas=schedule.betas, foreach=True, **usual),
    ]


def save_state(path: Path, tensors: Tensors, step: int, moments: Tensors | None = None) -> None:
    """Writes the state from which a `Run` resumes, atomically."""
    state = {f"tensor.{name}": tensor.detach() for name, tensor in tensors.items()}
    state |= moments or {}
    stored = {name: tensor.contiguous() for name, tensor in state.items()}
    save_whole(path, stored, {"step": str(step)})


def trained_tensors(directory: Path, name: str) -> Tensors:
    """The tensors of a run's saved state.

    Raises:
        CheckpointError: there is none.
    """
    path = directory / f"{name}.safetensors"
    if not path.exists():
        command = f"python -m training {name.split('-')[0]}"
        raise CheckpointError(f"{path} is missing: run `{command}` first")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("tensor.")]  # noqa: SIM118
        return {name.removeprefix("tensor."): file.get_tensor(name) for name in names}


@contextmanager
def _interruptible() -> Any:
    """A list that Ctrl-C or a termination request fills; a second Ctrl-C stops at once."""
    stopped: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
