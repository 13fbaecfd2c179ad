"""`MimoAudio`: upstream's class, its methods, arguments and returns; plus streams, sessions and
speech continuation."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from mimo_fast.audio.files import AudioSource, save_wav
from mimo_fast.checkpoint.embedded import resolve_pair
from mimo_fast.history import KeepsHistory
from mimo_fast.runtime.engine.request import Reply
from mimo_fast.runtime.engine.sequence import Conversation
from mimo_fast.runtime.engine.stream import (
    Chunk,
    ChunkStream,
    ReplyReader,
    iterate_async,
    read_reply,
    stream_reply,
)
from mimo_fast.runtime.lm.decode import Limits, Samplers
from mimo_fast.runtime.loading import LoadOptions, PathLike, load_parts
from mimo_fast.runtime.session import Session
from mimo_fast.sampling import (
    DEFAULT_GLOBAL_SAMPLER,
    DEFAULT_LOCAL_SAMPLER,
    MiMoSampler,
    MiMoStopper,
    task_samplers,
)
from mimo_fast.text.prompt_builder import Message
from mimo_fast.text.tasks import Task, find_task

MAX_NEW_TOKENS = 8192


class Options(TypedDict, total=False):
    """What every task method takes besides upstream's arguments."""

    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int


class MimoAudio(KeepsHistory):
    """A language model, its codec and its tokenizer, ready for upstream's tasks.

    Args:
        model_path, mimo_audio_tokenizer_path: directories or hub ids of the language model and the
            codec.
        device: "cuda", "cpu", ...; CUDA where there is one.
        dtype: to compute in; None: bfloat16 on CUDA, elsewhere the checkpoint's own, but float32
            for float16 on a CPU.
        quantization: "int8", "int4", "nf4", or a format for each part; None keeps the checkpoint's.
        max_batch, max_seq_len, kv_cache, offload: how much memory it may take, see `LoadOptions`.
        revision, codec_revision, cache_dir, token, local_files_only: as in huggingface_hub.

    Audio arguments are paths, bytes, file objects, or waveforms [n] at 24 kHz. Methods that take
    `output_path` or `output_audio_path` write a WAV there and return the text; `tts_sft` and the
    dialogue tasks do so as upstream does. Methods with a seed draw a fresh one when it is None.

    Raises:
        CheckpointError, ConfigError: the checkpoints are missing, incomplete or contradict their
            config.
        DeviceMemoryError: the device has not enough memory free; the message names settings that
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
        self.path, self.mimo_audio_tokenizer_path = str(model_path), str(mimo_audio_tokenizer_path)
        self.lm, self.codec, self.tokenizer, self.setup = load_parts(
            model_path, mimo_audio_tokenizer_path, device, dtype, quantization, options
        )
        self.model, self.mimo_audio_tokenizer, self.device = self.lm, self.codec, self.lm.device
        config, special = self.lm.config, self.tokenizer.special
        self.group_size, self.audio_channels = config.group_size, config.channels
        self.delay_pattern, self.vocab_size = config.delays, config.vocab_size
        self.speech_zeroemb_idx, self.padding_idx = list(config.empty_codes), special.pad
        self.sosp_idx, self.eosp_idx, self.empty_token = special.sosp, special.eosp, special.empty
        self.sostm_idx, self.eostm_idx, self.eot_idx = special.sostm, special.eostm, special.eot
        self.im_start_idx, self.im_end_idx = special.im_start, special.im_end
        self.default_global_sampler, self.default_local_sampler = (
            DEFAULT_GLOBAL_SAMPLER,
            DEFAULT_LOCAL_SAMPLER,
        )
        self.task_sampler_configs = task_samplers(config.greedy_tasks)
        super().__init__()
        if self.device.type == "cuda":
            self.warmup()

    def get_task_sampler(self, task_name: str | None) -> dict[str, MiMoSampler]:
        """The "global" and "local" samplers of a task; upstream's defaults for an unknown one."""
        default = {"global": self.default_global_sampler, "local": self.default_local_sampler}
        return self.task_sampler_configs.get(task_name or "", default)

    def save_wav(self, path: Any, wav: Tensor) -> None:
        """Writes a waveform of any shape as a mono WAV."""
        save_wav(path, wav.reshape(-1), self.codec.sample_rate)

    def session(
        self,
        system_prompt: str | None = None,
        voice: AudioSource | None = None,
        seed: int | None = None,
    ) -> Session:
        """A spoken dialogue that keeps its cache between turns and can be interrupted."""
        return Session(self, system_prompt, voice, seed)

    def restore_session(self, path: PathLike) -> Session:
        """A dialogue that `Session.save` wrote, with its cache.

        Raises:
            CheckpointError: the file is no session, is damaged, or belongs to another model.
        """
        return Session.restore(self, Path(path))

    def decode(
        self,
        conversation: Conversation,
        task_name: str,
        stop_ids: frozenset[int],
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
    ) -> Reply:
        """Prefills what is new in the conversation and decodes a reply with the task's samplers."""
        samplers = self.get_task_sampler(task_name)
        limits = Limits(
            MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens, min_new_tokens, stop_ids
        )
        return conversation.decode(limits, Samplers(samplers["global"], samplers["local"]))

    def forward(
        self,
        input_ids: Tensor,
        return_audio: bool = False,
        output_audio_path: Any = None,
        stopping_criteria: Iterable[Any] | None = None,
        min_new_tokens: int = 0,
        max_new_tokens: int | None = MAX_NEW_TOKENS,
        add_history: bool = False,
        task_name: str | None = None,
        seed: int | None = None,
    ) -> Any:
        """Generates after a prompt [C + 1, T G] and returns its text; or its audio [1, 1, n] with
        return_audio.

        With output_audio_path it writes a WAV there and returns the text. stopping_criteria are
        `MiMoStopper`s.
        """
        criteria = list(stopping_criteria or ())
        if any(not hasattr(criterion, "stop_token_ids") for criterion in criteria):
            raise ValueError(
                "forward takes MiMoStoppers; pass other stopping criteria to mimo_fast.generate"
            )
        stop_ids = frozenset(token for criterion in criteria for token in criterion.stop_token_ids)
        output_audio_path = (
            None
            if isinstance(output_audio_path, str) and not output_audio_path
            else output_audio_path
        )
        conversation = self.conversation_for(input_ids, add_history, seed)
        with closing(
            self.decode(conversation, task_name or "", stop_ids, max_new_tokens, min_new_tokens)
        ) as reply:
            text, codes = read_reply(reply, self._reader(input_ids))
        if not return_audio and output_audio_path is None:
            return text
        wav = (
            torch.zeros(self.codec.sample_rate) if codes is None else self.codec.decode(codes).cpu()
        )
        if output_audio_path is None:
            return wav[None, None]
        self.save_wav(output_audio_path, wav)
        return text

    def _reader(self, input_ids: Tensor) -> ReplyReader:
        """A reply speaks from the start where the prompt opened its speech: by `<|sostm|>`, or
        mid-recording."""
        last = int(input_ids[0, -self.group_size])
        return ReplyReader(self.tokenizer, speaking=last in (self.sostm_idx, self.empty_token))

    def _prompt(
        self, spec: Task, arguments: Sequence[Any], named: Mapping[str, Any], shared: dict[str, Any]
    ) -> Tensor:
        wanted = {name: shared[name] for name in spec.shares}
        return getattr(self, spec.prompt)(*arguments, **named, **wanted)

    def _reply(
        self,
        task: str,
        *arguments: Any,
        output: Any = None,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> Any:
        spec, seed = find_task(task), options.get("seed")
        input_ids = self._prompt(spec, arguments, {}, {"seed": seed, "add_history": add_history})
        stopper = MiMoStopper(
            self.group_size, self.audio_channels, spec.stop_ids(self.tokenizer.special)
        )
        return self.forward(
            input_ids,
            output_audio_path=output,
            stopping_criteria=[stopper],
            add_history=add_history,
            task_name=spec.sampler,
            **options,
        )

    def stream(
        self,
        task: str,
        *arguments: Any,
        add_history: bool = False,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        seed: int | None = None,
        **task_arguments: Any,
    ) -> ChunkStream:
        """A task's reply while it is decoded, a chunk a group.

        Args:
            task: upstream's method name, with or without `_sft` ("tts", "asr", "spoken_dialogue",
                ...).
            arguments, task_arguments: those of the task's `get_*_prompt`.

        Closing the iterator stops decoding within one group.
        """
        began, spec = perf_counter(), find_task(task)
        input_ids = self._prompt(
            spec, arguments, task_arguments, {"seed": seed, "add_history": add_history}
        )
        conversation = self.conversation_for(input_ids, add_history, seed)
        stop_ids = spec.stop_ids(self.tokenizer.special)
        reply = self.decode(conversation, spec.sampler, stop_ids, max_new_tokens, min_new_tokens)
        chunks = self._running = stream_reply(
            reply, self._reader(input_ids), self.codec, began, spec.speaks
        )
        return chunks

    def astream(self, task: str, *arguments: Any, **options: Any) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: everything runs in worker threads."""
        return iterate_async(lambda: self.stream(task, *arguments, **options))

    def asr_sft(self, audio: AudioSource, **options: Unpack[Options]) -> str:
        """Transcription."""
        return self._reply("asr_sft", audio, **options)

    def tts_sft(
        self,
        text: str,
        output_path: Any,
        instruct: str | None = None,
        read_text_only: bool = True,
        prompt_speech: AudioSource | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Speech for a text, into output_path; returns the text channel."""
        arguments = (text, instruct, read_text_only, prompt_speech)
        return self._reply("tts_sft", *arguments, output=output_path, **options)

    def audio_understanding_sft(
        self,
        input_speech: AudioSource,
        input_text: str,
        thinking: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """The answer to a question about a recording."""
        return self._reply("audio_understanding_sft", input_speech, input_text, thinking, **options)

    def spoken_dialogue_sft(
        self,
        input_speech: AudioSource,
        output_audio_path: Any = None,
        system_prompt: str | None = None,
        prompt_speech: AudioSource | None = None,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """A spoken answer, its audio into output_audio_path; returns its text."""
        return self._reply(
            "spoken_dialogue_sft",
            input_speech,
            system_prompt,
            prompt_speech,
            output=output_audio_path,
            add_history=add_history,
            **options,
        )

    def spoken_dialogue_sft_multiturn(
        self,
        message_list: Sequence[Message],
        output_audio_path: Any = None,
        system_prompt: str | None = None,
        prompt_speech: AudioSource | None = None,
        **options: Unpack[Options],
    ) -> str:
        """A spoken answer; a user's content is audio, an assistant's {"text": ..., "audio":
        ...}."""
        return self._reply(
            "spoken_dialogue_sft_multiturn",
            message_list,
            system_prompt,
            prompt_speech,
            output=output_audio_path,
            **options,
        )

    def speech2text_dialogue_sft(
        self,
        input_speech: AudioSource,
        thinking: bool = False,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """A written answer to speech."""
        return self._reply(
            "speech2text_dialogue_sft", input_speech, thinking, add_history=add_history, **options
        )

    def speech2text_dialogue_sft_multiturn(
        self, message_list: Sequence[Message], thinking: bool = False, **options: Unpack[Options]
    ) -> str:
        """A written answer; users' contents are audio, assistants' text."""
        return self._reply("speech2text_dialogue_sft_multiturn", message_list, thinking, **options)

    def text_dialogue_sft(
        self,
        input_text: str,
        thinking: bool = False,
        add_history: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """A written answer to text."""
        return self._reply(
            "text_dialogue_sft", input_text, thinking, add_history=add_history, **options
        )

    def text_dialogue_sft_multiturn(
        self, message_list: Sequence[Message], thinking: bool = False, **options: Unpack[Options]
    ) -> str:
        """A written answer; all contents are text."""
        return self._reply("text_dialogue_sft_multiturn", message_list, thinking, **options)

    def in_context_learning_s2s(
        self,
        instruction: str,
        prompt_examples: Sequence[Mapping[str, Any]],
        audio: AudioSource,
        max_new_tokens: int | None = None,
        output_audio_path: Any = None,
        min_new_tokens: int = 0,
        seed: int | None = None,
    ) -> str:
        """Speech to speech by example (base model); examples have input_audio, output_audio,
        output_transcription."""
        return self._reply(
            "in_context_learning_s2s",
            instruction,
            prompt_examples,
            audio,
            output=output_audio_path,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            seed=seed,
        )

    def speech_continuation(
        self, audio: AudioSource, output_audio_path: Any = None, **options: Unpack[Options]
    ) -> str:
        """Carries a recording on (base model); the continuation alone goes into
        output_audio_path."""
        return self._reply("speech_continuation", audio, output=output_audio_path, **options)


def load(
    lm: PathLike | None = None,
    codec: PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: Any = None,
    **options: Unpack[LoadOptions],
) -> MimoAudio:
    """Loads a language model and a codec from directories or hub ids; arguments as `MimoAudio`'s.

    Without either, or by the name "nano", it is the small pair inside the package; one alone goes
    with the published other.
    """
    return MimoAudio(
        *resolve_pair(lm, codec), device, dtype=dtype, quantization=quantization, **options
    )
