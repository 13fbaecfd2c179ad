"""Torch's modes as this package computes in, whatever its caller's are.

Default dtype and device need nothing: every tensor is made with both (`tests/test_modes.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def in_own_modes(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function that runs in `own_modes`."""

    @wraps(function)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        with own_modes():
            return function(*arguments, **named)

    return call
