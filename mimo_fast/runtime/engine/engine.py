"""Many replies at once over the slots of one state: they join, leave, wait and fail each on its
own.

There is no thread here. Whoever waits for a group does the work: one waiting thread at a time runs
a tick, which is a chunk of one prompt and a group of every row that wants one, and leaves the
others' groups where they will find them. So a single stream is computed as lazily as a generator,
Ctrl-C arrives where the work is, and threads or tasks that stream at the same time share their
steps.

Where the device works on its own it gets the next group of every row before the last one's audio is
waited for (`launch_next`): so the codec's chunk and the next group follow each other without a gap,
and one group at most is computed that nobody takes.

A row runs at most `ahead` groups in front of its consumer, then pauses. A sequence without a
running reply keeps its slot until another needs it; then its keys and values move to host memory,
as do those of a paused row.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimo_fast.errors import BusyError
from mimo_fast.runtime.engine.request import Request, StopHook
from mimo_fast.runtime.engine.sequence import TokenSequence, check_room
from mimo_fast.runtime.lm.decode import Decoder, Group, Launched, Limits, Row, Samplers
from mimo_fast.runtime.lm.graphs import Graphs, wanted
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.snapshot import PrefixCache, Snapshot

AHEAD = 4
QUEUE = 64
PREFIX_BYTES = 2**28
WARMUP_GROUPS = (3, 40, 100)
"""Groups of a prompt: each takes other kernels of the products (kernels/qmatmul_launch.py)."""


@dataclass(frozen=True)
class InFlight:
    """A group of these replies' rows that the device has been given and nobody has waited for."""

    requests: Sequence[Request]
    groups: Launched


