"""Upstream's tasks, one function each: arguments -> the segments of the prompt.

Wording, segment boundaries (each is tokenized on its own) and templates are upstream's
(`MimoAudio.get_*_prompt`), because the model was tuned with them; so are the names of the
arguments. `TASKS` adds how a task's reply is decoded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

from mimo_fast.architectures import Architecture
from mimo_fast.errors import PromptError
from mimo_fast.json_files import cut, shown
from mimo_fast.text.context import (
    Audio,
    Message,
    PromptContext,
    Template,
    task_named,
    thoughts,
)
from mimo_fast.text.few_shot import few_shots_qa, gen_speech, gen_text, in_context_learning_s2s
from mimo_fast.text.prompt import Joined, Segment, Segments, Speech, SpokenReply, Written
from mimo_fast.text.spelling import spell
from mimo_fast.text.templates import ASR_TEMPLATES, ASR_TEMPLATES_IN, TTS_TEMPLATES
from mimo_fast.text.tokenizer import SpecialIds

VOICE_IS = "Your voice should be:", "你的音色应该是："
"""What precedes a voice prompt, in dialogues and for texts."""

THINK_FIRST = "You can think about the question briefly and then answer it."
"""How MiMo-Audio-Eval asks for thoughts."""

SOUND = "<sound>"
"""Where a recording stands in the text of `instruction_following`."""


def asr_templates(architecture: Architecture, audio_tag: str) -> Sequence[str]:
    """Wordings of a request with a tag: those in its language, or all without one.

    Raises:
        PromptError: the architecture has no such tag.
    """
    language = architecture.language_of(audio_tag)
    return ASR_TEMPLATES if language is None else ASR_TEMPLATES_IN[language]


@task_named("asr_sft")
def asr(
    context: PromptContext, input: Audio, audio_tag: str = "", template: Template = None
) -> Segments:
    """Transcribe a recording.

    audio_tag: of the language that is spoken, where the architecture has tags; "" for any.
    """
    templates = asr_templates(context.architecture, audio_tag)
    speech = context.encode(input)
    words = context.wording(templates, template)
    return [*_user(speech, words), "<|im_start|>assistant\n", f"{thoughts(False)}{audio_tag}"]


@task_named("tts_sft")
def tts(
    context: PromptContext,
    input: str,
    instruct: str | None = None,
    read_text_only: bool = True,
    prompt_speech: Audio | None = None,
    template: Template = None,
) -> Segments:
    """Say a text: plain, with a style instruction, or as one sentence that holds both.

    As upstream, a voice is used only together with an instruction or with read_text_only=False.
    """
    voice = context.voice(prompt_speech)
    if not isinstance(input, str):
        raise PromptError(f"what to say must be text, not a {type(input).__name__}")
    if read_text_only and context.trained_words:
        input = _spelled(input)
    language = "zh" if re.search("[\u4e00-\u9fff]", input) else "en"
    request = [context.text(capitalize(input))]
    if read_text_only:
        request = [context.wording(TTS_TEMPLATES[language], template), ": ", *request]
        if instruct is None:
            return [_asked(*request), "<|im_start|>assistant\n<|sostm|>"]
        request += ["(", context.text(instruct), ")"]
    system: Segments = ["你需要根据指定的风格指令和文本内容来生成语音。"]
    if voice is not None:
        style = "你需要根据指定的风格指令和文本内容来生成和语音prompt具有相同音色的语音。"
        system = [f"{style}{VOICE_IS[1]}", voice]
    turn = _asked(*request), "<|im_start|>assistant\n<think>\n"
    return ["<|im_start|>system\n", *system, "<|im_end|>\n", *turn]


@task_named("audio_understanding_sft")
def audio_understanding(
    context: PromptContext, input_speech: Audio, input_text: str, thinking: bool = False
) -> Segments:
    """Answer a question about a recording, in text."""
    speech = context.encode(input_speech)
    question = context.text(input_text)
    return [*_user(speech, question), "<|im_start|>assistant\n", thoughts(thinking)]


@task_named("instruction_following")
def instruction_following(
    context: PromptContext,
    input_text: str,
    input_speech: Audio | Sequence[Audio],
    thinking: bool = False,
) -> Segments:
    """Answer a question about recordings, in text, as MiMo-Audio-Eval asks it.

    Args:
        input_text: has "<sound>" where each recording belongs, a part of the text a segment.
        thinking: to be thought about first, which a segment of its own asks for.

    Source: MiMo-Audio-Eval, `format_instruction_template`.
    """
    one = isinstance(input_speech, str | bytes) or not isinstance(input_speech, Sequence)
    recordings = [cast(Audio, input_speech)] if one else cast(Sequence[Audio], input_speech)
    parts = input_text.split(SOUND)
    if len(parts) != len(recordings) + 1:
        found = f"{len(parts) - 1} places of {SOUND} for {len(recordings)} recordings"
        raise PromptError(f"the text has {found}: write one for each")
    contents = list[Written | Speech]()
    for i, part in enumerate(parts):
        contents += [context.text(part)] if part else []
        contents += [context.encode(recordings[i])] if i < len(recordings) else []
    return text_reply([("user", [*contents, *([THINK_FIRST] if thinking else [])])], thinking)


@task_named("spoken_dialogue_sft")
def spoken_dialogue(
    context: PromptContext,
    input_speech: Audio,
    system_prompt: str | None = None,
    prompt_speech: Audio | None = None,
) -> Segments:
    """Answer speech with speech: a first turn or, with neither option, a later one."""
    if context.continued:
        system_prompt, prompt_speech = None, None
    speech, voice = context.encode(input_speech), context.voice(prompt_speech)
    user = _user(*_instruction(context, system_prompt), speech)
    return [*voice_system(voice), *user, "<|im_start|>assistant\n<|sostm|>"]


@task_named("spoken_dialogue_sft_multiturn")
def spoken_dialogue_multiturn(
    context: PromptContext,
    message_list: Sequence[Message],
    system_prompt: str | None = None,
    prompt_speech: Audio | None = None,
) -> Segments:
    """Answer the last turn of a spoken dialogue with speech.

    A user's content is audio, an assistant's {"text": ..., "audio": ...}.
    """
    turns: Segments = []
    for i, message in enumerate(message_list):
        role, content = role_of(message), message["content"]
        if role == "user":
            instruction = _instruction(context, None if i else system_prompt)
            turns += _user(*instruction, context.encode(content))
        elif isinstance(content, Mapping) and {"text", "audio"} <= content.keys():
            codes = context.encode(content["audio"]).codes
            reply = SpokenReply(context.text(content["text"]), codes)
            turns += ["<|im_start|>assistant\n", reply, "<|im_end|>\n"]
        else:
            raise PromptError("an assistant's message needs content {'text': ..., 'audio': ...}")
    voice = voice_system(context.voice(prompt_speech))
    return [*voice, *turns, "<|im_start|>assistant\n<|sostm|>"]


@task_named("speech2text_dialogue_sft")
def speech2text_dialogue(
    context: PromptContext, input_speech: Audio, thinking: bool = False
) -> Segments:
    """Answer speech in text."""
    return text_reply([("user", [context.encode(input_speech)])], thinking)


@task_named("speech2text_dialogue_sft_multiturn")
def speech2text_dialogue_multiturn(
    context: PromptContext, message_list: Sequence[Message], thinking: bool = False
) -> Segments:
    """Answer the last turn in text; users' contents are audio, assistants' text."""
    turns = list[tuple[str, Sequence[Written | Speech]]]()
    for role, message in ((role_of(message), message) for message in message_list):
        if role == "user":
            turns.append((role, [context.encode(message["content"])]))
        else:
            turns.append((role, [context.text(text_of(message))]))
    return text_reply(turns, thinking)


@task_named("text_dialogue_sft")
def text_dialogue(context: PromptContext, input_text: str, thinking: bool = False) -> Segments:
    """Answer text in text."""
    return text_reply([("user", [context.text(input_text)])], thinking)


@task_named("text_dialogue_sft_multiturn")
def text_dialogue_multiturn(
    context: PromptContext, message_list: Sequence[Message], thinking: bool = False
) -> Segments:
    """Answer the last turn in text; all contents are text."""
    turns = [(role_of(message), [context.text(text_of(message))]) for message in message_list]
    return text_reply(turns, thinking)


@task_named("speech_continuation")
def speech_continuation(context: PromptContext, audio: Audio) -> Segments:
    """Carry a recording on, with the base model: an open segment (report, section 3.3.2)."""
    return [context.encode(audio, closed=False)]


@dataclass(frozen=True)
class Task:
    """One of upstream's tasks.

    Args:
        prompt: (context, its arguments) -> segments.
        sampler: key of `TASK_SAMPLERS`; any other means upstream's default samplers.
        stops: the special tokens that end its reply.
        speaks: whether the reply has audio.
    """

    prompt: Callable[..., Segments]
    sampler: str
    stops: tuple[str, ...]
    speaks: bool

    def stop_ids(self, special: SpecialIds) -> frozenset[int]:
        return frozenset(getattr(special, name) for name in self.stops)


_in_text = partial(Task, stops=("eos", "im_end"), speaks=False)
_in_speech = partial(Task, stops=("eos", "eostm", "im_end"), speaks=True)

TASKS: dict[str, Task] = {
    "asr_sft": _in_text(asr, "asr"),
    "tts_sft": _in_speech(tts, "tts"),
    "audio_understanding_sft": _in_text(audio_understanding, "audio_understanding"),
    "spoken_dialogue_sft": _in_speech(spoken_dialogue, "spoken_dialogue"),
    "spoken_dialogue_sft_multiturn": _in_speech(spoken_dialogue_multiturn, "spoken_dialogue"),
    "speech2text_dialogue_sft": _in_text(speech2text_dialogue, "spoken_dialogue"),
    "speech2text_dialogue_sft_multiturn": _in_text(
        speech2text_dialogue_multiturn, "spoken_dialogue"
    ),
    "text_dialogue_sft": _in_text(text_dialogue, "text_chat"),
    "text_dialogue_sft_multiturn": _in_text(text_dialogue_multiturn, "text_chat"),
    "instruction_following": _in_text(instruction_following, "audio_understanding"),
    "few_shots_qa": Task(few_shots_qa, "qa", ("eos", "sosp"), speaks=False),
    "gen_text": Task(gen_text, "mmlu", ("eos",), speaks=False),
    "gen_speech": Task(gen_speech, "mmlu", ("eos", "eostm"), speaks=True),
    "in_context_learning_s2s": Task(
        in_context_learning_s2s, "in_context_learning_s2s", ("eos", "eostm"), speaks=True
    ),
    "speech_continuation": Task(
        speech_continuation, "speech_continuation", ("eos", "eosp"), speaks=True
    ),
}
"""Task by the name of upstream's method; of MiMo-Audio-Eval's, for which `MimoAudio` has none."""


def find_task(name: str) -> Task:
    """A task by upstream's name, or by the same without `_sft`.

    Raises:
        ValueError: no such task; the message lists them.
    """
    for known in (name, f"{name}_sft", name.replace("_multiturn", "_sft_multiturn")):
        if known in TASKS:
            return TASKS[known]
    raise ValueError(f"no task {cut(shown(name), 80)}; there are {', '.join(TASKS)}")


def voice_system(voice: Speech | None) -> Segments:
    """The system turn that sets the voice of a dialogue; nothing without one."""
    if voice is None:
        return []
    return ["<|im_start|>system\n", VOICE_IS[0], voice, "<|im_end|>\n"]


def voice_of(segments: Segments) -> Speech | None:
    """The speech of a prompt in whose voice the reply is to be: a voice prompt, or to carry on."""
    last = segments[-1] if segments else None
    if isinstance(last, Speech) and not last.closed:
        return last
    for text, speech in pairwise(segments):
        if isinstance(text, str) and text.endswith(VOICE_IS) and isinstance(speech, Speech):
            return speech
    return None


def capitalize(text: str) -> str:
    """Text all in one case is capitalized, as the model was tuned (upstream `preprocess_input`)."""
    return text.capitalize() if text.isupper() or text.islower() else text


def role_of(message: Any) -> str:
    """The role of a message, "user" or "assistant"; PromptError where it lacks role or content."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("user", "assistant") or "content" not in message:
        expected = "a role ('user' or 'assistant') and content"
        raise PromptError(f"a message needs {expected}, not {shown(message)}")
    return str(role)


