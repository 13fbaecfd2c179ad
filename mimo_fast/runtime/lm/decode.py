"""The decoding loop: one group at a time, for rows that may change between groups.

    hidden -> text token -> (if `<|empty|>`) patch decoder -> group -> embed -> backbone -> hidden

A row's tokens depend only on its own prompt, seed and settings, never on the rows beside it.

A row whose values are not finite draws NOT_FINITE for its text, which comes with the one host read.
Codes that could not be drawn make the next hidden state NaN, and so the next text NOT_FINITE; on a
CPU they are looked at at once.

Where a persistent kernel gave up (`persistent.py`), such rows have their group drawn again without
it. Of a patch on a GPU that shows only in a word that is copied behind it: `Decoder.confirm` waits
for it, so nothing is to be delivered before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mimo_fast.kernels.sample import NOT_FINITE, SamplerTensors
from mimo_fast.runtime.device.host_copy import HostCopy
from mimo_fast.runtime.lm.graphs import Graphs
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.state import DecodeState, in_order
from mimo_fast.sampling import MiMoSampler


@dataclass(frozen=True)
class Limits:
    """When a row ends.

    Attributes:
        max_new: The row ends after this number of groups.
        min_new: Stop ids are banned until the row has this number of groups.
        stop_ids: Text ids that end the row.
    """

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
    """One group of one row: a text token and codes int64 [C, G], empty codes beside a word.

    Attributes:
        finished: Whether it is the row's last group.
        finite: False where the text, or a code of a patch, is NOT_FINITE; the row has not advanced
            then.
    """

    text: int
    codes: Tensor
    finished: bool
    finite: bool = True


@dataclass
class Row:
    """The host's record of a slot that is being decoded; it suffices to repeat a failed group.

    Attributes:
        cached: Number of positions that the slot holds.
        draws: Number of groups drawn with its seed.
        produced: Number of groups decoded in this reply.
        last: The group drawn last, until it has been fed to the backbone.
        stale: The device may be ahead of this record; the slot is restored before the next group.
        hidden: The hidden state [D] that its first group is drawn from, if that was taken back.
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
    hidden: Tensor | None = None
    _before: tuple[int, int, int, Group | None, Tensor | None] | None = None

    def advance(self, text: int, codes: Tensor, hidden: Tensor | None = None) -> Group:
        """Takes the group that was drawn.

        hidden: what it was drawn from, if it is the first one and may be taken back.
        """
        self._before = self.cached, self.draws, self.produced, self.last, hidden
        self.cached += self.last is not None
        self.draws += 1
        self.produced += 1
        done = text in self.limits.stop_ids or self.produced >= self.limits.max_new
        self.last, self.stale = Group(text, codes, done), False
        return self.last

    def take_back(self) -> None:
        """Takes back the last `advance`, once."""
        assert self._before is not None
        self.cached, self.draws, self.produced, self.last, self.hidden = self._before
        self._before, self.stale = None, True

    @property
    def banned(self) -> bool:
        """Whether stop ids may not be drawn yet."""
        return bool(self.limits.stop_ids) and self.produced < self.limits.min_new


