"""Continuous batching: requests join, leave, wait and fail independently in one state's slots.

There is no engine thread. The thread that waits for a group computes it: one waiting thread at a
time runs a step, which prefills a chunk of one prompt, decodes a group of every runnable row, and
queues the groups of the other requests. A single stream is therefore computed as lazily as a
generator, Ctrl-C arrives in the thread that computes, and threads or tasks that stream at the same
time share their steps.

On a GPU, `launch_next` launches the next group of every row before the host waits for the audio of
the last one. The codec's chunk and the next group then run back to back, and at most one group is
computed that is never read.

A row runs at most `ahead` groups ahead of its consumer, then pauses. A sequence without a running
request keeps its slot until another needs it; then it is evicted: its keys and values move to host
memory. A paused row may be evicted too. If requests wait and every row is running, the row that has
had its slot for longest gives it up: after `SLICE` groups, or after two for a request that has
not begun.

Nothing waits for more than the step in progress: whoever ends a request waits until no step works
on it, and whoever copies a cache keeps the next step from beginning.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from mimo_fast.errors import BusyError, ClosedError, NumericError
from mimo_fast.kernels.sample import NOT_FINITE
from mimo_fast.modes import in_own_modes, on_device, own_modes
from mimo_fast.process import FreedWhenClosed, Owner
from mimo_fast.runtime.engine.request import FinishReason, Request, StopHook
from mimo_fast.runtime.engine.sequence import TokenSequence, check_room, group_ids
from mimo_fast.runtime.lm.decode import Decoder, Group, Launched, Limits, Row, Samplers
from mimo_fast.runtime.lm.finite import explain
from mimo_fast.runtime.lm.graphs import Graphs, PromptPart, wanted
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.snapshot import PrefixCache, Snapshot

AHEAD = 4
QUEUE = 64

FIRST_SLICE = 2
"""Groups that a running row keeps its slot for if a request that has not begun waits for one."""

SLICE = 25
"""Groups that a running row keeps its slot for if others wait that have begun (4 s of speech)."""

PREFIX_BYTES = 2**28
WARMUP_GROUPS = (3, 40, 100)
"""Prompt lengths in groups; each selects different matmul kernels (`kernels/matmul/plan.py`)."""


@dataclass(frozen=True)
class InFlight:
    """A group of these requests' rows that has been launched and not yet collected."""

    requests: Sequence[Request]
    groups: Launched


