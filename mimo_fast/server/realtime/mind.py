"""What a realtime session computes with the model; everything runs in the compute thread.

Ask -> spoken:  speech -> `Session` -> text and audio
       written: texts or speech -> text (-> TTS -> audio)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mimo_fast.errors import PromptError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.reply import Reply as EngineReply
from mimo_fast.runtime.engine.stream import ChunkStream, ReplyReader
from mimo_fast.runtime.lm.decode import Samplers
from mimo_fast.runtime.session import Exchange, Session
from mimo_fast.runtime.speech import pieces_to_say
from mimo_fast.runtime.transcription import GROUPS, GROUPS_A_SECOND, longest_piece
from mimo_fast.server.realtime.items import Reply, Said
from mimo_fast.server.service import voice_speech, warmed
from mimo_fast.text.prompt import Segments, Speech, SpokenReply, UserText, Written
from mimo_fast.text.spelling import spell
from mimo_fast.text.tasks import TASKS, text_reply

DIALOGUE, IN_TEXT, TEXTS = "spoken_dialogue_sft", "speech2text_dialogue_sft", "text_dialogue_sft"

HELLO = "hello"
"""What is asked where nobody has said anything."""


KNOWN = 2 / 3
"""Share of a text's words that a model of few words must know to be told it."""

LEAST_GROUPS, GROUPS_A_TOKEN = 16, 6
"""Groups that a text may take that is said to the model: twice those of slow speech."""


@dataclass(frozen=True)
class Piece:
    """Text and audio float32 [n] of a reply; each may be empty."""

    text: str = ""
    audio: Tensor | None = None


@dataclass
class Usage:
    """Groups of a prompt and its reply; of those, groups of text and of audio."""

    text_in: int = 0
    audio_in: int = 0
    cached: int = 0
    text_out: int = 0
    audio_out: int = 0


@dataclass
class Times:
    """Seconds that parts of a reply took; None: not measured."""

    encode: float | None = None
    prefill: float | None = None


@dataclass
class Ask:
    """A reply that is wanted, and what is found out while it is made.

    Args:
        before: earlier turns, oldest first.
        said: what the user says now, one content at least.
        instructions: of session and system.
        speaks: whether the reply has audio.
        most: groups of the reply at most.
        seed: of all draws, 0 ... 2**63 - 1; None draws one.
        temperature, top_p: of the words; None for what the task has.
        adapter: that it is computed with; None for the model itself.
        reply: filled in as the model remembers the reply.
    """

    before: Sequence[tuple[tuple[Said, ...], Reply, str]]
    said: tuple[Said, ...]
    instructions: str | None = None
    voice: Path | None = None
    speaks: bool = True
    most: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    adapter: str | None = None
    reply: Reply = field(default_factory=Reply)
    usage: Usage = field(default_factory=Usage)
    times: Times = field(default_factory=Times)
    finish_reason: str | None = None


@dataclass
class _Row:
    """A piece of a text that the model says to itself; its patches [C, G] so far."""

    reply: EngineReply
    reader: ReplyReader
    patches: list[Tensor] = field(default_factory=list)

    def step(self) -> None:
        """Takes a group, if there is one more."""
        if self.reply.ended:
            return
        group = next(self.reply, None)
        if group is not None and not group.finished:
            self.patches += [codes.cpu() for codes in self.reader.read(group.text, group.codes)[1]]
        if self.reply.ended:
            self.patches += [codes.cpu() for codes in self.reader.finish()[1]]
            self.reply.close()


