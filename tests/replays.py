"""What stands in for CUDA graphs on a CPU, and for a codec that is too large for native layers."""

import copy
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from mimo_fast.runtime.codec.layers import LayerByLayer
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.pools import CodecPools
from mimo_fast.runtime.lm.graphs import Capture, Run


def repeated(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A stand-in for a CUDA graph: each replay runs the work, with its result at a fixed place."""
    result = run().clone()

    def replay() -> None:
        result.copy_(run())

    return replay, result


class Counted:
    """A capture that counts its graphs and their replays."""

    def __init__(self, capture: Capture = repeated) -> None:
        self._capture = capture
        self.captures = self.replays = 0

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        again, result = self._capture(run)

        def replay() -> None:
            self.replays += 1
            again()

        return replay, result


def layered(codec: Codec) -> Codec:
    """A copy that computes streams in torch, as a large codec or one on a GPU does."""
    codec = copy.copy(codec)
    codec.pools, codec.calls = CodecPools(), 0
    for part in ("decoder", "vocoder"):
        stack = replace(getattr(codec, part))
        stack.__dict__["executor"] = LayerByLayer(stack)
        setattr(codec, part, stack)
    return codec
