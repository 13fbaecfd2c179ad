"""Several replies, one after the other, as one stream of speech; a long text, said so."""

import math
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.request import FinishReason
from mimo_fast.runtime.engine.stream import Chunk, ChunkStream, Listening, Timing
from mimo_fast.runtime.lm.decode import Group
from mimo_fast.runtime.pipeline import Pipeline
from mimo_fast.text.context import PromptContext
from mimo_fast.text.prompt import Speech
from mimo_fast.text.sentences import split_to_say
from mimo_fast.text.spelling import spell
from mimo_fast.text.tasks import TASKS, tts, voice_of

FADE = 0.01
"""Seconds that a piece fades in and out for, where another one precedes or follows."""

PAUSE = 0.12
"""Seconds of silence between the pieces, besides what they have at their ends."""

WORST: tuple[FinishReason, ...] = ("stop", "length", "context", "cancelled")
"""Reasons for the end of a reply, the worst last."""

Start = Callable[[int, int], ChunkStream]
"""Starts piece i, after so many groups of the pieces before it."""

Begin = Callable[[Tensor, int | None, int, bool], Reply]
"""Begins the reply to a prompt [C + 1, T G]: most groups, least groups, whether others precede."""


def _silence(samples: int) -> Tensor:
    return torch.zeros(samples, dtype=torch.float32, device="cpu")


class Joiner:
    """Joins pieces of audio: each fades out, a pause, the next fades in, at equal power.

    A piece may come in any parts. The last samples of what has come are kept back, as they fade if
    the piece ends with them.
    """

    def __init__(self, sample_rate: int) -> None:
        size = round(FADE * sample_rate)
        rising = torch.sin(
            (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5)
            * (math.pi / 2 / max(size, 1))
        )
        self._rising, self._size = rising, size
        self._gap = _silence(round(PAUSE * sample_rate))
        self._kept, self._heard, self._joins = _silence(0), 0, False

    def push(self, audio: Tensor, last: bool = False) -> Tensor:
        """More of a piece [n] -> what is final.

        last: whether no piece follows, so that nothing need be kept back.
        """
        audio = self._faded_in(audio)
        if last:
            return audio
        audio = torch.cat((self._kept, audio))
        final, self._kept = audio[: -self._size or None], audio[-self._size :]
        return final if len(audio) > self._size else audio[:0]

    def end(self, last: bool) -> Tensor:
        """The rest of the piece, which fades out unless it is the last one."""
        rest, self._kept = self._kept, _silence(0)
        if last or not self._heard:
            return rest
        self._heard, self._joins = 0, True
        # A short piece fades out over as much of the ramp as it has.
        return rest * self._rising.flip(0)[self._size - len(rest) :]

    def _faded_in(self, audio: Tensor) -> Tensor:
        start, self._heard = self._heard, self._heard + len(audio)
        if not self._joins or not len(audio):
            return audio
        ramp = self._rising[start : start + len(audio)]
        audio = torch.cat((audio[: len(ramp)] * ramp, audio[len(ramp) :]))
        return audio if start else torch.cat((self._gap, audio))


@dataclass
class _Progress:
    """What the generator of a `SplitStream` shares with it, so that neither holds the other."""

    closing: threading.Event = field(default_factory=threading.Event)
    current: ChunkStream | None = None
    reason: FinishReason | None = None
    ended: bool = False


class SplitStream(ChunkStream):
    """Chunks of the replies to the pieces of a text, as of one reply; one piece runs at a time.

    Times count from the request, groups and seconds over all pieces. The finish reason is the worst
    of the pieces'. An error of one piece ends the stream.

    Args:
        texts: the pieces.
        start: starts one of them.
        max_groups: groups of all pieces together; None for no limit.
    """

    def __init__(self, texts: Sequence[str], start: Start, max_groups: int | None = None) -> None:
        self._progress = progress = _Progress()
        progress.current = start(0, 0)
        self._chunks = _generate(progress, texts, start, max_groups)
        self._lock = threading.RLock()

    @property
    def finish_reason(self) -> FinishReason | None:
        progress = self._progress
        cancelled = progress.closing.is_set() and not progress.ended
        return "cancelled" if cancelled else progress.reason

    @property
    def ended(self) -> bool:
        return self._progress.ended or self._progress.closing.is_set()

    def prefill(self) -> None:
        """Returns when the first piece's prompt has been prefilled, or the stream closed."""
        if (current := self._progress.current) is not None:
            current.prefill()

    @property
    def orphaned(self) -> bool:
        current = self._progress.current
        return current is not None and current.orphaned

    def check(self) -> None:
        if (current := self._progress.current) is not None:
            current.check()

    def close(self) -> None:
        # First: a thread that waits for the next chunk holds the lock.
        self._progress.closing.set()
        if (current := self._progress.current) is not None:
            current.close()
        if self.orphaned:
            return
        with self._lock:
            self._chunks.close()


