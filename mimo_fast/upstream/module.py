"""`ModuleView`: what users call on a loaded `torch.nn.Module`, for one that is ready to run."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

View = TypeVar("View", bound="ModuleView")


class ModuleView:
    """Asked to stay what it is, it returns itself; it cannot be moved, cast or trained."""

    training = False

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names in a checkpoint; those of a quantized model are its scales."""
        raise NotImplementedError

    def parameters(self) -> Iterator[Tensor]:
        for _, tensor in self.named_parameters():
            yield tensor

    def eval(self: View) -> View:
        return self

    def train(self: View, mode: bool = True) -> View:
        """Raises ValueError unless mode is False."""
        if mode:
            raise ValueError("a loaded model cannot be trained: train upstream's and accelerate it")
        return self

    def requires_grad_(self: View, requires_grad: bool = True) -> View:
        """Raises ValueError unless requires_grad is False."""
        return self.train(requires_grad)

    def to(self: View, *places: Any, **named: Any) -> View:
        """Itself. Raises ValueError for another device or dtype."""
        for place in (*places, *(named.get(name) for name in ("device", "dtype"))):
            if isinstance(place, torch.dtype):
                if place != self.dtype:
                    name = str(place).removeprefix("torch.")
                    problem = f"it is loaded in {self.dtype}"
                    raise ValueError(f"{problem}: load it with dtype={name!r}")
            elif isinstance(place, str | torch.device | int) and not isinstance(place, bool):
                wanted = torch.device("cuda", place) if isinstance(place, int) else place
                if not self._is_on(torch.device(str(wanted))):
                    problem = f"it is loaded on {self.device}"
                    raise ValueError(f"{problem}: load it with device={str(wanted)!r}")
        return self

    def _is_on(self, device: torch.device) -> bool:
        return device.type == self.device.type and device.index in (None, self.device.index)

    def cpu(self: View) -> View:
        return self.to("cpu")

    def cuda(self: View, device: int | None = None) -> View:
        return self.to("cuda" if device is None else device)

    def bfloat16(self: View) -> View:
        return self.to(torch.bfloat16)

    def half(self: View) -> View:
        return self.to(torch.float16)

    def float(self: View) -> View:
        return self.to(torch.float32)
