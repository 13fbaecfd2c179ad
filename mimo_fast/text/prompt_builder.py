"""Upstream's prompt methods: audio and text in, ids [C + 1, T G] out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mimo_fast.audio.files import AudioSource, load_audio
from mimo_fast.errors import PromptError
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM
from mimo_fast.text import prompt
from mimo_fast.text.prompt import Reply, Segment, Speech
from mimo_fast.text.spelling import spell
from mimo_fast.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


class PromptBuilder:
    """`get_*_prompt` of upstream's `MimoAudio`, over a language model's dimensions, a codec and a
    tokenizer.

    Template choices are random upstream; here `template` is the wording or its index, and `seed`
    makes the draw.
    """

    lm: LM
    codec: Codec
    tokenizer: Tokenizer

    @property
    def has_history(self) -> bool:
        """Whether add_history has anything to add to."""
        return False

    def preprocess_input(self, input: Any = None) -> Any:
        """Audio -> its codes, flattened [T C]; any other string -> the text, capitalized if all in
        one case."""
        if isinstance(input, str) and not os.path.isfile(input):
            return prompt.capitalize(input)
        return self.speech(input).codes.T.reshape(-1)

    def speech(self, audio: AudioSource, closed: bool = True) -> Speech:
        """Audio -> codes [C, n G] for a prompt: padded with the last frame, or cut when it is left
        open."""
        group_size = self.lm.config.group_size
        wav = load_audio(audio, self.codec.sample_rate)
        codes = self.codec.encode(wav, self.lm.config.channels).cpu()
        codes = prompt.whole_patches(codes, group_size, closed)
        if not codes.shape[1]:
            raise PromptError("the audio is shorter than one patch of 160 ms: nothing to continue")
        return Speech(codes, closed)

    def pack(self, segments: Iterable[Segment]) -> Tensor:
        """Segments -> ids [C + 1, T G] on the CPU."""
        return prompt.pack(segments, self.tokenizer, self.lm.config)

    def _ids(self, segments: Iterable[Segment]) -> Tensor:
        return self.pack(segments).to(self.lm.device)

    def get_asr_sft_prompt(
        self, input: AudioSource, template: int | str | None = None, seed: int | None = None
    ) -> Tensor:
        return self._ids(prompt.asr(self.speech(input), template, seed))

    def get_tts_sft_prompt(
        self,
        input: str,
        instruct: str | None = None,
        read_text_only: bool = True,
        prompt_speech: AudioSource | None = None,
        template: int | str | None = None,
        seed: int | None = None,
    ) -> Tensor:
        voice = self._voice(prompt_speech)
        if read_text_only and self.tokenizer.trained_words and isinstance(input, str):
            input = self._spelled(input)
        return self._ids(prompt.tts(input, instruct, read_text_only, voice, template, seed))

    def get_audio_understanding_sft_prompt(
        self, input_speech: AudioSource, input_text: str, thinking: bool = False
    ) -> Tensor:
        return self._ids(
            prompt.audio_understanding(self.speech(input_speech), input_text, thinking)
        )

    def get_spoken_dialogue_sft_prompt(
        self,
        input_speech: AudioSource,
        system_prompt: str | None = None,
        prompt_speech: AudioSource | None = None,
        add_history: bool = False,
    ) -> Tensor:
        if add_history and self.has_history:
            system_prompt, prompt_speech = None, None
        segments = prompt.spoken_dialogue(
            self.speech(input_speech), system_prompt, self._voice(prompt_speech)
        )
        return self._ids(segments)

    def get_spoken_dialogue_sft_multiturn_prompt(
        self,
        message_list: Sequence[Message],
        system_prompt: str | None = None,
        prompt_speech: AudioSource | None = None,
    ) -> Tensor:
        turns: list[Speech | Reply] = []
        for message in message_list:
            role, content = prompt.role_of(message), message["content"]
            if role == "user":
                turns.append(self.speech(content))
            elif isinstance(content, Mapping) and {"text", "audio"} <= content.keys():
                turns.append(Reply(content["text"], self.speech(content["audio"]).codes))
            else:
                raise PromptError(
                    "an assistant's message needs content {'text': ..., 'audio': ...}"
                )
        return self._ids(
            prompt.spoken_dialogue_multiturn(turns, system_prompt, self._voice(prompt_speech))
        )

    def get_s2t_dialogue_sft_prompt(
        self, input_speech: AudioSource, thinking: bool = False
    ) -> Tensor:
        return self._ids(prompt.text_reply([("user", self.speech(input_speech))], thinking))

    def get_s2t_dialogue_sft_multiturn_prompt(
        self, message_list: Sequence[Message], thinking: bool = False
    ) -> Tensor:
        roles = [prompt.role_of(message) for message in message_list]
        contents = [
            self.speech(message["content"]) if role == "user" else prompt.text_of(message)
            for role, message in zip(roles, message_list, strict=True)
        ]
        return self._ids(prompt.text_reply(list(zip(roles, contents, strict=True)), thinking))

    def get_text_dialogue_sft_prompt(self, input_text: str, thinking: bool = False) -> Tensor:
        return self._ids(prompt.text_reply([("user", input_text)], thinking))

    def get_text_dialogue_sft_multiturn_prompt(
        self, message_list: Sequence[Message], thinking: bool = False
    ) -> Tensor:
        turns = [(prompt.role_of(message), prompt.text_of(message)) for message in message_list]
        return self._ids(prompt.text_reply(turns, thinking))

    def get_in_context_learning_s2s_prompt(
        self, instruction: str, prompt_examples: Sequence[Mapping[str, Any]], audio: AudioSource
    ) -> Tensor:
        for example in prompt_examples:
            missing = {"input_audio", "output_audio", "output_transcription"} - set(example)
            if missing:
                raise PromptError(f"an example needs {', '.join(sorted(missing))} as well")
        examples = [
            (
                self.speech(example["input_audio"]),
                Reply(example["output_transcription"], self.speech(example["output_audio"]).codes),
            )
            for example in prompt_examples
        ]
        return self._ids(prompt.in_context_s2s(instruction, examples, self.speech(audio)))

    def get_speech_continuation_prompt(self, audio: AudioSource) -> Tensor:
        return self._ids(prompt.continuation(self.speech(audio, closed=False)))

    def _spelled(self, text: str) -> str:
        words = spell(text)
        if not words:
            raise PromptError(
                f"there is no word to say in {text!r:.80}: this model knows words and numbers alone"
            )
        return " ".join(words)

    def _voice(self, audio: AudioSource | None) -> Speech | None:
        # Upstream takes an empty path for none.
        return (
            None if audio is None or (isinstance(audio, str) and not audio) else self.speech(audio)
        )