def text_of(message: Message) -> str:
    """The content of a message that must be text; PromptError where it is something else."""
    content, kind = message["content"], type(message["content"]).__name__
    if not isinstance(content, str):
        raise PromptError(
            f"the content of this {message['role']} message must be text, not a {kind}"
        )
    return content


def _user(*content: Written | Speech) -> Segments:
    return ["<|im_start|>user\n", *content, "<|im_end|>\n"]


def _asked(*request: Written) -> Segment:
    """A user's turn that is tokenized as one text."""
    return Joined(["<|im_start|>user\n", *request, "<|im_end|>\n"])


def _instruction(context: PromptContext, system_prompt: str | None) -> list[Written]:
    return [context.text(system_prompt), "\n\n"] if system_prompt else []


def text_reply(
    turns: Sequence[tuple[str, Sequence[Written | Speech]]], thinking: bool = False
) -> Segments:
    """Turns (role, texts and speech) answered in text: upstream's dialogues in text, mixed."""
    segments: Segments = []
    for role, contents in turns:
        segments += [f"<|im_start|>{role}\n", *contents, "<|im_end|>\n"]
    return [*segments, "<|im_start|>assistant\n", thoughts(thinking)]


def _spelled(text: str) -> str:
    words = spell(text)
    if not words:
        problem = f"there is no word to say in {shown(text)}"
        raise PromptError(f"{problem}: this model knows words and numbers alone")
    return " ".join(words)
