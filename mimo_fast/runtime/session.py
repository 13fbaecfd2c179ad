"""Dialogues that keep their KV cache, so that each turn prefills only its own ids."""

import asyncio
import math
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mimo_fast.arguments import checked, names_of, refuse_unknown
from mimo_fast.errors import BusyError, PromptError
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.engine.stream import (
    Chunk,
    ChunkStream,
    Listening,
    caller,
    is_read_by_another,
    iterate_async,
)
from mimo_fast.runtime.lm.decode import Group, Samplers
from mimo_fast.runtime.pipeline import Pipeline, check_limits
from mimo_fast.runtime.session_file import read_session, write_session
from mimo_fast.text.prompt import Segment, Segments, Speech, in_vocabulary
from mimo_fast.text.tasks import TASKS, Audio, spoken_dialogue, voice_system

TASK = TASKS["spoken_dialogue_sft"]

REPLY = 1 / 8
"""Fraction of the context that is kept free for a reply."""

FULL = 0.5
"""Fraction of the context that remains filled when turns are dropped; low, so drops are rare."""


@dataclass(frozen=True)
class Turn:
    """One exchange: the first group of the turn and of its reply, and what the user said."""

    begin: int
    reply: int
    said: Speech

    @property
    def speech(self) -> Tensor:
        """The user's codes [C, n G]."""
        return self.said.codes


@dataclass(frozen=True)
class Exchange:
    """What the user said, and the reply: ids [C + 1, n G] as decoded, without what closes it."""

    said: Speech
    reply: Tensor


@dataclass(frozen=True)
class _Before:
    """A dialogue as it was before its last turn."""

    ids: Tensor
    cached: int
    draws: int
    turns: list[Turn]
    spoken: list[int]
    voice: Voice


