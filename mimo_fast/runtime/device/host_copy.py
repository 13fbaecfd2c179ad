"""Results of the device on their way to the host."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor that is copied to the host while the device, and the host, go on.

    On a CPU it is the tensor itself.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._there, self._event = tensor, None
        if tensor.is_cuda:
            # The caching allocator does not lend pinned memory again before a copy into it is done.
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor on the host, once the work before the copy is done."""
        if self._event is not None:
            self._event.synchronize()
        return self._there
