"""`Converter`: speech to speech by example, whose examples are encoded and prefilled once."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Literal

from torch import Tensor

from mimo_fast.arguments import checked
from mimo_fast.audio.files import AudioSource
from mimo_fast.config import GROUP_SECONDS, LMConfig
from mimo_fast.errors import PromptError, TaskError
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.engine.sequence import in_seconds
from mimo_fast.runtime.engine.stream import ChunkStream
from mimo_fast.runtime.engine.voicing import Listening
from mimo_fast.runtime.examples import SAMPLE_RATE, TASK_KEYS, ExampleSet, read_recording
from mimo_fast.runtime.lm.decode import Samplers
from mimo_fast.runtime.pipeline import Pipeline, check_limits
from mimo_fast.runtime.transcription import TranscriptStream, transcript_of
from mimo_fast.text.few_shot import done_likewise, shown_examples
from mimo_fast.text.prompt import Segments, Speech
from mimo_fast.text.tasks import TASKS
from mimo_fast.text.templates import CONVERSIONS

NAME = "in_context_learning_s2s"
TASK = TASKS[NAME]
HEARING = "asr_sft"
"""The task that finds words of an example that were not given."""

KIND = "voice"
"""What is converted where nobody says so."""

LEAST_GROUPS, TIMES = 16, 3
"""A reply has at most so many groups, and so many times those of the longest recording that shows
how long one is."""


@checked
class Converter:
    """Converts recordings as examples show it.

    The examples are encoded with the first recording, and their keys and values are kept in the
    tree of prefixes: every further recording is all that is encoded and prefilled for it. So it is
    for other converters of the same pipeline with the same examples, instruction and adapter. Any
    thread may call any method; several recordings at once are rows of one batch.

    Args:
        pipeline: language model, codec and engine.
        examples: at most 16, with their instruction: words, or a name, see `instruction_of`.
        samplers: of text and codes; None for the preset of the task.
        adapter: of `LM.adapters`, that converts; None for the model itself, which is also what
            hears words that are missing.

    Raises:
        ValueError: the model was not loaded with the adapter.
        PromptError: the model does not know the task, or cannot hear the words that are missing.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        examples: ExampleSet,
        samplers: Samplers | None = None,
        adapter: str | None = None,
    ) -> None:
        pipeline.lm.place_of(adapter)
        self._adapter = adapter
        config = pipeline.lm.config
        config.architecture.check_task(NAME)
        check_words(config, examples)
        self._pipeline, self._set, self._examples = pipeline, examples, examples.examples
        self._samplers = samplers or pipeline.samplers(TASK.sampler)
        self.instruction = instruction_of(config, examples.instruction)
        self._longest = max((len(each.after) for each in self._examples), default=0)

    @property
    def words(self) -> list[str]:
        """The words of each example's recording after: as given, or as the model hears them.

        Raises:
            PromptError: it hears none.
        """
        found = list[str]()
        for number, each in enumerate(self._examples, 1):
            words = each.words
            if words is None:
                words = self._pipeline.known_speech.words(each.after, self._heard)
                if not words:
                    problem = f"example {number}: no words were heard in its recording after"
                    raise PromptError(f"{problem}: give them")
            found.append(words)
        return found

    def stream(
        self,
        audio: AudioSource,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        lookahead: Listening = "exact",
        priority: Literal["listener", "batch"] = "listener",
    ) -> ChunkStream:
        """Yields the converted recording while it is decoded, one chunk a group.

        Closing the iterator stops after the group in progress.

        Args:
            audio: anything that `load_audio` reads, 30 s at most; its level is set.
            max_new_tokens: by default 16 and three times the groups of the longest recording that
                shows how long one is: this one, and those after of the examples.
            lookahead, priority: as of `MimoAudio.stream`.

        Raises:
            AudioError: the recording cannot be used.
            PromptError: it does not fit into the context beside the examples.
            BusyError: the engine's queue is full.
        """
        began, pipeline, rank = perf_counter(), self._pipeline, Priority.of(priority)
        pipeline.owner.check()
        check_limits(max_new_tokens)
        wav = read_recording(audio)
        # Before sixteen examples are encoded.
        check_room(pipeline.lm.config, self._set, len(wav), pipeline.engine.capacity)
        speeches = self._speeches()
        shown = self._shown(speeches)
        gathers = rank is Priority.BATCH
        speech = pipeline.speech_later(wav, prepared=True, gathers=gathers)
        prefix, rest = pipeline.ids(shown), pipeline.packed(done_likewise(speech), TASK.sampler)
        sequence = pipeline.sequence(seed, self._adapter)
        sequence.add(prefix)
        sequence.prefix_groups = sequence.groups
        sequence.add(rest)
        stops = TASK.stop_ids(pipeline.tokenizer.special)
        most = max_new_tokens or longest_reply(max(self._longest, len(wav)))
        reply = pipeline.start(sequence, self._samplers, stops, most, priority=rank)
        voice = Voice(speeches[-1] if speeches else None)
        chunks = pipeline.stream(
            reply, sequence.text, began, TASK.speaks, None, False, lookahead, voice
        )
        try:
            chunks.prefill()
        except BaseException:
            chunks.close()
            raise
        return chunks

    def _speeches(self) -> list[Speech]:
        """Codes of the examples: before, after, before, ..."""
        waves = [wav for each in self._examples for wav in (each.before, each.after)]
        return self._pipeline.known_speech.speeches(waves, self._pipeline.speeches)

    def _shown(self, speeches: Sequence[Speech]) -> Segments:
        """Instruction and examples."""
        triples = zip(speeches[::2], speeches[1::2], self.words, strict=True)
        shown = [dict(zip(TASK_KEYS, each, strict=True)) for each in triples]
        return shown_examples(self._pipeline.context(), self.instruction, shown)

    def _heard(self, wav: Tensor) -> str:
        return transcript_of(TranscriptStream(self._pipeline, wav, seed=0)).text


