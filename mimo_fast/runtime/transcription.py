"""Recordings of any length -> text: cut at pauses, the pieces rows of one batch, words joined."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import cast

import numpy as np
from torch import Tensor

from mimo_fast.audio.files import MOST_BYTES, AudioSource, DecodeLimits, audio_blocks
from mimo_fast.audio.segments import LONG_PAUSE, Cutting, Piece, pieces_of
from mimo_fast.errors import AudioError
from mimo_fast.modes import in_own_modes
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.voicing import ReplyReader
from mimo_fast.runtime.lm.decode import Samplers
from mimo_fast.runtime.pipeline import Pipeline, check_limits
from mimo_fast.sampling import one_seed
from mimo_fast.text.context import Template, choose_template
from mimo_fast.text.prompt import Speech
from mimo_fast.text.tasks import TASKS, asr_templates
from mimo_fast.text.transcript import Transcript, TranscriptSegment, join

TASK = TASKS["asr_sft"]

LONGEST = 30.0
"""Seconds of a piece where a checkpoint states nothing."""

ANY_LENGTH = DecodeLimits(seconds=7 * 24 * 3600.0, bytes=MOST_BYTES)
"""A week: what is read is not held."""

MOST_SAMPLES = 2**29
"""Of an array, 2 GiB: six hours at 24 kHz. A file may be longer, as it is not held."""

GROUPS, GROUPS_A_SECOND = 16, 12
"""Groups that a piece of so many seconds may take: twice the words of the fastest speakers.

