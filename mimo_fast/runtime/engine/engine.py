"""Continuous batching: requests join, leave, wait and fail independently in one state's slots.

There is no engine thread. The thread that waits for a delivery computes it: one waiting thread at a
time leads a step, for whichever requests the policy chooses (`policy.py`): it prefills chunks of
prompts, draws a group of rows, and makes their text and audio, in one `Codec.advance` for all of
them. A single stream is therefore computed as lazily as a generator, Ctrl-C arrives in the thread
that computes, and threads or tasks that stream at the same time share their steps.

On a GPU a step launches the codec's chunks, the copy of their samples, and then the next group of
every row, before the host waits for the samples: the device stays busy while consumers handle them,
and at most one group is computed that is never read. The codec comes first: behind the next group
its samples would come one group later (7.0 ms with int4 on an H100), and the device would be no
busier.

A row runs at most `ahead` groups ahead of its consumer, then it costs nothing: it is not computed,
and its slot may be evicted to host memory, as may that of a sequence without a running request.

Nothing waits for more than the step in progress: whoever ends a request waits until no step works
on it, and whoever copies a cache keeps the next step from beginning.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

import torch

from mimo_fast.errors import BusyError, ClosedError
from mimo_fast.modes import in_own_modes
from mimo_fast.process import FreedWhenClosed, Owner
from mimo_fast.runtime.engine.policy import (
    Bounds,
    Demand,
    Priority,
    choose_slot,
    next_step,
    refusal,
)
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.request import Request, StopHook
from mimo_fast.runtime.engine.sequence import TokenSequence, check_room
from mimo_fast.runtime.engine.slots import Slots
from mimo_fast.runtime.engine.steps import Steps
from mimo_fast.runtime.engine.views import holders_of, load_of
from mimo_fast.runtime.engine.voicing import Delivery, Voicing
from mimo_fast.runtime.engine.waiting import Waiting
from mimo_fast.runtime.lm.decode import Decoder, Limits, Samplers
from mimo_fast.runtime.lm.graphs import Graphs, wanted
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.snapshot import Snapshot

AHEAD = 4


class Engine(FreedWhenClosed):
    """Schedules and decodes the sequences of one language model.

    Args:
        lm: the model.
        slots: rows that can be decoded at once.
        capacity: groups that a row can hold.
        quantized_cache: whether the KV cache is int8.
        bounds: what it takes on; by default `Bounds()`.

    Attributes:
        overlaps: Whether a step launches the next group; by default only with CUDA graphs.
    """

    @in_own_modes
    def __init__(
        self,
        lm: LM,
        slots: int,
        capacity: int,
        quantized_cache: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        lm.owner.check()
        self.owner = Owner()
        self.lm, self.capacity = lm, capacity
        self.bounds = bounds or Bounds()
        self.quantized_cache = quantized_cache
        self.state = lm.new_state([0] * slots, capacity, quantized_cache)
        graphs = Graphs(lm, self.state) if wanted(lm.device) else None
        self.decoder = Decoder(lm, self.state, graphs)
        self.slots = Slots(self.state)
        self.clock = perf_counter
        self.steps = Steps(lm, self.decoder, self.slots, lambda: self.clock())
        self._requests: list[Request] = []
        self._threads = Waiting()
        self._step_of: Sequence[Request] = ()
        # Without graphs decoding is launch-bound: launching a group would delay the samples.
        self.overlaps = self.decoder.graphs is not None

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
            if not graphs.takes_prompts and not self._requests and not any(self.slots):
                self.steps.warm_up_prompts(self.capacity)

    def check_room(self, groups: int) -> None:
        """Raises PromptError unless a sequence of `groups` groups leaves room for a reply."""
        check_room(groups, self.capacity)

    def sequence(self, seed: int, adapter: str | None = None) -> TokenSequence:
        """An empty sequence whose draws come from `seed`.

        adapter: of `LM.adapters`; None for the model itself.

        Raises:
            ValueError: the model was not loaded with it.
        """
        place = self.lm.place_of(adapter)
        return TokenSequence(self.lm.config, self.capacity, seed, place)

    def decode(self, sequence: TokenSequence, limits: Limits, samplers: Samplers) -> Reply:
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
        priority: Priority = Priority.LISTENER,
    ) -> Reply:
        """Queues a request to continue the sequence; nothing is computed before it is needed.

        Args:
            stop_hook: asked about each new group whether the reply ends with it.
            ahead: groups decoded ahead of the consumer at most; None for no limit.
            bounded: whether a full engine refuses the request.

        Raises:
            PromptError: the sequence leaves no room for a reply.
            BusyError: the engine is full, see `refusal`.
        """
        self.owner.check()
        self.check_room(sequence.groups)
        room = self.capacity - sequence.groups
        fits = limits.max_new <= room
        limits = replace(limits, max_new=min(limits.max_new, room))
        demand = Demand(priority, self.clock())
        request = Request(sequence, limits, samplers, stop_hook, ahead, fits, demand)
        with self._threads:
            self._sweep()
            if bounded and (reason := self._refusal(request)):
                raise BusyError(reason)
            self.release(sequence)
            # At least the last position is prefilled, even if it is cached: the first group is
            # drawn from its hidden state.
            sequence.cached = min(sequence.cached, sequence.groups - 1)
            sequence.prefilled = sequence.groups - sequence.cached
            self.steps.note(request)
            self._requests.append(request)
        return Reply(self, request)

    def _refusal(self, request: Request) -> str | None:
        load = load_of(request, self._requests, self.state, self.steps.cost)
        return refusal(load, self.bounds, request.demand.priority)

    def drive(self, request: Request, until: Callable[[], bool]) -> None:
        """Runs steps, or waits while another thread does, until the condition holds."""
        if self.owner.forked:
            self.owner.check()
        if request.sequence.slot is None:
            request.demand.served = self.clock()
        request.awaited = True
        try:
            while self._begin_step(until):
                try:
                    if not self._step() and not until():
                        raise RuntimeError(
                            "a request waits although nothing is runnable: a bug in the engine"
                        )
                finally:
                    self._end_step()
        finally:
            request.awaited = False
            with self._threads:
                # An interrupt may have come before the step.
                if self._threads.leads:
                    self._end_step()
                if self._threads.idle:
                    self._threads.wake()

    def _begin_step(self, until: Callable[[], bool]) -> bool:
        """Waits until the condition holds, or until this thread is to lead a step."""
        threads = self._threads
        with threads:
            threads.sleep(until, leads=True)
            if until():
                return False
            self.owner.check()
            threads.lead()
            flight = self.steps.in_flight
            self._step_of = () if flight is None else flight.requests
            return True

    def _end_step(self) -> None:
        with self._threads:
            self._threads.leader, self._step_of = None, ()
            # This thread leads the next one, or wakes another when it leaves.
            self._threads.wake(lead=False)

    def take(self, request: Request) -> Delivery | None:
        """The next delivery of a request, for its consumer; None if there is none."""
        paused = not request.runnable
        delivery = request.take()
        if paused:
            # What it waits for, it waits for from now on.
            request.demand.served = self.clock()
        return delivery

    def give_to(self, request: Request, voicing: Voicing) -> None:
        """Has text and audio made of a request's groups, also of those that nobody has taken."""
        if self.owner.forked:
            self.owner.check()
        with self._threads:
            self._wait_for_step_of(request)
            request.give_to(voicing)

    def cancel(self, request: Request) -> None:
        """Ends a request without waiting for the step in progress; its consumer stops waiting."""
        if self.owner.forked:
            # Another thread may have held the lock when the process was forked.
            request.cancelled = True
            return
        with self._threads:
            request.cancelled = True
            self._threads.wake()

    def remove(self, request: Request) -> None:
        """Ends a request after the group in progress; its sequence keeps the groups taken."""
        if self.owner.forked:
            request.cancelled = True
            return
        with self._threads:
            self.cancel(request)
            self._wait_for_step_of(request)
            self._sweep()

    def _wait_for_step_of(self, request: Request) -> None:
        # An interrupt may have left the step of this thread itself.
        if not self._threads.leads:
            self._threads.sleep(lambda: request not in self._step_of)

    def release(self, sequence: TokenSequence) -> None:
        """Ends the sequence's request if there is one; it has at most one at a time.

        Call it before the ids are changed: a reply that was dropped may still own the sequence.
        """
        if self.owner.forked:
            self.owner.check()
        with self._threads:
            for request in [other for other in self._requests if other.sequence is sequence]:
                self.remove(request)

    def _sweep(self) -> None:
        """Drops cancelled requests that no step works on, and a group in flight for them alone."""
        cancelled = [request for request in self._requests if request.cancelled]
        for request in cancelled:
            if request not in self._step_of:
                self._requests.remove(request)
                request.settle()
        flight = None if self.owner.closed else self.steps.in_flight
        if flight is not None and all(other.done for other in flight.requests):
            self.steps.in_flight = None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits for the step in progress; no other begins in the block."""
        with self._threads:
            self._threads.holders += 1
            try:
                self._threads.sleep(lambda: self._threads.leader is None)
                yield
            finally:
                self._threads.holders -= 1
                self._threads.wake()

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
            self.slots.forget()
            del self.steps, self.slots, self.decoder, self.state

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
        """Computes what the policy chooses and delivers it; False if there was nothing to do.

        If a group is in flight, it is collected instead; and what an interrupt has left drawn and
        not delivered comes before anything else.
        """
        steps, began = self.steps, self.clock()
        prompts, rows = list[Request](), list[Request]()
        with self._threads:
            # A row in flight must not move to another slot.
            if steps.in_flight is None:
                self._sweep()
            left = self._drawn()
            if not left and steps.in_flight is None:
                prompts, rows = self._choose()
                self._step_of = [*prompts, *rows]
        prefilling = 0.0
        groups = sum(request.demand.prompt for request in prompts)
        if not left:
            with self.lm.threads():
                if prompts:
                    steps.attempt(prompts, steps.prefill)
                    prefilling = self.clock() - began
                if steps.in_flight is not None:
                    rows = [*steps.in_flight.requests]
                    steps.collect()
                elif rows:
                    steps.attempt(rows, steps.decode)
        while drawn := self._drawn():
            steps.attempt(drawn, lambda some: steps.deliver(some, self._launch_next))
        self._learn(len(rows), groups, prefilling, self.clock() - began)
        return bool(left or prompts or rows)

    def _learn(self, rows: int, groups: int, prefilling: float, seconds: float) -> None:
        cost, asynchronous = self.steps.cost, self.device.type != "cpu"
        if groups and not asynchronous:
            cost.saw_prompts(groups, prefilling)
        elif groups and rows and cost.row:
            # The host waits for a prompt where it waits for the rows behind it.
            cost.saw_prompts(groups, max(seconds - cost.step(rows), 1e-6))
        if rows and not (groups and asynchronous):
            cost.saw(rows, seconds - prefilling)

    def _drawn(self) -> list[Request]:
        """Requests of which a group is drawn and not delivered; the step works on them."""
        with self._threads:
            found = [
                request for request in self._requests if request.drawn and not request.cancelled
            ]
            self._step_of = [*{*self._step_of, *found}]
            return found

    def _choose(self) -> tuple[list[Request], list[Request]]:
        """Admits requests; those whose prompts are prefilled next, and those that decode."""
        now = self.clock()
        for request in self._waiting(now):
            self.steps.attempt([request], self._admit)
        steps = self.steps
        waiting = [each for each in self._requests if self._computable(each) and each.row is None]
        steps.attempt(waiting, steps.reuse)
        leading = steps.leads([each for each in waiting if not each.done], now)
        admitted = [
            *leading,
            *(each for each in self._requests if self._computable(each) and each.row is not None),
        ]
        step = next_step([self._demand(each) for each in admitted], now, steps.cost)
        chosen = steps.together([(admitted[i], groups) for i, groups in step.prompts])
        for request, groups in chosen:
            request.demand.prompt = groups
        prompts, rows = [request for request, _ in chosen], [admitted[i] for i in step.rows]
        for request in (*prompts, *rows):
            self.slots.touch(request.sequence)
        return prompts, rows

    def _computable(self, request: Request) -> bool:
        return request.runnable and request.sequence.slot is not None

    def _waiting(self, now: float) -> list[Request]:
        """Requests that wait for a slot, the most urgent first."""
        waiting = [request for request in self._requests if request.needs_slot]
        return sorted(waiting, key=lambda request: request.demand.urgency(now))

    def _demand(self, request: Request) -> Demand:
        """What the policy is told of a request that has a slot."""
        demand = request.demand
        demand.prompt = demand.chunk = 0
        if request.row is None:
            demand.prompt, demand.chunk = self.steps.chunks(request)
        return demand

    def _launch_next(self) -> None:
        """Launches the next group of the rows that the policy chooses, without waiting for it.

        Nothing is launched while a prompt could be prefilled instead, or a request get a slot.
        """
        if not self.overlaps or self.steps.in_flight is not None:
            return
        with self._threads:
            if self._threads.holders or self.owner.closed:
                return
            now = self.clock()
            if any(self._choose_slot(other, now) is not None for other in self._waiting(now)):
                return
            rows = [other for other in self._requests if self._computable(other)]
            if not rows or any(other.row is None for other in rows):
                return
            step = next_step([self._demand(each) for each in rows], now, self.steps.cost)
            rows = [rows[i] for i in step.rows]
            for other in rows:
                self.slots.touch(other.sequence)
            self._step_of = [*{*self._step_of, *rows}]
        self.steps.launch(rows)

    def _admit(self, requests: Sequence[Request]) -> None:
        """Gives a request a slot and restores its cache; if there is no slot, the request waits."""
        (request,) = requests
        slot = self._choose_slot(request, self.clock())
        if slot is None:
            return
        if (owner := self.slots.owner(slot)) is not None:
            self._evict(owner)
        self.steps.place(request, slot)
        request.demand.served = self.clock()

    def _evict(self, sequence: TokenSequence) -> None:
        self.slots.evict(sequence)
        for request in self._requests:
            if request.sequence is sequence:
                request.demand.served = self.clock()

    def _choose_slot(self, request: Request, now: float) -> int | None:
        """A slot for a request, see `choose_slot`; None if it waits."""
        holders = holders_of(self.slots, self._requests)
        awaited = request.ahead is not None and request.awaited
        return choose_slot(holders, request.demand, request.row is not None, awaited, now)
