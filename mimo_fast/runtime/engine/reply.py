"""`Reply`: what the consumer of a request holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Protocol

import torch
from torch import Tensor

from mimo_fast.errors import NumericError
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.process import Owner
from mimo_fast.runtime.engine.request import FinishReason, Request
from mimo_fast.runtime.engine.sequence import TokenSequence, group_ids
from mimo_fast.runtime.engine.voicing import Delivery, Voicing
from mimo_fast.runtime.lm.decode import Group
from mimo_fast.runtime.lm.finite import explain
from mimo_fast.runtime.lm.model import LM


class Drives(Protocol):
    """The engine, as a reply sees it."""

    owner: Owner
    lm: LM
    quantized_cache: bool

    def drive(self, request: Request, until: Callable[[], bool]) -> None: ...
    def take(self, request: Request) -> Delivery | None: ...
    def give_to(self, request: Request, voicing: Voicing) -> None: ...
    def cancel(self, request: Request) -> None: ...
    def remove(self, request: Request) -> None: ...
    def exclusive(self) -> AbstractContextManager[None]: ...


class Reply(Iterator[Group]):
    """The groups of a reply; each becomes part of the sequence when it is taken.

    Any thread may take a group, cancel or close the reply.

    Attributes:
        prefilled: `time.perf_counter()` when the prompt had been prefilled; None before.
    """

    def __init__(self, engine: Drives, request: Request) -> None:
        self._engine, self._request = engine, request
        self.prefilled: float | None = None

    @property
    def sequence(self) -> TokenSequence:
        """The sequence that it continues."""
        return self._request.sequence

    @property
    def taken(self) -> int:
        """Number of groups taken."""
        return self._request.taken

    @property
    def ended(self) -> bool:
        """Whether it has ended and all of its groups have been taken or dropped."""
        return self._request.settled

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the reply ended; None while it has not."""
        return self._request.finish_reason

    def prefill(self) -> None:
        """Returns when the prompt has been prefilled, or the reply cancelled.

        Raises:
            Exception: the error that ended the request.
        """
        request = self._request
        self._engine.drive(request, lambda: request.row is not None or request.done)
        if request.error is not None:
            self.close()
            raise self._explained(request.error)
        if self.prefilled is None:
            self.prefilled = perf_counter()
        try:
            # Codes of recordings are looked at here, while the device prefills them.
            request.sequence.settle()
        except BaseException:
            self.close()
            raise

    def voiced_by(self, voicing: Voicing) -> None:
        """Has the engine make text and audio of the groups; call it before one is taken."""
        self._engine.give_to(self._request, voicing)

    def __next__(self) -> Group:
        delivery = self.take()
        if delivery is None:
            raise StopIteration
        return delivery.group

    def take(self) -> Delivery | None:
        """The next group with what is made of it; None at the end.

        Raises:
            Exception: the error that ended the request.
        """
        request = self._request
        if request.settled:
            return None
        self._engine.drive(request, lambda: bool(request.ready) or request.over)
        if not request.cancelled and (delivery := self._engine.take(request)) is not None:
            request.sequence.append(delivery.group.text, delivery.group.codes)
            return delivery
        error = None if request.cancelled else request.error
        self.close()
        if error is not None:
            raise self._explained(error)
        return None

    def _explained(self, error: BaseException) -> BaseException:
        """The error of the request; where its values were not finite, with their cause."""
        lost = self._request.lost
        if lost is None:
            return error
        spoke = lost.text == self._engine.lm.empty_id
        rest = [delivery.group for delivery in self._request.ready]
        return self.not_finite(rest, lost.codes if spoke else None)

    def not_finite(self, rest: Sequence[Group] = (), codes: Tensor | None = None) -> NumericError:
        """Why the group that follows what has been taken is not finite; computes for a while.

        Args:
            rest: groups decoded before it and not taken.
            codes: its codes [C, G] where they could not be drawn, None where its text could not.
        """
        request = self._request
        lm = self._engine.lm.variant(request.sequence.adapter)
        ids = torch.cat(
            [request.sequence.ids, *(group_ids(group.text, group.codes) for group in rest)], dim=1
        )
        spoken = ids[1:].unflatten(1, (-1, lm.config.group_size)).amin((0, 2)) == NOT_FINITE
        groups, taken = len(spoken), request.taken + len(rest)
        failed = int(spoken.nonzero()[0, 0]) if spoken.any() else groups
        number, part = failed - (groups - taken) + 1, "logits"
        if codes is not None or failed < groups:
            part = "codes"
        where = f"of group {number} of the reply" if number > 0 else "of an earlier reply"
        why = explain(lm, ids, codes, self._engine.quantized_cache)
        return NumericError(f"the {part} {where} are not finite: {why}")

    def exclusive(self) -> AbstractContextManager[None]:
        """Keeps the engine's next step from beginning, see `Engine.exclusive`."""
        return self._engine.exclusive()

    @property
    def orphaned(self) -> bool:
        """Whether this process was forked from the one that decodes it."""
        return self._engine.owner.forked

    def check(self) -> None:
        """Raises ClosedError in a process that was forked from the one that decodes it."""
        if self.orphaned:
            self._engine.owner.check()

    def cancel(self) -> None:
        """Ends the reply without waiting; a thread that waits for a group gets none."""
        self._engine.cancel(self._request)

    def close(self) -> None:
        """Ends the reply after the group in progress; groups not yet taken are dropped."""
        self._engine.remove(self._request)

    def __del__(self) -> None:
        # Nothing but a flag: the interpreter may call this at any point of any thread. The engine
        # drops the request before its next step.
        self._request.cancelled = True
