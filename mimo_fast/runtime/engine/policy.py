"""The policy: who is computed next, who gets a slot, who is let in. It computes nothing itself.

A request is for a listener, who hears its audio or reads its text as it is made, or for a batch.
Listeners are served by the time at which they run dry (`urgency`):

    0  a listener who runs dry within DRY                     by that time
    1  a listener who has heard nothing yet                   by arrival
    2  any other listener                                     by the time at which it runs dry
    3  a request of a batch                                   in turns

A step (`next_step`) takes rows in that order. With none of 0 and 1 it is filled up to STEP of
predicted time; with some of them they alone are, and others join as long as they add a half at
most. Where rows are nearly free, as on a GPU, that is all of them. Prompts are prefilled in chunks,
as many groups a step as are predicted to take PROMPT.

The bounds. A listener's next group waits for one step at most before it can be chosen, that is for
STEP + PROMPT = 80 ms, half a group of audio, where a model can do so little at once: a step has at
least one row, and one chunk of a prompt that waits. Nobody starves: one place of each step is for
whoever has waited for longest, once that is more than PATIENCE. So with n requests that have a slot
and steps of at most L seconds nobody waits longer than PATIENCE + (n + 1) L for its next group or
chunk. Without a slot a listener waits until a row has had its slot for FIRST_SLICE or SLICE groups
(`choose_slot`), a batch until nobody else wants one or SLOT_PATIENCE is over.

Everything here is a function of its arguments: the same records give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from mimo_fast.config import GROUP_SECONDS

DRY = 0.5
"""Seconds of audio that a listener has left, below which it comes before all others."""

STEP = 0.04
"""Predicted seconds that the rows of one step take together."""

PROMPT = 0.04
"""Predicted seconds that the prompts of one step take together."""

PATIENCE = 1.0
"""Seconds after which whoever waits for longest has a place in every step."""

SLOT_PATIENCE = 5.0
"""Seconds after which a batch that waits for a slot may take a listener's for a while."""

FIRST_SLICE = 2
"""Groups that a running row keeps its slot for if a request that has not begun waits for one."""

SLICE = 25
"""Groups that a running row keeps its slot for if others wait that have begun (4 s of speech)."""

JOINING = 0.5
"""Share of the time of urgent rows that others may add to their step."""


class Priority(IntEnum):
    """What a reply is for."""

    LISTENER = 0  # somebody hears it, or reads it, as it is made
    BATCH = 1  # a file, a transcript, a text

    @classmethod
    def of(cls, name: str) -> Priority:
        """That of a name, "listener" or "batch".

        Raises:
            ValueError: there is no such priority.
        """
        for each in cls:
            if name == each.name.lower():
                return each
        raise ValueError(f"priority must be 'listener' or 'batch', not {name!r:.80}")


def urgency(
    priority: Priority, arrived: float, served: float, dry: float | None, now: float
) -> tuple[int, float]:
    """The least is next.

    Args:
        arrived: when it was asked for.
        served: when something was last computed for it; `arrived` before that.
        dry: when its listener has heard all that has been made; None before the first audio.
    """
    if priority is Priority.BATCH:
        return 3, served
    if dry is None:
        return 1, arrived
    return (0 if dry - now < DRY else 2), dry


@dataclass
class Demand:
    """What the policy knows of one request; times are of any clock that goes on.

    Attributes:
        served: When a group or a chunk was last computed for it, or it could first be computed.
        dry: When its listener has heard all that has been made; None before the first audio.
        prompt: Groups that are still to be prefilled; 0 for a row that decodes.
        chunk: Groups that a step prefills of it at least.
    """

    priority: Priority
    arrived: float
    served: float = 0.0
    dry: float | None = None
    prompt: int = 0
    chunk: int = 1

    def __post_init__(self) -> None:
        self.served = max(self.served, self.arrived)

    def hears(self, seconds: float, now: float) -> None:
        """So much more can be heard. Who ran dry, or did not listen for a while, begins anew."""
        self.dry = max(self.dry or 0.0, now) + seconds

    def urgency(self, now: float) -> tuple[int, float]:
        return urgency(self.priority, self.arrived, self.served, self.dry, now)


@dataclass
class StepCost:
    """Seconds of a step: base + rows x row, and of a prompt: groups x group; learned as they come.

    Older steps count for less and less, and one that took four times what was predicted for no
    more than that. Unknown until the first. Steps that all had as many rows do not tell what a row
    adds, so the next one may have twice as many as any had.
    """

    base: float = 0.0
    row: float = 0.0
    group: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)
    _most: int = 0
    _tells: bool = False

    def saw(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if self._sums[0] > 1:
            seconds = min(seconds, 4 * self.step(rows))
        new = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = [0.98 * old + x for old, x in zip(self._sums, new, strict=True)]
        n, r, t, rr, rt = self._sums
        spread = rr - r * r / n
        self._most, self._tells = max(self._most, rows), spread > 0.01 * rr
        slope = (rt - r * t / n) / spread if self._tells else t / r
        slope = min(max(slope, 0.0), t / r)
        self.base, self.row = (t - slope * r) / n, slope

    def saw_prompts(self, groups: int, seconds: float) -> None:
        """Prompts of so many groups together took so long."""
        each = seconds / groups
        self.group += ((min(each, 4 * self.group) if self.group else each) - self.group) * (
            0.2 if self.group else 1.0
        )

    def step(self, rows: int) -> float:
        """Predicted seconds of a step of so many rows."""
        return self.base + rows * self.row

    def rows_within(self, seconds: float) -> int:
        """Rows that a step of so many seconds has room for; a step at most doubles its base."""
        if self.row <= 0:
            return 2**31
        room = max(int(max(seconds - self.base, self.base) / self.row), 1)
        return room if self._tells else max(room, 2 * self._most)


@dataclass(frozen=True)
class Step:
    """What is computed next: indices of the demands.

    Attributes:
        rows: Those that decode a group.
        prompts: (index, groups) of those that prefill so many.
    """

    rows: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]


