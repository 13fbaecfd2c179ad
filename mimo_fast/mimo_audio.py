"""`MimoAudio`: upstream's class and methods; plus streams, sessions and speech continuation."""

import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from time import perf_counter
from typing import (
    Any,
    BinaryIO,
    Concatenate,
    Literal,
    ParamSpec,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

import torch
from torch import Tensor

from mimo_fast import sampling
from mimo_fast.arguments import check_call, checked, names_of, refuse_unknown
from mimo_fast.audio.files import AudioSource, as_samples
from mimo_fast.audio.resample import resample
from mimo_fast.audio.segments import LONG_PAUSE
from mimo_fast.audio.writing import check_output, save_wav
from mimo_fast.checkpoint.embedded import resolve_pair
from mimo_fast.config import PathLike
from mimo_fast.errors import AudioError, NumericError, PromptError
from mimo_fast.generation import check_ids, flatten_ids, unflatten_history
from mimo_fast.history import History
from mimo_fast.json_files import shown
from mimo_fast.marking.marks import Marks
from mimo_fast.runtime.codec.finite import checked_samples
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.voice import Voice
from mimo_fast.runtime.conversion import NAME as BY_EXAMPLE
from mimo_fast.runtime.conversion import Converter
from mimo_fast.runtime.engine.engine import Engine
from mimo_fast.runtime.engine.policy import Priority
from mimo_fast.runtime.engine.reply import Reply
from mimo_fast.runtime.engine.sequence import TokenSequence
from mimo_fast.runtime.engine.stream import Chunk, ChunkStream, iterate_async
from mimo_fast.runtime.engine.voicing import Listening
from mimo_fast.runtime.examples import ExampleSet, read_examples
from mimo_fast.runtime.lm.decode import Samplers
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.loading import LoadOptions, load_parts
from mimo_fast.runtime.pipeline import MAX_NEW_TOKENS, Pipeline, check_limits
from mimo_fast.runtime.session import Session
from mimo_fast.runtime.speech import pieces_to_say, read_request, say_pieces
from mimo_fast.runtime.transcription import TranscriptStream, transcript_of
from mimo_fast.sampling import DrawnSeed, MiMoSampler, MiMoStopper
from mimo_fast.text import tasks
from mimo_fast.text.context import Audio, Message, PromptContext, Template
from mimo_fast.text.prompt import PackedPrompt, Segment, Segments, Speech, SpokenReply
from mimo_fast.text.tasks import TASKS, find_task, voice_of
from mimo_fast.text.tokenizer import Tokenizer
from mimo_fast.text.transcript import Transcript
from mimo_fast.upstream.codec import AudioTokenizer
from mimo_fast.upstream.device import DeviceName
from mimo_fast.upstream.features import MelTransform, check_samples, group_by_length, log_of
from mimo_fast.upstream.language_model import LanguageModel
from mimo_fast.upstream.tokenizer import CallableTokenizer

Arguments = ParamSpec("Arguments")
View = TypeVar("View")

STREAM_OPTIONS = frozenset(
    {"add_history", "lookahead", "max_new_tokens", "min_new_tokens", "seed", "special_tokens"}
    | {"split", "priority", "adapter"}
)
"""Arguments of `MimoAudio.stream` besides those of the task."""


Output = str | os.PathLike[str] | BinaryIO | None
"""Where a task writes its audio; None or "" is nowhere."""


class Options(TypedDict, total=False):
    """Arguments of every task method besides upstream's.

    special_tokens: special tokens in the texts of a prompt are tokens, and those in the text of the
    reply are shown, as upstream does. By default a text is text.

    adapter: that the reply is computed with, of those that the model was loaded with and that were
    not merged (`adapters`); None for the model itself.
    """

    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int
    special_tokens: bool
    adapter: str | None


def _refuse_unknown(task: str, given: Iterable[str]) -> None:
    """Raises TypeError if `stream` of a task does not take one of these arguments."""
    known = (names_of(find_task(task).prompt, bound=True) or frozenset()) | STREAM_OPTIONS
    refuse_unknown(given, known, f"stream({task!r})")


def _prompt_of(
    task: Callable[Concatenate[PromptContext, Arguments], Segments],
) -> "Callable[Concatenate[MimoAudio, Arguments], Tensor]":
    """The method `get_*_prompt` of a task: its arguments -> ids [C + 1, T G].

    It takes `special_tokens` as well, see `Options`.
    """

    @wraps(task)
    def prompt(model: "MimoAudio", *arguments: Arguments.args, **named: Arguments.kwargs) -> Tensor:
        context = model.pipeline.context(special_tokens=bool(named.pop("special_tokens", False)))
        return model._prompt(task(context, *arguments, **named))

    option = Parameter("special_tokens", Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    plain = signature(task)
    parameters = [*plain.parameters.values(), option]
    prompt.__signature__ = plain.replace(parameters=parameters)  # type: ignore[attr-defined]
    return prompt


def _is_nowhere(output: Output) -> bool:
    """Whether audio is not to be written; upstream treats an empty path as none."""
    return output is None or (isinstance(output, str) and not output)


@checked
class MimoAudio:
    """A language model, its codec and its tokenizer, ready for upstream's tasks.

    Args:
        model_path, mimo_audio_tokenizer_path: directories or hub ids of the language model and the
            codec; "nano" is the small one in the package.
        device: "cuda", "cpu", ...; by default CUDA if there is a GPU.
        dtype: to compute in. None is bfloat16 on CUDA, elsewhere the checkpoint's own (float32
            instead of float16 on a CPU).
        quantization: "int8", "int4", "nf4", or a format for each part; None keeps the checkpoint's.
        adapters: {name: folder} of a PEFT adapter, merged into the language model while loading.
        codec_rope: "exact" or "bfloat16", the codec's rotary frequencies. None for what the
            checkpoint states; the published one is rounded, as upstream runs it. See `LoadOptions`.
        max_batch, max_seq_len, kv_cache, offload: memory use, see `LoadOptions`.
        prepare: whether silence and long pauses are cut from recordings and their level is set, see
            `prepare_speech`. Off, as upstream takes them.
        revision, codec_revision, cache_dir, token, local_files_only: as in huggingface_hub.

    Audio arguments are paths, bytes, file objects, or waveforms [n] at 24 kHz. Methods with
    `output_path` or `output_audio_path` write audio there and return the text, as upstream's
    `tts_sft` and dialogue tasks do; the suffix chooses the format, see `save_wav`. A seed of None
    is drawn from torch's global generator and templates from Python's `random`, so that a script
    that seeds both repeats; with a seed neither is read.

    A task method (`asr_sft`, ...) runs the task of `text/tasks.py` that has its name; its
    `get_*_prompt` returns the ids [C + 1, T G] of the prompt, int64, or int32 without speech.

    Attributes:
        marks: What files that this model writes tell of it, None for nothing: a watermark, signed
            provenance, see `mimo_fast.marking.marks.Marks`.
        generate_kwargs: Upstream's options of `forward`, of which "max_length" counts: the groups
            of a prompt and its reply.

    Raises:
        CheckpointError, ConfigError: the checkpoints are missing, incomplete or contradict their
            config.
        DeviceMemoryError: the device has too little memory free; the message names settings that
            would fit.
    """

    def __init__(
        self,
        model_path: PathLike,
        mimo_audio_tokenizer_path: PathLike,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        quantization: Any = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        directories = resolve_pair(model_path, mimo_audio_tokenizer_path)
        self.path, self.mimo_audio_tokenizer_path = map(str, directories)
        loaded = load_parts(*directories, device, dtype, quantization, options)
        lm, audio_codec, tokenizer, setup = loaded
        prepares = bool(options.get("prepare"))
        self.pipeline = Pipeline(lm, audio_codec, CallableTokenizer.of(tokenizer), setup, prepares)
        self.setup, self._history = self.pipeline.setup, History()
        self._views = dict[type, Any]()
        self.marks: Marks | None = None
        place = self.lm.device
        self.device = DeviceName(place.type if device is None else str(device), place)
        config, special = self.lm.config, self.tokenizer.special
        self.group_size, self.audio_channels = config.group_size, config.channels
        self.delay_pattern, self.vocab_size = self.model.config.delay_pattern, config.vocab_size
        self.speech_zeroemb_idx, self.padding_idx = list(config.empty_codes), special.pad
        self.sosp_idx, self.eosp_idx, self.empty_token = special.sosp, special.eosp, special.empty
        self.sostm_idx, self.eostm_idx, self.eot_idx = special.sostm, special.eostm, special.eot
        self.im_start_idx, self.im_end_idx = special.im_start, special.im_end
        self.default_global_sampler = sampling.DEFAULT_GLOBAL_SAMPLER
        self.default_local_sampler = sampling.DEFAULT_LOCAL_SAMPLER
        self.task_sampler_configs = self.pipeline.presets
        self.generate_kwargs = {
            "max_length": MAX_NEW_TOKENS,
            "eos_token_id": special.eos,
            "pad_token_id": special.pad,
        }
        self.mel_transform = MelTransform(self.codec.config, self.codec.device)
        if self.device.type == "cuda":
            self.warmup()

    def __copy__(self) -> "MimoAudio":
        """A copy that shares the pipeline and has a history of its own."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _history=copy(self._history), _views=dict(self._views))
        return twin

    def close(self) -> None:
        """Frees caches, graphs and weights; running streams end with a ClosedError.

        So does every later call, of copies and sessions of this model too; closing again does
        nothing. A `with` block closes the model that it begins with.
        """
        self.pipeline.close()
        if not self.pipeline.owner.forked:
            self._history.clear()

    def __enter__(self) -> "MimoAudio":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def lm(self) -> LM:
        self.pipeline.owner.check()
        return self.pipeline.lm

    @lm.setter
    def lm(self, lm: LM) -> None:
        self.pipeline = replace(self.pipeline, lm=lm)
        self.clear_history()

    @property
    def codec(self) -> Codec:
        self.pipeline.owner.check()
        return self.pipeline.codec

    @codec.setter
    def codec(self, codec: Codec) -> None:
        self.pipeline = replace(self.pipeline, codec=codec)

    @property
    def model(self) -> LanguageModel:
        """The language model as upstream's users know it; `lm` is the model itself."""
        return self._view(LanguageModel, lambda: LanguageModel(self.pipeline, self.path))

    @property
    def mimo_audio_tokenizer(self) -> AudioTokenizer:
        """The codec in upstream's layouts; `codec` is the codec itself."""
        return self._view(AudioTokenizer, lambda: AudioTokenizer(self.pipeline))

    def _view(self, kind: type[View], make: Callable[[], View]) -> View:
        """The view of this kind; a new one where the pipeline has been replaced."""
        self.pipeline.owner.check()
        view = self._views.get(kind)
        if view is None or view.pipeline is not self.pipeline:
            view = self._views[kind] = make()
        return view

    @property
    def tokenizer(self) -> CallableTokenizer:
        return cast(CallableTokenizer, self.pipeline.tokenizer)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self.pipeline = replace(self.pipeline, tokenizer=CallableTokenizer.of(tokenizer))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that a request may choose."""
        return self.lm.adapters

    @property
    def engine(self) -> Engine:
        """The engine of every stream and session of this language model."""
        return self.pipeline.engine

    def warmup(self, progress: bool = True) -> dict[str, int]:
        """Captures the graphs, as loading on a GPU does; returns bytes, see `Pipeline.warmup`."""
        return self.pipeline.warmup(progress)

    @property
    def history(self) -> Tensor | None:
        """Ids of the last exchange, flattened [1, L] as upstream's are; None before the first.

        It may be set to one that was read before, which add_history then continues.
        """
        self.pipeline.owner.check()
        kept = self._history.sequence
        return None if kept is None else flatten_ids(kept.ids)[None].to(self.lm.device)

    @history.setter
    def history(self, value: Tensor | None) -> None:
        if value is None:
            self.clear_history()
            return
        self.pipeline.owner.check()
        self._history.restore(self.pipeline, unflatten_history(value, self.lm.config))

    @property
    def has_history(self) -> bool:
        """Whether there is a last exchange for add_history to continue."""
        return self._history.sequence is not None

    def clear_history(self) -> None:
        self._history.clear()

    def get_task_sampler(self, task_name: str | None) -> dict[str, MiMoSampler]:
        """The "global" and "local" samplers of a task; upstream's defaults for an unknown one."""
        default = {"global": self.default_global_sampler, "local": self.default_local_sampler}
        return self.task_sampler_configs.get(task_name or "", default)

    def save_wav(self, path: str | os.PathLike[str] | BinaryIO, wav: Tensor) -> None:
        """Writes a waveform of any shape as a mono file with `marks`, see `mimo_fast.save_wav`."""
        write = save_wav if self.marks is None else self.marks.write
        write(path, as_samples(wav).reshape(-1), self.codec.sample_rate)

    def wav2mel(self, wav: Tensor) -> Tensor:
        """Waveform [n] at the codec's rate -> natural log-mel [n_mels, 1 + n // hop]."""
        return log_of(self.mel_transform(wav)).squeeze()

    def resample_audio_if_needed(self, wav_tensor: Tensor, original_sr: int) -> Tensor:
        """Samples [..., n] at the codec's rate; the same tensor where they have it already."""
        rate = self.codec.sample_rate
        check_samples(wav_tensor)
        return wav_tensor if original_sr == rate else resample(wav_tensor, original_sr, rate)

    def group_by_length(
        self, features: Tensor, lengths: Tensor, max_length: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `mimo_fast.upstream.features.group_by_length`."""
        return group_by_length(features, lengths, max_length)

    def encode_batch(
        self, input_features: Tensor, input_lens: Tensor, max_length: int = 256000
    ) -> Tensor:
        """Log-mel [sum of input_lens, n_mels] -> codes [Q, T] of all rows, one after the other.

        max_length: mel frames of rows that are padded together.
        """
        encode = self.mimo_audio_tokenizer.encoder.encode
        features, lengths = group_by_length(input_features, input_lens, max_length)
        if not lengths:
            raise ValueError("encode_batch needs a row of features, one at least")
        groups = zip(features, lengths, strict=True)
        return torch.cat([encode(*group, return_codes_only=True)[0] for group in groups], dim=-1)

    def get_input_ids(self, prompt: Iterable[Any]) -> Tensor:
        """Segments, ours or those of `mimo_fast.upstream`, -> ids [C + 1, T G] on the device."""
        shape = self.tokenizer, self.group_size, self.audio_channels
        try:
            prompt = list(prompt)
        except TypeError:  # An array of no dimension says that it can be iterated.
            raise PromptError(f"a prompt is a list of segments, not {shown(prompt)}") from None
        ids = [
            segment.to_input_id(*shape) if hasattr(segment, "to_input_id") else self.pack([segment])
            for segment in prompt
        ]
        if not ids:
            raise PromptError("the prompt is empty")
        return torch.cat(ids, dim=1).to(self.lm.device)

    def preprocess_input(self, input: Any = None) -> Any:
        """Audio -> codes, flattened [T C]; a string that is no file's name -> text of a prompt."""
        if isinstance(input, str) and not os.path.isfile(input):
            return tasks.capitalize(input)
        return self.speech(input).codes.T.reshape(-1)

    def speech(self, audio: Audio, closed: bool = True) -> Speech:
        """Audio -> codes [C, n G] for a prompt, see `Pipeline.speech`."""
        return self.pipeline.speech(audio, closed)

    def pack(self, segments: Iterable[Segment]) -> Tensor:
        """Segments -> ids [C + 1, T G] on the CPU.

        A `str` is a template, in which special tokens are tokens; `text.prompt.UserText` is text.
        """
        return self.pipeline.ids(segments)

    def session(
        self,
        system_prompt: str | None = None,
        voice: Audio | None = None,
        seed: int | None = None,
        special_tokens: bool = False,
        adapter: str | None = None,
    ) -> Session:
        """A spoken dialogue that keeps its cache between turns and can be interrupted."""
        samplers = self._samplers("spoken_dialogue")
        how = seed, samplers, special_tokens, adapter
        return Session(self.pipeline, system_prompt, voice, *how)

    def restore_session(self, path: PathLike) -> Session:
        """Reads a dialogue that `Session.save` wrote, with its cache; see `Session.restore`."""
        return Session.restore(self.pipeline, Path(path), self._samplers("spoken_dialogue"))

    def converter(
        self,
        examples: Iterable[Any] | str | os.PathLike[str] | ExampleSet,
        instruction: str | None = None,
        adapter: str | None = None,
    ) -> Converter:
        """Speech to speech by example, for several recordings: the examples are computed once.

        Args:
            examples: at most 16 of (before, after) or (before, after, words of after), recordings
                as everywhere; upstream's mappings; or the folder of a set. Words that are missing
                are transcribed.
            instruction: what they show, in words or by one of the names "voice", "emotion",
                "style", "speed", "denoise" and "translation"; None for the set's or "voice".
            adapter: that converts, see `load`; words that are missing the model itself hears.

        Raises:
            AudioError, ConfigError, PromptError: an example cannot be used; the message names it.
        """
        read = read_examples(examples)
        chosen = read.instruction if instruction is None else instruction
        read = replace(read, instruction=chosen)
        return Converter(self.pipeline, read, self._samplers(TASKS[BY_EXAMPLE].sampler), adapter)

    def conversation(self, seed: int | None = None, adapter: str | None = None) -> TokenSequence:
        """An empty sequence for `decode`."""
        return self.pipeline.sequence(seed, adapter)

    def decode(
        self,
        conversation: TokenSequence,
        task_name: str,
        stop_ids: frozenset[int],
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
    ) -> Reply:
        """Prefills what is new in a sequence and returns a reply with the task's samplers."""
        limits = (stop_ids, max_new_tokens, min_new_tokens)
        return self.pipeline.decode(conversation, self._samplers(task_name), *limits)

    def _samplers(self, task_name: str) -> Samplers:
        chosen = self.get_task_sampler(task_name)
        return Samplers(chosen["global"], chosen["local"])

    def forward(
        self,
        input_ids: Tensor,
        return_audio: bool = False,
        output_audio_path: Output = None,
        stopping_criteria: Iterable[Any] | None = None,
        min_new_tokens: int = 0,
        max_new_tokens: int | None = MAX_NEW_TOKENS,
        add_history: bool = False,
        task_name: str | None = None,
        seed: int | None = None,
        special_tokens: bool = False,
        adapter: str | None = None,
    ) -> Any:
        """Replies to a prompt [C + 1, T G]: the text or, with return_audio, audio [1, 1, n].

        With output_audio_path it writes audio there and returns the text. stopping_criteria are
        `MiMoStopper`s. The text has the control tokens that upstream leaves in it only with
        special_tokens; `</think>` also ends the thoughts of a written reply. Without a word spoken
        audio is a second of silence, as upstream's.

        Raises:
            AudioError: output_audio_path cannot be written, or nothing was said. Nothing is
                written.
        """
        how = (return_audio, output_audio_path, stopping_criteria, min_new_tokens, max_new_tokens)
        prompt = PackedPrompt(input_ids)
        return self._forward(prompt, *how, add_history, task_name, seed, special_tokens, adapter)

    def _forward(
        self,
        prompt: PackedPrompt,
        return_audio: bool = False,
        output_audio_path: Output = None,
        stopping_criteria: Iterable[Any] | None = None,
        min_new_tokens: int = 0,
        max_new_tokens: int | None = MAX_NEW_TOKENS,
        add_history: bool = False,
        task_name: str | None = None,
        seed: int | None = None,
        special_tokens: bool = False,
        adapter: str | None = None,
    ) -> Any:
        """`forward`, which knows more of a packed prompt's recordings."""
        input_ids = check_ids(prompt.settled(), self.lm.config)
        prompt = replace(prompt, ids=input_ids, pending=())
        max_new_tokens = self._within_length(input_ids, max_new_tokens, add_history)
        criteria = list(() if stopping_criteria is None else stopping_criteria)
        if any(not hasattr(criterion, "stop_token_ids") for criterion in criteria):
            raise ValueError(
                "forward takes MiMoStoppers; pass other stopping criteria to mimo_fast.generate"
            )
        silent = _is_nowhere(output_audio_path)
        if not silent:
            check_output(output_audio_path)
        stop_ids = frozenset(token for criterion in criteria for token in criterion.stop_token_ids)
        limits = stop_ids, max_new_tokens, min_new_tokens
        # Of the tasks that think before they answer, one speaks.
        speaks = return_audio or not silent or task_name == TASKS["tts_sft"].sampler
        start = self._start(prompt, task_name or "", *limits, add_history, seed, adapter)
        with closing(start) as reply:
            text, codes = self.pipeline.read(reply, input_ids, speaks, special_tokens)
        if silent and not return_audio:
            return text
        if codes is None and not silent:
            fix = "raise max_new_tokens" if text.finish_reason == "length" else "try another seed"
            problem = f"nothing was said, so {output_audio_path} was not written: {fix}"
            raise AudioError(f"{problem} (the reply's text: {str(text)!r:.120})")
        rate = self.codec.sample_rate
        wav = torch.zeros(rate, dtype=torch.float32, device="cpu")
        if codes is not None:
            wav = checked_samples(self.codec, self.codec.decode(codes).cpu(), codes)
        if silent or output_audio_path is None:
            return wav[None, None].to(self.codec.device)
        self.save_wav(output_audio_path, wav)
        return text

    def _within_length(
        self, ids: Tensor, max_new_tokens: int | None, add_history: bool
    ) -> int | None:
        """The limit of a reply to ids [C + 1, T G] with the limit in `generate_kwargs`, if any."""
        longest = self.generate_kwargs.get("max_length")
        if longest is None or longest == MAX_NEW_TOKENS:
            return max_new_tokens
        kept = self._history.sequence
        before = kept.groups if kept is not None and add_history else 0
        room = max(longest - before - ids.shape[1] // self.group_size, 1)
        return room if max_new_tokens is None else min(room, max_new_tokens)

    def stream(
        self,
        task: str,
        *arguments: Any,
        add_history: bool = False,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        seed: int | None = None,
        special_tokens: bool = False,
        split: bool = False,
        lookahead: Listening = "exact",
        priority: Literal["listener", "batch"] = "listener",
        adapter: str | None = None,
        **task_arguments: Any,
    ) -> ChunkStream:
        """Yields a task's reply while it is decoded, one chunk a group.

        task is upstream's method name, with or without `_sft` ("tts", "asr", ...); its arguments
        are those of `get_*_prompt`. Closing the iterator stops after the group in progress.

        special_tokens, adapter: see `Options`.

        split: with the task "tts", a text that is longer than the checkpoint says at once is said
        in pieces, in one voice where the checkpoint takes one, and comes as one stream. Limits hold
        for all pieces together; the history is that of the last one. Most checkpoints, the
        published ones too, do not state how long a text may be: theirs is one piece.

        lookahead: "elastic" is for somebody who listens: the first samples come with the second
        patch, the first ones less exact, see `Codec.stream`. It begins with the norm statistics of
        earlier replies that add_history continues, of the voice prompt, of the codec's calibration,
        or with what it estimates.

        priority: "listener" for somebody who hears or reads the reply as it is made, "batch" for
        work that waits where a listener would run dry, see `runtime/engine/policy.py`.
        """
        rank = Priority.of(priority)
        gathers = rank is Priority.BATCH
        began, spec, pipeline = perf_counter(), find_task(task), self.pipeline
        _refuse_unknown(task, task_arguments)
        given, named = check_call(spec.prompt, arguments, task_arguments, f"stream({task!r})")
        check_limits(max_new_tokens, min_new_tokens)
        pipeline.lm.place_of(adapter)
        if split:
            if spec is not TASKS["tts_sft"] or add_history:
                raise ValueError("split=True goes with the task 'tts', without add_history")
            request = read_request(given, named)
            if len(texts := pieces_to_say(pipeline, request)) > 1:

                def begin(ids: Tensor, most: int | None, least: int, follows: bool) -> Reply:
                    stops = spec.stop_ids(self.tokenizer.special)
                    limits = stops, most, least
                    return self._start(
                        ids, spec.sampler, *limits, False, seed, adapter, follows, rank
                    )

                context = pipeline.context(seed, False, special_tokens, gathers)
                limits_of_all = max_new_tokens, min_new_tokens
                return say_pieces(
                    pipeline, context, request, texts, begin, began, limits_of_all, lookahead
                )
        continued = add_history and self.has_history
        context = pipeline.context(seed, continued, special_tokens, gathers)
        segments = spec.prompt(context, *given, **named)
        prompt = pipeline.packed(segments, spec.sampler)
        limits = spec.stop_ids(self.tokenizer.special), max_new_tokens, min_new_tokens
        how = add_history, seed, adapter
        reply = self._start(prompt, spec.sampler, *limits, *how, priority=rank)
        voice = self._history.voice or Voice(voice_of(segments))
        chunks = pipeline.stream(
            reply, prompt.ids, began, spec.speaks, None, special_tokens, lookahead, voice
        )
        return self._history.read_by(reply, chunks, voice)

    def _start(
        self,
        prompt: Tensor | PackedPrompt,
        task_name: str,
        stop_ids: frozenset[int],
        max_new_tokens: int | None,
        min_new_tokens: int,
        add_history: bool,
        seed: int | None,
        adapter: str | None = None,
        follows: bool = False,
        priority: Priority = Priority.LISTENER,
    ) -> Reply:
        """Adds a prompt [C + 1, T G] to the history and prefills it.

        One that follows in a stream is not prefilled yet, and not refused by a full queue.
        """
        # Before the history is touched.
        check_limits(max_new_tokens, min_new_tokens)
        samplers, limits = self._samplers(task_name), (max_new_tokens, min_new_tokens)
        reply = self._history.start(
            self.pipeline,
            prompt,
            add_history,
            seed,
            lambda sequence: self.pipeline.start(
                sequence, samplers, stop_ids, *limits, not follows, priority
            ),
            adapter,
        )
        if not follows:
            try:
                reply.prefill()
            except (AudioError, NumericError):
                # A recording that was still encoded when it was added.
                self._history.take_back()
                raise
        return reply

    def transcribe(
        self,
        audio: AudioSource | Iterator[Tensor],
        template: Template = None,
        seed: int | None = None,
        max_new_tokens: int | None = None,
        language: str | None = None,
        adapter: str | None = None,
    ) -> Transcript:
        """A recording of any length in words, with the times of what was said.

        It is cut at pauses, the level of each piece set, and pieces are transcribed as rows of one
        batch; `asr_sft` is upstream's one pass. Memory does not grow with the recording.

        Args:
            audio: anything that `load_audio` reads, of any length, or an iterator of waveforms [n]
                at the codec's sample rate.
            template: a wording of the request, its index, or None for one drawn by the seed.
            max_new_tokens: groups of each piece; by default what its seconds can hold.
            language: that is spoken, "en", "english", "zh" or "chinese", where the model has
                language tags, as MiMo-V2.5-ASR does; None leaves it to the model.
            adapter: see `Options`.

        Raises:
            AudioError: the audio cannot be read.
            PromptError: the model has no tag for the language.
            ValueError: it was not loaded with the adapter.
        """
        how = audio, template, seed, LONG_PAUSE, max_new_tokens, language, adapter
        return transcript_of(self.transcript(*how))

    def transcript(
        self,
        audio: AudioSource | Iterator[Tensor],
        template: Template = None,
        seed: int | None = None,
        waits: float = LONG_PAUSE,
        max_new_tokens: int | None = None,
        language: str | None = None,
        adapter: str | None = None,
    ) -> TranscriptStream:
        """`transcribe` whose segments come as soon as they are known.

        waits: seconds of silence after which a piece is transcribed; less of it for live speech.
        """
        how = template, seed, waits, max_new_tokens
        return TranscriptStream(self.pipeline, audio, *how, language=language, adapter=adapter)

    def astream(self, task: str, *arguments: Any, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: everything runs in worker threads."""
        self.pipeline.owner.check()
        _refuse_unknown(task, options.keys() - STREAM_OPTIONS)
        if options.get("seed") is None:
            options["seed"] = DrawnSeed.draw()
        return iterate_async(lambda: self.stream(task, *arguments, **options))

    def _run(
        self,
        name: str,
        arguments: Sequence[Any],
        options: Options,
        output: Output = None,
        add_history: bool = False,
    ) -> Any:
        """Runs a task to its end: returns the text and writes the audio to `output`."""
        task, continued = TASKS[name], add_history and self.has_history
        # Before the recordings of the prompt are encoded.
        if not _is_nowhere(output):
            check_output(output)
        check_limits(options.get("max_new_tokens"), options.get("min_new_tokens", 0))
        self.lm.place_of(options.get("adapter"))
        written = options.get("special_tokens", False)
        context = self.pipeline.context(options.get("seed"), continued, written)
        ids = self.pipeline.packed(task.prompt(context, *arguments), task.sampler)
        stops = task.stop_ids(self.tokenizer.special)
        return self._forward(
            ids,
            output_audio_path=output,
            stopping_criteria=[MiMoStopper(self.group_size, self.audio_channels, stops)],
            add_history=add_history,
            task_name=task.sampler,
            **options,
        )

    def asr_sft(self, audio: Audio, audio_tag: str = "", **options: Unpack[Options]) -> str:
        """Transcribes a recording.

        audio_tag: "<chinese>" or "<english>", which tells MiMo-V2.5-ASR the language; "" leaves it
        to the model, and is all that MiMo-Audio takes.
        """
        return self._run("asr_sft", [audio, audio_tag], options)

    def tts_sft(
        self,
        text: str,
        output_path: Output,
        instruct: str | None = None,
        read_text_only: bool = True,
        prompt_speech: Audio | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Writes speech for a text to output_path; returns the text channel."""
        arguments = [text, instruct, read_text_only, prompt_speech]
        return self._run("tts_sft", arguments, options, output_path)

    def audio_understanding_sft(
        self,
        input_speech: Audio,
        input_text: str,
        thinking: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """Answers a question about a recording."""
        return self._run("audio_understanding_sft", [input_speech, input_text, thinking], options)

    def spoken_dialogue_sft(
        self,
        input_speech: Audio,
        output_audio_path: Output = None,
        system_prompt: str | None = None,
        prompt_speech: Audio | None = None,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """Answers speech with speech, written to output_audio_path; returns the text."""
        turn = [input_speech, system_prompt, prompt_speech]
        return self._run("spoken_dialogue_sft", turn, options, output_audio_path, add_history)

    def spoken_dialogue_sft_multiturn(
        self,
        message_list: Sequence[Message],
        output_audio_path: Output = None,
        system_prompt: str | None = None,
        prompt_speech: Audio | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Answers with speech; contents are audio, an assistant's {"text": ..., "audio": ...}."""
        turns = [message_list, system_prompt, prompt_speech]
        return self._run("spoken_dialogue_sft_multiturn", turns, options, output_audio_path)

    def speech2text_dialogue_sft(
        self,
        input_speech: Audio,
        thinking: bool = False,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """Answers speech with text."""
        turn = [input_speech, thinking]
        return self._run("speech2text_dialogue_sft", turn, options, add_history=add_history)

    def speech2text_dialogue_sft_multiturn(
        self, message_list: Sequence[Message], thinking: bool = False, **options: Unpack[Options]
    ) -> str:
        """Answers with text; users' contents are audio, assistants' are text."""
        turns = [message_list, thinking]
        return self._run("speech2text_dialogue_sft_multiturn", turns, options)

    def text_dialogue_sft(
        self,
        input_text: str,
        thinking: bool = False,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """Answers text with text."""
        turn = [input_text, thinking]
        return self._run("text_dialogue_sft", turn, options, add_history=add_history)

    def text_dialogue_sft_multiturn(
        self, message_list: Sequence[Message], thinking: bool = False, **options: Unpack[Options]
    ) -> str:
        """Answers with text; all contents are text."""
        return self._run("text_dialogue_sft_multiturn", [message_list, thinking], options)

    def in_context_learning_s2s(
        self,
        instruction: str,
        prompt_examples: Sequence[Mapping[str, Any]],
        audio: Audio,
        max_new_tokens: int | None = None,
        output_audio_path: Output = None,
        min_new_tokens: int = 0,
        seed: int | None = None,
        special_tokens: bool = False,
        adapter: str | None = None,
    ) -> str:
        """Speech to speech by example; see `text.tasks.in_context_learning_s2s`."""
        arguments = [instruction, prompt_examples, audio]
        options = Options(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, seed=seed)
        options |= Options(special_tokens=special_tokens, adapter=adapter)
        return self._run("in_context_learning_s2s", arguments, options, output_audio_path)

    def speech_continuation(
        self, audio: Audio, output_audio_path: Output = None, **options: Unpack[Options]
    ) -> str:
        """Continues a recording (base model); output_audio_path gets only the continuation."""
        return self._run("speech_continuation", [audio], options, output_audio_path)

    def get_asr_sft_prompt(
        self,
        input: Audio | None = None,
        audio_tag: str = "",
        template: Template = None,
        seed: int | None = None,
        special_tokens: bool = False,
    ) -> Tensor:
        """Raises PromptError without a recording, and for a tag that the model does not have."""
        if input is None:
            raise PromptError("get_asr_sft_prompt needs a recording")
        context = self.pipeline.context(seed, special_tokens=special_tokens)
        return self._prompt(tasks.asr(context, input, audio_tag, template))

    def get_tts_sft_prompt(
        self,
        input: str | None = None,
        instruct: str | None = None,
        read_text_only: bool = True,
        prompt_speech: Audio | None = None,
        template: Template = None,
        seed: int | None = None,
        special_tokens: bool = False,
    ) -> Tensor:
        """Raises PromptError without a text."""
        if input is None:
            raise PromptError("get_tts_sft_prompt needs a text to say")
        arguments = (input, instruct, read_text_only, prompt_speech, template)
        context = self.pipeline.context(seed, special_tokens=special_tokens)
        return self._prompt(tasks.tts(context, *arguments))

    def get_spoken_dialogue_sft_prompt(
        self,
        input_speech: Audio,
        system_prompt: str | None = None,
        prompt_speech: Audio | None = None,
        add_history: bool = False,
        special_tokens: bool = False,
    ) -> Tensor:
        continued = add_history and self.has_history
        context = self.pipeline.context(continued=continued, special_tokens=special_tokens)
        return self._prompt(
            tasks.spoken_dialogue(context, input_speech, system_prompt, prompt_speech)
        )

    get_audio_understanding_sft_prompt = _prompt_of(tasks.audio_understanding)
    get_spoken_dialogue_sft_multiturn_prompt = _prompt_of(tasks.spoken_dialogue_multiturn)
    get_s2t_dialogue_sft_prompt = _prompt_of(tasks.speech2text_dialogue)
    get_s2t_dialogue_sft_multiturn_prompt = _prompt_of(tasks.speech2text_dialogue_multiturn)
    get_text_dialogue_sft_prompt = _prompt_of(tasks.text_dialogue)
    get_text_dialogue_sft_multiturn_prompt = _prompt_of(tasks.text_dialogue_multiturn)
    get_in_context_learning_s2s_prompt = _prompt_of(tasks.in_context_learning_s2s)
    get_speech_continuation_prompt = _prompt_of(tasks.speech_continuation)

    def _prompt(self, segments: Segments) -> Tensor:
        """A prompt [C + 1, T G], of the dtype and on the device that upstream's has."""
        spoken = any(isinstance(segment, Speech | SpokenReply) for segment in segments)
        dtype = torch.int64 if spoken else torch.int32
        return self.pipeline.ids(segments).to(self.lm.device, dtype)


@checked
def load(
    lm: PathLike | None = None,
    codec: PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: Any = None,
    **options: Unpack[LoadOptions],
) -> MimoAudio:
    """Loads a language model and a codec from directories or hub ids; arguments as `MimoAudio`'s.

    Without arguments, or with the name "nano", it loads the small pair in the package. If only one
    is given, the other is the published one.
    """
    pair = resolve_pair(lm, codec)
    return MimoAudio(*pair, device, dtype=dtype, quantization=quantization, **options)