def instruction_of(config: LMConfig, given: str | None = None) -> str:
    """The instruction of a conversion in words.

    given: words; or a name of those that the checkpoint was trained with, or of `CONVERSIONS`; None
        for "voice".

    Raises:
        PromptError: it is empty.
    """
    named = CONVERSIONS | dict(config.example_instructions)
    words = KIND if given is None else given.strip()
    if not words:
        raise PromptError("the instruction is empty: say what the examples show, or leave it out")
    return named.get(words, words)


def untrained_instruction(config: LMConfig, given: str | None) -> str | None:
    """A sentence about an instruction that a checkpoint was not trained with, as far as it states
    any; None where it was."""
    texts = [text for _, text in config.example_instructions]
    if not texts or instruction_of(config, given) in texts:
        return None
    known = " or ".join(f'"{text}"' for text in texts)
    return f"this model was trained to convert by example with {known} alone"


def check_words(config: LMConfig, examples: ExampleSet) -> None:
    """Raises TaskError where words are missing that a model cannot hear."""
    missing = [number for number, each in enumerate(examples.examples, 1) if each.words is None]
    if missing and not config.is_trained(HEARING):
        problem = f"example {missing[0]} has no words, and this model does not transcribe"
        raise TaskError(f"{problem}: give the words of its recording after")


def check_room(config: LMConfig, examples: ExampleSet, longest: int, context: int | None) -> None:
    """Refuses what the context cannot hold, as far as the recordings' lengths tell.

    Args:
        longest: samples of the longest recording to convert.
        context: groups that the context is to have, None for the model's own.

    Raises:
        PromptError: examples and recording leave no room for a reply.
    """
    waves = [len(wav) for each in examples.examples for wav in (each.before, each.after)]
    groups = sum(groups_of(samples) for samples in (*waves, longest))
    room = min(context or config.max_positions, config.max_positions)
    if groups >= room:
        raise PromptError(
            f"the recordings have {in_seconds(groups)} and the model's context is "
            f"{in_seconds(room)}: give fewer or shorter examples"
        )


def groups_of(samples: int) -> int:
    """Groups of a recording at 24 kHz."""
    return -(-samples // round(GROUP_SECONDS * SAMPLE_RATE))


def longest_reply(samples: int) -> int:
    """Groups at which the reply ends by default, by the longest recording that shows its length."""
    return LEAST_GROUPS + TIMES * groups_of(samples)
