"""Whole requests, measured as their callers see them: one, or several at a time in threads.

Everything goes through the runtime's own path: `prompt.pack`, `TokenSequence`, `Engine`,
`stream_reply`. Names are the field's; all times are seconds.

    ttft             from the request to the first group, text or audio; includes encoding the input
    audio_ttfp       from the request to the first samples of audio
    itl              between two chunks of a reply: one group each, with its share of the codec
    e2el             from the request to the last sample or word
    audio_rtf        e2el over the seconds of audio produced or, for a text reply, of the input
    audio_rtfx       audio of all requests over wall time
    audio_underrun   longest silence within a reply that is played as it arrives (`player.py`)
    audio_continuity share of the replies in which no more than a tenth of a second was silent
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from mimo_fast.bench.meters import EnergyMeter, PeakMemory
from mimo_fast.bench.player import Playback, play
from mimo_fast.bench.schedule import spoken_reply, written_reply
from mimo_fast.bench.target import SAMPLE_RATE, Target
from mimo_fast.bench.timing import percentile
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.stream import ReplyReader, stream_reply
from mimo_fast.runtime.lm.decode import Group, Limits, Samplers
from mimo_fast.sampling import GREEDY, TASK_SAMPLERS
from mimo_fast.text import prompt, tasks
from mimo_fast.text.prompt import Segments, Speech
from mimo_fast.text.tasks import find_task

SENTENCE = "It begins to speak before it has finished thinking."
QUESTION = "What is being said?"

IN_ONE_PIECE = "the replies were shorter than the look-ahead, so their audio came in one piece"

ENCODED = tasks.PromptContext()

PROMPTS: dict[str, Callable[[Callable[[], Speech]], Segments]] = {
    "tts": lambda _speech: tasks.tts(ENCODED, SENTENCE, template=0),
    "spoken_dialogue": lambda speech: tasks.spoken_dialogue(ENCODED, speech()),
    "asr": lambda speech: tasks.asr(ENCODED, speech(), template=0),
    "audio_understanding": lambda speech: tasks.audio_understanding(ENCODED, speech(), QUESTION),
}
"""Task -> its segments, given a function that encodes the user's speech."""


@dataclass(frozen=True)
class TimedRequest:
    """One request to measure.

    Args:
        task: one of PROMPTS.
        audio: the user's speech, float32 [n] at the codec's rate, a whole number of patches.
        words, patches: text and audio groups of the reply where the target is steered; elsewhere
            their sum is the reply's limit.
        context: length of the prompt in groups. A shorter prompt is filled up with words in front;
            a longer one is kept or, if `cut`, loses its beginning.
        greedy: decode greedily instead of with the task's samplers.
    """

    task: str
    audio: Tensor
    words: int
    patches: int
    context: int = 0
    greedy: bool = False
    cut: bool = False


@dataclass
class Trace:
    """The course of one request; times are since its beginning.

    chunks: (time, samples). spoken: whether each group was speech.
    """

    encoded: float = 0.0
    prefilled: float = 0.0
    prompt_groups: int = 0
    first_group: float | None = None
    spoken: list[bool] = field(default_factory=list)
    chunks: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0


@dataclass(frozen=True)
class Spread:
    """Percentiles of n values."""

    p50: float
    p95: float
    p99: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not values:
            return None
        p50, p95, p99 = (percentile(values, share) for share in (0.5, 0.95, 0.99))
        return cls(p50, p95, p99, len(values))


@dataclass(frozen=True)
class Metrics:
    """Results of equal requests, named as in the module's docstring.

    What is None has its reason in `unmeasured`. wall: from the first request to the end of the
    last. text_groups, audio_groups: of all of their replies. audio_seconds: of all replies, or of
    all inputs where the replies are text.
    """

    task: str
    batch: int
    requests: int
    prompt_groups: int
    text_groups: int
    audio_groups: int
    audio_seconds: float
    wall: float
    encode: float
    prefill: float
    ttft: Spread | None
    audio_ttfp: Spread | None
    itl: Spread | None
    e2el: Spread | None
    audio_rtf: float | None
    audio_rtfx: float | None
    audio_underrun: float | None
    audio_continuity: float | None
    peak_bytes: int
    joules: float | None
    joules_source: str | None
    unmeasured: dict[str, str]


