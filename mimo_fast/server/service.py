"""What a server does with its model, whatever the wire: speak, transcribe, reply.

endpoints, realtime sessions -> Service -> Worker (compute thread) -> MimoAudio
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

from torch import Tensor

from mimo_fast.audio.segments import Piece, pieces_by_block
from mimo_fast.errors import TaskError
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.engine.stream import Chunk
from mimo_fast.runtime.lm.decode import Samplers
from mimo_fast.runtime.transcription import cutting_of, start_piece
from mimo_fast.sampling import fresh_seed
from mimo_fast.server.audio import AudioThreads, decode_blocks
from mimo_fast.server.errors import ApiError
from mimo_fast.server.worker import Priority, Stream, Worker
from mimo_fast.text.prompt import Speech
from mimo_fast.text.spelling import spell
from mimo_fast.text.templates import ASR_TEMPLATES_IN
from mimo_fast.text.transcript import TranscriptSegment

ASR, TTS, DIALOGUE = "asr_sft", "tts_sft", "spoken_dialogue_sft"


def heard(chunk: Chunk) -> float:
    """Seconds of audio of a chunk."""
    return len(chunk.audio) / chunk.sample_rate


def warmed(
    samplers: Samplers, temperature: float | None = None, top_p: float | None = None
) -> Samplers:
    """Samplers whose words are drawn so; None leaves what they have. Voices stay as they are."""
    if temperature is None and top_p is None:
        return samplers
    text = replace(samplers.text, do_sample=True)
    if temperature is not None:
        text = replace(text, temperature=temperature)
    if top_p is not None:
        text = replace(text, top_p=top_p)
    return replace(samplers, text=text)


_voices: WeakKeyDictionary[MimoAudio, dict[tuple[Path, int], Speech]] = WeakKeyDictionary()
"""Codes of the recordings whose voices were asked for, by when these were written."""


def voice_speech(model: MimoAudio, path: Path) -> Speech:
    """The codes of a voice, encoded once; for the compute thread."""
    known, key = _voices.setdefault(model, {}), (path, path.stat().st_mtime_ns)
    if key not in known:
        known[key] = model.speech(str(path))
    return known[key]


@dataclass
class Read:
    """How much of a recording has been read, in samples."""

    samples: int = 0


@dataclass(frozen=True)
class Counted:
    """What a transcript took.

    Attributes:
        segment: What was said in a piece.
        groups_in, groups_out: Groups of its prompt and its reply.
    """

    segment: TranscriptSegment
    groups_in: int
    groups_out: int


@dataclass
class Service:
    """A model, the thread that computes with it, and what may be asked of it.

    Attributes:
        name: The model's name in `/v1/models`.
        config: The model's, also while it is not loaded.
        threads: Where clients' audio is decoded and encoded.
        adapter: That all of this is computed with; None for the model itself.
        models: The adapter by each name in `/v1/models`. By default the names are `name` and, if
            that is the model itself, `name:adapter` for each adapter that requests may choose.
    """

    model: MimoAudio
    name: str
    worker: Worker = field(default_factory=Worker)
    threads: AudioThreads = field(default_factory=AudioThreads)
    adapter: str | None = None
    models: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What a model can do stays as it is while its memory is given to others.
        self.config = self.model.lm.config
        if not self.models:
            chosen = self.model.adapters if self.adapter is None else ()
            named = {f"{self.name}:{adapter}": adapter for adapter in chosen}
            self.models = {self.name: self.adapter} | named

    def called(self, name: str) -> Service:
        """This service with the adapter of another name of `models`."""
        if name == self.name:
            return self
        # Nothing of the model is asked, which may not be loaded.
        twin = copy(self)
        twin.name, twin.adapter = name, self.models[name]
        return twin

    @property
    def marked(self) -> bool:
        """Whether what is said carries a watermark."""
        marks = self.model.marks
        return marks is not None and marks.watermark

    @property
    def sample_rate(self) -> int:
        return self.model.codec.sample_rate

    def knows(self, task: str, option: str | None = None) -> bool:
        """Whether the model was trained for a task, or an option of it, as far as it states."""
        return self.config.is_trained(task, option)

    def check_converses(self) -> None:
        """Raises ApiError where the model, by its architecture, answers nobody."""
        try:
            self.config.architecture.check_task(DIALOGUE)
        except TaskError as error:
            problem = f"{error}, or connect with ?intent=transcription"
            raise ApiError(problem, 400, "unsupported_value", "session.type") from None

    def check_words(self, text: str, param: str = "input") -> None:
        """Raises ApiError where a model of few words has none for a text."""
        if self.model.tokenizer.trained_words and not spell(text):
            problem = f"{param} holds no word that can be said: this model knows words and numbers"
            raise ApiError(problem, 400, "invalid_value", param)

    def check_voice(self, voice: Path | None) -> None:
        """Raises ApiError for a recording whose voice this model cannot speak in."""
        if voice is not None and not self.knows(TTS, "prompt_speech"):
            problem = f"{self.name} speaks with one voice alone; leave voice at 'default'"
            raise ApiError(problem, 400, "unsupported_value", "voice")

    def check_style(self, instructions: str | None) -> None:
        """Raises ApiError for a style that this model was not trained to speak in."""
        if instructions and not self.knows(TTS, "instruct"):
            problem = f"{self.name} was not trained to follow a style; leave instructions out"
            raise ApiError(problem, 400, "unsupported_value", "instructions")

    def speech(
        self,
        text: str,
        instructions: str | None = None,
        voice: Path | Tensor | None = None,
        seed: int | None = None,
        priority: Priority = Priority.LISTENER,
    ) -> Stream[Chunk]:
        """A text said, in pieces as far as the model needs that.

        voice: a recording whose voice it has, or its samples [n]; None for the model's own.
        """

        def start() -> Iterator[Chunk]:
            model, options = self.model, dict[str, Any]()
            if instructions:
                options["instruct"] = instructions
            if voice is not None:
                options["prompt_speech"] = (
                    voice_speech(model, voice) if isinstance(voice, Path) else model.speech(voice)
                )
                # A voice goes with a style, or with a text that may hold one.
                options["read_text_only"] = bool(instructions)
            splits = voice is None or bool(instructions)
            options |= {"seed": seed, "split": splits, "adapter": self.adapter}
            return model.stream("tts", text, **options)

        return self.worker.stream(start, priority=priority, seconds=heard)

    async def pieces(
        self, source: bytes | BinaryIO, most: float, read: Read
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a recording, cut at its pauses as the model needs that.

        Args:
            source: encoded audio, see `decode_blocks`.
            most: seconds that it may have.
            read: counts what has been read.

        Raises:
            AudioError: it cannot be decoded, holds no samples, or is too long.
        """
        # It asks the engine, which is the compute thread's.
        rate, cutting = self.sample_rate, await self.worker.call(cutting_of, self.model.pipeline)

        def counted() -> Iterator[Tensor]:
            for block in decode_blocks(source, rate, most):
                # Short, so that nobody waits for long.
                for part in block.split(10 * rate):
                    read.samples += len(part)
                    yield part

        pulled = self.threads.pull(lambda: pieces_by_block(counted(), rate, cutting))
        try:
            while (found := await pulled.next()) is not None:
                for piece in found:
                    yield piece
        finally:
            pulled.close()

    def words(
        self,
        piece: Piece,
        seed: int | None = None,
        language: str | None = None,
        temperature: float | None = None,
    ) -> Stream[str | Counted]:
        """What is said in a piece, as it is found, and at last all of it.

        Args:
            language: a code of `LANGUAGES`, which chooses the request's tag or, where the model has
                none, its wording: what it is asked in, it tends to write. None for any.
            temperature: None for what the task has.
        """

        def start() -> Iterator[str | Counted | None]:
            pipeline = self.model.pipeline
            samplers = None
            if temperature is not None:
                samplers = warmed(pipeline.samplers("asr"), temperature)
            drawn = fresh_seed() if seed is None else seed
            how: dict[str, Any] = {"seed": drawn, "samplers": samplers, "adapter": self.adapter}
            if pipeline.lm.config.architecture.tags:
                how["language"] = language
            elif language is not None:
                how["template"] = ASR_TEMPLATES_IN[language][0]
            work = start_piece(pipeline, piece, **how)
            try:
                ended, shown = False, 0
                while not ended:
                    ended = work.step()
                    new = "".join(work.words[shown:])
                    shown = len(work.words)
                    yield new or None
                kept = work.kept
                yield Counted(work.segment, kept.prompt_groups, kept.reply.taken)
            finally:
                work.close()

        return self.worker.stream(start, ahead=256, priority=Priority.BATCH)

    def close(self) -> None:
        """Ends what runs, then frees the model."""
        self.worker.close()
        self.threads.close()
        self.model.close()
