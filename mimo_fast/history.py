"""The model's last exchange, kept with its KV cache for `add_history`."""

from dataclasses import dataclass

from torch import Tensor

from mimo_fast.errors import PromptError
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.pipeline import Pipeline


@dataclass
class History:
    """One sequence; a task starts a new one or, with add_history, continues it.

    Attributes:
        sequence: The sequence of the last exchange, None before the first.
        stream: The stream of its last reply, which may still be running.
    """

    sequence: TokenSequence | None = None
    stream: ChunkStream | None = None

    def clear(self) -> None:
        self.sequence = self.stream = None

    def begin(
        self, pipeline: Pipeline, ids: Tensor, add_history: bool, seed: int | None
    ) -> TokenSequence:
        """Adds a prompt [C + 1, T G] to the last sequence or, without add_history, to a new one.

        Raises:
            PromptError: the prompt is empty or does not fit; the history is unchanged.
        """
        if not ids.shape[1]:
            raise PromptError("the prompt is empty")
        kept = self.sequence
        if kept is None or not add_history:
            pipeline.engine.check_room(ids.shape[1] // pipeline.lm.config.group_size)
            # The old cache is freed before a new one is allocated. `kept` is a local variable,
            # since another thread may call `begin` meanwhile.
            kept = None
            self.clear()
            kept = self.sequence = pipeline.sequence(seed)
        elif (running := self.stream) is not None:
            # A running reply would append to the same sequence.
            running.close()
        kept.add(ids)
        if seed is not None:
            kept.reseed(seed)
        return kept
