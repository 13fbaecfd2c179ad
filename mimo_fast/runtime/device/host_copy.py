"""Asynchronous copies of results from the device to the host."""

import torch
from torch import Tensor

from mimo_fast.modes import on_device


class HostCopy:
    """A device-to-host copy that blocks neither side until `wait`.

    For a CPU tensor nothing is copied.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._event = tensor, None
        if tensor.is_cuda:
            # The caching allocator does not reuse pinned memory while a copy into it is running.
            self._there = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu"
            )
            # The event is one of the tensor's device, which need not be the current one.
            with on_device(tensor.device):
                self._there.copy_(tensor, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def wait(self) -> Tensor:
        """Blocks until the copy has finished and returns the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._there
