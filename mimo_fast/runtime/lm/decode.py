"""The one decoding loop: a group at a time, for rows that come and go between groups.

    hidden -> text token -> (if `<|empty|>`) patch decoder -> group -> embed the group -> backbone
    step -> hidden

A row's tokens depend on its own prompt, seed and settings alone, whatever rows are decoded beside
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mimo_fast.kernels.sample import SamplerTensors
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import DecodeState
from mimo_fast.sampling import MiMoSampler


@dataclass(frozen=True)
class Limits:
    """When a row ends: groups it may generate, and text ids that end it, banned until it has
    min_new groups."""

    max_new: int
    min_new: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Samplers:
    """How a row draws its text and its speech codes."""

    text: MiMoSampler
    codes: MiMoSampler


@dataclass(frozen=True)
class Group:
    """One group of one row: its text token, its codes int64 [C, G] (empty under a word), whether it
    is the last."""

    text: int
    codes: Tensor
    finished: bool


@dataclass
class Row:
    """What the host knows of a slot that is being decoded; enough to repeat a group that failed
    half way.

    cached: positions its slot holds. draws: groups drawn with its seed. last: the group drawn last,
    while it has not been fed. stale: the device may be ahead of this and is to be set back first.
    """

    slot: int
    limits: Limits
    samplers: Samplers
    seed: int
    cached: int
    draws: int = 0
    produced: int = 0
    last: Group | None = None
    stale: bool = True

    @property
    def banned(self) -> bool:
        """Whether stop ids may not be drawn yet."""
        return bool(self.limits.stop_ids) and self.produced < self.limits.min_new


class HostRead:
    """Tokens on their way to the host, while the device goes on.

    Args:
        parts: rows, and what waits for the token of each. Several are of one device, so that
            waiting for the last is waiting for all.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Callable[[], list[int]]]]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, tokens: Tensor, order: Sequence[int]) -> "HostRead":
        """Tokens [R] and the row of each."""
        copy = HostCopy(tokens)
        return cls([(order, lambda: copy.wait().tolist())])

    def __add__(self, other: "HostRead") -> "HostRead":
        return HostRead([*self._parts, *other._parts])

    def wait(self) -> list[int]:
        """The tokens by row."""
        by_row = dict[int, int]()
        for rows, wait in self._parts:
            by_row |= zip(rows, wait(), strict=True)
        return [by_row[row] for row in range(len(by_row))]


@dataclass(frozen=True)
class Launched:
    """A group of some rows that the device is at: their tokens, and the patches that have been
    launched so far by their slot."""

    rows: Sequence[Row]
    tokens: HostRead
    patches: dict[int, Tensor]


