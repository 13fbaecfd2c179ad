"""`Pipeline`: language model, codec, tokenizer and engine, from audio or text to audio and text.

    task (text/tasks.py) -> segments -> ids -> sequence -> reply -> text and audio

`MimoAudio`, `Session` and servers are built on it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimo_fast.audio.files import AudioSource, load_audio
from mimo_fast.audio.segments import parts_of, prepare_speech
from mimo_fast.errors import PromptError
from mimo_fast.process import FreedWhenClosed, Owner
from mimo_fast.runtime.codec.finite import checked_codes
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.recordings import attempt
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.confidence import confidence_of
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Bounds, Priority
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import ChunkStream, ReplyText, read_reply, stream_reply
from mimo_fast.runtime.engine.voicing import Listening, ReplyReader
from mimo_fast.runtime.gathering import Gathering
from mimo_fast.runtime.known_speech import KnownSpeech
from mimo_fast.runtime.lm.decode import Group, Limits, Samplers
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.memory import Setup
from mimo_fast.sampling import (
    DEFAULT_GLOBAL_SAMPLER,
    DEFAULT_LOCAL_SAMPLER,
    DrawnSeed,
    MiMoSampler,
    check_seed,
    one_seed,
    task_samplers,
)
from mimo_fast.text.context import Audio, PromptContext, encoded_speech
from mimo_fast.text.prompt import (
    PackedPrompt,
    PendingSpeech,
    Segment,
    Speech,
    pack,
    pack_pending,
    whole_frames,
    whole_patches,
)
from mimo_fast.text.tasks import Task
from mimo_fast.text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 8192
"""Default limit of a reply's length, in groups."""


