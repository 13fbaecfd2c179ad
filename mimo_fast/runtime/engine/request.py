"""`Request`: one reply in progress, as the engine schedules it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import OutOfMemoryError, Tensor

from mimo_fast.errors import DeviceMemoryError, NumericError
from mimo_fast.runtime.engine.policy import Demand, Priority
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.voicing import Delivery, Voicing
from mimo_fast.runtime.lm.decode import Group, Limits, Row, Samplers
from mimo_fast.runtime.lm.prefixes import Unit

StopHook = Callable[[int, Tensor], bool]
"""A callable (text token, codes [C, G]) of a new group -> whether the reply ends with it."""

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""Why a reply ended: by a stop token or criterion, at `max_new_tokens`, at the end of the context,
or by its consumer."""


@dataclass(eq=False)
class Request:
    """One reply in progress.

    Each flag has one writer and is never unset: the engine finishes a request, its consumer cancels
    it.

    Args:
        ahead: groups decoded ahead of the consumer at most; None for no limit.
        fits: whether the context has room for `limits.max_new` groups as they were asked for.
        demand: what the policy knows of it.

    Attributes:
        row: Its row, from the end of the prefill on.
        drawn: Groups decoded and not yet delivered, since their text and audio are being made.
        ready: Deliveries not yet taken.
        taken: Number of groups taken by the consumer.
        slice: Number of groups decoded since it got its slot.
        finished: Its last group has been decoded, or it has failed.
        cancelled: Its consumer wants nothing more.
        settled: The sequence has been brought up to the groups taken.
        error: The reason why it ended early.
        lost: The group that was not finite, which ended it early.
        awaited: Its consumer waits for the prefill or for a group.
        voicing: Makes its text and audio; None where its consumer takes groups alone.
        units: Its prompt as the tree of prefixes knows it; empty where it has a cache of its own.
    """

    sequence: TokenSequence
    limits: Limits
    samplers: Samplers
    stop_hook: StopHook | None
    ahead: int | None
    fits: bool = True
    demand: Demand = field(default_factory=lambda: Demand(Priority.LISTENER, 0.0))
    row: Row | None = None
    drawn: deque[Group] = field(default_factory=deque)
    ready: deque[Delivery] = field(default_factory=deque)
    taken: int = 0
    slice: int = 0
    finished: bool = False
    cancelled: bool = False
    settled: bool = False
    error: BaseException | None = None
    lost: Group | None = None
    awaited: bool = False
    voicing: Voicing | None = None
    units: Sequence[Unit] = ()
    _stopped: bool = False

    @property
    def done(self) -> bool:
        """Whether nothing more will be decoded."""
        return self.finished or self.cancelled

    @property
    def over(self) -> bool:
        """Whether nothing more will be delivered."""
        return self.cancelled or (self.finished and not self.drawn)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not, and after an error."""
        if self.finished and not self.drawn and not self.ready and self.error is None:
            if self._stopped:
                return "stop"
            return "length" if self.fits else "context"
        return "cancelled" if self.cancelled else None

    @property
    def runnable(self) -> bool:
        """Whether the engine may compute something for it now."""
        if self.done or (self.drawn and self.drawn[-1].finished):
            return False
        return self.ahead is None or len(self.ready) + len(self.drawn) < self.ahead

    @property
    def needs_slot(self) -> bool:
        """Whether it waits for a slot: a reply that nobody reads gives up its place."""
        read = self.row is None or self.awaited or self.ahead is None
        return self.runnable and self.sequence.slot is None and read

    def begin(self) -> None:
        """Makes the row, once the prompt has been prefilled."""
        sequence = self.sequence
        assert sequence.slot is not None
        how = self.limits, self.samplers
        self.row = Row(sequence.slot, *how, sequence.seed, sequence.groups, sequence.draws)

    def receive(self, group: Group) -> None:
        """Takes a decoded group; one that is not finite ends the reply."""
        if not group.finite:
            self.lost = group
            # What caused it is found out in the thread of the consumer.
            self.fail(NumericError("the model's values are not finite"))
            return
        self.slice += 1
        self._stopped = group.text in self.limits.stop_ids
        try:
            if self.stop_hook is not None and self.stop_hook(group.text, group.codes):
                group = replace(group, finished=True)
                self._stopped = True
        except Exception as error:
            self.fail(error)
            return
        self.drawn.append(group)

    def take_back(self) -> None:
        """Takes back the group received last, which is decoded again; its row already has."""
        self.drawn.pop()
        self.slice -= 1

    def deliver(self, delivery: Delivery) -> None:
        """Queues the oldest group drawn, with its text and audio, for the consumer."""
        self.ready.append(delivery)
        self.drawn.popleft()
        if delivery.group.finished:
            self.finished = True

    def give_to(self, voicing: Voicing) -> None:
        """Has text and audio made of its groups, those that are ready too."""
        self.voicing = voicing
        self.drawn.extendleft(delivery.group for delivery in reversed(self.ready))
        self.ready.clear()

    def take(self) -> Delivery | None:
        """The next delivery, for the consumer; None if there is none."""
        try:
            delivery = self.ready.popleft()
        except IndexError:  # also where `Engine.close` has just dropped them
            return None
        self.taken += 1
        return delivery

    def fail(self, error: Exception) -> None:
        """Ends it with an error, which the consumer gets after what was delivered before it."""
        if isinstance(error, OutOfMemoryError):
            cause = str(error).partition("\n")[0]
            wrapped = DeviceMemoryError(
                f"the device ran out of memory ({cause}): lower max_batch or max_seq_len"
            )
            wrapped.__cause__ = error
            error = wrapped
        self.drawn.clear()
        self.error, self.finished = error, True

    def settle(self) -> None:
        """Brings the sequence's cache and draws to the groups that the consumer has taken."""
        if not self.settled:
            self.sequence.cached = min(self.sequence.cached, self.sequence.groups)
            self.sequence.draws += self.taken
        self.settled = True