def next_step(demands: Sequence[Demand], now: float, cost: StepCost) -> Step:
    """What is computed next of requests that have a slot and can be computed."""
    order = sorted(range(len(demands)), key=lambda i: (*demands[i].urgency(now), i))
    longest = min(order, key=lambda i: (demands[i].served, i), default=None)
    if longest is not None and now - demands[longest].served > PATIENCE:
        order.remove(longest)
        order.insert(0, longest)
    else:
        longest = None
    rows = [i for i in order if not demands[i].prompt]
    urgent = [i for i in rows if i == longest or demands[i].urgency(now)[0] < 2]
    most = cost.rows_within(STEP)
    if any(demands[i].urgency(now)[0] < 2 for i in urgent):
        extra = JOINING * cost.step(len(urgent)) / cost.row if cost.row else 2**31
        rows = [*urgent, *[i for i in rows if i not in urgent][: int(extra)]]
    return Step(tuple(rows[:most]), _prompts(demands, order, cost))


def _prompts(
    demands: Sequence[Demand], order: Sequence[int], cost: StepCost
) -> tuple[tuple[int, int], ...]:
    """Chunks of prompts in order, as many groups as PROMPT has room for; one chunk at least."""
    room = PROMPT / cost.group if cost.group else float("inf")
    chosen = list[tuple[int, int]]()
    for i in order:
        left = demands[i].prompt
        if not left:
            continue
        least = min(left, demands[i].chunk)
        if chosen and least > room:
            break
        groups = max(min(left, int(min(room, left))), least)
        chosen.append((i, groups))
        room -= groups
    return tuple(chosen)


@dataclass(frozen=True)
class Holder:
    """What the policy knows of a slot's owner.

    Attributes:
        runs: Whether something can be computed for it now.
        used: Counts up with each step; the least is used least recently.
        slice: Groups decoded since it got the slot.
    """

    runs: bool
    priority: Priority
    used: int
    slice: int


def choose_slot(
    holders: Sequence[Holder | None], asks: Demand, begun: bool, awaited: bool, now: float
) -> int | None:
    """The slot that a request gets, whose owner is evicted; None if it waits.

    Free ones first, then the least recently used of those that cannot be computed: sequences
    without a reply, and replies whose consumer pauses. Otherwise that of the row that has had it
    for longest, of a batch rather than a listener's.

    Args:
        holders: by slot, None for a free one.
        begun: whether the request has decoded before.
        awaited: whether somebody waits for it; a reply that nobody waits for takes no slot from a
            row that runs, unless it has waited for SLOT_PATIENCE.
    """
    if None in holders:
        return holders.index(None)
    held = [(slot, holder) for slot, holder in enumerate(holders) if holder is not None]
    still = [(holder.used, slot) for slot, holder in held if not holder.runs]
    if still:
        return min(still)[1]
    patient = now - asks.served <= SLOT_PATIENCE
    if not awaited and patient:
        return None
    # A batch is in no hurry: to evict a row costs more than a few of its groups.
    least = SLICE if begun or asks.priority is Priority.BATCH else FIRST_SLICE
    ready = list[tuple[Priority, int, int]]()
    for slot, holder in held:
        below = holder.priority > asks.priority
        above = holder.priority < asks.priority
        if (above and patient) or holder.slice < (FIRST_SLICE if below else least):
            continue
        ready.append((holder.priority, holder.slice, -slot))
    return -max(ready)[2] if ready else None


@dataclass(frozen=True)
class Load:
    """What an engine has to do when a request asks to be let in.

    Attributes:
        running: Requests with a slot.
        waiting: Requests that wait for one.
        listeners: Requests for listeners that have not ended.
        group: Predicted seconds that a group of one row takes beside the others.
        parked: Bytes of host memory that requests without a slot hold or are predicted to need.
    """

    running: int
    waiting: int
    listeners: int
    group: float
    parked: int


@dataclass(frozen=True)
class Bounds:
    """What an engine takes on.

    Args:
        queue: requests that may wait for a slot.
        parked: bytes of host memory for requests without a slot.
        load: share of real time that the replies of listeners may need together, by the engine's
            own measurements; None for no bound. One listener is always let in.
    """

    queue: int = 64
    parked: int | None = None
    load: float | None = None


def refusal(load: Load, bounds: Bounds, priority: Priority) -> str | None:
    """Why a request is not let in; None if it is."""
    if load.waiting >= bounds.queue:
        return (
            f"{load.running} replies are running and {load.waiting} wait: try again later, or load "
            "the model with a larger max_batch"
        )
    if bounds.parked is not None and load.waiting and load.parked > bounds.parked:
        return (
            f"{load.waiting} replies wait for a slot, and another would need "
            f"{load.parked / 2**20:.0f} MiB of host memory with them: try again later, or load the "
            "model with a larger max_batch"
        )
    if priority is Priority.LISTENER and bounds.load is not None and load.listeners:
        share = (load.listeners + 1) * load.group / GROUP_SECONDS
        if share > bounds.load:
            return (
                f"{load.listeners} listeners are served, and one more would need {share:.0%} of "
                f"real time where {bounds.load:.0%} are allowed: try again later, or as a batch"
            )
    return None