class Mind:
    """A dialogue with the model, whose `Session` follows the conversation's items."""

    def __init__(self, model: MimoAudio) -> None:
        self._model, config = model, model.lm.config
        self.converses = config.is_trained(TEXTS)
        """Whether it answers texts; else they are said to it."""
        self.remembers = config.is_trained(f"{DIALOGUE}_multiturn")
        """Whether it was trained on more than one turn."""
        self._instructed = config.is_trained(DIALOGUE, "system_prompt")
        self._clones = config.is_trained(DIALOGUE, "prompt_speech")
        self._session: Session | None = None
        self._made: tuple[str | None, Path | None, str | None] = (None, None, None)
        self._turns: list[Reply] = []  # of the session, the oldest of which it may have dropped

    @property
    def marked(self) -> bool:
        """Whether what is said carries a watermark."""
        marks = self._model.marks
        return marks is not None and marks.watermark

    @property
    def sample_rate(self) -> int:
        return self._model.codec.sample_rate

    def answer(self, ask: Ask) -> Generator[Piece, None, None]:
        """The reply, a group at a time. Closing it keeps what was taken."""
        ask.reply.asked = ask.said
        if ask.speaks and (not self.converses or any(said.spoken for said in ask.said)):
            return self._answer_aloud(ask)
        return self._answer_in_text(ask)

    def _answer_aloud(self, ask: Ask) -> Generator[Piece, None, None]:
        began = perf_counter()
        yield from self._encode(ask.said, ask.adapter, ask.seed)
        speech = _joined([said.speech for said in ask.said if said.speech is not None])
        session = self._follow(ask)
        ask.times.encode = perf_counter() - began
        began = perf_counter()
        heard = speech.codes.shape[1] // self._model.group_size
        limit = self._model.lm.config.longest_reply(TASKS[DIALOGUE].sampler, heard)
        most = min(filter(None, (ask.most, limit)), default=None)
        stream = session.stream(speech, max_new_tokens=most, lookahead="elastic")
        ask.times.prefill = perf_counter() - began
        self._turns.append(ask.reply)
        tokens, usage = session.ids[0, :: self._model.group_size], ask.usage
        usage.audio_in = int((tokens == self._model.empty_token).sum())
        usage.text_in = len(tokens) - usage.audio_in
        usage.cached = len(tokens) - session.prefilled
        try:
            for chunk in stream:
                ask.finish_reason, usage.text_out = chunk.finish_reason, chunk.timing.groups
                yield Piece(chunk.text, chunk.audio)
        finally:
            stream.close()
            self._remember(session, ask)

    def _remember(self, session: Session, ask: Ask) -> None:
        """Notes the last exchange, unless it was taken back or is another one's by now."""
        if not self._turns or self._turns[-1] is not ask.reply or session is not self._session:
            return
        exchange = ask.reply.exchange = session.exchanges[-1]
        tokens = exchange.reply[0, :: self._model.group_size]
        ask.usage.audio_out = int((tokens == self._model.empty_token).sum())
        ask.usage.text_out = len(tokens) - ask.usage.audio_out

    def _take_back(self) -> None:
        """Drops the last turn as if it had not been asked, where that was decided."""
        if self._session is not None and self._turns and self._turns[-1].dropped:
            self._session.take_back()
            self._turns.pop()

    def cut(self, reply: Reply, played_ms: float) -> None:
        """Drops what was not heard of a reply, from the session's cache too."""
        self._take_back()
        session = self._session
        if session is not None and self._turns and self._turns[-1] is reply:
            session.interrupt(played_ms)
            reply.exchange = session.exchanges[-1]
        elif reply.exchange is not None:
            reply.exchange = self._shortened(reply.exchange, played_ms)

    def _shortened(self, exchange: Exchange, played_ms: float) -> Exchange:
        size, codec = self._model.group_size, self._model.codec.config
        tokens = exchange.reply[0, ::size].tolist()
        patches = [i for i, token in enumerate(tokens) if token == self._model.empty_token]
        patch_ms = 1000 * size * codec.samples_per_frame / codec.sample_rate
        heard = math.ceil(min(max(played_ms / patch_ms, 0), len(patches)))
        kept = patches[heard] if heard < len(patches) else len(tokens)
        return Exchange(exchange.said, exchange.reply[:, : kept * size])

    def _samplers(self, ask: Ask, preset: str) -> Samplers:
        found = self._model.pipeline.samplers(preset)
        return warmed(found, ask.temperature, ask.top_p)

    def _follow(self, ask: Ask) -> Session:
        """The session, whose turns are those before the question."""
        self._take_back()
        system = ask.instructions if self._instructed else None
        made = system, ask.voice if self._clones else None, ask.adapter
        if self._session is None or self._made != made:
            voice = None if made[1] is None else voice_speech(self._model, made[1])
            samplers = self._samplers(ask, TASKS[DIALOGUE].sampler)
            how = ask.seed, samplers, False, ask.adapter
            self._session = Session(self._model.pipeline, system, voice, *how)
            self._made, self._turns = made, []
        session = self._session
        if not self.remembers:
            session.reset()
            self._turns = []
            return session
        wanted = [reply for _, reply, _ in ask.before]
        shown = self._turns[len(self._turns) - session.turns :]
        same = [id(reply) for reply in self._turns] == [id(reply) for reply in wanted] and all(
            mine.exchange is not None and mine.exchange.reply.shape == there.reply.shape
            for mine, there in zip(shown, session.exchanges, strict=True)
        )
        if not same:
            session.restart([self._exchange(*each, ask.adapter) for each in ask.before])
            # Of some there was no room for.
            self._turns = wanted
        return session

    def _exchange(
        self, said: tuple[Said, ...], reply: Reply, text: str, adapter: str | None
    ) -> Exchange:
        """A turn for the session; of a reply that was written, its words alone."""
        if reply.exchange is None:
            for _ in self._encode(said, adapter):
                pass
            user = _joined([each.speech for each in said if each.speech is not None])
            shape = self._model.audio_channels, 0
            codes = torch.zeros(shape, dtype=torch.int64, device="cpu")
            ids = self._model.pack([SpokenReply(UserText(text), codes)])
            # The prompt ends with the token that begins it.
            reply.exchange = Exchange(user, ids[:, self._model.group_size :])
        return reply.exchange

    def _encode(
        self, contents: Sequence[Said], adapter: str | None, seed: int | None = None
    ) -> Iterator[Piece]:
        """Gives each content its codes; texts are said first, a group at a time."""
        for said in contents:
            if said.speech is not None:
                continue
            if said.wav is None:
                said.speech = yield from self._say_to_itself(said.text or HELLO, adapter, seed)
            else:
                self.encode(said)

    def encode(self, said: Said) -> None:
        """Leaves the codes of a recording alone; of one that has none, nothing."""
        wav, said.wav = said.wav, None
        if wav is not None and said.speech is None:
            said.speech = self._model.speech(wav)

    def _say_to_itself(
        self, text: str, adapter: str | None, seed: int | None = None
    ) -> Generator[Piece, None, Speech]:
        """A text as speech that nobody else hears: its pieces are rows of one batch, as many as
        the model has room for, and their codes are heard as they are.

        Raises:
            PromptError: the model finds nothing to say, or more than its context holds.
        """
        model, task, pipeline = self._model, TASKS["tts_sft"], self._model.pipeline
        context, samplers = pipeline.context(seed), pipeline.samplers(task.sampler)
        stops = task.stop_ids(model.tokenizer.special)
        texts = deque(pieces_to_say(pipeline, {"input": self._sayable(text)}))
        rows, said = deque[_Row](), list[Tensor]()
        try:
            while rows or texts:
                while texts and len(rows) < model.setup.max_batch:
                    piece = texts.popleft().strip()
                    ids = pipeline.ids(task.prompt(context, piece))
                    sequence = pipeline.sequence(seed, adapter)
                    sequence.add(ids)
                    most = LEAST_GROUPS + GROUPS_A_TOKEN * len(model.tokenizer.encode(piece))
                    reply = pipeline.start(sequence, samplers, stops, most)
                    rows.append(_Row(reply, pipeline.reader(ids, speaks=True)))
                for row in rows:
                    row.step()
                yield Piece()
                while rows and rows[0].reply.ended:
                    said += rows.popleft().patches
                    model.engine.check_room(len(said))
        finally:
            for row in rows:
                row.reply.close()
        if not said:
            raise PromptError("the model found nothing to say in this text: word it otherwise")
        return Speech(torch.cat(said, dim=1))

    def _sayable(self, text: str) -> str:
        """What a model of few words is told: those that it knows, or hello where they are few."""
        known = self._model.tokenizer.trained_words
        if not known:
            return text
        words = spell(text)
        kept = [word for word in words if word in known]
        return " ".join(kept) if kept and len(kept) >= KNOWN * len(words) else HELLO

    def _say(self, text: str, ask: Ask) -> ChunkStream:
        """A text as speech for the user."""
        model, voice = self._model, ask.voice
        how: dict[str, Any] = {"lookahead": "elastic", "adapter": ask.adapter}
        if voice is not None and model.lm.config.is_trained("tts_sft", "prompt_speech"):
            speech = voice_speech(model, voice)
            return model.stream("tts", text, read_text_only=False, prompt_speech=speech, **how)
        return model.stream("tts", text, split=True, **how)

    def _answer_in_text(self, ask: Ask) -> Generator[Piece, None, None]:
        model, said = self._model, ask.said
        model.lm.config.architecture.check_task(IN_TEXT)
        spoken = any(each.spoken for each in said)
        task = TASKS[TEXTS if self.converses and not spoken else IN_TEXT]
        began = perf_counter()
        heard = [each for each in said if each.spoken or not self.converses]
        yield from self._encode(heard, ask.adapter, ask.seed)
        ask.times.encode = perf_counter() - began
        prompt = model.pipeline.packed(self._texts(ask), task.sampler)
        sequence = model.conversation(ask.seed, ask.adapter)
        sequence.add(prompt)
        began = perf_counter()
        stops = task.stop_ids(model.tokenizer.special)
        samplers = self._samplers(ask, task.sampler)
        reply = model.pipeline.decode(sequence, samplers, stops, ask.most)
        ask.times.prefill = perf_counter() - began
        tokens, usage = prompt.ids[0, :: model.group_size], ask.usage
        usage.audio_in = int((tokens == model.empty_token).sum())
        usage.text_in, words = len(tokens) - usage.audio_in, ""
        with closing(model.pipeline.stream(reply, prompt.ids, began, speaks=False)) as stream:
            for chunk in stream:
                ask.finish_reason, words = chunk.finish_reason, words + chunk.text
                usage.text_out = chunk.timing.groups
                yield Piece("" if ask.speaks else chunk.text)
        if ask.speaks and words.strip():
            yield from self._read_out(words.strip(), ask)

    def _read_out(self, words: str, ask: Ask) -> Iterator[Piece]:
        """The reply in the session's voice; its text comes with its first audio."""
        with closing(self._say(words, ask)) as stream:
            for chunk in stream:
                ask.usage.audio_out = chunk.timing.groups
                shown, words = (words, "") if len(chunk.audio) else ("", words)
                yield Piece(shown, chunk.audio)
        if words:
            yield Piece(words)

    def _texts(self, ask: Ask) -> Segments:
        """The conversation, to be answered in text."""
        turns = list[tuple[str, Sequence[Written | Speech]]]()
        if self.remembers:
            for said, _, text in ask.before:
                turns += [("user", _written(said)), ("assistant", [UserText(text)])]
        turns.append(("user", _written(ask.said)))
        if ask.instructions and self._instructed:
            role, contents = turns[0]
            turns[0] = role, [UserText(ask.instructions), "\n\n", *contents]
        return text_reply(turns)

    def transcribe(self, said: Said, wav: Tensor, adapter: str | None = None) -> Iterator[str]:
        """The words of what the user said, a group at a time.

        Short speech is a row beside the reply, and shares its codes; longer speech is cut at its
        pauses.
        """
        pipeline, rate = self._model.pipeline, self._model.codec.sample_rate
        if len(wav) / rate > longest_piece(pipeline):
            with closing(self._model.transcript(wav, adapter=adapter)) as segments:
                before = ""
                for _ in segments:
                    new, before = segments.joined[len(before) :], segments.joined
                    yield new
            return
        if said.speech is None:
            said.speech, said.wav = self._model.speech(wav), None
        most = GROUPS + math.ceil(GROUPS_A_SECOND * len(wav) / rate)
        how: dict[str, Any] = {"max_new_tokens": most, "adapter": adapter}
        with closing(self._model.stream("asr", said.speech, **how)) as stream:
            for chunk in stream:
                yield chunk.text


def _written(contents: Sequence[Said]) -> list[Written | Speech]:
    """A turn of the user in a prompt: what was typed as text, what was said as speech."""
    return [
        each.speech if each.speech is not None else UserText(each.text or HELLO)
        for each in contents
    ]


def _joined(speeches: Sequence[Speech]) -> Speech:
    """Several recordings as one turn."""
    if len(speeches) == 1:
        return speeches[0]
    return Speech(torch.cat([each.codes for each in speeches], dim=1))
