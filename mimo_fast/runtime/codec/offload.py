"""Transformer layers kept in host memory, for a stack that rarely runs: the codec's encoder."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mimo_fast.runtime.codec.layers import CodecLayer, CodecStack


class HostLayers:
    """Layers in host memory; each is copied to the device when it is used, and dropped after it.

    On CUDA they are pinned and copied on the current stream: the host does not wait, and the copies
    do not overlap with the computation. At most two layers are on the device at once.
    """

    def __init__(self, layers: tuple[CodecLayer, ...], device: torch.device) -> None:
        self._device = device
        self._layers = tuple(_map_tensors(layer, self._to_host) for layer in layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[CodecLayer]:
        for layer in self._layers:
            yield _map_tensors(layer, lambda tensor: tensor.to(self._device, non_blocking=True))

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = tensor.cpu()
        return host.pin_memory() if self._device.type == "cuda" else host


def offload(stack: CodecStack, device: torch.device) -> CodecStack:
    """The stack with its layers in host memory, unless they are there already."""
    if isinstance(stack.layers, HostLayers):
        return stack
    return replace(stack, layers=HostLayers((*stack.layers,), device))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dataclasses and tuples with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        parts = {name: _map_tensors(getattr(value, name), change) for name in names}
        return replace(value, **parts)
    return value