@dataclass
class Decoder:
    """Decodes rows of one state.

    A prompt is prefilled into a slot before its row comes here: `state.hidden` of the slot is what
    the first group is drawn from. A row's last group is not fed to the backbone, so a later turn
    begins by feeding it.

    predict: start the patch decoder of rows that spoke in their last group before the host has read
    whether they speak in this one, so that a device never waits for the host; where that was wrong
    the patch is dropped. On by default on devices that work on their own; of no account where the
    device itself tests whether a row speaks (`Graphs.conditional`).
    """

    lm: LM
    state: DecodeState
    graphs: Graphs | None = None
    predict: bool | None = None
    _slot_indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def next_groups(self, rows: Sequence[Row]) -> list[Group]:
        """The next group of each row. On any error no row has moved: each may be tried again or
        given up."""
        return self.collect(self.launch(rows))

    @torch.no_grad()
    def launch(self, rows: Sequence[Row]) -> Launched:
        """Gives the device the next group of each row and waits for nothing. It is either collected
        or, with all that it has changed, forgotten: until then no row has moved."""
        for row in rows:
            if row.stale:
                self._restore(row)
            row.stale = True
        if self.graphs and self.graphs.conditional:
            return self._launch_whole(rows, self.graphs)
        drawn = self._draw_text(rows)
        likely = self._likely_to_speak(rows)
        return Launched(rows, drawn, self._patches(likely) if likely else {})

    def _launch_whole(self, rows: Sequence[Row], graphs: Graphs) -> Launched:
        """One launch for all rows that have a group to feed, patches included."""
        fed, fresh = _fed_and_fresh(rows)
        drawn, patches = HostRead([]), dict[int, Tensor]()
        if fed:
            slots = [rows[i].slot for i in fed]
            wait, codes = graphs.group(slots)
            drawn, patches = HostRead([(fed, wait)]), dict(zip(slots, codes, strict=True))
        if fresh:
            drawn += HostRead.of(self._sample_text([rows[i] for i in fresh]), order=fresh)
        return Launched(rows, drawn, patches)

    @torch.no_grad()
    def collect(self, launched: Launched) -> list[Group]:
        """The groups of the last `launch`, one a row."""
        rows, patches = launched.rows, launched.patches
        # The one host read of a group.
        tokens = launched.tokens.wait()
        speaking = [row for row, text in zip(rows, tokens, strict=True) if text == self.lm.empty_id]
        if missing := [row for row in speaking if row.slot not in patches]:
            patches = patches | self._patches(missing)
        silence = self.lm.empty_codes[:, None].expand(-1, self.lm.config.group_size)
        groups = [
            self._group(row, text, patches[row.slot] if text == self.lm.empty_id else silence)
            for row, text in zip(rows, tokens, strict=True)
        ]
        for row, group in zip(rows, groups, strict=True):
            row.cached += row.last is not None
            row.last, row.stale = group, False
            row.draws += 1
            row.produced += 1
            if row.limits.min_new == row.produced:
                self.state.banned[row.slot] = False
        return groups

    def _draw_text(self, rows: Sequence[Row]) -> HostRead:
        """Feeds the rows that have a group to feed, and draws a text token for each row."""
        fed, fresh = _fed_and_fresh(rows)
        tokens = list[Tensor]()
        if fed:
            tokens.append(self._feed([rows[i] for i in fed]))
        if fresh:
            tokens.append(self._sample_text([rows[i] for i in fresh]))
        return HostRead.of(torch.cat(tokens), order=[*fed, *fresh])

    def _likely_to_speak(self, rows: Sequence[Row]) -> list[Row]:
        predict = self.lm.device.type == "cuda" if self.predict is None else self.predict
        return (
            [row for row in rows if row.last is not None and row.last.text == self.lm.empty_id]
            if predict
            else []
        )

    def _feed(self, rows: Sequence[Row]) -> Tensor:
        if self.graphs:
            return self.graphs.step([row.slot for row in rows])
        self.lm.step(self.state, self._slots(rows))
        return self._sample_text(rows)

    def _sample_text(self, rows: Sequence[Row]) -> Tensor:
        slots = self._slots(rows)
        settings = _known(
            self.state.text_sampler.select(slots), [row.samplers.text for row in rows]
        )
        banned = self.state.banned[slots] if any(row.banned for row in rows) else None
        return self.lm.sample_text(self.state, slots, settings, banned)

    def _patches(self, rows: Sequence[Row]) -> dict[int, Tensor]:
        """Codes of these rows by their slot."""
        slots = [row.slot for row in rows]
        if self.graphs:
            return dict(zip(slots, self.graphs.patch(slots), strict=True))
        indices = self._slots(rows)
        settings = _known(
            self.state.code_sampler.select(indices), [row.samplers.codes for row in rows]
        )
        return dict(zip(slots, self.lm.sample_patch(self.state, indices, settings), strict=True))

    def _group(self, row: Row, text: int, codes: Tensor) -> Group:
        done = text in row.limits.stop_ids or row.produced + 1 >= row.limits.max_new
        return Group(text, codes, done)

    def _restore(self, row: Row) -> None:
        """Brings the device to what the host knows of a row."""
        state, slot = self.state, row.slot
        state.lengths[slot], state.seeds[slot], state.draws[slot] = row.cached, row.seed, row.draws
        state.set_samplers(slot, row.samplers.text, row.samplers.codes)
        state.banned[slot] = False
        if row.banned:
            stops = [token for token in row.limits.stop_ids if token < self.lm.config.vocab_size]
            state.banned[slot, stops] = True
        if row.last is not None:
            self.lm.stage(state, slot, row.last.text, row.last.codes)

    def _slots(self, rows: Sequence[Row]) -> Tensor:
        key = tuple(row.slot for row in rows)
        if key not in self._slot_indices:
            if len(self._slot_indices) >= 64:
                self._slot_indices.clear()
            self._slot_indices[key] = torch.tensor(key, device=self.lm.device)
        return self._slot_indices[key]


def _fed_and_fresh(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Which rows have a group to feed, and which are drawn from their prompts."""
    fed = [i for i, row in enumerate(rows) if row.last is not None]
    return fed, [i for i, row in enumerate(rows) if row.last is None]


def _known(settings: SamplerTensors, samplers: Sequence[MiMoSampler]) -> SamplerTensors:
    """Adds what the host knows of the rows, which saves launches and sorts."""
    greedy = all(not s.do_sample or s.temperature == 0 for s in samplers)
    return replace(settings, all_greedy=greedy, any_top_k=any(s.top_k for s in samplers))
