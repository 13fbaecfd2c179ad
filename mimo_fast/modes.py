"""Torch's modes as this package computes in, and its current device, whatever its caller's are.

Default dtype and device need nothing: every tensor is made with both (`tests/test_modes.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def own_modes() -> Iterator[None]:
    """No gradients, no autocast, and outside of inference mode.

    Tensors of inference mode could not be changed after it, such as a KV cache that was allocated
    in it.
    """
    enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if torch.is_inference_mode_enabled() or enabled:
        # Nested blocks are entered only where they are needed: a group takes milliseconds.
        with torch.inference_mode(False), torch.no_grad():
            for kind in enabled:
                torch.set_autocast_enabled(kind, False)
            try:
                yield
            finally:
                for kind in enabled:
                    torch.set_autocast_enabled(kind, True)
    else:
        with torch.no_grad():
            yield


def on_device(device: torch.device | None) -> AbstractContextManager[object]:
    """Makes a GPU the current one: launches, streams and events belong to the current device,
    whatever tensors they concern."""
    if device is None or device.type != "cuda" or device.index is None:
        return nullcontext()
    return (
        nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    )


def in_own_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs in `own_modes`, on the device of its first arguments that have one."""

    @wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        # A method's object, or in a constructor what it is made for.
        found = (getattr(each, "device", None) for each in arguments[:2])
        device = next((each for each in found if isinstance(each, torch.device)), None)
        with on_device(device), own_modes():
            return function(*arguments, **named)

    return call