class HostRead:
    """Tokens that are being copied to the host while the device goes on.

    Args:
        parts: pairs of row indices and a function that waits for their tokens.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[int], Callable[[], list[int]]]]) -> None:
        self._parts = parts

    @classmethod
    def of(cls, tokens: Tensor, order: Sequence[int]) -> "HostRead":
        """Starts the copy of tokens [R]; order: the row of each."""
        copy = HostCopy(tokens)
        return cls([(order, lambda: copy.wait().tolist())])

    def __add__(self, other: "HostRead") -> "HostRead":
        return HostRead([*self._parts, *other._parts])

    def wait(self) -> list[int]:
        """Waits for all tokens and returns them in the order of the rows."""
        return in_order((rows for rows, _ in self._parts), (wait() for _, wait in self._parts))


@dataclass(frozen=True)
class Launched:
    """A group of some rows that has been launched: their tokens, and patches by slot so far."""

    rows: Sequence[Row]
    tokens: HostRead
    patches: dict[int, Tensor]


@dataclass
class Decoder:
    """Decodes rows of one state.

    A prompt is prefilled into a slot first; the row's first group is drawn from `state.hidden` of
    that slot. The last group of a reply is not fed to the backbone, so a later reply begins by
    prefilling it.

    Attributes:
        predict: Whether to launch the patch decoder of rows that spoke in their last group before
            the host has read whether they speak in this one. The device then never waits for the
            host; a wrong prediction drops the patch. The default is True on CUDA. It has no effect
            where the device itself tests whether a row speaks (`Graphs.conditional`).
        check_codes: Whether to look for NOT_FINITE among the codes of a group, which waits for the
            patch. The default is True on a CPU.
    """

    lm: LM
    state: DecodeState
    graphs: Graphs | None = None
    predict: bool | None = None
    check_codes: bool | None = None
    _slot_indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _unconfirmed: list[Row] = field(default_factory=list)
    _error: HostCopy | None = None

    def next_groups(self, rows: Sequence[Row]) -> list[Group]:
        """The next group of each row. After an error no row has advanced; each can be retried."""
        return self.collect(self.launch(rows))

    @torch.no_grad()
    def launch(self, rows: Sequence[Row]) -> Launched:
        """Launches the next group of each row without waiting for it.

        No row advances until `collect`. A launched group may also be dropped: the rows are then
        stale and the next launch restores them.
        """
        for row in rows:
            if row.stale:
                self._restore(row)
            row.stale = True
        fed, _ = _fed_and_fresh(rows)
        if self.graphs and self.graphs.joins([rows[i].slot for i in fed]):
            return self._launch_whole(rows, self.graphs)
        drawn = self._draw_text(rows)
        likely = self._likely_to_speak(rows)
        return Launched(rows, drawn, self._patches(likely) if likely else {})

    def _launch_whole(self, rows: Sequence[Row], graphs: Graphs) -> Launched:
        """`launch` with conditional graphs: one launch for each adapter among the rows that have a
        group to feed, of which there are some."""
        fed, fresh = _fed_and_fresh(rows)
        slots = [rows[i].slot for i in fed]
        wait, codes = graphs.group(slots)
        drawn, patches = HostRead([(fed, wait)]), dict(zip(slots, codes, strict=True))
        if fresh:
            drawn += HostRead.of(self._sample_text([rows[i] for i in fresh]), order=fresh)
        return Launched(rows, drawn, patches)

    @torch.no_grad()
    def collect(self, launched: Launched) -> list[Group]:
        """Waits for the groups of the last `launch` and returns one a row."""
        rows, patches = launched.rows, launched.patches
        # The only host synchronization of a group.
        tokens = launched.tokens.wait()
        speaking = [row for row, text in zip(rows, tokens, strict=True) if text == self.lm.empty_id]
        if missing := [row for row in speaking if row.slot not in patches]:
            patches = patches | self._patches(missing)
        persistent = self.lm.persistent_of(self.state) if speaking else None
        error = persistent and persistent.error_copy()
        # A first group is drawn from a hidden state that the next step overwrites.
        first = [row.slot for row in rows if error and row.last is None]
        hidden = dict(zip(first, self.state.hidden[first], strict=True)) if first else {}
        failed = NOT_FINITE in tokens and self._gave_up()
        checks = self.lm.device.type == "cpu" if self.check_codes is None else self.check_codes
        drawn = [patches[row.slot] for row in speaking]
        # One look at all of them costs less than one at each.
        lost = (checks or failed) and bool(drawn)
        lost = lost and bool((torch.stack(drawn) == NOT_FINITE).any())
        failed = failed or (lost and self._gave_up())
        silence = self.lm.empty_codes[:, None].expand(-1, self.lm.config.group_size)
        groups, again = list[Group](), list[Row]()
        for row, text in zip(rows, tokens, strict=True):
            codes = patches[row.slot] if text == self.lm.empty_id else silence
            if text == NOT_FINITE or (lost and bool((codes == NOT_FINITE).any())):
                groups.append(Group(text, codes, finished=True, finite=False))
                again.append(row)
                continue
            groups.append(row.advance(text, codes, hidden.get(row.slot)))
            # What a launch that was given up has left of the row in device memory is not known.
            row.stale = failed
            if row.limits.min_new == row.produced:
                self.state.banned[row.slot] = False
        if not failed:
            if error:
                pairs = zip(rows, groups, strict=True)
                self._unconfirmed += [row for row, group in pairs if group.finite]
                self._error = error
            return groups
        repeated = iter(self.next_groups(again))
        return [group if group.finite else next(repeated) for group in groups]

    def confirm(self) -> bool:
        """Whether the groups collected since this was asked last are right; waits for patches.

        If not, a persistent kernel gave up: no row has advanced, each can be retried, and what has
        been launched since is of no use.
        """
        rows, error = self._unconfirmed, self._error
        self._unconfirmed, self._error = [], None
        if error is None or not int(error.wait()):
            return True
        self._gave_up()
        for row in rows:
            row.take_back()
        return False

    def _gave_up(self) -> bool:
        """Whether a persistent kernel gave up; from now on there is none."""
        if not self.lm.gave_up():
            return False
        if self.graphs:
            self.graphs.forget_groups()
        return True

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
        spoke = (row for row in rows if row.last and row.last.text == self.lm.empty_id)
        return list(spoke) if predict else []

    def _feed(self, rows: Sequence[Row]) -> Tensor:
        if self.graphs:
            return self.graphs.step([row.slot for row in rows])
        return self.lm.step_text(self.state, *self._text_draw(rows))

    def _sample_text(self, rows: Sequence[Row]) -> Tensor:
        return self.lm.sample_text(self.state, *self._text_draw(rows))

    def _text_draw(self, rows: Sequence[Row]) -> tuple[Tensor, SamplerTensors, Tensor | None]:
        """Slots, settings and banned ids of the rows' next text."""
        slots = self._slots(rows)
        samplers = [row.samplers.text for row in rows]
        settings = _known(self.state.text_sampler.select(slots), samplers)
        banned = self.state.banned[slots] if any(row.banned for row in rows) else None
        return slots, settings, banned

    def _patches(self, rows: Sequence[Row]) -> dict[int, Tensor]:
        """Codes [C, G] of these rows by slot."""
        slots = [row.slot for row in rows]
        if self.graphs:
            return dict(zip(slots, self.graphs.patch(slots), strict=True))
        indices = self._slots(rows)
        samplers = [row.samplers.codes for row in rows]
        settings = _known(self.state.code_sampler.select(indices), samplers)
        return dict(zip(slots, self.lm.sample_patch(self.state, indices, settings), strict=True))

    def _restore(self, row: Row) -> None:
        """Restores a slot of the device from the host's record of its row."""
        state, slot = self.state, row.slot
        state.lengths[slot], state.seeds[slot], state.draws[slot] = row.cached, row.seed, row.draws
        state.set_samplers(slot, row.samplers.text, row.samplers.codes)
        state.banned[slot] = False
        if row.banned:
            stops = [token for token in row.limits.stop_ids if token < self.lm.config.vocab_size]
            state.banned[slot, stops] = True
        if row.last is not None:
            self.lm.stage(state, slot, row.last.text, row.last.codes)
        if row.hidden is not None:
            state.hidden[slot], row.hidden = row.hidden, None

    def _slots(self, rows: Sequence[Row]) -> Tensor:
        key = tuple(row.slot for row in rows)
        if key not in self._slot_indices:
            if len(self._slot_indices) >= 64:
                self._slot_indices.clear()
            self._slot_indices[key] = torch.tensor(key, device=self.lm.device, dtype=torch.int64)
        return self._slot_indices[key]


def _fed_and_fresh(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Indices of the rows that have a group to feed, and of those at the end of their prompt."""
    fed = [i for i, row in enumerate(rows) if row.last is not None]
    return fed, [i for i, row in enumerate(rows) if row.last is None]


def _known(settings: SamplerTensors, samplers: Sequence[MiMoSampler]) -> SamplerTensors:
    """Adds what the host knows of the settings, which saves launches and sorts."""
    greedy = all(not s.do_sample or s.temperature == 0 for s in samplers)
    return replace(settings, all_greedy=greedy, any_top_k=any(s.top_k for s in samplers))