def measure(
    target: Target,
    request: TimedRequest,
    batch: int = 1,
    rounds: int = 1,
    warm: bool = True,
    seconds: float | None = None,
) -> Metrics:
    """Sends `batch` requests at once, `rounds` times, and waits for all of their replies each time.

    Args:
        warm: whether to send an unmeasured request first.
        seconds: after which replies are cut off, each after the group in progress.
    """
    target.plan(plan_of(target, request))
    if warm:
        warm_up(target, request)
    memory, energy = PeakMemory(target.lm.device), EnergyMeter(target.lm.device)
    traces, wall, stopped = list[Trace](), 0.0, threading.Event()
    clock = threading.Timer(0 if seconds is None else max(seconds, 0), stopped.set)
    if seconds is not None:
        clock.start()
    try:
        for _ in range(rounds):
            began = perf_counter()
            traces += _together(target, request, batch, stopped)
            wall += perf_counter() - began
    finally:
        clock.cancel()
    return summarize(target, request, batch, traces, wall, memory.bytes, energy)


def summarize(
    target: Target,
    request: TimedRequest,
    batch: int,
    traces: Sequence[Trace],
    wall: float,
    peak: int,
    energy: EnergyMeter,
) -> Metrics:
    spoken = sum(sum(trace.spoken) for trace in traces)
    unmeasured = {} if energy.unmeasured is None else {"joules": energy.unmeasured}
    heard: list[Playback] = []
    if not find_task(request.task).speaks:
        seconds, why = len(request.audio) / SAMPLE_RATE * len(traces), "the reply is text"
    elif target.codec is None:
        seconds, why = spoken * target.patch_seconds, "measured without a codec"
    else:
        heard = [play(trace.chunks, target.codec.sample_rate) for trace in traces]
        seconds, why = sum(playback.duration for playback in heard), "no audio came"
    speaking = [playback for playback in heard if playback.first_audio is not None]
    # Audio that came in one piece, as that of a reply shorter than the look-ahead does, could not
    # fall silent.
    followed = [
        playback
        for trace, playback in zip(traces, heard, strict=bool(heard))
        if sum(samples > 0 for _, samples in trace.chunks) > 1
    ]
    factors = [trace.ended * len(traces) / seconds for trace in traces] if seconds else []
    if not factors:
        unmeasured["audio_rtf"] = why
    if not speaking:
        unmeasured["audio_ttfp"] = why
    if not followed:
        unmeasured["audio_underrun"] = IN_ONE_PIECE if speaking else why
    # A request's first chunk waits for its prompt, which is counted as ttft.
    gaps = [
        after - before for trace in traces for (before, _), (after, _) in pairwise(trace.chunks)
    ]
    return Metrics(
        task=request.task,
        batch=batch,
        requests=len(traces),
        prompt_groups=traces[0].prompt_groups,
        text_groups=sum(len(trace.spoken) for trace in traces) - spoken,
        audio_groups=spoken,
        audio_seconds=seconds,
        wall=wall,
        encode=percentile([trace.encoded for trace in traces], 0.5),
        prefill=percentile([trace.prefilled - trace.encoded for trace in traces], 0.5),
        ttft=Spread.of([trace.first_group for trace in traces if trace.first_group is not None]),
        audio_ttfp=Spread.of(
            [playback.first_audio for playback in heard if playback.first_audio is not None]
        ),
        itl=Spread.of(gaps),
        e2el=Spread.of([trace.ended for trace in traces]),
        audio_rtf=percentile(factors, 0.5) if factors else None,
        audio_rtfx=seconds / wall if seconds else None,
        audio_underrun=max((playback.worst_underrun for playback in followed), default=None),
        audio_continuity=sum(p.continuous for p in followed) / len(followed) if followed else None,
        peak_bytes=peak,
        joules=energy.joules,
        joules_source=energy.source,
        unmeasured=unmeasured,
    )


