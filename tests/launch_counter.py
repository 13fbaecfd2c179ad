"""Counts launches: Triton kernels by name, and torch ops that compute or copy."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


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
