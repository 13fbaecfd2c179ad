"""The model's last exchange, kept with its KV cache for `add_history`."""

import asyncio
import threading
import weakref
from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor

from mimo_fast.errors import BusyError, PromptError
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import ChunkStream, caller, is_read_by_another
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.sampling import DrawnSeed, check_seed, one_seed
from mimo_fast.text.prompt import PackedPrompt


class History:
    """One sequence; a task starts a new one or, with add_history, continues it.

    Attributes:
        sequence: The sequence of the last exchange, None before the first.
        voice: That of its streamed replies, None before the first.
    """

    def __init__(self) -> None:
        self.sequence: TokenSequence | None = None
        self.voice: Voice | None = None
        # Whether the sequence's draws come from a seed that a caller gave.
        self._seeded = False
        self._before: tuple[Tensor, int] | None = None
        self._reader: weakref.ref[Reply | ChunkStream] | None = None
        self._owner: asyncio.Task[Any] | threading.Thread | None = None
        self._lock = threading.RLock()

    def __copy__(self) -> "History":
        twin = History()
        with self._lock:
            twin.sequence = None if self.sequence is None else self.sequence.fork()
            twin.voice, twin._seeded = copy(self.voice), self._seeded
        return twin

    def clear(self) -> None:
        with self._lock:
            self.sequence = self._reader = self.voice = None

    def restore(self, pipeline: Pipeline, ids: Tensor) -> None:
        """Begins with ids [C + 1, T G] of an earlier exchange, none of which is cached.

        Raises:
            PromptError: they leave no room for a turn; the history is unchanged.
        """
        # Its seed is replaced when a turn continues it.
        sequence = pipeline.sequence(0)
        sequence.add(ids)
        with self._lock:
            self.clear()
            self.sequence, self._seeded = sequence, False

    def start(
        self,
        pipeline: Pipeline,
        prompt: Tensor | PackedPrompt,
        add_history: bool,
        seed: int | None,
        start: Callable[[TokenSequence], Reply],
        adapter: str | None = None,
    ) -> Reply:
        """Adds a prompt [C + 1, T G] to the last sequence or, without add_history, to a new one.

        seed: of the draws from here on. Without one they go on from the last seed that was given,
        or begin with a fresh one, which may have been drawn ahead.

        adapter: that this turn is computed with. Where it is another one than the last turn's, all
        of the history is prefilled again.

        Returns:
            What `start` returns for that sequence.

        Raises:
            PromptError: the prompt is empty or does not fit; the history is unchanged.
            BusyError: add_history, and the reply to be continued is still running for another
                thread or task.
        """
        groups = (prompt.ids if isinstance(prompt, PackedPrompt) else prompt).shape[1]
        groups //= pipeline.lm.config.group_size
        if not groups:
            raise PromptError("the prompt is empty")
        given = seed is not None and not isinstance(seed, DrawnSeed)
        seed, place = None if seed is None else check_seed(seed), pipeline.lm.place_of(adapter)
        with self._lock:
            continued = add_history and self.sequence is not None
            if self.sequence is not None and add_history:
                self._check_owner()
                # A running reply would append to the same sequence.
                if (running := self._running()) is not None:
                    running.close()
                pipeline.engine.release(self.sequence)
                if self.sequence.adapter != place:
                    self.sequence = self.sequence.fork(place)
            else:
                pipeline.engine.check_room(groups)
                # The old cache is freed before a new one is allocated.
                self.clear()
                self.sequence, self._seeded = pipeline.sequence(seed, adapter), given
            sequence = self.sequence
            before = sequence.ids, sequence.cached
            self._before = before if add_history else None
            try:
                sequence.add(prompt)
                if continued and (given or not self._seeded):
                    sequence.reseed(one_seed(seed))
                    self._seeded = given
                reply = start(sequence)
            except BaseException:
                sequence.go_back(*before)
                raise
            self._reader, self._owner = weakref.ref(reply), caller()
        return reply

    def take_back(self) -> None:
        """Forgets the prompt that was added last, of which a recording turned out to be none."""
        with self._lock:
            if self.sequence is not None and self._before is not None:
                self.sequence.go_back(*self._before)
            else:
                self.clear()

    def read_by(self, reply: Reply, stream: ChunkStream, voice: Voice) -> ChunkStream:
        """Notes the stream of the last reply, which a continuation closes, and its voice."""
        with self._lock:
            if self._running() is reply:
                self._reader, self.voice = weakref.ref(stream), voice
        return stream

    def _running(self) -> Reply | ChunkStream | None:
        """The last reply or its stream, while somebody holds it."""
        return None if self._reader is None else self._reader()

    def _check_owner(self) -> None:
        if is_read_by_another(self._running(), self._owner):
            raise BusyError(
                "another thread or task is still reading the reply that add_history would "
                "continue: wait for its end, or give each caller a model of its own with "
                "copy.copy(model)"
            )
