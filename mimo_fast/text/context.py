"""What a prompt depends on besides the arguments of its task."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol

from mimo_fast.architectures import MIMO_AUDIO, Architecture
from mimo_fast.audio.files import AudioSource
from mimo_fast.errors import PromptError
from mimo_fast.text.prompt import Segments, Speech, UserText, Written

Arguments = ParamSpec("Arguments")

Audio = AudioSource | Speech
Message = Mapping[str, Any]
Template = int | str | None
"""A wording, its index in upstream's list, or None for one drawn at random."""


class Encode(Protocol):
    """Audio -> its codes; an open segment ends where the recording does, and is to be continued."""

    def __call__(self, audio: Audio, closed: bool = True) -> Speech: ...


def encoded_speech(audio: Audio, closed: bool = True) -> Speech:
    """`Encode` without a codec, for speech that is encoded already."""
    if not isinstance(audio, Speech):
        raise PromptError(f"encoding a {type(audio).__name__} needs a codec")
    return audio if closed else replace(audio, closed=False)


@dataclass(frozen=True)
class PromptContext:
    """What a prompt depends on besides the arguments of its task.

    Args:
        encode: audio -> codes.
        trained_words: the only words that the model can say, if it was trained on so few.
        seed: of the draw of a template; None draws from Python's `random`, as upstream does.
        continued: earlier turns precede, so instruction and voice are not repeated.
        special_tokens: special tokens that a caller writes in a text are tokens, as upstream's are,
            and not text.
        architecture: of the checkpoint, which decides what it can be asked.
    """

    encode: Encode = encoded_speech
    trained_words: frozenset[str] = frozenset()
    seed: int | None = None
    continued: bool = False
    special_tokens: bool = False
    architecture: Architecture = MIMO_AUDIO

    def text(self, typed: str) -> Written:
        """A caller's text. Raises PromptError where it is something else."""
        written = UserText(typed)
        return written.text if self.special_tokens else written

    def wording(self, templates: Sequence[str], template: Template) -> Written:
        """A template, see `choose_template`; a wording of the caller's own is a caller's text."""
        chosen = choose_template(templates, template, self.seed)
        return chosen if chosen in templates else self.text(chosen)

    def voice(self, audio: Audio | None) -> Speech | None:
        """Speech in the voice to use. Upstream takes an empty path for none."""
        if audio is None or (isinstance(audio, str) and not audio):
            return None
        return self.encode(audio)


def task_named(
    name: str,
) -> Callable[
    [Callable[Concatenate[PromptContext, Arguments], Segments]],
    Callable[Concatenate[PromptContext, Arguments], Segments],
]:
    """The function is the task of that name: it refuses a context whose architecture lacks it."""

    def named(
        task: Callable[Concatenate[PromptContext, Arguments], Segments],
    ) -> Callable[Concatenate[PromptContext, Arguments], Segments]:
        @wraps(task)
        def prompt(
            context: PromptContext, *arguments: Arguments.args, **named: Arguments.kwargs
        ) -> Segments:
            context.architecture.check_task(name)
            return task(context, *arguments, **named)

        return prompt

    return named


def choose_template(templates: Sequence[str], template: Template, seed: int | None) -> str:
    """A template by its text, by its index, or drawn: with a seed, or from Python's `random`.

    Raises:
        PromptError: there is no template of that index.
    """
    if template is None:
        return (random if seed is None else random.Random(seed)).choice(templates)
    if isinstance(template, str):
        return template
    last = len(templates) - 1
    if not -len(templates) <= template <= last:
        raise PromptError(f"there are {len(templates)} templates, 0 to {last}; not {template}")
    return templates[template]


def thoughts(thinking: bool) -> str:
    """How an answer in text begins: with thoughts, or without."""
    return "<think>\n" if thinking else "<think>\n\n</think>\n"
