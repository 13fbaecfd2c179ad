"""The last exchange of a model, kept with its cache for add_history."""

from dataclasses import dataclass

from torch import Tensor

from mimo_fast.errors import PromptError
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.pipeline import Pipeline


@dataclass
class History:
    """One sequence: each request starts a new one or, with add_history, adds to the old one.

    stream: what may still be reading its last reply.
    """

    sequence: TokenSequence | None = None
    stream: ChunkStream | None = None

    def clear(self) -> None:
        self.sequence = self.stream = None

    def begin(
        self, pipeline: Pipeline, ids: Tensor, add_history: bool, seed: int | None
    ) -> TokenSequence:
        """Adds a prompt [C + 1, T G] to the last sequence or, without add_history, a new one.

        Raises:
            PromptError: the prompt is empty or does not fit; what was kept stays.
        """
        if not ids.shape[1]:
            raise PromptError("the prompt is empty")
        kept = self.sequence
        if kept is None or not add_history:
            pipeline.engine.check_room(ids.shape[1] // pipeline.lm.config.group_size)
            # The old cache goes before the new one comes. Other threads may begin theirs meanwhile.
            kept = None
            self.clear()
            kept = self.sequence = pipeline.sequence(seed)
        elif (running := self.stream) is not None:
            # A reply still being read would write into the same sequence.
            running.close()
        kept.add(ids)
        if seed is not None:
            kept.reseed(seed)
        return kept
