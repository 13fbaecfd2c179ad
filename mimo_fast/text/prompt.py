"""Prompts: a task's segments, and segments -> ids [C + 1, T G].

Wording, segment boundaries (each is tokenized on its own) and templates are upstream's
(`MimoAudio.get_*_prompt`, `InputSegment`, `StreamingInputSegment`), because they are what the model
was tuned with.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimo_fast.config import LMConfig
from mimo_fast.errors import PromptError
from mimo_fast.text.templates import ASR_TEMPLATES, TTS_TEMPLATES
from mimo_fast.text.tokenizer import Tokenizer

TEXT_FILLER = -100
"""Channel 0 of the frames of a group after its first."""

REPLY_TEXT_TOKENS = 5
REPLY_PATCHES = 5
"""A spoken reply alternates so many text tokens with so many patches (upstream
`StreamingInputSegment`)."""

MAX_EXAMPLES = 16
"""In-context examples the report evaluates with (section 3.3)."""


@dataclass(frozen=True)
class Speech:
    """Codes [C, n G] between `<|sosp|>` and `<|eosp|>`; an open one lacks the end, to be
    continued."""

    codes: Tensor
    closed: bool = True


@dataclass(frozen=True)
class Reply:
    """A spoken reply, its text and codes [C, n G] interleaved between `<|sostm|>` and `<|eostm|>`.

    places: of each text token, ascending: the patch that it stands before. None: they alternate as
    upstream's do.
    """

    text: str
    codes: Tensor
    places: Sequence[int] | None = None


Segment = str | Speech | Reply
Segments = list[Segment]


def pack(segments: Iterable[Segment], tokenizer: Tokenizer, config: LMConfig) -> Tensor:
    """Segments -> ids [C + 1, T G] int64: a text token a group, or a patch under `<|empty|>`."""
    special = tokenizer.special
    parts = [torch.empty(config.channels + 1, 0, dtype=torch.int64)]

    def text(ids: Sequence[int]) -> None:
        codes = torch.tensor(config.empty_codes)[:, None].expand(-1, len(ids) * config.group_size)
        parts.append(_with_text(torch.tensor(ids, dtype=torch.int64), codes, config.group_size))

    def speech(codes: Tensor) -> None:
        patches = codes.shape[1] // config.group_size
        parts.append(_with_text(torch.full((patches,), special.empty), codes, config.group_size))

    for segment in segments:
        spoken = segment.text if isinstance(segment, Reply) else segment
        if not isinstance(spoken, str | Speech):
            raise PromptError(
                f"a prompt is made of text and speech, not of a {type(spoken).__name__}"
            )
        if isinstance(segment, str):
            text(tokenizer.encode(segment))
        elif isinstance(segment, Speech):
            _check_codes(segment.codes, config)
            text([special.sosp])
            speech(segment.codes)
            if segment.closed:
                text([special.eosp])
        else:
            _check_codes(segment.codes, config)
            text([special.sostm])
            for ids, codes in _interleaved(
                segment, tokenizer.encode(segment.text), special.eot, config.group_size
            ):
                text(ids)
                speech(codes)
            text([special.eostm])
    return torch.cat(parts, dim=1)


def _interleaved(
    reply: Reply, ids: list[int], end: int, group_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The reply's text tokens and patches in turn; the end of the text follows its last token."""
    if reply.places is None:
        texts = [
            ids[i : i + REPLY_TEXT_TOKENS] for i in range(0, max(len(ids), 1), REPLY_TEXT_TOKENS)
        ]
        texts[-1] = [*texts[-1], end]
        size = REPLY_PATCHES * group_size
    else:
        count, size = reply.codes.shape[1] // group_size, group_size
        last = reply.places[-1] if reply.places else 0
        placed = [*zip([*reply.places, last], [*ids, end], strict=True)]
        texts = [[token for place, token in placed if place == i] for i in range(count)]
    for i in range(max(len(texts), -(-reply.codes.shape[1] // size))):
        yield texts[i] if i < len(texts) else [], reply.codes[:, i * size : (i + 1) * size]


def _with_text(ids: Tensor, codes: Tensor, group_size: int) -> Tensor:
    channel = torch.full((len(ids), group_size), TEXT_FILLER, dtype=torch.int64)
    channel[:, 0] = ids
    return torch.cat((channel.view(1, -1), codes.to("cpu", torch.int64)))


def whole_patches(codes: Tensor, group_size: int, closed: bool = True) -> Tensor:
    """Codes [C, T] -> [C, n G]: the last frame is repeated; where speech stays open, the rest of a
    patch is cut off."""
    extra = codes.shape[1] % group_size
    if extra and closed:
        return torch.cat((codes, codes[:, -1:].expand(-1, group_size - extra)), dim=1)
    return codes[:, :-extra] if extra else codes


def _check_codes(codes: Tensor, config: LMConfig) -> None:
    if codes.ndim != 2 or codes.shape[0] != config.channels or codes.shape[1] % config.group_size:
        raise PromptError(
            f"codes must be [{config.channels}, a multiple of {config.group_size}], not {list(codes.shape)}; "
            "use MimoAudio.speech() or preprocess_input() to make them"
        )


def capitalize(text: str) -> str:
    """Text all in one case is capitalized, as the model was tuned (upstream `preprocess_input`)."""
    return text.capitalize() if text.isupper() or text.islower() else text


def choose_template(templates: Sequence[str], template: int | str | None, seed: int | None) -> str:
    """A template by its text, by its index, or drawn with a seed."""
    if isinstance(template, str):
        return template
    if template is not None:
        if not -len(templates) <= template < len(templates):
            raise PromptError(
                f"there are {len(templates)} templates, 0 to {len(templates) - 1}; not {template}"
            )
        return templates[template]
    return random.Random(seed).choice(templates)


def _think(thinking: bool) -> str:
    return "<think>\n" if thinking else "<think>\n\n</think>\n"


def asr(speech: Speech, template: int | str | None = None, seed: int | None = None) -> Segments:
    """Transcribe (upstream `get_asr_sft_prompt`)."""
    words = choose_template(ASR_TEMPLATES, template, seed)
    return [
        "<|im_start|>user\n",
        speech,
        words,
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        _think(False),
    ]


def tts(
    text: str,
    instruct: str | None = None,
    read_text_only: bool = True,
    voice: Speech | None = None,
    template: int | str | None = None,
    seed: int | None = None,
) -> Segments:
    """Speak (upstream `get_tts_sft_prompt`): plain; with a style instruction; or one natural
    sentence that holds both.

    As upstream, a voice is used only together with an instruction or with read_text_only=False.
    """
    if not isinstance(text, str):
        raise PromptError(f"what to say must be text, not a {type(text).__name__}")
    language = "zh" if re.search("[\u4e00-\u9fff]", text) else "en"
    request = capitalize(text)
    if read_text_only:
        request = f"{choose_template(TTS_TEMPLATES[language], template, seed)}: {request}"
        if instruct is None:
            return [f"<|im_start|>user\n{request}<|im_end|>\n", "<|im_start|>assistant\n<|sostm|>"]
        request += f"({instruct})"
    if voice is None:
        system: Segments = ["你需要根据指定的风格指令和文本内容来生成语音。"]
    else:
        system = [
            "你需要根据指定的风格指令和文本内容来生成和语音prompt具有相同音色的语音。你的音色应该是：",
            voice,
        ]
    turn = [f"<|im_start|>user\n{request}<|im_end|>\n", "<|im_start|>assistant\n<think>\n"]
    return ["<|im_start|>system\n", *system, "<|im_end|>\n", *turn]


def audio_understanding(speech: Speech, text: str, thinking: bool = False) -> Segments:
    """A question about a recording (upstream `get_audio_understanding_sft_prompt`)."""
    return [
        "<|im_start|>user\n",
        speech,
        text,
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        _think(thinking),
    ]


def voice_system(voice: Speech | None) -> Segments:
    """The system turn that sets the voice of a dialogue; nothing without one."""
    return (
        []
        if voice is None
        else ["<|im_start|>system\n", "Your voice should be:", voice, "<|im_end|>\n"]
    )


def spoken_dialogue(
    speech: Speech, system_prompt: str | None = None, voice: Speech | None = None
) -> Segments:
    """First turn of a spoken dialogue; with neither option a later one (upstream
    `get_spoken_dialogue_sft_prompt`)."""
    instruction: Segments = [system_prompt, "\n\n"] if system_prompt else []
    user: Segments = ["<|im_start|>user\n", *instruction, speech, "<|im_end|>\n"]
    return [*voice_system(voice), *user, "<|im_start|>assistant\n<|sostm|>"]


def spoken_dialogue_multiturn(
    turns: Sequence[Speech | Reply], system_prompt: str | None = None, voice: Speech | None = None
) -> Segments:
    """User speech and assistant replies so far (upstream
    `get_spoken_dialogue_sft_multiturn_prompt`)."""
    segments = voice_system(voice)
    for i, turn in enumerate(turns):
        if isinstance(turn, Reply):
            segments += ["<|im_start|>assistant\n", turn, "<|im_end|>\n"]
        else:
            instruction: Segments = [system_prompt, "\n\n"] if system_prompt and i == 0 else []
            segments += ["<|im_start|>user\n", *instruction, turn, "<|im_end|>\n"]
    return [*segments, "<|im_start|>assistant\n<|sostm|>"]


def text_reply(turns: Sequence[tuple[str, str | Speech]], thinking: bool = False) -> Segments:
    """Turns (role, text or speech) answered in text (upstream's speech2text and text dialogues, of
    any length)."""
    segments: Segments = []
    for role, content in turns:
        segments += [f"<|im_start|>{role}\n", content, "<|im_end|>\n"]
    return [*segments, "<|im_start|>assistant\n", _think(thinking)]


def in_context_s2s(
    instruction: str, examples: Sequence[tuple[Speech, Reply]], speech: Speech
) -> Segments:
    """Few-shot speech to speech on the base model (upstream
    `get_in_context_learning_s2s_prompt`)."""
    if len(examples) > MAX_EXAMPLES:
        raise PromptError(f"at most {MAX_EXAMPLES} examples are supported, not {len(examples)}")
    segments: Segments = [f"[Int]:{instruction}\n"]
    for source, target in examples:
        segments += [source, "\n", target, " \n\n"]
    return [*segments, speech, "\n", "<|sostm|>"]


def continuation(speech: Speech) -> Segments:
    """Speech to be carried on by the base model: an open segment (report, section 3.3.2)."""
    return [Speech(speech.codes, closed=False)]


def role_of(message: Any) -> str:
    """The role of a message, 'user' or 'assistant'.

    Raises:
        PromptError: the message lacks a role or content, or has another role.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("user", "assistant") or "content" not in message:
        shown = repr(message)
        raise PromptError(
            f"a message needs a role ('user' or 'assistant') and content, not {shown:.120}"
        )
    return str(role)


def text_of(message: Mapping[str, Any]) -> str:
    """The content of a message that must be text.

    Raises:
        PromptError: it is something else.
    """
    content = message["content"]
    if not isinstance(content, str):
        raise PromptError(
            f"the content of this {message['role']} message must be text, not a {type(content).__name__}"
        )
    return content
