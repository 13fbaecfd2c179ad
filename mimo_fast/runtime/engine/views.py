"""What the policy is told of an engine's requests and slots."""

from __future__ import annotations

from collections.abc import Sequence

from mimo_fast.runtime.engine.policy import Holder, Load, Priority, StepCost
from mimo_fast.runtime.engine.request import Request
from mimo_fast.runtime.engine.slots import Slots
from mimo_fast.runtime.lm.state import DecodeState


def load_of(
    request: Request, requests: Sequence[Request], state: DecodeState, cost: StepCost
) -> Load:
    """What there is to do when a request asks to be let in beside others."""
    others = [other for other in requests if other.sequence is not request.sequence]
    parked = [other for other in others if other.sequence.slot is None and not other.done]
    listeners = [other for other in others if other.demand.priority is Priority.LISTENER]
    groups = sum(
        other.sequence.groups + other.limits.max_new - other.taken for other in (*parked, request)
    )
    position = state.cache.nbytes // (state.slots * state.capacity)
    return Load(
        running=sum(other.sequence.slot is not None for other in others),
        waiting=sum(other.needs_slot for other in others),
        listeners=sum(not other.done for other in listeners),
        group=cost.row,
        parked=groups * position,
    )


def holders_of(slots: Slots, requests: Sequence[Request]) -> list[Holder | None]:
    """Who has each slot; None for a free one."""
    running = {id(other.sequence): other for other in requests if other.runnable}
    holders = list[Holder | None]()
    for owner, used in zip(slots, slots.used, strict=True):
        other = running.get(id(owner))
        if owner is None:
            holders.append(None)
        elif other is None:
            holders.append(Holder(False, Priority.BATCH, used, 0))
        else:
            holders.append(Holder(True, other.demand.priority, used, other.slice))
    return holders