def warm_up(target: Target, request: TimedRequest) -> None:
    """Sends a request that ends after its first group.

    For a spoken reply the codec also decodes up to the first audio.
    """
    _answer(target, request, seed=0, limit=1, stopped=threading.Event())
    if target.codec is not None and find_task(request.task).speaks:
        target.codec.warmup(target.setup.max_batch, progress=False)
        stream, shape = target.codec.stream(), (target.lm.config.channels, PATCH_FRAMES)
        codes = torch.zeros(shape, dtype=torch.int64, device=target.lm.device)
        for _ in range(LOOKAHEAD + 2):
            stream.push(codes, trusted=True)
        stream.finish()


def prompt_ids(target: Target, request: TimedRequest) -> Tensor:
    """The request's prompt [C + 1, T G], its audio encoded."""
    segments = PROMPTS[request.task](lambda: target.speech(request.audio))
    ids = prompt.pack(segments, target.tokenizer, target.lm.config)
    size = target.lm.config.group_size
    missing = request.context - ids.shape[1] // size
    if missing < 0 and request.cut:
        return ids[:, -request.context * size :]
    return ids if missing <= 0 else torch.cat((target.filler(missing), ids), dim=1)


def plan_of(target: Target, request: TimedRequest) -> list[int]:
    special, words = target.tokenizer.special, (request.words, target.word_id)
    if find_task(request.task).speaks:
        return spoken_reply(request.patches, *words, special.empty, special.im_end)
    return written_reply(*words, special.im_end)


def _together(
    target: Target, request: TimedRequest, batch: int, stopped: threading.Event
) -> list[Trace]:
    """One request in this thread, or several with a thread each.

    All start at once, and end early once `stopped`.
    """
    limit = request.words + request.patches + 1
    if batch == 1:
        return [_answer(target, request, 0, limit, stopped)]
    gate = threading.Barrier(batch)

    def answer(seed: int) -> Trace:
        gate.wait()
        return _answer(target, request, seed, limit, stopped)

    with ThreadPoolExecutor(batch) as pool:
        running = [pool.submit(answer, seed) for seed in range(batch)]
        # An error or an interrupt ends the others after the group in progress.
        try:
            finished, _ = wait(running, return_when=FIRST_EXCEPTION)
            if any(future.exception() is not None for future in finished):
                stopped.set()
        except BaseException:
            stopped.set()
            raise
    return [future.result() for future in running]


def _answer(
    target: Target, request: TimedRequest, seed: int, limit: int, stopped: threading.Event
) -> Trace:
    trace, task, began = Trace(), find_task(request.task), perf_counter()
    ids = prompt_ids(target, request)
    trace.encoded = perf_counter() - began
    sequence = target.engine.sequence(seed)
    sequence.add(ids)
    trace.prompt_groups = sequence.groups
    preset = TASK_SAMPLERS[task.sampler]
    samplers = Samplers(preset["global"], preset["local"])
    if request.greedy:
        samplers = Samplers(GREEDY, GREEDY)
    limits = Limits(limit, stop_ids=task.stop_ids(target.tokenizer.special))
    reply = target.engine.decode(sequence, limits, samplers)
    trace.prefilled = perf_counter() - began

    def on_group(group: Group) -> None:
        if trace.first_group is None:
            trace.first_group = perf_counter() - began
        if not group.finished:
            trace.spoken.append(group.text == target.lm.empty_id)

    last_id = int(ids[0, -target.lm.config.group_size])
    for samples in _chunks(target, reply, last_id, began, task.speaks, on_group):
        trace.chunks.append((perf_counter() - began, samples))
        if stopped.is_set():
            reply.close()
    trace.ended = perf_counter() - began
    return trace


def _chunks(
    target: Target,
    reply: Reply,
    last_id: int,
    began: float,
    speaks: bool,
    on_group: Callable[[Group], None],
) -> Iterator[int]:
    """Samples of each chunk; without a codec, none for a group."""
    if target.codec is None:
        for group in reply:
            on_group(group)
            yield 0
        return
    special = target.tokenizer.special
    reader = ReplyReader(target.tokenizer, speaking=last_id in (special.sostm, special.empty))
    for chunk in stream_reply(reply, reader, target.codec, began, speaks, on_group):
        yield len(chunk.audio)
