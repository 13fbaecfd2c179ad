"""`TokenSequence`: the ids of one sequence, and where their keys and values are cached."""

import threading

import torch
from torch import Tensor

from mimo_fast.config import GROUP_SECONDS, LMConfig
from mimo_fast.errors import PromptError
from mimo_fast.runtime.lm.snapshot import Snapshot
from mimo_fast.text.prompt import Hearing, PackedPrompt, PendingCodes, fill_in


class TokenSequence:
    """Ids [C + 1, T G] that grow by prompts and replies.

    The name keeps it apart from `collections.abc.Sequence`, which the same modules use.

    Args:
        config: dimensions of the language model.
        capacity: groups that it may have, the last one of a reply included.
        seed: of its draws.
        adapter: place of the adapter that it is computed with (`LM.adapters`); 0 for none.

    Attributes:
        slot: Its slot in the engine's KV cache, None while it has none.
        snapshot: Its keys and values in host memory, while it has no slot.
        cached: Number of groups whose keys and values are in the slot or the snapshot.
        prefix_groups: Number of groups at its start that form a prefix shared with other sequences.
        draws: Number of groups drawn.
        prefilled: Number of groups that were prefilled for the last reply.
        heard: Where the last prompt begins, and what is known of its recordings; None: nothing.
    """

    def __init__(self, config: LMConfig, capacity: int, seed: int, adapter: int = 0) -> None:
        self._config, self.capacity, self.seed, self.draws = config, capacity, seed, 0
        self.adapter = adapter
        self.group_size = config.group_size
        self._ids = torch.empty(config.channels + 1, 0, dtype=torch.int64, device="cpu")
        self._decoded: list[tuple[int, Tensor]] = []
        self._pending: tuple[tuple[int, PendingCodes], ...] = ()
        self._lock = threading.Lock()
        self.heard: tuple[int, Hearing] | None = None
        self.slot: int | None = None
        self.snapshot: Snapshot | None = None
        self.cached = self.prefix_groups = self.prefilled = 0

    @property
    def ids(self) -> Tensor:
        """All ids [C + 1, T G] on the host, settled."""
        return self.settle()

    @ids.setter
    def ids(self, ids: Tensor) -> None:
        with self._lock:
            self._ids = ids.cpu()
            self._decoded.clear()
            self._pending = ()

    def settle(self) -> Tensor:
        """`ids`, with decoded groups copied from the device and codes waited for.

        Raises:
            NumericError: those codes come of no finite values.
        """
        with self._lock:
            self._add_decoded()
            if self._pending:
                self._ids = fill_in(self._ids, self._pending)
                for _, codes in self._pending:
                    codes.drop()
                self._pending = ()
            return self._ids

    def _add_decoded(self) -> None:
        if self._decoded:
            codes = torch.cat([codes for _, codes in self._decoded], dim=1).cpu()
            text = torch.tensor(
                [text for text, _ in self._decoded], dtype=torch.int64, device="cpu"
            )
            text = text.repeat_interleave(self.group_size)
            self._ids = torch.cat((self._ids, torch.cat((text[None], codes))), dim=1)
            self._decoded.clear()

    def part(self, first: int, end: int) -> PackedPrompt:
        """Groups first ... end - 1, without waiting for codes that are still computed."""
        with self._lock:
            self._add_decoded()
            prompt = PackedPrompt(self._ids, self._pending)
        return prompt.part(first * self.group_size, end * self.group_size)

    @property
    def text(self) -> Tensor:
        """Channel 0 of `ids` [1, T G], which waits for no codes."""
        return self.part(0, self.groups).ids[:1]

    @property
    def groups(self) -> int:
        with self._lock:
            return self._ids.shape[1] // self.group_size + len(self._decoded)

    @property
    def known_groups(self) -> int:
        """Groups at its beginning whose ids are on the host, so that nobody waits for them."""
        with self._lock:
            first = min((frame for frame, _ in self._pending), default=self._ids.shape[1])
            return first // self.group_size

    def fork(self, adapter: int | None = None) -> "TokenSequence":
        """A sequence with the same ids and draws, and nothing cached.

        adapter: its place; None for this sequence's.
        """
        place = self.adapter if adapter is None else adapter
        twin = TokenSequence(self._config, self.capacity, self.seed, place)
        twin.ids, twin.draws, twin.prefix_groups = self.ids, self.draws, self.prefix_groups
        return twin

    def reseed(self, seed: int) -> None:
        """Restarts the draws from a seed."""
        self.seed, self.draws = seed, 0

    def add(self, prompt: Tensor | PackedPrompt) -> None:
        """Appends a prompt [C + 1, n G], which is prefilled when decoding begins.

        Raises:
            PromptError: it leaves no room for a reply; the sequence is unchanged.
        """
        added = prompt if isinstance(prompt, PackedPrompt) else PackedPrompt(prompt.cpu())
        check_room(self.groups + added.ids.shape[1] // self.group_size, self.capacity)
        before = self.ids
        begin, hearing = before.shape[1] // self.group_size, added.hearing
        self.heard = None if hearing is None else (begin, hearing)
        with self._lock:
            self._ids = torch.cat((before, added.ids), dim=1)
            self._pending = tuple((before.shape[1] + at, codes) for at, codes in added.pending)

    def append(self, text: int, codes: Tensor) -> None:
        """Appends a decoded group, its codes [C, G] on any device."""
        with self._lock:
            self._decoded.append((text, codes))

    def truncate(self, groups: int) -> None:
        """Keeps the first `groups` groups."""
        self.ids = self.ids[:, : groups * self.group_size]
        self.cached = min(self.cached, groups)

    def go_back(self, ids: Tensor, cached: int) -> None:
        """Restores earlier ids; groups overwritten since then no longer count as cached."""
        # Codes that are still computed are not waited for: they may be why it goes back.
        now = self.part(0, self.groups).ids
        shorter = min(ids.shape[1], now.shape[1])
        same = (ids[:, :shorter] == now[:, :shorter]).all(0).cumprod(0).sum()
        self.ids, self.cached = ids, min(cached, self.cached, int(same) // self.group_size)


def group_ids(text: int, codes: Tensor) -> Tensor:
    """A group as ids [C + 1, G] on the CPU: its text token, repeated, above its codes [C, G]."""
    return torch.cat((codes.new_full((1, codes.shape[1]), text), codes)).cpu()


def check_room(groups: int, capacity: int) -> None:
    """Raises PromptError unless a sequence of `groups` groups leaves room for a reply."""
    if groups >= capacity:
        raise PromptError(
            f"the conversation has {in_seconds(groups)} and the model's context is "
            f"{in_seconds(capacity)}: start a new one or shorten the input"
        )


def in_seconds(groups: int) -> str:
    """A number of groups, and the duration of as many groups of speech."""
    return f"{groups} groups ({groups * GROUP_SECONDS:.1f} s)"
