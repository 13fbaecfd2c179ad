"""The one decoding loop: a group at a time, for a batch of rows that end when they will.

    hidden -> text token -> (if `<|empty|>`) patch decoder -> yield -> embed the group -> backbone step -> hidden
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.sample import SamplerTensors
from .lm import LM
from .state import DecodeState


@dataclass(frozen=True)
class Limits:
    """When a row ends: groups it may generate, and text ids that end it, banned until it has min_new groups."""

    max_new: int
    min_new: int = 0
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Step:
    """One group for each row still running.

    slots: the rows; text: their tokens; codes int64 [R, C, G], the empty codes on text rows;
    finished: whether this group is the row's last.
    """

    slots: list[int]
    text: list[int]
    codes: Tensor
    finished: list[bool]


StopHook = Callable[[int, int, Tensor], bool]
"""(slot, text token, codes [C, G]) -> whether the row ends here."""


def start(lm: LM, prompts: Sequence[Tensor], seeds: Sequence[int], capacity: int) -> DecodeState:
    """A state with every prompt [C + 1, T_b G] prefilled, each on its own so that no row feels another's length."""
    state = lm.new_state(seeds, capacity)
    with torch.no_grad():
        for slot, prompt in enumerate(prompts):
            lm.prefill(prompt, state, slot)
    return state


def decode(
    lm: LM,
    state: DecodeState,
    limits: Sequence[Limits],
    global_settings: SamplerTensors,
    local_settings: SamplerTensors,
    stop_hook: StopHook | None = None,
) -> Iterator[Step]:
    """Decodes all slots of a prefilled state until each has ended; closing the iterator stops at once.

    limits and settings have one entry a slot. A row's last group is yielded but not fed to the backbone, so a later
    turn begins by feeding it.
    """
    slots = list(range(len(limits)))
    produced = 0
    while slots:
        with torch.no_grad():
            step = _next_groups(lm, state, slots, limits, global_settings, local_settings, produced, stop_hook)
        produced += 1
        yield step
        running = [row for row, finished in enumerate(step.finished) if not finished]
        slots = [step.slots[row] for row in running]
        if slots:
            with torch.no_grad():
                text = torch.tensor([step.text[row] for row in running], device=lm.device)
                lm.step(text, step.codes[running], state, slots)


def _next_groups(
    lm: LM,
    state: DecodeState,
    slots: list[int],
    limits: Sequence[Limits],
    global_settings: SamplerTensors,
    local_settings: SamplerTensors,
    produced: int,
    stop_hook: StopHook | None,
) -> Step:
    banned = _banned_stops(lm, [limits[slot] for slot in slots], produced)
    # The one host read of a group: which rows speak, and which end.
    text = lm.sample_text(state, slots, global_settings.select(slots), banned).tolist()
    codes = lm.empty_codes[:, None].expand(len(slots), -1, lm.config.group_size).clone()
    speaking = [row for row, token in enumerate(text) if token == lm.empty_id]
    if speaking:
        speakers = [slots[row] for row in speaking]
        codes[speaking] = lm.sample_patch(state, speakers, local_settings.select(speakers))
    state.draws[slots] += 1
    finished = []
    for row, (slot, token) in enumerate(zip(slots, text, strict=True)):
        # The hook sees every group, those that end a row by themselves as well.
        hooked = stop_hook is not None and stop_hook(slot, token, codes[row])
        finished.append(hooked or token in limits[slot].stop_ids or produced + 1 >= limits[slot].max_new)
    return Step(slots, text, codes, finished)


def _banned_stops(lm: LM, limits: Sequence[Limits], produced: int) -> Tensor | None:
    """Stop ids of rows that have not reached their minimum: bool [R, vocabulary], or None."""
    if all(produced >= limit.min_new or not limit.stop_ids for limit in limits):
        return None
    banned = torch.zeros(len(limits), lm.config.vocab_size, dtype=torch.bool)
    for row, limit in enumerate(limits):
        if produced < limit.min_new:
            banned[row, [token for token in limit.stop_ids if token < lm.config.vocab_size]] = True
    return banned.to(lm.device)
