"""Counts launches: Triton kernels by name, and torch ops that compute or copy."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Launches(TorchDispatchMode):
    """Names of Triton kernels launched, and "torch.<op>" of torch ops that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = all(
            result.alias_info and not result.alias_info.is_write for result in func._schema.returns
        )
        if not (views or "empty" in name):
            self.names.append(f"torch.{name}")
        return func(*args, **(kwargs or {}))


class HostLaunches(TorchDispatchMode):
    """What the host asks of the device: ops on the device's tensors, and replays.

    On a CPU the device is the memory of given tensors, and what is computed from it; the rest is
    the host's. `unwatched` makes the replay of a stand-in for a graph one launch, as of a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._device: set[int] = set()
        self._alive: list[Tensor] = []

    def owns(self, *tensors: Tensor) -> None:
        """Says that tensors lie on the device."""
        for tensor in tensors:
            self._device.add(tensor.untyped_storage().data_ptr())
            # No other tensor may get the same memory.
            self._alive.append(tensor)

    def unwatched(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = run().clone()
        self.owns(result)

        def replay() -> None:
            self.names.append("graph")
            with _disable_current_modes():
                result.copy_(run())

        return replay, result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.untyped_storage().data_ptr() in self._device for x in tensors):
            return result
        name = func.overloadpacket.__name__
        views = all(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not (views or "empty" in name):
            self.names.append(name)
            # What an op makes of the device's memory stays there, but for a copy to the host.
            if name not in ("copy_", "clone"):
                self.owns(*[x for x in tree_leaves(result) if isinstance(x, Tensor)])
        return result