A model that repeats itself ends there.
"""


@dataclass
class Hearing:
    """One reply to a piece, and the text that it became."""

    reply: Reply
    reader: ReplyReader
    prompt_groups: int
    words: list[str] = field(default_factory=list)
    confidence: float | None = None
    warning: str | None = None


class PieceReply:
    """The transcript of a piece, a group at a time.

    A piece with hearings `again` is heard so often, one after the other, if the checkpoint states
    how confident it is; what is kept is what it is most confident of.

    Attributes:
        words: The text that is certain so far, in parts.
        ended: Whether all of it is there.
    """

    def __init__(
        self, pipeline: Pipeline, piece: Piece, speech: Speech, hear: Callable[[Speech], Hearing]
    ) -> None:
        self._pipeline, self._piece, self._hear = pipeline, piece, hear
        tells = any(each.task == TASK.sampler for each in pipeline.lm.config.confidence)
        self._again = deque(piece.again if tells else ())
        self._open = not self._again
        self._running = self._kept = hear(speech)
        self.ended = False

    def step(self) -> bool:
        """Takes a group -> whether the transcript has ended."""
        hearing = self._running
        group = next(hearing.reply, None)
        if group is not None and not group.finished:
            hearing.words.append(hearing.reader.read(group.text, group.codes)[0])
            return False
        hearing.words.append(hearing.reader.finish()[0])
        hearing.confidence, hearing.warning = self._pipeline.judge(hearing.reply)
        hearing.reply.close()
        self._kept = max(self._kept, hearing, key=lambda each: each.confidence or 0.0)
        if self._again:
            (speech,) = self._pipeline.speeches([self._again.popleft()])
            self._running = self._hear(speech)
        else:
            self.ended = True
        return self.ended

    def close(self) -> None:
        self._running.reply.close()

    @property
    def words(self) -> list[str]:
        return self._kept.words if self._open or self.ended else []

    @property
    def kept(self) -> Hearing:
        """The hearing whose text it is."""
        return self._kept

    @property
    def segment(self) -> TranscriptSegment:
        text, kept = "".join(self.words).strip(), self._kept
        times, reason = (self._piece.start, self._piece.end), kept.reply.finish_reason
        return TranscriptSegment(*times, text, reason, kept.confidence, kept.warning)


def start_pieces(
    pipeline: Pipeline,
    pieces: Sequence[Piece],
    template: Template = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    samplers: Samplers | None = None,
    language: str | None = None,
    adapter: str | None = None,
) -> Iterator[PieceReply]:
    """Encodes pieces together and queues their transcripts; no other thing is computed before their
    first step.

    Args:
        template, max_new_tokens, language, adapter: as those of `TranscriptStream`.
        samplers: of the words; None for those of the task.
    """
    rate, stops = pipeline.codec.sample_rate, TASK.stop_ids(pipeline.tokenizer.special)
    tag = pipeline.lm.config.architecture.tag_of(language)

    def hear(most: int, speech: Speech) -> Hearing:
        prompt = TASK.prompt(pipeline.context(seed), speech, tag, template)
        packed, sequence = pipeline.packed(prompt, TASK.sampler), pipeline.sequence(seed, adapter)
        sequence.add(packed)
        how = samplers or pipeline.samplers(TASK.sampler), stops, most
        reply = pipeline.start(sequence, *how, priority=Priority.BATCH)
        return Hearing(reply, pipeline.reader(packed.ids, speaks=False), sequence.groups)

    speeches = pipeline.speeches([piece.wav for piece in pieces])
    for piece, speech in zip(pieces, speeches, strict=True):
        most = max_new_tokens or GROUPS + math.ceil(GROUPS_A_SECOND * len(piece.wav) / rate)
        yield PieceReply(pipeline, piece, speech, partial(hear, most))


def start_piece(
    pipeline: Pipeline,
    piece: Piece,
    template: Template = None,
    seed: int | None = None,
    samplers: Samplers | None = None,
    language: str | None = None,
    adapter: str | None = None,
) -> PieceReply:
    """`start_pieces` of one."""
    how = template, seed, None, samplers, language, adapter
    (work,) = start_pieces(pipeline, [piece], *how)
    return work


class TranscriptStream(Iterator[TranscriptSegment]):
    """Segments of a recording, in order, as soon as each is transcribed.

    Args:
        audio: anything that `load_audio` reads, of any length, or an iterator of waveforms [n] at
            the codec's rate, such as a microphone's.
        template: a wording of the request, its index, or None for one drawn by the seed; one for
            the whole recording.
        waits: see `Cutting`.
        max_new_tokens: groups of each piece; by default what its seconds can hold.
        at_once: how many pieces may be at work, asked again before each; by default as many as the
            model has slots.
        language: that is spoken, by its code or name, see `Architecture.tag_of`; None for any.
        adapter: that it is computed with, of `LM.adapters`; None for the model itself.

    Raises:
        PromptError: the model has no tag for the language.
        ValueError: it was not loaded with the adapter.

    Attributes:
        duration: Seconds of the recording that have been read.
        joined: What has been said so far.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        audio: AudioSource | Iterator[Tensor],
        template: Template = None,
        seed: int | None = None,
        waits: float = LONG_PAUSE,
        max_new_tokens: int | None = None,
        at_once: Callable[[], int] | None = None,
        language: str | None = None,
        adapter: str | None = None,
    ) -> None:
        pipeline.owner.check()
        pipeline.lm.place_of(adapter)
        architecture, self._language = pipeline.lm.config.architecture, language
        self._adapter = adapter
        templates = asr_templates(architecture, architecture.tag_of(language))
        check_limits(max_new_tokens, 0)
        self._pipeline, self._seed, self._most = pipeline, one_seed(seed), max_new_tokens
        # One wording for the whole recording.
        self._template = choose_template(templates, template, self._seed)
        rate = pipeline.codec.sample_rate
        self._blocks: Iterator[Tensor]
        self._at_once = at_once or (lambda: pipeline.setup.max_batch)
        if isinstance(audio, Iterator) and not hasattr(audio, "read"):
            # Nobody waits for the next piece.
            self._blocks, self._at_once = audio, lambda: 1
        else:
            self._blocks = audio_blocks(cast(AudioSource, audio), rate, limits=ANY_LENGTH)
        if isinstance(audio, Tensor | np.ndarray) and audio.shape[-1:] > (MOST_SAMPLES,):
            problem = f"the audio array has {audio.shape[-1]} samples, {MOST_SAMPLES} is the most"
            raise AudioError(f"{problem}: write it to a file, which is read in parts")
        self._cutting = cutting_of(pipeline, waits)
        self._rate, self._samples = rate, 0
        self.joined = ""
        self._work = deque[PieceReply]()
        self._lock = threading.RLock()
        self._segments = self._generate()

    @property
    def duration(self) -> float:
        return self._samples / self._rate

    @in_own_modes
    def __next__(self) -> TranscriptSegment:
        self._pipeline.owner.check()
        with self._lock:
            segment = next(self._segments)
        self.joined = join(self.joined, segment.text)
        return segment

    def close(self) -> None:
        """Ends it; no segment follows."""
        with self._lock:
            self._segments.close()

    def _counted(self) -> Iterator[Tensor]:
        for block in self._blocks:
            self._samples += len(block)
            yield block

    def _generate(self) -> Generator[TranscriptSegment, None, None]:
        work, limits = self._work, (self._seed, self._most)
        how = self._template, *limits, None, self._language, self._adapter
        pieces = pieces_of(self._counted(), self._rate, self._cutting)
        try:
            more = True
            while work or more:
                room = max(self._at_once(), 1) - len(work)
                if more and room > 0:
                    # Pieces that start at once are encoded at once.
                    new = [*islice(pieces, room)]
                    more = len(new) == room
                    work.extend(start_pieces(self._pipeline, new, *how))
                yield from self._step()
        finally:
            while work:
                work.pop().close()

    def _step(self) -> Iterator[TranscriptSegment]:
        """A group of each piece at work -> segments of the first that are done."""
        work = self._work
        for each in [each for each in work if not each.ended]:
            each.step()
        while work and work[0].ended:
            yield work.popleft().segment


def cutting_of(pipeline: Pipeline, waits: float = LONG_PAUSE) -> Cutting:
    """How recordings are cut for a model; waits: see `Cutting`."""
    return Cutting(longest_piece(pipeline), pipeline.lm.config.sentences_at_once != 1, waits=waits)


def longest_piece(pipeline: Pipeline) -> float:
    """Seconds of a piece: those that the checkpoint states, or what half of the context holds."""
    return min(pipeline.lm.config.seconds_at_once or LONGEST, context_seconds(pipeline) / 2)


def context_seconds(pipeline: Pipeline) -> float:
    """Seconds of speech that fill the context."""
    codec = pipeline.codec
    group = pipeline.lm.config.group_size * codec.config.samples_per_frame / codec.sample_rate
    return pipeline.engine.capacity * group


def transcript_of(stream: TranscriptStream) -> Transcript:
    """Reads a stream to its end."""
    segments = tuple(stream)
    return Transcript(stream.joined, segments, stream.duration)