class Engine(FreedWhenClosed):
    """Schedules and decodes the sequences of one language model.

    Args:
        lm: the model.
        slots: rows that can be decoded at once.
        capacity: groups that a row can hold.
        queue: requests that may wait for a slot.
        quantized_cache: whether the KV cache is int8.

    Attributes:
        overlaps: Whether `launch_next` launches anything; by default only with CUDA graphs.
    """

    @in_own_modes
    def __init__(
        self, lm: LM, slots: int, capacity: int, queue: int = QUEUE, quantized_cache: bool = False
    ) -> None:
        lm.owner.check()
        self.owner = Owner()
        self.lm, self.capacity, self.queue = lm, capacity, queue
        self.quantized_cache = quantized_cache
        self.state = lm.new_state([0] * slots, capacity, quantized_cache)
        graphs = Graphs(lm, self.state) if wanted(lm.device) else None
        self.decoder = Decoder(lm, self.state, graphs)
        self.prefixes = PrefixCache(PREFIX_BYTES)
        self._owners: list[weakref.ref[TokenSequence] | None] = [None] * slots
        self._used = [0] * slots
        self._clock = 0
        self._requests: list[Request] = []
        self._changed = threading.Condition()
        self._leader: int | None = None
        self._step_of: Sequence[Request] = ()
        self._exclusive = 0
        # Without graphs decoding is launch-bound: launching a group would delay the samples.
        self.overlaps = self.decoder.graphs is not None
        self._in_flight: InFlight | None = None

    @property
    def device(self) -> torch.device:
        """That of the language model, where all steps run."""
        return self.lm.device

    @in_own_modes
    def warmup(self, progress: bool = True) -> None:
        """Captures the graphs of every batch size and compiles the kernels of prompts."""
        self.owner.check()
        if graphs := self.decoder.graphs:
            graphs.warmup(progress)
            # Capturing the graphs of prompts has compiled their kernels.
            if not graphs.takes_prompts and not self._requests and not any(self._owners):
                self._warm_up_prompts()

    def _warm_up_prompts(self) -> None:
        """Prefills slot 0 with prompts of each length in `WARMUP_GROUPS`, then empties it."""
        config = self.lm.config
        for groups in (length for length in WARMUP_GROUPS if length <= self.capacity):
            ids = torch.zeros(
                config.channels + 1, groups * config.group_size, dtype=torch.int64, device="cpu"
            )
            ids[0, config.group_size :] = self.lm.empty_id
            self.lm.prefill(ids, self.state, slot=0)
        self.state.lengths[0] = 0

    def check_room(self, groups: int) -> None:
        """Raises PromptError unless a sequence of `groups` groups leaves room for a reply."""
        check_room(groups, self.capacity)

    def sequence(self, seed: int) -> TokenSequence:
        """An empty sequence whose draws come from `seed`."""
        return TokenSequence(self.lm.config, self.capacity, seed)

    def decode(self, sequence: TokenSequence, limits: Limits, samplers: Samplers) -> "Reply":
        """Prefills what is not cached and returns the reply."""
        reply = self.start(sequence, limits, samplers)
        reply.prefill()
        return reply

    def start(
        self,
        sequence: TokenSequence,
        limits: Limits,
        samplers: Samplers,
        stop_hook: StopHook | None = None,
        ahead: int | None = AHEAD,
        bounded: bool = True,
    ) -> "Reply":
        """Queues a request to continue the sequence; nothing is computed before it is needed.

        Args:
            stop_hook: asked about each new group whether the reply ends with it.
            ahead: groups decoded ahead of the consumer at most; None for no limit.
            bounded: whether a full queue refuses the request.

        Raises:
            PromptError: the sequence leaves no room for a reply.
            BusyError: the queue is full.
        """
        self.owner.check()
        self.check_room(sequence.groups)
        room = self.capacity - sequence.groups
        fits = limits.max_new <= room
        limits = replace(limits, max_new=min(limits.max_new, room))
        request = Request(sequence, limits, samplers, stop_hook, ahead, fits)
        with self._changed:
            self._sweep()
            waiting = sum(other.needs_slot for other in self._requests)
            if bounded and waiting >= self.queue:
                running = sum(other.sequence.slot is not None for other in self._requests)
                raise BusyError(
                    f"{running} replies are running and {waiting} wait: try again later, or load "
                    "the model with a larger max_batch"
                )
            self.release(sequence)
            # At least the last position is prefilled, even if it is cached: the first group is
            # drawn from its hidden state.
            sequence.cached = min(sequence.cached, sequence.groups - 1)
            sequence.prefilled = sequence.groups - sequence.cached
            self._requests.append(request)
        return Reply(self, request)

    def drive(self, until: Callable[[], bool]) -> None:
        """Runs steps, or waits while another thread does, until the condition holds."""
        if self.owner.forked:
            self.owner.check()
        while True:
            with self._changed:
                while (self._leader is not None or self._exclusive) and not until():
                    self._changed.wait()
                if until():
                    return
                self.owner.check()
                self._leader = threading.get_ident()
                self._step_of = () if self._in_flight is None else self._in_flight.requests
            try:
                if not self._step() and not until():
                    raise RuntimeError(
                        "a request waits although nothing is runnable: a bug in the engine"
                    )
            finally:
                self._end_step()

    def _end_step(self) -> None:
        with self._changed:
            self._leader, self._step_of = None, ()
            self._changed.notify_all()

    def launch_next(self, request: Request) -> None:
        """Launches the next group of every runnable row, without waiting for it.

        Call it once the codec's work on the request's last group has been launched: the audio of
        that group must not queue behind the next one.

        Nothing is launched while another request has yet to launch its codec work, while a prompt
        could be prefilled instead, or while another thread runs a step. The next step then decodes
        the group.
        """
        if self.owner.forked:
            self.owner.check()
        with self._changed:
            request.launching = False
            if self.owner.closed:
                return
            requests = [other for other in self._requests if other.runnable]
            busy = self._leader is not None or self._exclusive or self._in_flight is not None
            if not self.overlaps or busy or any(other.launching for other in self._requests):
                return
            unadmitted = [other for other in requests if other.needs_slot]
            requests = [other for other in requests if other.sequence.slot is not None]
            if not requests or any(other.row is None for other in requests):
                return
            if any(self._choose_slot(other) is not None for other in unadmitted):
                return
            for other in requests:
                self._touch(other.sequence)
            self._leader, self._step_of = threading.get_ident(), requests
        try:
            with self.lm.threads(), on_device(self.device), own_modes():
                self._in_flight = InFlight(requests, self.decoder.launch(_rows(requests)))
        except Exception:
            # No row has advanced, so the next step repeats the work and reports the error to the
            # requests concerned. Raising here would lose the chunk that the caller holds.
            self._in_flight = None
        finally:
            self._end_step()

    def cancel(self, request: Request) -> None:
        """Ends a request without waiting for the step in progress; its consumer stops waiting."""
        if self.owner.forked:
            # Another thread may have held the lock when the process was forked.
            request.cancelled = True
            return
        with self._changed:
            request.cancelled, request.launching = True, False
            self._changed.notify_all()

    def remove(self, request: Request) -> None:
        """Ends a request after the group in progress; its sequence keeps the groups taken."""
        if self.owner.forked:
            request.cancelled = True
            return
        with self._changed:
            self.cancel(request)
            # An interrupt may have left the step of this thread itself.
            while request in self._step_of and self._leader != threading.get_ident():
                self._changed.wait()
            self._sweep()

    def release(self, sequence: TokenSequence) -> None:
        """Ends the sequence's request if there is one; it has at most one at a time.

        Call it before the ids are changed: a reply that was dropped may still own the sequence.
        """
        if self.owner.forked:
            self.owner.check()
        with self._changed:
            for request in [other for other in self._requests if other.sequence is sequence]:
                self.remove(request)

    def _sweep(self) -> None:
        """Drops cancelled requests that no step works on, and a group in flight for them alone."""
        cancelled = [request for request in self._requests if request.cancelled]
        for request in cancelled:
            if request not in self._step_of:
                self._requests.remove(request)
                request.settle()
        if self._in_flight is not None and all(other.done for other in self._in_flight.requests):
            self._in_flight = None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the step in progress; no other begins in the block."""
        with self._changed:
            self._exclusive += 1
            try:
                while self._leader is not None:
                    self._changed.wait()
                yield
            finally:
                self._exclusive -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Ends all requests after the group in progress, and frees the cache and all graphs.

        Their consumers get a ClosedError; so does every later request.
        """
        if self.owner.closed or self.owner.forked:
            self.owner.closed = True
            return
        with self.exclusive():
            self.owner.closed = True
            for request in self._requests:
                if not request.done:
                    request.ready.clear()
                    request.fail(ClosedError("the model was closed while this reply was running"))
            self._requests.clear()
            self._in_flight = None
            self.prefixes.clear()
            for owner in filter(None, (self._owner(slot) for slot in range(len(self._owners)))):
                owner.slot, owner.cached = None, 0
            del self.decoder, self.state

    @in_own_modes
    def export(self, sequence: TokenSequence) -> Snapshot | None:
        """A snapshot of the cache of a sequence without a running request; None if empty."""
        self.owner.check()
        with self.exclusive():
            if not sequence.cached:
                return None
            if sequence.slot is None:
                return sequence.snapshot
            return Snapshot.take(self.state, sequence.slot, sequence.cached)

    @in_own_modes
    def _step(self) -> bool:
        """Admits requests, prefills a chunk of some prompts and decodes a group of the other rows.

        If a group is in flight, it is collected instead. Returns False if there was nothing to do.
        """
        # This comes first, since admitting may move a row to another slot.
        if self._in_flight is not None:
            self._collect()
            return True
        with self._changed:
            self._sweep()
            waiting = [request for request in self._requests if request.needs_slot]
            # Those that have not begun come first: they have waited for nothing so far.
            for request in sorted(waiting, key=lambda request: request.row is not None):
                self._attempt([request], self._admit)
            admitted = [
                request
                for request in self._requests
                if request.runnable and request.sequence.slot is not None
            ]
            for request in admitted:
                self._touch(request.sequence)
            prompts = self._together([request for request in admitted if request.row is None])
            rows = [request for request in admitted if request.row is not None]
            self._step_of = [*prompts, *rows]
        with self.lm.threads():
            if prompts:
                self._attempt(prompts, self._prefill)
            if rows:
                self._attempt(rows, self._decode)
        return bool(prompts or rows)

    def _collect(self) -> None:
        """Delivers the group in flight; if collecting it fails, the group is decoded again."""
        flight, self._in_flight = self._in_flight, None
        assert flight is not None
        left = [request for request in flight.requests if not request.done]
        with self.lm.threads():
            try:
                groups = self.decoder.collect(flight.groups)
            except Exception:
                if left:
                    self._attempt(left, self._decode)
            else:
                self._deliver(flight.requests, groups)

    def _attempt(
        self, requests: Sequence[Request], work: Callable[[Sequence[Request]], None]
    ) -> None:
        """Does the work for all at once or, if that fails, for each, which then gets its error."""
        try:
            work(requests)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(requests) == 1:
                requests[0].fail(error)
            else:
                for request in requests:
                    self._attempt([request], work)

    def _together(self, requests: Sequence[Request]) -> list[Request]:
        """The requests whose prompts are prefilled in one step: the first and, if a graph takes
        several prompts, others of its bucket."""
        graphs = self.decoder.graphs
        if graphs is None or not graphs.packs_prompts or not requests:
            return [*requests[:1]]
        buckets = [graphs.bucket_of(end - start) for start, end in map(self._chunk, requests)]
        same = [
            each for each, bucket in zip(requests, buckets, strict=True) if bucket == buckets[0]
        ]
        return same[: graphs.most_packed(buckets[0])]

    def _chunk(self, request: Request) -> tuple[int, int]:
        """The first group of a prompt to be prefilled next, and the end of what is."""
        sequence = request.sequence
        start = sequence.cached
        end = min(start + self.lm.prefill_chunk, sequence.groups)
        if start < sequence.prefix_groups < end:
            # The prefix ends a chunk, so that later chunks are the same, bit for bit, whether or
            # not the prefix came from the cache.
            end = sequence.prefix_groups
        return start, end

    def _prefill(self, requests: Sequence[Request]) -> None:
        chunks, parts = [self._chunk(request) for request in requests], list[PromptPart]()
        for request, (start, end) in zip(requests, chunks, strict=True):
            slot = request.sequence.slot
            assert slot is not None
            parts.append(PromptPart(request.sequence.part(start, end), slot, start))
        if len(parts) > 1:
            assert self.decoder.graphs is not None
            self.decoder.graphs.prefill_parts(parts)
        else:
            self._prefill_one(parts[0])
        for request, part, (_, end) in zip(requests, parts, chunks, strict=True):
            sequence = request.sequence
            if end == sequence.prefix_groups and self.prefixes.get(sequence.prefix) is None:
                self.prefixes.put(sequence.prefix, Snapshot.take(self.state, part.slot, end))
            sequence.cached = end
            if end == sequence.groups:
                request.begin()

    def _prefill_one(self, part: PromptPart) -> None:
        if self.decoder.graphs:
            self.decoder.graphs.prefill(part.prompt, part.slot, part.start)
        else:
            self.lm.prefill(part.prompt.settled(), self.state, part.slot, part.start)

    def _decode(self, requests: Sequence[Request]) -> None:
        self._deliver(requests, self.decoder.next_groups(_rows(requests)))

    def _deliver(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        """Gives each request its group; requests that ended since the launch get none."""
        for request, row, group in zip(requests, _rows(requests), groups, strict=True):
            if not request.settled:
                request.sequence.cached = row.cached
                request.receive(group)

    def _admit(self, requests: Sequence[Request]) -> None:
        """Gives a request a slot and restores its cache; if there is no slot, the request waits."""
        (request,) = requests
        slot, sequence = self._choose_slot(request), request.sequence
        if slot is None:
            return
        if (owner := self._owner(slot)) is not None:
            self._evict(owner)
        kept, cached = sequence.snapshot, sequence.cached
        if kept is None and sequence.prefix_groups and not cached:
            kept = self.prefixes.get(sequence.prefix)
            if kept is not None:
                cached = min(kept.length, sequence.groups - 1)
        if kept is not None:
            kept.put(self.state, slot)
        self._owners[slot] = weakref.ref(sequence)
        sequence.slot, sequence.snapshot = slot, None
        request.slice = 0
        if cached != sequence.cached:
            sequence.cached, sequence.prefilled = cached, sequence.groups - cached
        if request.row is not None:
            request.row.slot, request.row.stale = slot, True

    def _choose_slot(self, request: Request) -> int | None:
        """A slot for a request: free, else with an owner that can be evicted; None if it waits."""
        owners = [self._owner(slot) for slot in range(len(self._owners))]
        if None in owners:
            return owners.index(None)
        running = {id(other.sequence): other for other in self._requests if other.runnable}
        movable = [slot for slot, owner in enumerate(owners) if id(owner) not in running]
        if movable:
            return min(movable, key=self._used.__getitem__)
        if request.ahead is None or not request.awaited:
            # Nobody listens to it yet, or to a row without a limit at all: it waits until others
            # end or pause.
            return None
        longest = FIRST_SLICE if request.row is None else SLICE
        rows = {slot: running[id(owner)] for slot, owner in enumerate(owners)}
        rows = {slot: other for slot, other in rows.items() if other.slice >= longest}
        return max(rows, key=lambda slot: rows[slot].slice, default=None)

    def _owner(self, slot: int) -> TokenSequence | None:
        owner = self._owners[slot]
        return None if owner is None else owner()

    def _evict(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None
        if sequence.cached:
            sequence.snapshot = Snapshot.take(self.state, sequence.slot, sequence.cached)
        self._owners[sequence.slot] = None
        sequence.slot = None
        # A running row goes to the end of those that wait.
        self._requests.sort(key=lambda request: request.sequence is sequence)

    def _touch(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None
        self._clock += 1
        self._used[sequence.slot] = self._clock


def _rows(requests: Sequence[Request]) -> list[Row]:
    """The rows of requests whose prompts have been prefilled."""
    rows = [request.row for request in requests if request.row is not None]
    assert len(rows) == len(requests)
    return rows


class Reply(Iterator[Group]):
    """The groups of a reply; each becomes part of the sequence when it is taken.

    Any thread may take a group, cancel or close the reply.

    Attributes:
        launches: Whether the consumer launches device work of its own for each group and then
            calls `launch_next`.
        prefilled: `time.perf_counter()` when the prompt had been prefilled; None before.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self.launches = False
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
        self._wait(lambda: request.row is not None or request.done)
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

    def __next__(self) -> Group:
        request = self._request
        if request.settled:
            raise StopIteration
        request.launching = self.launches
        self._wait(lambda: bool(request.ready) or request.done)
        if not request.cancelled and (group := request.take()) is not None:
            request.sequence.append(group.text, group.codes)
            return group
        error = None if request.cancelled else request.error
        self.close()
        if error is not None:
            raise self._explained(error)
        raise StopIteration

    def _explained(self, error: BaseException) -> BaseException:
        """The error of the request; where its values were not finite, with their cause."""
        lost = self._request.lost
        if lost is None:
            return error
        spoke = lost.text == self._engine.lm.empty_id
        return self.not_finite([*self._request.ready], lost.codes if spoke else None)

    def not_finite(self, rest: Sequence[Group] = (), codes: Tensor | None = None) -> NumericError:
        """Why the group that follows what has been taken is not finite; computes for a while.

        Args:
            rest: groups decoded before it and not taken.
            codes: its codes [C, G] where they could not be drawn, None where its text could not.
        """
        request, lm = self._request, self._engine.lm
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

    def _wait(self, until: Callable[[], bool]) -> None:
        self._request.awaited = True
        try:
            self._engine.drive(until)
        finally:
            self._request.awaited = False

    def launch_next(self) -> None:
        """See `Engine.launch_next`; an error of that group is raised when the group is taken."""
        self._engine.launch_next(self._request)

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
