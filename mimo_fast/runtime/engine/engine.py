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

A row runs at most `ahead` groups in front of its consumer, then pauses. A conversation without a
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
from mimo_fast.runtime.engine.request import Job, StopHook
from mimo_fast.runtime.engine.sequence import Conversation, check_room
from mimo_fast.runtime.lm.decode import Decoder, Group, Launched, Limits, Row, Samplers
from mimo_fast.runtime.lm.graphs import Graphs, wanted
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.snapshot import PrefixCache, Snapshot

AHEAD = 4
QUEUE = 64
PREFIX_BYTES = 2**28
REHEARSED = (3, 40, 100)
"""Groups of a prompt: each takes other kernels of the products (kernels/matmul/plan.py)."""


@dataclass(frozen=True)
class Flight:
    """A group of these replies' rows that the device has been given and nobody has waited for."""

    jobs: Sequence[Job]
    groups: Launched


class Engine:
    """Decodes conversations of one language model.

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
        self._owners: list[weakref.ref[Conversation] | None] = [None] * slots
        self._used = [0] * slots
        self._clock = 0
        self._jobs: list[Job] = []
        self._turn = threading.Condition()
        self._leader: int | None = None
        # Kernel by kernel, launching a group would take the host longer than samples take to come.
        self.overlaps = self.decoder.graphs is not None
        self._flight: Flight | None = None

    def warmup(self, progress: bool = True) -> None:
        """Captures the graphs of every batch size and runs some prompts, so that the first reply is
        as fast as the
        tenth: their kernels are compiled now."""
        if self.decoder.graphs:
            self.decoder.graphs.warmup(progress)
            # Prompts that are graphs have run by now.
            if self.decoder.graphs.takes_prompts:
                return
            if not self._jobs and not any(self._owners):
                self._rehearse()

    @torch.no_grad()
    def _rehearse(self) -> None:
        """Prompts of words and speech of each length that has kernels of its own; nothing of them
        stays."""
        config = self.lm.config
        for groups in (length for length in REHEARSED if length <= self.capacity):
            ids = torch.zeros(config.channels + 1, groups * config.group_size, dtype=torch.int64)
            ids[0, config.group_size :] = self.lm.empty_id
            self.lm.prefill(ids, self.state, slot=0)
        self.state.lengths[0] = 0

    def check_room(self, groups: int) -> None:
        """Raises PromptError unless a conversation of so many groups leaves room for a reply."""
        check_room(groups, self.capacity)

    def conversation(self, seed: int) -> Conversation:
        """An empty conversation, its draws from this seed."""
        return Conversation(self.lm.config, self.capacity, seed)

    def decode(self, conversation: Conversation, limits: Limits, samplers: Samplers) -> "Reply":
        """Prefills what is not cached and returns the reply, each group part of the conversation
        once it is taken."""
        reply = self.start(conversation, limits, samplers)
        reply.prefill()
        return reply

    def start(
        self,
        conversation: Conversation,
        limits: Limits,
        samplers: Samplers,
        stop_hook: StopHook | None = None,
        ahead: int | None = AHEAD,
        bounded: bool = True,
    ) -> "Reply":
        """A reply to all that the conversation holds; nothing is computed before it is asked for.

        Args:
            ahead: groups it may be in front of its consumer; None for any number.
            bounded: whether a full queue refuses it.

        Raises:
            PromptError: the conversation leaves no room. BusyError: the queue is full.
        """
        self.check_room(conversation.groups)
        limits = Limits(
            min(limits.max_new, self.capacity - conversation.groups),
            limits.min_new,
            limits.stop_ids,
        )
        job = Job(conversation, limits, samplers, stop_hook, ahead)
        with self._turn:
            waiting = sum(other.conversation.slot is None for other in self._jobs)
            if bounded and waiting >= self.queue:
                raise BusyError(
                    f"{len(self._jobs) - waiting} replies are running and {waiting} wait: try "
                    "again later, or load the model with a larger max_batch"
                )
            # The last position is fed again where nothing new was said: what follows is drawn from
            # its hidden state.
            conversation.cached = min(conversation.cached, conversation.groups - 1)
            conversation.prefilled = conversation.groups - conversation.cached
            self._jobs.append(job)
        return Reply(self, job)

    def drive(self, until: Callable[[], bool]) -> None:
        """Works, or waits while another thread does, until the condition holds."""
        while True:
            with self._turn:
                while self._leader is not None and not until():
                    self._turn.wait()
                if until():
                    return
                self._leader = threading.get_ident()
            try:
                if not self._tick() and not until():
                    raise RuntimeError("a reply waits for nothing: a bug in the engine")
            finally:
                with self._turn:
                    self._leader = None
                    self._turn.notify_all()

    def launch_next(self, job: Job) -> None:
        """Gives the device the next group of every row that wants one, without waiting for it.

        To be called once the job's own work on its last group has been launched, for whoever waits
        for that work must not wait for a group more.

        Nothing is launched while that of others is still to come, while a prompt could be computed
        instead, or while another thread works: then the next tick does it.
        """
        with self._turn:
            job.launching = False
            jobs = [other for other in self._jobs if other.wants]
            busy = self._leader is not None or self._flight is not None
            if not self.overlaps or busy or any(other.launching for other in self._jobs):
                return
            seatless = [other for other in jobs if other.conversation.slot is None]
            jobs = [other for other in jobs if other.conversation.slot is not None]
            if not jobs or any(other.row is None for other in jobs):
                return
            if seatless and self._choose_slot() is not None:
                return
            for other in jobs:
                self._touch(other.conversation)
            self._leader = threading.get_ident()
        try:
            with self.lm.threads():
                self._flight = Flight(jobs, self.decoder.launch(_rows(jobs)))
        except Exception:
            # No row has moved. The next tick meets what failed here again, where each reply gets
            # its own error, and the chunk that the caller holds is not lost to it.
            self._flight = None
        finally:
            with self._turn:
                self._leader = None
                self._turn.notify_all()

    def leave(self, job: Job) -> None:
        """Takes a job off its slot, after the group in progress; its conversation keeps what has
        been delivered."""
        with self._turn:
            job.done, job.launching = True, False
            while self._leader not in (None, threading.get_ident()) and job in self._jobs:
                self._turn.wait()
            if job in self._jobs:
                self._jobs.remove(job)
            if self._flight is not None and all(other.done for other in self._flight.jobs):
                self._flight = None
            job.settle()
            self._turn.notify_all()

    def export(self, conversation: Conversation) -> Snapshot | None:
        """A copy of what is cached of a conversation that has no running reply."""
        with self._turn:
            while self._leader is not None:
                self._turn.wait()
            if not conversation.cached:
                return None
            if conversation.slot is None:
                return conversation.snapshot
            return Snapshot.take(self.state, conversation.slot, conversation.cached)

    def _tick(self) -> bool:
        """A chunk of one prompt, and a group of every row that wants one, or the group that has
        been launched; False if there was nothing to do."""
        # Before anything moves a row to another slot.
        if self._flight is not None:
            self._land()
            return True
        with self._turn:
            self._jobs = [job for job in self._jobs if not job.done]
            for job in self._jobs:
                if job.wants and job.conversation.slot is None:
                    self._seat(job)
            seated = [job for job in self._jobs if job.wants and job.conversation.slot is not None]
            for job in seated:
                self._touch(job.conversation)
            prompts = [job for job in seated if job.row is None]
            rows = [job for job in seated if job.row is not None]
        with self.lm.threads():
            if prompts:
                self._attempt(prompts[:1], self._prefill)
            if rows:
                self._attempt(rows, self._decode)
        return bool(prompts or rows)

    def _land(self) -> None:
        """Hands over the group that has been launched. Where that fails it is begun again."""
        flight, self._flight = self._flight, None
        assert flight is not None
        left = [job for job in flight.jobs if not job.done]
        with self.lm.threads():
            try:
                groups = self.decoder.collect(flight.groups)
            except Exception:
                if left:
                    self._attempt(left, self._decode)
            else:
                self._deliver(flight.jobs, groups)

    def _attempt(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        """Does the work for these jobs together or, where that fails, for each alone: who fails
        alone has failed."""
        try:
            work(jobs)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(jobs) == 1:
                jobs[0].fail(error)
            else:
                for job in jobs:
                    self._attempt([job], work)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        (job,) = jobs
        conversation = job.conversation
        slot, start = conversation.slot, conversation.cached
        assert slot is not None
        end = min(start + self.lm.prefill_chunk, conversation.groups)
        if start < conversation.shared < end:
            # The opening ends a chunk, so that what follows is the same whether or not it was
            # computed before.
            end = conversation.shared
        size = conversation.group_size
        with torch.no_grad():
            self._compute(conversation.ids[:, start * size : end * size], slot, start)
            if end == conversation.shared and self.prefixes.get(conversation.opening) is None:
                self.prefixes.put(conversation.opening, Snapshot.take(self.state, slot, end))
        conversation.cached = end
        if end == conversation.groups:
            job.begin()

    def _compute(self, ids: Tensor, slot: int, start: int) -> None:
        """A part of a prompt."""
        if self.decoder.graphs:
            self.decoder.graphs.prefill(ids, slot, start)
        else:
            self.lm.prefill(ids, self.state, slot, start)

    def _decode(self, jobs: Sequence[Job]) -> None:
        self._deliver(jobs, self.decoder.next_groups(_rows(jobs)))

    def _deliver(self, jobs: Sequence[Job], groups: Sequence[Group]) -> None:
        """One group to each job; who has left since it was launched gets none."""
        for job, row, group in zip(jobs, _rows(jobs), groups, strict=True):
            if not job.settled:
                job.conversation.cached = row.cached
                job.receive(group)

    def _seat(self, job: Job) -> None:
        """Gives a job a slot and puts back what its conversation had cached; without a slot to
        give, it waits."""
        slot, conversation = self._choose_slot(), job.conversation
        if slot is None:
            return
        owner = self._owner(slot)
        if owner is not None:
            self._park(owner)
        kept = conversation.snapshot
        if kept is None and conversation.shared and not conversation.cached:
            kept = self.prefixes.get(conversation.opening)
            if kept is not None:
                conversation.cached = min(kept.length, conversation.groups - 1)
                conversation.prefilled = conversation.groups - conversation.cached
        if kept is not None:
            kept.put(self.state, slot)
        self._owners[slot] = weakref.ref(conversation)
        conversation.slot, conversation.snapshot = slot, None
        if job.row is not None:
            job.row.slot, job.row.stale = slot, True

    def _choose_slot(self) -> int | None:
        """A slot that nobody owns, else the longest unused of those whose owner can wait in host
        memory."""
        owners = [self._owner(slot) for slot in range(len(self._owners))]
        if None in owners:
            return owners.index(None)
        busy = {id(job.conversation) for job in self._jobs if job.wants}
        movable = [slot for slot, owner in enumerate(owners) if id(owner) not in busy]
        return min(movable, key=self._used.__getitem__, default=None)

    def _owner(self, slot: int) -> Conversation | None:
        owner = self._owners[slot]
        return None if owner is None else owner()

    def _park(self, conversation: Conversation) -> None:
        assert conversation.slot is not None
        kept = (
            Snapshot.take(self.state, conversation.slot, conversation.cached)
            if conversation.cached
            else None
        )
        conversation.snapshot = kept
        self._owners[conversation.slot] = None
        conversation.slot = None

    def _touch(self, conversation: Conversation) -> None:
        assert conversation.slot is not None
        self._clock += 1
        self._used[conversation.slot] = self._clock


def _rows(jobs: Sequence[Job]) -> list[Row]:
    """Of jobs whose prompts are computed."""
    rows = [job.row for job in jobs if job.row is not None]
    assert len(rows) == len(jobs)
    return rows


class Reply(Iterator[Group]):
    """The groups of a reply, each part of the conversation once it is taken. Any thread may take or
    close.

    launches: the consumer has work of its own for the device in each group, and calls `launch_next`
    when it has launched that.
    """

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job
        self.launches = False

    def prefill(self) -> None:
        """Returns when the prompt has been computed.

        Raises:
            Exception: what went wrong with it.
        """
        job = self._job
        self._engine.drive(lambda: job.row is not None or job.done)
        if job.error is not None:
            self.close()
            raise job.error

    def __next__(self) -> Group:
        job = self._job
        if job.settled:
            raise StopIteration
        job.launching = self.launches
        self._engine.drive(lambda: bool(job.ready) or job.done)
        if job.ready:
            group = job.ready.popleft()
            job.conversation.append(group.text, group.codes)
            job.taken += 1
            return group
        self.close()
        if job.error is not None:
            raise job.error
        raise StopIteration

    def launch_next(self) -> None:
        """Lets the device begin the next group, where it works on its own and nothing else comes
        first; an error of that group is raised where the group is taken."""
        self._engine.launch_next(self._job)

    def close(self) -> None:
        """Ends it after the group in progress; groups that nobody took are forgotten."""
        self._engine.leave(self._job)

    def __del__(self) -> None:
        # What nobody holds any more must not be decoded on; the engine drops it at its next tick.
        self._job.done = True
        self._job.settle()
