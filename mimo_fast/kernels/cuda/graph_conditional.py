"""A CUDA graph whose second part runs only where the first has drawn a given token.

The node is made by csrc/cuda/graph_conditional.cu.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor

from mimo_fast.kernels.cuda.library import library

_PREFIX = "mimo_fast_conditional_"


@cache
def _functions() -> ctypes.CDLL | None:
    """The library with its argument types declared; None where it lacks the functions."""
    loaded = library()
    return None if loaded is None or not hasattr(loaded, f"{_PREFIX}create") else declared(loaded)


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of these functions in a library, and returns it."""
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, arguments in (
        ("supported", []),
        ("create", [pointer] * 5 + [number] * 2 + [pointer] * 2 + [integer]),
        ("launch", [pointer] * 2),
        ("wait", [pointer]),
        ("destroy", [pointer]),
    ):
        function = getattr(loaded, _PREFIX + name)
        function.argtypes, function.restype = arguments, integer
    return loaded


@cache
def available() -> bool:
    """Whether the library, the driver (CUDA 12.4) and torch (2.8, which exposes graphs) can."""
    loaded = _functions()
    shown = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph")
    return shown and loaded is not None and getattr(loaded, f"{_PREFIX}supported")() == 0


class ConditionalGraph:
    """A graph that draws tokens and, if one of them is `empty`, runs a second graph.

    Args:
        first, then: `cudaGraph_t` of the two as integers. They are cloned; the caller keeps the
            tensors that they use.
        tokens: int64 [N], written by `first`.
        slots: int64 [N]; tokens of rows in slot `scratch` are ignored.
        loaded: another build of the library than the package's.

    Raises:
        RuntimeError: CUDA refused to make it.
    """

    def __init__(
        self,
        first: int,
        then: int,
        tokens: Tensor,
        slots: Tensor,
        empty: int,
        scratch: int,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        found = _functions() if loaded is None else loaded
        assert found is not None
        self._library, self._device, self._launches = found, tokens.device, 0
        self._tokens, self._slots = tokens, slots
        self._count = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self._host = torch.zeros(
            len(tokens) + 1, dtype=torch.int64, pin_memory=tokens.is_cuda, device="cpu"
        )
        if tokens.is_cuda:
            # Whatever stream it is launched on finds the count at zero.
            torch.cuda.current_stream(tokens.device).synchronize()
        handle = ctypes.c_void_p()
        where = (x.data_ptr() for x in (tokens, slots))
        kept = (x.data_ptr() for x in (self._host, self._count))
        error = found.mimo_fast_conditional_create(
            ctypes.byref(handle), first, then, *where, empty, scratch, *kept, len(tokens)
        )
        _check(error, "to make a conditional graph")
        self._handle = handle
        # What the host writes and reads lives as long as the graph.
        self._destroy = weakref.finalize(
            self, _destroy, found, handle, self._host, self._count, tokens, slots
        )
        self._destroy.atexit = False

    def launch(self) -> None:
        """Launches it on the current stream.

        Raises:
            RuntimeError: the device refused the launch.
        """
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        error = self._library.mimo_fast_conditional_launch(self._handle, stream)
        _check(error, "a conditional graph")
        self._launches += 1

    def wait(self) -> list[int]:
        """The tokens [N] of the last launch, once they are drawn; the second graph may still run.

        Raises:
            RuntimeError: the device failed.
        """
        _check(self._library.mimo_fast_conditional_wait(self._handle), "to draw tokens")
        if int(self._host[-1]) != self._launches and self._device.type == "cuda":
            # The event was an earlier launch's. No driver is known to do so; a wrong token would
            # not be noticed.
            torch.cuda.current_stream(self._device).synchronize()
        *tokens, launches = self._host.tolist()
        if launches != self._launches:
            raise RuntimeError(
                f"the GPU has run {launches} of {self._launches} launches of a graph"
            )
        return tokens


def _destroy(loaded: ctypes.CDLL, handle: ctypes.c_void_p, *_kept: Tensor) -> None:
    loaded.mimo_fast_conditional_destroy(handle)


def _check(error: int, what: str) -> None:
    if error:
        raise RuntimeError(f"the GPU refused {what}: CUDA error {error}")