@checked
class Session:
    """A spoken dialogue in the format of upstream's multi-turn prompt.

    When a turn leaves less than an eighth of the context for its reply, the oldest turns are
    dropped whole until the dialogue, the new turn included, fills at most half of the context.
    Voice and system prompt stay. The turns that remain are prefilled again.

    Any thread or task may call any method. Calls wait for each other, but never for a reply: a
    second caller of `stream` is refused while the reply of the first runs, and `interrupt`, `reset`
    and `save` end a running reply after the group in progress.

    Args:
        pipeline: language model, codec and engine.
        system_prompt: an instruction in front of the first turn.
        voice: a recording whose voice the replies should have.
        seed: of all draws; None draws one from torch's global generator.
        samplers: of text and codes; None for the preset of spoken dialogues.
        special_tokens: special tokens in the system prompt are tokens, and those of the reply are
            shown in its text, as upstream does.
        adapter: that replies are computed with, of `LM.adapters`; None for the model itself.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        system_prompt: str | None = None,
        voice: Audio | None = None,
        seed: int | None = None,
        samplers: Samplers | None = None,
        special_tokens: bool = False,
        adapter: str | None = None,
    ) -> None:
        pipeline.lm.config.architecture.check_task("spoken_dialogue_sft")
        self._pipeline, self._system_prompt = pipeline, system_prompt
        self._special_tokens = special_tokens
        self._samplers = samplers or pipeline.samplers(TASK.sampler)
        self._sequence = pipeline.sequence(seed, adapter)
        speech = None if voice is None else pipeline.speech(voice)
        self._sequence.add(pipeline.ids(voice_system(speech)))
        self._prefix_groups = self._sequence.prefix_groups = self._sequence.groups
        self._voice = Voice(speech)
        self._turns: list[Turn] = []
        self._spoken: list[int] = []
        self._before: _Before | None = None
        self._running: weakref.ref[ChunkStream] | None = None
        self._owner: asyncio.Task[Any] | threading.Thread | None = None
        self._lock = threading.RLock()

    @property
    def ids(self) -> Tensor:
        """Ids of the dialogue that the model sees: [C + 1, T G]."""
        self._pipeline.owner.check()
        return self._sequence.ids

    @property
    def turns(self) -> int:
        """Number of exchanges that the model still sees."""
        return len(self._turns)

    @property
    def prefilled(self) -> int:
        """Number of groups that were prefilled for the last turn."""
        return self._sequence.prefilled

    def stream(
        self,
        audio: Audio,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        lookahead: Listening = "exact",
    ) -> ChunkStream:
        """Adds the user's turn and yields the reply as it is decoded.

        A reply that still runs ends as if its stream were closed, if it is this caller's. Closing
        the iterator stops after the group in progress and keeps the groups decoded; `interrupt`
        keeps only those that were heard.

        Args:
            audio: anything that `load_audio` reads.
            lookahead: "elastic" is for somebody who listens, see `MimoAudio.stream`. It begins with
                the norm statistics of the replies of this dialogue that came to their end, exact
                ones too.

        Raises:
            ValueError: max_new_tokens is less than 1, or min_new_tokens less than 0.
            PromptError: the turn alone does not fit into the context. The dialogue is unchanged, as
                after any error.
            BusyError: another thread or task has not finished its turn, or the engine is full.
        """
        began, pipeline, sequence = perf_counter(), self._pipeline, self._sequence
        pipeline.owner.check()
        check_limits(max_new_tokens, min_new_tokens)
        self._check_owner()
        # Before the recording is encoded: groups of the last reply are copied to the host here.
        sequence.settle()
        speech = pipeline.speech_later(audio)
        with self._lock:
            self._check_owner()
            self._stop()
            earlier, before = self._before, self._state()
            try:
                self._say(speech)
                stop_ids = TASK.stop_ids(pipeline.tokenizer.special)
                reply = pipeline.start(
                    sequence, self._samplers, stop_ids, max_new_tokens, min_new_tokens
                )
            except BaseException:
                self._go_back(before, earlier)
                raise
            self._before = before
            shown = self._special_tokens
            speaker = lookahead, self._voice
            chunks = pipeline.stream(
                reply, sequence.text, began, True, self._record_patch, shown, *speaker
            )
            self._running, self._owner = weakref.ref(chunks), caller()
        try:
            chunks.prefill()
        except BaseException:
            chunks.close()
            with self._lock:
                if self._running_stream() is chunks:
                    self._go_back(before, earlier)
            raise
        return chunks

    def take_back(self) -> None:
        """Drops the last turn and its reply as if it had not been asked; a running reply ends.

        Ids, draws and what is known of the voice are those from before; of the cache, what the turn
        has not overwritten. Turns that it had pushed out of the context are back.

        Raises:
            ValueError: there is no such turn: none since the dialogue began, was reset, restored,
                restarted or interrupted, or it has been taken back.
        """
        self._pipeline.owner.check()
        with self._lock:
            if self._before is None:
                raise ValueError("there is no turn to take back: only the last one can be")
            self._stop()
            self._go_back(self._before)

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The turns that the model still sees, with the replies as far as they are kept."""
        with self._lock:
            ids, size = self.ids, self._sequence.group_size
            ends = [*(turn.begin for turn in self._turns[1:]), self._sequence.groups]
            return tuple(
                Exchange(turn.said, ids[:, turn.reply * size : end * size])
                for turn, end in zip(self._turns, ends, strict=False)
            )

    def restart(self, exchanges: Sequence[Exchange]) -> None:
        """Makes the dialogue one of these exchanges, oldest first; a running reply ends.

        What differs from before is prefilled with the next turn. The oldest exchanges are left out
        where all of them leave no room for a reply.

        Raises:
            TypeError: they are not exchanges.
            PromptError: codes or ids of another model.
        """
        self._pipeline.owner.check()
        sequence = self._sequence
        for each in exchanges:
            self._check(each)
        with self._lock:
            self._stop()
            earlier, before = self._before, self._state()
            try:
                kept, share = [*exchanges], 1 - REPLY
                while not self._refill(kept, share * sequence.capacity):
                    del kept[0]
                    share = FULL
            except BaseException:
                self._go_back(before, earlier)
                raise
            # Of the cache stays what both have at their beginning.
            ids, sequence.ids = sequence.ids, before.ids
            sequence.go_back(ids, before.cached)
            self._before, self._spoken = None, self._patches_of_last()

    def _check(self, exchange: Exchange) -> None:
        """Raises TypeError or PromptError for what is no exchange of this model."""
        if not isinstance(exchange, Exchange):
            raise TypeError(f"exchanges must be of Exchange, not {type(exchange).__name__}")
        config, reply = self._pipeline.lm.config, exchange.reply
        said = exchange.said
        # Codes may still be on their way from a device.
        spoken = isinstance(said, Speech) and (
            isinstance(said.codes, Tensor) or hasattr(said.codes, "wait")
        )
        if not (spoken and isinstance(reply, Tensor)):
            raise TypeError("an exchange is a Speech and a Tensor of ids")
        rows, size = config.channels + 1, config.group_size
        if reply.ndim != 2 or reply.shape[0] != rows or reply.shape[1] % size:
            problem = f"a reply's ids must be [{rows}, a multiple of {size}]: {list(reply.shape)}"
            raise PromptError(problem)
        if reply.dtype != torch.int64 or not in_vocabulary(reply, config):
            raise PromptError("a reply's ids are none of this model")

    def _refill(self, exchanges: Sequence[Exchange], room: float) -> bool:
        """Writes exchanges after the voice; whether all that fits into so many groups."""
        sequence = self._sequence
        sequence.ids = sequence.ids[:, : self._prefix_groups * sequence.group_size]
        self._turns = []
        for each in exchanges:
            begin = sequence.groups
            turn = [*self._closing(), *self._turn(each.said, first=not self._turns)]
            added = torch.cat((self._pipeline.ids(turn), each.reply.to("cpu", torch.int64)), dim=1)
            if sequence.groups + added.shape[1] // sequence.group_size > room:
                return False
            sequence.add(added)
            reply = sequence.groups - each.reply.shape[1] // sequence.group_size
            self._turns = [*self._turns, Turn(begin, reply, each.said)]
        return True

    def _patches_of_last(self) -> list[int]:
        """Groups of the sequence that hold the patches of the last reply."""
        if not self._turns:
            return []
        empty, size = self._pipeline.tokenizer.special.empty, self._sequence.group_size
        tokens = self._sequence.ids[0, ::size].tolist()
        return [i for i in range(self._turns[-1].reply, len(tokens)) if tokens[i] == empty]

    def _state(self) -> _Before:
        sequence, voice = self._sequence, self._voice
        kept = sequence.ids, sequence.cached, sequence.draws, self._turns, self._spoken
        return _Before(*kept, copy(voice))

    def _check_owner(self) -> None:
        """Raises BusyError while a reply runs that another thread or task has asked for."""
        if is_read_by_another(self._running_stream(), self._owner):
            raise BusyError(
                "this dialogue is answering another thread or task: wait for the end of its reply, "
                "close that stream, or call interrupt first"
            )

    def _go_back(self, before: _Before, earlier: _Before | None = None) -> None:
        self._turns, self._spoken = before.turns, before.spoken
        self._running, self._before, self._voice = None, earlier, before.voice
        self._sequence.go_back(before.ids, before.cached)
        self._sequence.draws = before.draws

    def _say(self, speech: Speech) -> None:
        """Appends the user's turn."""
        sequence = self._sequence
        said = [*self._closing(), *self._turn(speech, first=not self._turns)]
        turn = self._pipeline.packed(said, TASK.sampler)
        kept = self._fitting(turn.ids.shape[1] // sequence.group_size)
        if kept < len(self._turns):
            self._drop(len(self._turns) - kept)
            if not kept:
                turn = self._pipeline.packed(self._turn(speech, first=True), TASK.sampler)
        begin = sequence.groups
        sequence.add(turn)
        self._turns = [*self._turns, Turn(begin, sequence.groups, speech)]
        self._spoken = []

    def _turn(self, speech: Speech, first: bool) -> Segments:
        system = self._system_prompt if first else None
        context = self._pipeline.context(special_tokens=self._special_tokens)
        return spoken_dialogue(context, speech, system)

    def _fitting(self, new: int) -> int:
        """Number of the latest turns that fit beside a new turn of `new` groups."""
        sequence, capacity = self._sequence, self._sequence.capacity
        if sequence.groups + new <= (1 - REPLY) * capacity:
            return len(self._turns)
        room = FULL * capacity - self._prefix_groups - new
        return sum(sequence.groups - turn.begin <= room for turn in self._turns)

    def _drop(self, count: int) -> None:
        """Drops the oldest turns; the system prompt moves to the first turn that stays."""
        sequence, kept = self._sequence, self._turns[count:]
        ids = [self.ids[:, : self._prefix_groups * sequence.group_size]]
        if kept:
            first = self._pipeline.ids(self._turn(kept[0].said, first=True))
            moved = self._prefix_groups + first.shape[1] // sequence.group_size - kept[0].reply
            ids += [first, self.ids[:, kept[0].reply * sequence.group_size :]]
            kept = [Turn(turn.begin + moved, turn.reply + moved, turn.said) for turn in kept]
            kept[0] = replace(kept[0], begin=self._prefix_groups)
        sequence.truncate(self._prefix_groups)
        sequence.ids = torch.cat(ids, dim=1)
        self._turns = kept

    def astream(self, audio: Audio, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio."""
        self._pipeline.owner.check()
        refuse_unknown(options, names_of(Session.stream, bound=True) or (), "Session.astream")
        return iterate_async(lambda: self.stream(audio, **options))

    def interrupt(self, played_ms: float) -> None:
        """Stops the running reply and drops what was not heard.

        Args:
            played_ms: how much of this reply's audio has been played. The patch being played counts
                as heard; text, codes and cache after it are dropped. Text before it stays; it may
                be up to five tokens ahead of the voice. The next turn closes the reply there.
        """
        self._pipeline.owner.check()
        if math.isnan(played_ms):
            raise ValueError("played_ms must be a number of milliseconds, not NaN")
        with self._lock:
            self._stop()
            self._before = None
            self._keep_heard(played_ms)

    def _keep_heard(self, played_ms: float) -> None:
        codec = self._pipeline.codec.config
        patch_ms = 1000 * self._sequence.group_size * codec.samples_per_frame / codec.sample_rate
        heard = math.ceil(min(max(played_ms / patch_ms, 0), len(self._spoken)))
        if heard < len(self._spoken):
            self._sequence.truncate(self._spoken[heard])
            del self._spoken[heard:]

    def reset(self) -> None:
        """Drops all turns; the voice stays, and stays cached, and so do its norm statistics."""
        self._pipeline.owner.check()
        with self._lock:
            self._stop()
            self._sequence.truncate(self._prefix_groups)
            self._turns, self._spoken, self._before = [], [], None

    def save(self, path: str | Path) -> None:
        """Writes the dialogue with its cache to a safetensors file for `restore_session`.

        A running reply ends as if its stream were closed.
        """
        self._pipeline.owner.check()
        with self._lock:
            self._stop()
            about = {
                "system_prompt": self._system_prompt,
                "special_tokens": self._special_tokens,
                "opening": self._prefix_groups,
                "spoken": self._spoken,
                "heard": self._heard(),
            }
            turns = [(turn.begin, turn.reply, turn.speech) for turn in self._turns]
            write_session(path, self._pipeline.engine, self._sequence, about, turns)

    @classmethod
    def restore(
        cls, pipeline: Pipeline, path: str | Path, samplers: Samplers | None = None
    ) -> "Session":
        """Reads a dialogue that `save` wrote, with its adapter, voice, draws and cache.

        Raises:
            CheckpointError: the file is not a session, is damaged, contradicts itself, belongs to
                another model or an adapter that it was not loaded with, or is longer than this
                model's context.
        """
        saved = read_session(path, pipeline.engine)
        session = cls(pipeline, samplers=samplers)
        saved.fill(session._sequence)
        session._system_prompt, session._spoken = saved.system_prompt, saved.spoken
        session._special_tokens = saved.special_tokens
        session._prefix_groups = saved.opening
        session._turns = [Turn(begin, reply, Speech(codes)) for begin, reply, codes in saved.turns]
        session._voice = Voice(session._voice_prompt(), saved.heard_by(pipeline.codec))
        return session

    def _heard(self) -> dict[str, Any] | None:
        """What is known of the replies' voice, and by which codec, for a file."""
        heard = self._voice.heard
        if heard is None:
            return None
        return {"codec": self._pipeline.codec.fingerprint, "sums": heard.tolist()}

    def _voice_prompt(self) -> Speech | None:
        """The speech of the voice in the opening; None without one."""
        size = self._sequence.group_size
        opening = self._sequence.ids[:, : self._prefix_groups * size]
        patches = opening[0, ::size] == self._pipeline.tokenizer.special.empty
        codes = opening[1:, patches.repeat_interleave(size)]
        return Speech(codes) if codes.shape[1] else None

    def _record_patch(self, group: Group) -> None:
        """Records the group of the sequence that holds each patch of the reply."""
        if group.text == self._pipeline.tokenizer.special.empty:
            self._spoken.append(self._sequence.groups - 1)

    def _closing(self) -> Sequence[Segment]:
        """Segments that close the last reply, however it ended: stop token, limit, `interrupt`."""
        if not self._turns:
            return []
        special = self._pipeline.tokenizer.special
        last = int(self.ids[0, -self._sequence.group_size])
        if last == special.im_end:
            return ["\n"]
        return ["<|im_end|>\n"] if last == special.eostm else ["<|eostm|>", "<|im_end|>\n"]

    def _running_stream(self) -> ChunkStream | None:
        """The stream of the last turn, while somebody holds it."""
        return None if self._running is None else self._running()

    def _stop(self) -> None:
        """Ends the running reply, also one whose stream was dropped without being closed."""
        running = self._running_stream()
        if running is not None:
            running.close()
        self._pipeline.engine.release(self._sequence)
        self._running = None
