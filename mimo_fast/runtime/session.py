"""Dialogues that keep their key/value cache, so that each turn prefills its own ids alone."""

import math
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import prompt
from ..tasks import find_task
from .decode import Group
from .reply import Chunk, ChunkStream, ReplyReader, iterate_async, stream_reply

if TYPE_CHECKING:
    from ..mimo_audio import MimoAudio


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
        self._opening = self._conversation.shared = self._conversation.groups
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
        reply = model.decode(self._conversation, task.sampler, stop_ids, max_new_tokens, min_new_tokens)
        reader = ReplyReader(model.tokenizer, speaking=True)
        self._running = stream_reply(reply, reader, model.codec, began, note=self._note)
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
        codec = self._model.codec.config
        patch_ms = 1000 * self._conversation.group_size * codec.samples_per_frame / codec.sample_rate
        heard = math.ceil(min(max(played_ms / patch_ms, 0), len(self._spoken)))
        if heard < len(self._spoken):
            self._conversation.truncate(self._spoken[heard])
            del self._spoken[heard:]

    def reset(self) -> None:
        """Starts over; the voice stays, and stays cached."""
        self._stop()
        self._conversation.truncate(self._opening)
        self._reply_start, self._spoken = None, []

    def _note(self, group: Group) -> None:
        """Remembers at which group of the conversation each patch of the reply lies."""
        if group.text == self._model.tokenizer.special.empty:
            self._spoken.append(self._conversation.groups - 1)

    def _closing(self) -> Sequence[prompt.Segment]:
        """What turns the last reply into a finished turn: it may have ended at a stop token, a limit or mid-word."""
        if self._reply_start is None:
            return []
        special = self._model.tokenizer.special
        last = int(self.ids[0, -self._conversation.group_size])
        if last == special.im_end:
            return ["\n"]
        return ["<|im_end|>\n"] if last == special.eostm else ["<|eostm|>", "<|im_end|>\n"]

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None