class Engine:
    """Decodes sequences of one language model.

    Args:
        lm: the model.
        slots: rows that can be decoded at once.
        capacity: groups that a row can hold.
        queue: replies that may wait for a slot.
        quantized_cache: whether keys and values are kept as int8.

    overlaps: whether `launch_next` launches; on by default where a device replays graphs.
    """

    def __init__(
        self, lm: LM, slots: int, capacity: int, queue: int = QUEUE, quantized_cache: bool = False
    ) -> None:
        self.lm, self.capacity, self.queue = lm, capacity, queue
        self.state = lm.new_state([0] * slots, capacity, quantized_cache)
        self.decoder = Decoder(
            lm, self.state, Graphs(lm, self.state) if wanted(lm.device) else None
        )
        self.prefixes = PrefixCache(PREFIX_BYTES)
        self._owners: list[weakref.ref[TokenSequence] | None] = [None] * slots
        self._used = [0] * slots
        self._clock = 0
        self._requests: list[Request] = []
        self._changed = threading.Condition()
        self._leader: int | None = None
        # Kernel by kernel, launching a group would take the host longer than samples take to come.
        self.overlaps = self.decoder.graphs is not None
        self._in_flight: InFlight | None = None

    def warmup(self, progress: bool = True) -> None:
        """Captures the graphs of every batch size and runs some prompts, so that the first reply is
        as fast as the
        tenth: their kernels are compiled now."""
        if self.decoder.graphs:
            self.decoder.graphs.warmup(progress)
            # Prompts that are graphs have run by now.
            if self.decoder.graphs.takes_prompts:
                return
            if not self._requests and not any(self._owners):
                self._warm_up_prompts()

    @torch.no_grad()
    def _warm_up_prompts(self) -> None:
        """Prompts of words and speech of each length that has kernels of its own; nothing of them
        stays."""
        config = self.lm.config
        for groups in (length for length in WARMUP_GROUPS if length <= self.capacity):
            ids = torch.zeros(config.channels + 1, groups * config.group_size, dtype=torch.int64)
            ids[0, config.group_size :] = self.lm.empty_id
            self.lm.prefill(ids, self.state, slot=0)
        self.state.lengths[0] = 0

    def check_room(self, groups: int) -> None:
        """Raises PromptError unless a sequence of so many groups leaves room for a reply."""
        check_room(groups, self.capacity)

    def sequence(self, seed: int) -> TokenSequence:
        """An empty sequence, its draws from this seed."""
        return TokenSequence(self.lm.config, self.capacity, seed)

    def decode(self, sequence: TokenSequence, limits: Limits, samplers: Samplers) -> "Reply":
        """Prefills what is not cached and returns the reply, each group part of the sequence
        once it is taken."""
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
        """A reply to all that the sequence holds; nothing is computed before it is asked for.

        Args:
            ahead: groups it may be in front of its consumer; None for any number.
            bounded: whether a full queue refuses it.

        Raises:
            PromptError: the sequence leaves no room. BusyError: the queue is full.
        """
        self.check_room(sequence.groups)
        limits = Limits(
            min(limits.max_new, self.capacity - sequence.groups),
            limits.min_new,
            limits.stop_ids,
        )
        request = Request(sequence, limits, samplers, stop_hook, ahead)
        with self._changed:
            waiting = sum(other.sequence.slot is None for other in self._requests)
            if bounded and waiting >= self.queue:
                raise BusyError(
                    f"{len(self._requests) - waiting} replies are running and {waiting} wait: try "
                    "again later, or load the model with a larger max_batch"
                )
            # The last position is fed again where nothing new was said: what follows is drawn from
            # its hidden state.
            sequence.cached = min(sequence.cached, sequence.groups - 1)
            sequence.prefilled = sequence.groups - sequence.cached
            self._requests.append(request)
        return Reply(self, request)

    def drive(self, until: Callable[[], bool]) -> None:
        """Works, or waits while another thread does, until the condition holds."""
        while True:
            with self._changed:
                while self._leader is not None and not until():
                    self._changed.wait()
                if until():
                    return
                self._leader = threading.get_ident()
            try:
                if not self._step() and not until():
                    raise RuntimeError("a reply waits for nothing: a bug in the engine")
            finally:
                with self._changed:
                    self._leader = None
                    self._changed.notify_all()

    def launch_next(self, request: Request) -> None:
        """Gives the device the next group of every row that wants one, without waiting for it.

        To be called once the request's own work on its last group has been launched, for whoever waits
        for that work must not wait for a group more.

        Nothing is launched while that of others is still to come, while a prompt could be computed
        instead, or while another thread works: then the next tick does it.
        """
        with self._changed:
            request.launching = False
            requests = [other for other in self._requests if other.runnable]
            busy = self._leader is not None or self._in_flight is not None
            if not self.overlaps or busy or any(other.launching for other in self._requests):
                return
            unadmitted = [other for other in requests if other.sequence.slot is None]
            requests = [other for other in requests if other.sequence.slot is not None]
            if not requests or any(other.row is None for other in requests):
                return
            if unadmitted and self._choose_slot() is not None:
                return
            for other in requests:
                self._touch(other.sequence)
            self._leader = threading.get_ident()
        try:
            with self.lm.threads():
                self._in_flight = InFlight(requests, self.decoder.launch(_rows(requests)))
        except Exception:
            # No row has moved. The next tick meets what failed here again, where each reply gets
            # its own error, and the chunk that the caller holds is not lost to it.
            self._in_flight = None
        finally:
            with self._changed:
                self._leader = None
                self._changed.notify_all()

    def remove(self, request: Request) -> None:
        """Takes a request off its slot, after the group in progress; its sequence keeps what has
        been delivered."""
        with self._changed:
            request.done, request.launching = True, False
            while self._leader not in (None, threading.get_ident()) and request in self._requests:
                self._changed.wait()
            if request in self._requests:
                self._requests.remove(request)
            if self._in_flight is not None and all(
                other.done for other in self._in_flight.requests
            ):
                self._in_flight = None
            request.settle()
            self._changed.notify_all()

    def export(self, sequence: TokenSequence) -> Snapshot | None:
        """A copy of what is cached of a sequence that has no running reply."""
        with self._changed:
            while self._leader is not None:
                self._changed.wait()
            if not sequence.cached:
                return None
            if sequence.slot is None:
                return sequence.snapshot
            return Snapshot.take(self.state, sequence.slot, sequence.cached)

    def _step(self) -> bool:
        """A chunk of one prompt, and a group of every row that wants one, or the group that has
        been launched; False if there was nothing to do."""
        # Before anything moves a row to another slot.
        if self._in_flight is not None:
            self._collect()
            return True
        with self._changed:
            self._requests = [request for request in self._requests if not request.done]
            for request in self._requests:
                if request.runnable and request.sequence.slot is None:
                    self._admit(request)
            admitted = [
                request
                for request in self._requests
                if request.runnable and request.sequence.slot is not None
            ]
            for request in admitted:
                self._touch(request.sequence)
            prompts = [request for request in admitted if request.row is None]
            rows = [request for request in admitted if request.row is not None]
        with self.lm.threads():
            if prompts:
                self._attempt(prompts[:1], self._prefill)
            if rows:
                self._attempt(rows, self._decode)
        return bool(prompts or rows)

    def _collect(self) -> None:
        """Hands over the group that has been launched. Where that fails it is begun again."""
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
        """Does the work for these requests together or, where that fails, for each alone: who fails
        alone has failed."""
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

    def _prefill(self, requests: Sequence[Request]) -> None:
        (request,) = requests
        sequence = request.sequence
        slot, start = sequence.slot, sequence.cached
        assert slot is not None
        end = min(start + self.lm.prefill_chunk, sequence.groups)
        if start < sequence.prefix_groups < end:
            # The prefix ends a chunk, so that what follows is the same whether or not it was
            # computed before.
            end = sequence.prefix_groups
        size = sequence.group_size
        with torch.no_grad():
            self._compute(sequence.ids[:, start * size : end * size], slot, start)
            if end == sequence.prefix_groups and self.prefixes.get(sequence.prefix) is None:
                self.prefixes.put(sequence.prefix, Snapshot.take(self.state, slot, end))
        sequence.cached = end
        if end == sequence.groups:
            request.begin()

    def _compute(self, ids: Tensor, slot: int, start: int) -> None:
        """A part of a prompt."""
        if self.decoder.graphs:
            self.decoder.graphs.prefill(ids, slot, start)
        else:
            self.lm.prefill(ids, self.state, slot, start)

    def _decode(self, requests: Sequence[Request]) -> None:
        self._deliver(requests, self.decoder.next_groups(_rows(requests)))

    def _deliver(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        """One group to each request; who has left since it was launched gets none."""
        for request, row, group in zip(requests, _rows(requests), groups, strict=True):
            if not request.settled:
                request.sequence.cached = row.cached
                request.receive(group)

    def _admit(self, request: Request) -> None:
        """Gives a request a slot and puts back what its sequence had cached; without a slot to
        give, it waits."""
        slot, sequence = self._choose_slot(), request.sequence
        if slot is None:
            return
        owner = self._owner(slot)
        if owner is not None:
            self._evict(owner)
        kept = sequence.snapshot
        if kept is None and sequence.prefix_groups and not sequence.cached:
            kept = self.prefixes.get(sequence.prefix)
            if kept is not None:
                sequence.cached = min(kept.length, sequence.groups - 1)
                sequence.prefilled = sequence.groups - sequence.cached
        if kept is not None:
            kept.put(self.state, slot)
        self._owners[slot] = weakref.ref(sequence)
        sequence.slot, sequence.snapshot = slot, None
        if request.row is not None:
            request.row.slot, request.row.stale = slot, True

    def _choose_slot(self) -> int | None:
        """A slot that nobody owns, else the longest unused of those whose owner can wait in host
        memory."""
        owners = [self._owner(slot) for slot in range(len(self._owners))]
        if None in owners:
            return owners.index(None)
        busy = {id(request.sequence) for request in self._requests if request.runnable}
        movable = [slot for slot, owner in enumerate(owners) if id(owner) not in busy]
        return min(movable, key=self._used.__getitem__, default=None)

    def _owner(self, slot: int) -> TokenSequence | None:
        owner = self._owners[slot]
        return None if owner is None else owner()

    def _evict(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None
        kept = (
            Snapshot.take(self.state, sequence.slot, sequence.cached) if sequence.cached else None
        )
        sequence.snapshot = kept
        self._owners[sequence.slot] = None
        sequence.slot = None

    def _touch(self, sequence: TokenSequence) -> None:
        assert sequence.slot is not None
        self._clock += 1
        self._used[sequence.slot] = self._clock


def _rows(requests: Sequence[Request]) -> list[Row]:
    """Of requests whose prompts are computed."""
    rows = [request.row for request in requests if request.row is not None]
    assert len(rows) == len(requests)
    return rows


class Reply(Iterator[Group]):
    """The groups of a reply, each part of the sequence once it is taken. Any thread may take or
    close.

    launches: the consumer has work of its own for the device in each group, and calls `launch_next`
    when it has launched that.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self._request = engine, request
        self.launches = False

    def prefill(self) -> None:
        """Returns when the prompt has been computed.

        Raises:
            Exception: what went wrong with it.
        """
        request = self._request
        self._engine.drive(lambda: request.row is not None or request.done)
        if request.error is not None:
            self.close()
            raise request.error

    def __next__(self) -> Group:
        request = self._request
        if request.settled:
            raise StopIteration
        request.launching = self.launches
        self._engine.drive(lambda: bool(request.ready) or request.done)
        if request.ready:
            group = request.ready.popleft()
            request.sequence.append(group.text, group.codes)
            request.taken += 1
            return group
        self.close()
        if request.error is not None:
            raise request.error
        raise StopIteration

    def launch_next(self) -> None:
        """Lets the device begin the next group, where it works on its own and nothing else comes
        first; an error of that group is raised where the group is taken."""
        self._engine.launch_next(self._request)

    def close(self) -> None:
        """Ends it after the group in progress; groups that nobody took are forgotten."""
        self._engine.remove(self._request)

    def __del__(self) -> None:
        # What nobody holds any more must not be decoded on; the engine drops it at its next tick.
        self._request.done = True
        self._request.settle()
