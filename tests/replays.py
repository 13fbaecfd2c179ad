"""What stands in for CUDA graphs on a CPU."""

from collections.abc import Callable

from torch import Tensor

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