def _generate(
    progress: _Progress, texts: Sequence[str], start: Start, max_groups: int | None
) -> Generator[Chunk, None, None]:
    joiner: Joiner | None = None
    groups, samples, first_audio, prefill = 0, 0, None, None
    reasons = list[FinishReason]()
    for i in range(len(texts)):
        if i:
            progress.current = start(i, groups)
        stream = progress.current
        assert stream is not None
        if progress.closing.is_set():
            # Whoever closes may have seen the piece before this one.
            stream.close()
            return
        before, space = groups, " " if i and texts[i - 1][-1:].isspace() else ""
        for chunk in stream:
            groups = before + chunk.timing.groups
            joiner = joiner or Joiner(chunk.sample_rate)
            audio = joiner.push(chunk.audio, last=i == len(texts) - 1)
            reason = None
            if chunk.finish_reason is not None:
                reasons.append(chunk.finish_reason)
                cut = reasons[-1] == "cancelled" or groups >= (max_groups or math.inf)
                last = cut or i == len(texts) - 1
                if len(rest := joiner.end(last)):
                    audio = torch.cat((audio, rest))
                reason = max(reasons, key=WORST.index) if last else None
                if cut and i < len(texts) - 1:
                    reason = max(reason or "length", "length", key=WORST.index)
            samples += len(audio)
            if first_audio is None and len(audio):
                first_audio = chunk.timing.elapsed
            prefill = chunk.timing.prefill if prefill is None else prefill
            seconds = samples / chunk.sample_rate
            timing = Timing(chunk.timing.elapsed, prefill, first_audio, groups, seconds)
            words = chunk.text if chunk.text[:1].isspace() or not chunk.text else space + chunk.text
            space = space if not words else ""
            progress.reason = reason
            yield Chunk(audio, chunk.sample_rate, words, timing, reason)
            if reason is not None:
                progress.ended = True
                return
        if progress.closing.is_set():
            return


def read_request(arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `tts` by their names.

    Raises:
        TypeError: one is missing or unknown.
        ValueError: the text holds its style, so that it cannot be split.
    """
    request = dict(signature(tts).bind(None, *arguments, **named).arguments)
    if not request.get("read_text_only", True):
        raise ValueError("split=True needs read_text_only=True: a style holds for a whole text")
    return request


def pieces_to_say(pipeline: Pipeline, request: Mapping[str, Any]) -> list[str]:
    """The texts that the model says for a request, one after the other; none for what is no text.

    Raises:
        PromptError: the text holds half of a surrogate pair.
    """
    text, config, tokenizer = request["input"], pipeline.lm.config, pipeline.tokenizer
    if not isinstance(text, str):
        return []
    # Before anything is said of it.
    tokenizer.encode_as_text(text)
    pieces = split_to_say(text, config.sentences_at_once, config.words_at_once)
    # A model of few words can say nothing else.
    return [piece for piece in pieces if not tokenizer.trained_words or spell(piece)]


def say_pieces(
    pipeline: Pipeline,
    context: PromptContext,
    request: Mapping[str, Any],
    pieces: Sequence[str],
    begin: Begin,
    began: float,
    limits: tuple[int | None, int],
    lookahead: Listening = "exact",
) -> SplitStream:
    """Says texts one after the other; the speech of the first is the voice of the others.

    Args:
        request: arguments of `tts`, with any text.
        began: `time.perf_counter()` at the request.
        limits: most and least groups of all pieces together.
    """
    voice, (longest, shortest) = list[Tensor](), limits
    clones = pipeline.lm.config.is_trained("tts_sft", "prompt_speech")
    clones = clones and request.get("prompt_speech") is None
    # By the voices of the pieces: all have one, or each its own.
    voices = dict[int, Voice]()

    def remember(group: Group) -> None:
        if group.text == pipeline.tokenizer.special.empty and not group.finished:
            voice.append(group.codes)

    def start(i: int, groups: int) -> ChunkStream:
        given = {**request, "context": context, "input": pieces[i].strip()}
        if i and voice:
            given["prompt_speech"] = Speech(torch.cat(voice, dim=1))
            # Upstream clones a voice with an instruction, or in the form of one sentence.
            given["read_text_only"] = given.get("instruct") is not None
        segments = TASKS["tts_sft"].prompt(**given)
        ids = pipeline.ids(segments)
        one = clones or request.get("prompt_speech") is not None
        speaker = voices.setdefault(0 if one else i, Voice(voice_of(segments)))
        most = None if longest is None else longest - groups
        least = max(shortest - groups, 0) if i == len(pieces) - 1 else 0
        heard = remember if i == 0 and clones else None
        reply = begin(ids, most, least, i > 0)
        shown = context.special_tokens
        return pipeline.stream(reply, ids, began, True, heard, shown, lookahead, speaker)

    return SplitStream(pieces, start, longest)
