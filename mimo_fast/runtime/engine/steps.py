"""`Steps`: what a step computes, in the thread that leads: prompts, groups, text and audio."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

from mimo_fast.config import GROUP_SECONDS
from mimo_fast.runtime.engine.policy import StepCost
from mimo_fast.runtime.engine.request import Request
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.slots import Slots
from mimo_fast.runtime.engine.voicing import Delivery, Voicing, voice
from mimo_fast.runtime.lm.decode import Decoder, Group, Launched, Row
from mimo_fast.runtime.lm.graphs import PromptPart
from mimo_fast.runtime.lm.model import LM, PlacedIds
from mimo_fast.runtime.lm.prefixes import SHORTEST, Prefixes, Unit

PREFIX_BYTES = 2**28
"""Bytes of host memory that the beginnings of prompts take at most."""

WARMUP_GROUPS = (3, 40, 100)
"""Prompt lengths in groups; each selects different matmul kernels (`kernels/matmul/plan.py`)."""

LEAST_CHUNK = 16
"""Groups of a prompt that a step prefills at least, where it may be cut anywhere."""


@dataclass(frozen=True)
class InFlight:
    """A group of these requests' rows that has been launched and not yet collected."""

    requests: Sequence[Request]
    groups: Launched


class Steps:
    """Computes for requests that have a slot; each error is its own request's.

    Attributes:
        in_flight: The next group of some rows, which has been launched.
        cost: What steps have taken so far.
    """

    def __init__(self, lm: LM, decoder: Decoder, slots: Slots, clock: Callable[[], float]) -> None:
        self.lm, self.decoder, self.slots, self.clock = lm, decoder, slots, clock
        self.prefixes = Prefixes(PREFIX_BYTES)
        self.in_flight: InFlight | None = None
        self._unconfirmed = list[Request]()
        self.cost = StepCost()

    def warm_up_prompts(self, capacity: int) -> None:
        """Prefills slot 0 with prompts of each length in `WARMUP_GROUPS`, then empties it."""
        config, state = self.lm.config, self.slots.state
        for groups in (length for length in WARMUP_GROUPS if length <= capacity):
            ids = torch.zeros(
                config.channels + 1, groups * config.group_size, dtype=torch.int64, device="cpu"
            )
            ids[0, config.group_size :] = self.lm.empty_id
            self.lm.prefill(ids, state, slot=0)
        state.lengths[0] = 0

    def attempt(
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
                    self.attempt([request], work)

    def place(self, request: Request, slot: int) -> None:
        """Gives a free slot to a request and restores its cache."""
        sequence = request.sequence
        self.slots.place(sequence, slot)
        request.slice = 0
        if request.row is not None:
            request.row.slot, request.row.stale = slot, True

    @property
    def any_chunks(self) -> bool:
        """Whether prompts may be cut anywhere; otherwise they have the chunks of a lone run."""
        return self.decoder.graphs is None and self.lm.prefills_alike(self.slots.state)

    def chunks(self, request: Request) -> tuple[int, int]:
        """Groups of a prompt that are still to be prefilled, and how many a step takes at least."""
        sequence = request.sequence
        left = sequence.groups - sequence.cached
        if self.any_chunks:
            left = min(left, self.lm.prefill_chunk)
            return left, min(left, LEAST_CHUNK)
        fixed = self._end_of_chunk(sequence, sequence.cached, sequence.groups) - sequence.cached
        return fixed, fixed

    def _end_of_chunk(self, sequence: TokenSequence, start: int, groups: int) -> int:
        end = min(start + self.lm.prefill_chunk, groups)
        # The prefix ends a chunk, so that later chunks are the same, bit for bit, whether or not
        # the prefix came from the cache.
        return sequence.prefix_groups if start < sequence.prefix_groups < end else end

    def note(self, request: Request) -> None:
        """Tells the tree of prefixes of a prompt that has nothing cached."""
        sequence = request.sequence
        # Codes that a device still computes are not waited for.
        known, size = sequence.known_groups, sequence.group_size
        if sequence.cached or not known:
            return
        ids = sequence.part(0, known).ids.unflatten(1, (known, size)).transpose(0, 1)
        rows, bounds = ids.reshape(known, -1).numpy(), [0]
        while bounds[-1] < known:
            start = bounds[-1]
            alone = start + 1 if self.any_chunks else None
            end = alone or self._end_of_chunk(sequence, start, sequence.groups)
            if end > known:
                break
            bounds.append(end)
        # Keys and values depend on the adapter from the first layer on.
        adapter = self.lm.adapter_digests[sequence.adapter].encode()

        def key(first: int, end: int) -> bytes:
            return hashlib.blake2b(rows[first:end].tobytes(), digest_size=16, key=adapter).digest()

        request.units = [Unit(key(*place), place[1] - place[0]) for place in pairwise(bounds)]
        self.prefixes.note(request.units, sequence.prefix_groups)

    def reuse(self, requests: Sequence[Request]) -> None:
        """Gives prompts that have a slot what the tree of prefixes knows of them by now."""
        for request in requests:
            sequence, slot = request.sequence, request.sequence.slot
            known = self.prefixes.known(request.units, sequence.groups - 1)
            if slot is not None and known > sequence.cached:
                place = self.slots.state, slot, sequence.cached, known
                self.prefixes.put(request.units, *place)
                sequence.prefilled -= known - sequence.cached
                sequence.cached = known

    def leads(self, requests: Sequence[Request], now: float) -> list[Request]:
        """Prompts without those that wait for another one to compute what they share with it.

        The most urgent one computes it or, of several, the one that has got furthest.
        """
        order = sorted(
            requests,
            key=lambda each: (
                each.demand.urgency(now)[0],
                -each.sequence.cached,
                each.demand.arrived,
            ),
        )
        computed, found = set[int](), list[Request]()
        for request in order:
            sequence = request.sequence
            missing = self.prefixes.missing(request.units, sequence.prefix_groups)
            missing = [edge for edge in missing if edge.end > sequence.cached]
            others = takewhile(lambda edge: id(edge) in computed, missing)
            if sum(edge.end - max(edge.start, sequence.cached) for edge in others) >= SHORTEST:
                continue
            computed.update(map(id, missing))
            found.append(request)
        return found

    def together(self, chosen: Sequence[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Those of the prompts and groups that one pass takes: with graphs, those of the bucket and
        the adapter of the first one."""
        graphs = self.decoder.graphs
        if not chosen or graphs is None:
            return [*chosen]
        if not graphs.packs_prompts:
            return [*chosen[:1]]
        first, length = chosen[0]
        bucket, adapter = graphs.bucket_of(length), first.sequence.adapter
        same = [
            (request, groups)
            for request, groups in chosen
            if graphs.bucket_of(groups) == bucket and request.sequence.adapter == adapter
        ]
        return same[: graphs.most_packed(bucket)]

    def prefill(self, requests: Sequence[Request]) -> None:
        """Prefills of each prompt as many groups as its demand states."""
        chunks, parts = list[tuple[int, int]](), list[PromptPart]()
        for request in requests:
            start = request.sequence.cached
            chunks.append((start, start + request.demand.prompt))
        for request, (start, end) in zip(requests, chunks, strict=True):
            slot = request.sequence.slot
            assert slot is not None
            parts.append(PromptPart(request.sequence.part(start, end), slot, start))
        self._prefill_parts(parts)
        now = self.clock()
        for request, part, (_, end) in zip(requests, parts, chunks, strict=True):
            sequence = request.sequence
            place = self.slots.state, part.slot, end
            self.prefixes.keep(request.units, *place, sequence.prefix_groups)
            sequence.cached, request.demand.served = end, now
            if end == sequence.groups:
                request.begin()

    def _prefill_parts(self, parts: Sequence[PromptPart]) -> None:
        graphs = self.decoder.graphs
        if graphs is None:
            placed = [PlacedIds(part.prompt.settled(), part.slot, part.start) for part in parts]
            self.lm.prefill_together(placed, self.slots.state)
        elif len(parts) > 1:
            graphs.prefill_parts(parts)
        else:
            graphs.prefill(parts[0].prompt, parts[0].slot, parts[0].start)

    def decode(self, requests: Sequence[Request]) -> None:
        """Draws the next group of each row."""
        self._received(requests, self.decoder.next_groups(rows_of(requests)))

    def launch(self, requests: Sequence[Request]) -> None:
        """Launches the next group of each row without waiting for it."""
        try:
            with self.lm.threads():
                self.in_flight = InFlight(requests, self.decoder.launch(rows_of(requests)))
        except Exception:
            # No row has advanced, so the next step repeats the work and reports the error to the
            # requests concerned. Raising here would lose what is being delivered.
            self.in_flight = None

    def collect(self) -> None:
        """Takes the group in flight; if collecting it fails, the group is decoded again."""
        flight, self.in_flight = self.in_flight, None
        assert flight is not None
        left = [request for request in flight.requests if not request.done]
        try:
            groups = self.decoder.collect(flight.groups)
        except Exception:
            if left:
                self.attempt(left, self.decode)
        else:
            self._received(flight.requests, groups)

    def _received(self, requests: Sequence[Request], groups: Sequence[Group]) -> None:
        """Gives each request its group; requests that ended since the launch get none."""
        now = self.clock()
        for request, row, group in zip(requests, rows_of(requests), groups, strict=True):
            if not request.settled:
                request.sequence.cached, request.demand.served = row.cached, now
                request.receive(group)
        self._unconfirmed += requests

    def deliver(self, requests: Sequence[Request], meanwhile: Callable[[], None]) -> None:
        """Makes text and audio of the oldest group that each has drawn, and delivers them.

        What was decoded last is decoded again if it turns out not to be right.

        meanwhile: called once all device work on them has been launched.
        """
        silent, voiced, voicings = list[Request](), list[Request](), list[Voicing]()
        for request in (each for each in requests if each.drawn):
            if request.voicing is None:
                silent.append(request)
            else:
                voiced.append(request)
                voicings.append(request.voicing)
        groups = [request.drawn[0] for request in voiced]
        results = voice(voicings, groups, meanwhile)
        unconfirmed, self._unconfirmed = self._unconfirmed, []
        if not self.decoder.confirm():
            self._take_back(unconfirmed)
            return
        for request in silent:
            self._deliver(request, Delivery(request.drawn[0]))
        for request, voicing, group, result in zip(voiced, voicings, groups, results, strict=True):
            if isinstance(result, Exception):
                request.fail(result)
                continue
            reading = result.reading
            if not request.settled:
                made = reading.text, result.audio, reading.codes, result.finite
                self._deliver(request, Delivery(group, *made))
            voicing.accept(reading)

    def _take_back(self, requests: Sequence[Request]) -> None:
        """Has the groups that these received last decoded again, and drops what is in flight."""
        self.in_flight = None
        for request in requests:
            if request.drawn and request.error is None and not request.settled:
                request.take_back()

    def _deliver(self, request: Request, delivery: Delivery) -> None:
        audio, voicing = delivery.audio, request.voicing
        seconds = GROUP_SECONDS
        if audio is not None and voicing is not None and voicing.speaks:
            seconds = len(audio) / voicing.codec.sample_rate
        if seconds:
            request.demand.hears(seconds, self.clock())
        request.deliver(delivery)


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """The rows of requests whose prompts have been prefilled."""
    rows = [request.row for request in requests if request.row is not None]
    assert len(rows) == len(requests)
    return rows