def check_limits(max_new_tokens: int | None, min_new_tokens: int = 0) -> None:
    """Raises ValueError for limits that no reply can have: it has one group at least."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens must be 0 or more, not {min_new_tokens}")


class Waiting(NamedTuple):
    """A waveform [n] to encode for a prompt; closed as of `Pipeline.speech`."""

    wav: Tensor
    closed: bool


def _check_patches(frames: int) -> None:
    if not frames:
        raise PromptError("the audio is shorter than one patch of 160 ms: nothing to continue")


def _mean_loss(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """What the codes of parts lose: of normalized frames, each has the same share."""
    frames = sum(codes.shape[1] for codes, _ in parts)
    losses = [loss * (codes.shape[1] / frames) for codes, loss in parts if loss is not None]
    return torch.stack(losses).sum() if losses else None


@dataclass(eq=False, repr=False)
class Pipeline(FreedWhenClosed):
    """A loaded language model and codec. One engine decodes all of its requests.

    Args:
        setup: the memory plan it was loaded with.
        prepares: whether recordings are prepared before they are encoded, see `prepare_speech`.

    Attributes:
        presets: Upstream's samplers of each task, greedy where the checkpoint says so.
        known_speech: Codes and words of recordings of examples.
    """

    lm: LM
    codec: Codec
    tokenizer: Tokenizer
    setup: Setup
    prepares: bool = False
    _engine: Engine | None = None
    presets: dict[str, dict[str, MiMoSampler]] = field(init=False)
    _gathering: Gathering[Waiting, Speech | Exception] = field(
        init=False, default_factory=Gathering
    )
    known_speech: KnownSpeech = field(init=False, default_factory=KnownSpeech)
    owner: Owner = field(init=False, default_factory=Owner)

    def __post_init__(self) -> None:
        self.presets = task_samplers(self.lm.config.greedy_tasks)
        # `dataclasses.replace` passes the engine on, but it serves one language model only.
        if self._engine is not None and self._engine.lm is not self.lm:
            self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine of every sequence; its KV cache is allocated on first use.

        Raises:
            ClosedError: the pipeline has been closed, or this is a forked process.
        """
        self.owner.check()
        if self._engine is None:
            slots, quantized = self.setup.max_batch, self.setup.kv_cache is not None
            capacity = min(self.setup.max_seq_len, self.lm.config.max_positions)
            bounds = Bounds(parked=self.setup.max_parked_bytes, load=self.setup.max_load)
            self._engine = Engine(self.lm, slots, capacity, quantized, bounds)
            self.codec.pools.expected = slots
        return self._engine

    @property
    def counters(self) -> dict[str, int]:
        """What the engine has done so far, by name; see `Prefixes` and `Slots`.

        "prompts" that began without a cache, of which "prefix_hits" began with "prefix_groups"
        groups that had been computed for others; "prefix_bytes" that are held of those; and
        "evictions" of sequences to host memory.
        """
        engine = None if self.owner.closed else self._engine
        if engine is None:
            names = "prompts", "prefix_hits", "prefix_groups", "prefix_bytes", "evictions"
            return dict.fromkeys(names, 0)
        tree = engine.steps.prefixes
        return {
            "prompts": tree.asked,
            "prefix_hits": tree.hits,
            "prefix_groups": tree.reused,
            "prefix_bytes": tree.nbytes,
            "evictions": engine.slots.evictions,
        }

    def close(self) -> None:
        """Ends running replies with a ClosedError and lets go of engine and weights.

        It may be called again. In a forked process it only marks the pipeline.
        """
        if self.owner.closed or self.owner.forked:
            self.owner.closed = True
            return
        self.owner.closed = True
        if self._engine is not None:
            self._engine.close()
        device = self.lm.device
        del self.lm, self.codec
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def warmup(self, progress: bool = True) -> dict[str, int]:
        """Captures all graphs: of every batch size, and of `max_batch` codec streams.

        After it the first reply is as fast as the tenth.

        Returns:
            Bytes of device memory by purpose; on a GPU "reserved" is what the allocator holds.
        """
        self.engine.warmup(progress)
        self.codec.warmup(self.setup.max_batch, progress)
        self.codec.warm_up_encoder(self.lm.config.channels, progress)
        report = self.setup.bytes()
        if self.lm.device.type == "cuda":
            report["reserved"] = torch.cuda.memory_reserved(self.lm.device)
        return report

    def speech(self, audio: Audio, closed: bool = True) -> Speech:
        """Audio -> codes [C, n G] for a prompt; the last patch is padded with its last frame.

        Args:
            audio: anything that `load_audio` reads, or speech that is already encoded.
            closed: False leaves the speech open for a continuation; an incomplete last patch is
                cut off.

        Raises:
            AudioError: the audio cannot be read.
            NumericError: the codec's values are not finite.
            PromptError: it is shorter than a patch.
        """
        self.owner.check()
        if isinstance(audio, Speech):
            return encoded_speech(audio, closed)
        return self._encoded(self._loaded(audio), closed)

    def _loaded(self, audio: AudioSource) -> Tensor:
        load = prepare_speech if self.prepares else load_audio
        return load(audio, self.codec.sample_rate)

    def _parts(self, wav: Tensor) -> list[Tensor]:
        """What of a waveform [n] is encoded by itself, see `Architecture.part_seconds`."""
        seconds, config = self.lm.config.architecture.part_seconds, self.codec.config
        if seconds is None:
            return [wav]
        return parts_of(wav, seconds * config.sample_rate, config.n_fft)

    def _encoded(self, wav: Tensor, closed: bool) -> Speech:
        channels = self.lm.config.channels

        def encode(part: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.lm.config.confidence and self.codec.encoder_graphs is None:
                return self.codec.encode_measured(part, channels)
            return self.codec.encode(part, channels), self._loss(part)

        parts = [encode(part) for part in self._parts(wav)]
        return self._encoded_speech(Waiting(wav, closed), parts)

    def _encoded_together(self, waiting: Sequence[Waiting]) -> list[Speech | Exception]:
        """`_encoded` of several recordings; an error is that recording's own."""
        cut, channels = [self._parts(each.wav) for each in waiting], self.lm.config.channels
        waves = [part for parts in cut for part in parts]
        found: Sequence[Tensor | tuple[Tensor, Tensor] | Exception]
        if self.lm.config.confidence and self.codec.encoder_graphs is None:
            found = self.codec.encode_measured_together(waves, channels)
        else:
            found = self.codec.encode_together(waves, channels)

        encoded = iter(zip(waves, found, strict=True))

        def measured(
            part: Tensor, each: Tensor | tuple[Tensor, Tensor] | Exception
        ) -> tuple[Tensor, Tensor | None]:
            if isinstance(each, Exception):
                raise each
            return (each, self._loss(part)) if isinstance(each, Tensor) else each

        def speech(recording: Waiting, own: Sequence[Any]) -> Speech:
            return self._encoded_speech(recording, [measured(*each) for each in own])

        owned = [[*islice(encoded, len(parts))] for parts in cut]
        return [attempt(partial(speech, *pair)) for pair in zip(waiting, owned, strict=True)]

    def _encoded_speech(
        self, recording: Waiting, parts: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Speech:
        """Speech of a recording from the codes of its parts, and what they lose."""
        wav, closed = recording
        (codes, loss), *others = parts
        if others:
            codes, loss = torch.cat([each for each, _ in parts], dim=1), _mean_loss(parts)
        codes = checked_codes(self.codec, codes.cpu(), wav)
        codes = whole_patches(codes, self.lm.config.group_size, closed)
        _check_patches(codes.shape[1])
        return Speech(codes, closed, loss)

    def _loss(self, wav: Tensor) -> Tensor | None:
        """What the codes of a graph lose; None where the checkpoint calibrates no confidence."""
        if not self.lm.config.confidence:
            return None
        return self.codec.encode_measured(wav, self.lm.config.channels)[1]

    def speech_later(
        self,
        audio: Audio,
        closed: bool = True,
        *,
        prepared: bool = False,
        gathers: bool = False,
    ) -> Speech:
        """`speech` for a prompt: what the context cannot hold is refused before it is encoded.

        Args:
            prepared: whether the audio is a waveform [n] that nothing is to be done to.
            gathers: whether nobody listens, so that it may be encoded together with recordings of
                other threads; it may then wait for those that are being encoded.

        It does not wait for the codes where they can be prefilled on the device; that the codec's
        values are not finite is then found by whoever reads them.
        """
        self.owner.check()
        if isinstance(audio, Speech):
            return encoded_speech(audio, closed)
        rate = self.codec.sample_rate
        wav = load_audio(audio, rate) if prepared else self._loaded(audio)
        self._check_room(wav)
        pending = self._pending(wav, closed)
        if pending is not None:
            return pending
        if not gathers:
            return self._encoded(wav, closed)
        (speech,) = self._gathering.run([Waiting(wav, closed)], self._encoded_together)
        if isinstance(speech, Exception):
            raise speech
        return speech

    def speeches(self, waves: Sequence[Tensor]) -> list[Speech]:
        """`speech_later` of several prepared recordings that nobody listens to, encoded together.

        Raises:
            AudioError, NumericError, PromptError: one of them cannot be encoded.
        """
        self.owner.check()
        for wav in waves:
            self._check_room(wav)
        found: list[Speech | Exception | None] = [self._pending(wav, True) for wav in waves]
        pairs = zip(waves, found, strict=True)
        missing = [Waiting(wav, True) for wav, speech in pairs if speech is None]
        encoded = iter(self._gathering.run(missing, self._encoded_together) if missing else ())
        speeches = list[Speech]()
        for speech in found:
            each = next(encoded) if speech is None else speech
            if isinstance(each, Exception):
                raise each
            speeches.append(each)
        return speeches

    def _check_room(self, wav: Tensor) -> None:
        """Raises PromptError for a recording that the context cannot hold."""
        group = self.codec.config.samples_per_frame * self.lm.config.group_size
        self.engine.check_room(len(wav) // group)

    def _pending(self, wav: Tensor, closed: bool) -> Speech | None:
        """Speech that is being encoded by graph; None where no graph takes it."""
        if self.codec.encoder_graphs is None or not self._prefills:
            return None
        parts = self._parts(wav)
        # No graph takes more than a part.
        # No graph is as long as a part.
        if len(parts) > 1:
            return None
        pending = self.codec.encode_later(parts[0], self.lm.config.channels)
        if pending is None:
            return None
        pending.frames = whole_frames(pending.frames, self.lm.config.group_size, closed)
        _check_patches(pending.frames)
        pending.check = lambda codes: checked_codes(self.codec, codes, wav)
        return PendingSpeech(pending, closed, self._loss(parts[0]))

    @property
    def _prefills(self) -> bool:
        """Whether prompts are prefilled by graphs, which take codes that are on the device."""
        graphs = self.engine.decoder.graphs
        return graphs is not None and graphs.takes_prompts

    def context(
        self,
        seed: int | None = None,
        continued: bool = False,
        special_tokens: bool = False,
        gathers: bool = False,
    ) -> PromptContext:
        """The part of a model that the functions of `text/tasks.py` use.

        gathers: as of `speech_later`.
        """
        self.owner.check()
        drawn = seed.templates if isinstance(seed, DrawnSeed) else seed
        seed, words = None if drawn is None else check_seed(drawn), self.tokenizer.trained_words
        encode = partial(self.speech_later, gathers=gathers)
        architecture = self.lm.config.architecture
        return PromptContext(encode, words, seed, continued, special_tokens, architecture)

    def ids(self, segments: Iterable[Segment]) -> Tensor:
        """Segments -> ids [C + 1, T G] on the CPU."""
        self.owner.check()
        return pack(segments, self.tokenizer, self.lm.config)

    def packed(self, segments: Iterable[Segment], task: str | None = None) -> PackedPrompt:
        """`ids` that does not wait for speech that is still encoded.

        task: `Task.sampler`, for a reply with a confidence.
        """
        self.owner.check()
        return pack_pending(segments, self.tokenizer, self.lm.config, task)

    def prompt(
        self,
        task: Task,
        *arguments: Any,
        seed: int | None = None,
        continued: bool = False,
        special_tokens: bool = False,
        **named: Any,
    ) -> Tensor:
        """A task's prompt [C + 1, T G] on the CPU; arguments are those of `task.prompt`."""
        context = self.context(seed, continued, special_tokens)
        return self.ids(task.prompt(context, *arguments, **named))

    def sequence(self, seed: int | None = None, adapter: str | None = None) -> TokenSequence:
        """An empty sequence; without a seed its draws come from a fresh one, see `fresh_seed`.

        adapter: as of `Engine.sequence`.
        """
        return self.engine.sequence(one_seed(seed), adapter)

    def samplers(self, preset: str) -> Samplers:
        """The samplers of a preset (`Task.sampler`); upstream's defaults if it does not exist."""
        default = {"global": DEFAULT_GLOBAL_SAMPLER, "local": DEFAULT_LOCAL_SAMPLER}
        chosen = self.presets.get(preset, default)
        return Samplers(chosen["global"], chosen["local"])

    def decode(
        self,
        sequence: TokenSequence,
        samplers: Samplers,
        stop_ids: frozenset[int],
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
    ) -> Reply:
        """Prefills what is new in a sequence and returns its reply, decoded as it is read.

        Raises:
            ValueError: max_new_tokens is less than 1, or min_new_tokens less than 0.
            PromptError: the sequence leaves no room for a reply.
            BusyError: the engine's queue is full.
        """
        reply = self.start(sequence, samplers, stop_ids, max_new_tokens, min_new_tokens)
        reply.prefill()
        return reply

    def start(
        self,
        sequence: TokenSequence,
        samplers: Samplers,
        stop_ids: frozenset[int],
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        bounded: bool = True,
        priority: Priority = Priority.LISTENER,
    ) -> Reply:
        """`decode` that computes nothing before the reply is read or `Reply.prefill` is called.

        bounded: whether a full engine refuses it.
        """
        check_limits(max_new_tokens, min_new_tokens)
        longest = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if longest == MAX_NEW_TOKENS:
            longest = self._longest_reply(sequence) or longest
        limits = Limits(longest, min_new_tokens, stop_ids)
        return self.engine.start(sequence, limits, samplers, bounded=bounded, priority=priority)

    def _longest_reply(self, sequence: TokenSequence) -> int | None:
        """Groups at which a reply ends by default: what it heard bounds what there is to say."""
        if sequence.heard is None:
            return None
        begin, hearing = sequence.heard
        text = sequence.part(begin, sequence.groups).ids[0, :: sequence.group_size]
        heard = int((text == self.tokenizer.special.empty).sum())
        return self.lm.config.longest_reply(hearing.calibration.task, heard)

    def read(
        self, reply: Reply, ids: Tensor, speaks: bool = True, special_tokens: bool = False
    ) -> tuple[ReplyText, Tensor | None]:
        """Reads the reply to a prompt that ends with `ids`: text, and codes [C, T] or None."""
        text, codes = read_reply(reply, self.reader(ids, speaks, special_tokens))
        text.confidence, text.warning = self.judge(reply)
        return text, codes

    def judge(self, reply: Reply) -> tuple[float | None, str | None]:
        """Confidence and warning of a reply of which all has been taken, see `ReplyText`."""
        found = confidence_of(self.lm, reply)
        return (None, None) if found is None else (found.value, found.warning)

    def stream(
        self,
        reply: Reply,
        ids: Tensor,
        began: float,
        speaks: bool = True,
        on_group: Callable[[Group], None] | None = None,
        special_tokens: bool = False,
        lookahead: Listening = "exact",
        voice: Voice | None = None,
    ) -> ChunkStream:
        """The reply to a prompt that ends with `ids`, a chunk a group; see `stream_reply`."""
        reader = self.reader(ids, speaks, special_tokens)
        how = began, speaks, on_group, lookahead, voice
        return stream_reply(reply, reader, self.codec, *how, self.judge)

    def reader(self, ids: Tensor, speaks: bool, special_tokens: bool = False) -> ReplyReader:
        """A reader; the reply starts as speech after `<|sostm|>` or inside a recording.

        Its text has no control tokens, with two exceptions: all that upstream shows with
        `special_tokens`, and `</think>` between thoughts and answer, if the prompt of a written
        reply leaves `<think>` open.
        """
        text, special = ids[0, :: self.lm.config.group_size].tolist(), self.tokenizer.special
        shown = frozenset[int]()
        if special_tokens:
            shown = self.tokenizer.control_ids - {special.empty, special.eot, special.eostm}
        elif (bounds := self.tokenizer.think_ids) and not speaks:
            thinks = [token for token in text if token in bounds]
            shown = frozenset(bounds[1:] if thinks[-1:] == [bounds[0]] else ())
        speaking = text[-1] in (special.sostm, special.empty)
        tags = tuple(tag for _, tag in self.lm.config.architecture.tags)
        return ReplyReader(self.tokenizer, speaking, shown, tags)
