"""The last exchange of a model, kept with its cache for add_history."""

import torch
from torch import Tensor

from mimo_fast.errors import PromptError
from mimo_fast.generation import flatten_ids, row_seeds
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.sequence import Conversation
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.memory import Setup
from mimo_fast.text.prompt_builder import PromptBuilder


class KeepsHistory(PromptBuilder):
    """One conversation: each request starts a new one, or with add_history prefills what is new in
    the old one."""

    setup: Setup

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._kept: Conversation | None = None
        self._running: ChunkStream | None = None

    @property
    def engine(self) -> Engine:
        """What decodes every stream and session of this language model."""
        if self._engine is None or self._engine.lm is not self.lm:
            setup, capacity = self.setup, min(self.setup.max_seq_len, self.lm.config.max_positions)
            self._engine = Engine(
                self.lm, setup.max_batch, capacity, quantized_cache=setup.kv_cache is not None
            )
        return self._engine

    def warmup(self, progress: bool = True) -> dict[str, int]:
        """Captures the graphs of every batch size and of as many codec streams, so that the first
        reply is as fast as the tenth; done at load.

        Returns:
            Bytes of the device's memory by what they are for, and on a GPU what has been reserved
            of it in all.
        """
        self.engine.warmup(progress)
        self.codec.warmup(self.setup.max_batch, progress)
        report = self.setup.bytes()
        if self.lm.device.type == "cuda":
            report["reserved"] = torch.cuda.memory_reserved(self.lm.device)
        return report

    @property
    def history(self) -> Tensor | None:
        """Ids of the last exchange, flattened [1, L] as upstream keeps them; None before the
        first."""
        return flatten_ids(self._kept.ids)[None] if self._kept is not None else None

    @history.setter
    def history(self, value: None) -> None:
        if value is not None:
            raise ValueError("history can only be cleared: set it to None")
        self.clear_history()

    @property
    def has_history(self) -> bool:
        return self._kept is not None

    def clear_history(self) -> None:
        self._kept = self._running = None

    def conversation(self, seed: int | None = None) -> Conversation:
        """An empty conversation."""
        return Conversation(self.engine, row_seeds(seed, 1)[0])

    def conversation_for(
        self, input_ids: Tensor, add_history: bool, seed: int | None
    ) -> Conversation:
        """The last conversation or, without add_history, a new one, with the prompt [C + 1, T G]
        appended.

        Raises:
            PromptError: the prompt is empty or does not fit; what was kept stays.
        """
        if not input_ids.shape[1]:
            raise PromptError("the prompt is empty")
        kept = self._kept
        if kept is None or not add_history:
            self.engine.check_room(input_ids.shape[1] // self.lm.config.group_size)
            # The old cache goes before the new one comes. Other threads may begin theirs meanwhile.
            kept = None
            self.clear_history()
            kept = self._kept = self.conversation(seed)
        elif (running := self._running) is not None:
            # A reply still being read would write into the same conversation.
            running.close()
        kept.add(input_ids)
        if seed is not None:
            kept.reseed(seed)
        return kept
