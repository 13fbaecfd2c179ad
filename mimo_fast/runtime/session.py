"""Dialogues that keep their key/value cache, so that each turn prefills its own ids alone."""

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import prompt
from ..config import LMConfig
from ..errors import PromptError
from ..kernels.sample import SamplerTensors
from ..tasks import find_task
from .decode import Limits, Step, decode
from .lm import LM
from .reply import Chunk, ChunkStream, ReplyReader, iterate_async, stream_reply

if TYPE_CHECKING:
    from ..mimo_audio import MimoAudio


class Conversation:
    """One row's ids [C + 1, T G], and a state that holds a prefix of them."""

    def __init__(self, lm: LM, seed: int) -> None:
        self.lm = lm
        self.ids = torch.empty(lm.config.channels + 1, 0, dtype=torch.int64)
        self.state = lm.new_state([seed], lm.config.max_positions)
        self.prefilled = 0

    @property
    def groups(self) -> int:
        return self.ids.shape[1] // self.lm.config.group_size

    @property
    def cached(self) -> int:
        """Groups whose keys and values the state holds."""
        return self.state.cache.lengths[0]

    def reseed(self, seed: int) -> None:
        """Restarts the draws from a seed."""
        self.state.seeds[0] = seed
        self.state.draws[0] = 0

    def add(self, ids: Tensor) -> None:
        """Appends a prompt [C + 1, n G], to be fed when decoding begins.

        Raises:
            PromptError: it leaves no room for a reply; the conversation stays as it was.
        """
        check_room(self.lm.config, self.groups + ids.shape[1] // self.lm.config.group_size)
        self._extend(ids)

    def _extend(self, ids: Tensor) -> None:
        self.ids = torch.cat((self.ids, ids.cpu()), dim=1)

    def truncate(self, groups: int) -> None:
        """Forgets all but the first `groups` groups."""
        self.ids = self.ids[:, : groups * self.lm.config.group_size]
        self.state.cache.lengths[0] = min(self.cached, groups)

    def decode(self, limits: Limits, global_settings: SamplerTensors, local_settings: SamplerTensors) -> Iterator[Step]:
        """Prefills what is not cached, then decodes; each group is part of the conversation before it is yielded."""
        room = self.lm.config.max_positions - self.groups
        self.prefilled = self.groups - self.cached
        with torch.no_grad():
            self.lm.prefill(self.ids[:, self.cached * self.lm.config.group_size :], self.state, 0)
        limits = Limits(min(limits.max_new, room), limits.min_new, limits.stop_ids)
        return self._record(decode(self.lm, self.state, [limits], global_settings, local_settings))

    def _record(self, steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            codes = step.codes[0].cpu()
            self._extend(torch.cat((codes.new_full((1, codes.shape[1]), step.text[0]), codes)))
            yield step


def check_room(config: LMConfig, groups: int) -> None:
    """Raises PromptError unless a conversation of so many groups leaves room for a reply."""
    if groups >= config.max_positions:
        raise PromptError(
            f"the conversation has {groups} groups and the model's context is {config.max_positions}: "
            "start a new one or shorten the input"
        )


class Session:
    """A spoken dialogue, turn by turn, in the format of upstream's multi-turn prompt.

    Args:
        model: a `MimoAudio`.
        system_prompt: an instruction in front of the first turn.
        voice: a recording whose voice the replies should have.
        seed: of all draws; None draws a fresh one.
    """

    def __init__(
        self, model: "MimoAudio", system_prompt: str | None = None, voice: Any = None, seed: int | None = None
    ) -> None:
        self._model = model
        self._system_prompt = system_prompt
        self._conversation = model.conversation(seed)
        self._conversation.add(model.pack(prompt.voice_system(None if voice is None else model.speech(voice))))
        self._opening = self._conversation.groups
        self._reply_start: int | None = None
        self._spoken: list[int] = []
        self._running: ChunkStream | None = None

    @property
    def ids(self) -> Tensor:
        """Everything said so far: [C + 1, T G]."""
        return self._conversation.ids

    @property
    def prefilled(self) -> int:
        """Groups that the last turn had to prefill."""
        return self._conversation.prefilled

    def stream(self, audio: Any, max_new_tokens: int | None = None, min_new_tokens: int = 0) -> ChunkStream:
        """Says `audio` (anything `load_audio` reads) to the model and yields its reply as it is decoded.

        Closing the iterator stops at once and keeps what was decoded; `interrupt` keeps only what was heard.
        """
        self._stop()
        began = perf_counter()
        model = self._model
        first = self._reply_start is None
        turn = prompt.spoken_dialogue(model.speech(audio), self._system_prompt if first else None)
        self._conversation.add(model.pack([*self._closing(), *turn]))
        self._reply_start, self._spoken = self._conversation.groups, []
        task = find_task("spoken_dialogue")
        stop_ids = task.stop_ids(model.tokenizer.special)
        steps = model.decode(self._conversation, task.sampler, stop_ids, max_new_tokens, min_new_tokens)
        steps = self._note_patches(steps)
        self._running = stream_reply(steps, ReplyReader(model.tokenizer, speaking=True), model.codec, began)
        return self._running

    def astream(self, audio: Any, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio."""
        return iterate_async(lambda: self.stream(audio, **options))

    def interrupt(self, played_ms: float) -> None:
        """Stops the running reply and forgets what was not heard.

        Args:
            played_ms: how much of this reply's audio has been played. The patch being played counts as heard; text,
                codes and cache after it are dropped. Text in front of it stays, which may run up to five tokens
                ahead of the voice. The next turn closes the reply there.
        """
        self._stop()
        if self._reply_start is None:
            return
        codec, group_size = self._model.codec.config, self._conversation.lm.config.group_size
        patch_ms = 1000 * group_size * codec.samples_per_frame / codec.sample_rate
        heard = math.ceil(min(max(played_ms / patch_ms, 0), len(self._spoken)))
        if heard < len(self._spoken):
            self._conversation.truncate(self._spoken[heard])
            del self._spoken[heard:]

    def reset(self) -> None:
        """Starts over; the voice stays, and stays cached."""
        self._stop()
        self._conversation.truncate(self._opening)
        self._reply_start, self._spoken = None, []

    def _note_patches(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Remembers at which group of the conversation each patch of the reply lies."""
        for step in steps:
            if step.text[0] == self._model.tokenizer.special.empty:
                self._spoken.append(self._conversation.groups - 1)
            yield step

    def _closing(self) -> Sequence[prompt.Segment]:
        """What turns the last reply into a finished turn: it may have ended at a stop token, a limit or mid-word."""
        if self._reply_start is None:
            return []
        special = self._model.tokenizer.special
        last = int(self.ids[0, -self._conversation.lm.config.group_size])
        if last == special.im_end:
            return ["\n"]
        return ["<|im_end|>\n"] if last == special.eostm else ["<|eostm|>", "<|im_end|>\n"]

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None
