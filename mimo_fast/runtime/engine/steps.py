"""`Steps`: what a step computes, in the thread that leads: prompts, groups, text and audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mimo_fast.config import GROUP_SECONDS
from mimo_fast.runtime.engine.policy import StepCost
from mimo_fast.runtime.engine.request import Request
from mimo_fast.runtime.engine.slots import Slots
from mimo_fast.runtime.engine.voicing import Delivery, Voicing, voice
from mimo_fast.runtime.lm.decode import Decoder, Group, Launched, Row
from mimo_fast.runtime.lm.graphs import PromptPart
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.snapshot import PrefixCache, Snapshot

PREFIX_BYTES = 2**28


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
        self.prefixes = PrefixCache(PREFIX_BYTES)
        self.in_flight: InFlight | None = None
        self.cost = StepCost()

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
        if sequence.prefix_groups and not sequence.cached:
            kept = self.prefixes.get(sequence.prefix)
            if kept is not None:
                kept.put(self.slots.state, slot)
                sequence.cached = min(kept.length, sequence.groups - 1)
                sequence.prefilled = sequence.groups - sequence.cached
        request.slice = 0
        if request.row is not None:
            request.row.slot, request.row.stale = slot, True

    def chunk(self, request: Request) -> tuple[int, int]:
        """The first group of a prompt to be prefilled next, and the end of what is."""
        sequence = request.sequence
        start = sequence.cached
        end = min(start + self.lm.prefill_chunk, sequence.groups)
        if start < sequence.prefix_groups < end:
            # The prefix ends a chunk, so that later chunks are the same, bit for bit, whether or
            # not the prefix came from the cache.
            end = sequence.prefix_groups
        return start, end

    def together(self, requests: Sequence[Request]) -> list[Request]:
        """Those of the requests whose prompts one pass takes: with graphs, those of the bucket of
        the first one."""
        graphs = self.decoder.graphs
        if not requests or graphs is None:
            return [*requests]
        if not graphs.packs_prompts:
            return [*requests[:1]]
        buckets = [graphs.bucket_of(end - start) for start, end in map(self.chunk, requests)]
        same = [
            each for each, bucket in zip(requests, buckets, strict=True) if bucket == buckets[0]
        ]
        return same[: graphs.most_packed(buckets[0])]

    def prefill(self, requests: Sequence[Request]) -> None:
        """Prefills the next chunk of each prompt."""
        chunks, parts = [self.chunk(request) for request in requests], list[PromptPart]()
        for request, (start, end) in zip(requests, chunks, strict=True):
            slot = request.sequence.slot
            assert slot is not None
            parts.append(PromptPart(request.sequence.part(start, end), slot, start))
        self._prefill_parts(parts)
        now = self.clock()
        for request, part, (_, end) in zip(requests, parts, chunks, strict=True):
            sequence = request.sequence
            if end == sequence.prefix_groups and self.prefixes.get(sequence.prefix) is None:
                kept = Snapshot.take(self.slots.state, part.slot, end)
                self.prefixes.put(sequence.prefix, kept)
            sequence.cached, request.demand.served = end, now
            if end == sequence.groups:
                request.begin()

    def _prefill_parts(self, parts: Sequence[PromptPart]) -> None:
        graphs, state = self.decoder.graphs, self.slots.state
        if graphs is not None and len(parts) > 1:
            graphs.prefill_parts(parts)
            return
        for part in parts:
            if graphs is not None:
                graphs.prefill(part.prompt, part.slot, part.start)
            else:
                self.lm.prefill(part.prompt.settled(), state, part.slot, part.start)

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

    def deliver(self, requests: Sequence[Request], meanwhile: Callable[[], None]) -> None:
        """Makes text and audio of the oldest group that each has drawn, and delivers them.

        meanwhile: called once all device work on them has been launched.
        """
        voiced, voicings = list[Request](), list[Voicing]()
        for request in (each for each in requests if each.drawn):
            if request.voicing is None:
                self._deliver(request, Delivery(request.drawn[0]))
            else:
                voiced.append(request)
                voicings.append(request.voicing)
        groups = [request.drawn[0] for request in voiced]
        results = voice(voicings, groups, meanwhile)
        for request, voicing, group, result in zip(voiced, voicings, groups, results, strict=True):
            if isinstance(result, Exception):
                request.fail(result)
                continue
            reading, audio = result
            if not request.settled:
                self._deliver(request, Delivery(group, reading.text, audio, reading.codes))
            voicing.accept(reading)

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
