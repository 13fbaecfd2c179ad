"""`Request`: one reply in progress, as the engine schedules it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import OutOfMemoryError, Tensor

from mimo_fast.errors import DeviceMemoryError
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.lm.decode import Group, Limits, Row, Samplers

StopHook = Callable[[int, Tensor], bool]
"""A callable (text token, codes [C, G]) of a new group -> whether the reply ends with it."""


@dataclass(eq=False)
class Request:
    """One reply in progress.

    Args:
        ahead: groups decoded ahead of the consumer at most; None for no limit.

    Attributes:
        row: Its row, from the end of the prefill on.
        ready: Groups decoded and not yet taken.
        taken: Number of groups taken by the consumer.
        done: Nothing more will be decoded.
        settled: The sequence has been brought up to the groups taken.
        error: The reason why it ended early.
        launching: Its consumer waits for a group, or holds one whose codec work it has yet to
            launch.
    """

    sequence: TokenSequence
    limits: Limits
    samplers: Samplers
    stop_hook: StopHook | None
    ahead: int | None
    row: Row | None = None
    ready: deque[Group] = field(default_factory=deque)
    taken: int = 0
    done: bool = False
    settled: bool = False
    error: BaseException | None = None
    launching: bool = False

    @property
    def runnable(self) -> bool:
        """Whether the engine may compute something for it now."""
        return not self.done and (self.ahead is None or len(self.ready) < self.ahead)

    def begin(self) -> None:
        """Makes the row, once the prompt has been prefilled."""
        sequence = self.sequence
        assert sequence.slot is not None
        how = self.limits, self.samplers
        self.row = Row(sequence.slot, *how, sequence.seed, sequence.groups, sequence.draws)

    def receive(self, group: Group) -> None:
        """Queues a decoded group for the consumer."""
        try:
            if self.stop_hook is not None and self.stop_hook(group.text, group.codes):
                group = replace(group, finished=True)
        except Exception as error:
            self.fail(error)
            return
        self.ready.append(group)
        self.done = group.finished

    def fail(self, error: Exception) -> None:
        """Ends it with an error, which the consumer gets after the groups decoded before it."""
        if isinstance(error, OutOfMemoryError):
            cause = str(error).partition("\n")[0]
            wrapped = DeviceMemoryError(
                f"the device ran out of memory ({cause}): lower max_batch or max_seq_len"
            )
            wrapped.__cause__ = error
            error = wrapped
        self.error, self.done = error, True

    def settle(self) -> None:
        """Brings the sequence's cache and draws to the groups that the consumer has taken."""
        if not self.settled:
            self.sequence.cached = min(self.sequence.cached, self.sequence.groups)
            self.sequence.draws += self.taken
        self.settled = True
