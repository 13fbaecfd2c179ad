"""Tasks of the base model, which examples in the prompt show: arguments -> segments.

Segments, wording and the names of arguments are those of MiMo-Audio-Eval (`MimoAudioModel`), by
which the report's sections 3.3 and 3.4 evaluate, and upstream's where it has the task.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mimo_fast.errors import PromptError
from mimo_fast.text.context import Audio, PromptContext, task_named
from mimo_fast.text.prompt import Joined, Segments, Speech, SpokenReply

BEGINNING = "[Int]:"
"""How a prompt of text and speech begins."""

SPEECH_ALONE = "<Spe>:"
"""How a prompt of speech alone begins."""

MAX_EXAMPLES = 16
"""Number of in-context examples that the report evaluates with (section 3.3)."""


@task_named("few_shots_qa")
def few_shots_qa(context: PromptContext, examples: Sequence[Mapping[str, Any]]) -> Segments:
    """Answer a question about a recording, as the questions before it are answered.

    Args:
        examples: have audio, question and answer; the last one is to be answered and has none. Of
            an example whose question is "" there is the recording alone.

    Source: MiMo-Audio-Eval, `few_shots_qa`; with one example, `get_qa_prompt`.
    """
    if not examples:
        raise PromptError("few_shots_qa needs a question: examples is empty")
    *shown, asked = examples
    for example in shown:
        check_keys(example, ("audio", "question", "answer"))
    check_keys(asked, ("audio", "question"))
    segments: Segments = [BEGINNING]
    for example in shown:
        segments += [context.encode(example["audio"])]
        if example["question"] != "":
            segments += [
                Joined(["Question: ", context.text(example["question"])]),
                Joined(["Answer: ", context.text(example["answer"]), "\n\n"]),
            ]
    question = Joined(["Question: ", context.text(asked["question"])])
    return [*segments, context.encode(asked["audio"]), question, "\nAnswer:"]


@task_named("gen_text")
def gen_text(context: PromptContext, prompts: Sequence[Mapping[str, Any]]) -> Segments:
    """Carry on with text: questions and answers, of which the last answer is missing.

    Args:
        prompts: parts of the prompt in turn: {"text": ...}, {"speech": ...}, or both for an answer
            that is spoken.

    Source: MiMo-Audio-Eval, `get_few_shot_prompts`.
    """
    if not prompts:
        raise PromptError("there is nothing to carry on with: prompts is empty")
    spoken = ["speech" in part for part in prompts]
    segments: Segments = [BEGINNING if not all(spoken) else SPEECH_ALONE] if any(spoken) else []
    for part in prompts:
        if "speech" not in part:
            check_keys(part, ("text",))
            segments += [context.text(part["text"])]
        elif "text" not in part:
            segments += [context.encode(part["speech"])]
        else:
            speech = context.encode(part["speech"])
            segments += [SpokenReply(context.text(part["text"]), speech.codes)]
    return segments


@task_named("gen_speech")
def gen_speech(context: PromptContext, prompts: Sequence[Mapping[str, Any]]) -> Segments:
    """`gen_text` that carries on with speech."""
    return [*gen_text(context, prompts), "<|sostm|>"]


def check_keys(example: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises PromptError where an example lacks one of these."""
    if missing := set(names) - set(example):
        raise PromptError(f"an example needs {', '.join(sorted(missing))} as well")


@task_named("in_context_learning_s2s")
def in_context_learning_s2s(
    context: PromptContext,
    instruction: str | None,
    prompt_examples: Sequence[Mapping[str, Any]],
    audio: Audio,
) -> Segments:
    """Speech to speech by example, on the base model.

    Args:
        instruction: what the examples show; None asks without one, as MiMo-Audio-Eval does.
        prompt_examples: have input_audio, output_audio and output_transcription.
    """
    shown = shown_examples(context, instruction, prompt_examples)
    return [*shown, *done_likewise(context.encode(audio))]


def shown_examples(
    context: PromptContext, instruction: str | None, prompt_examples: Sequence[Mapping[str, Any]]
) -> Segments:
    """The beginning of `in_context_learning_s2s`, which requests by the same examples share."""
    for example in prompt_examples:
        check_keys(example, ("input_audio", "output_audio", "output_transcription"))
    if len(prompt_examples) > MAX_EXAMPLES:
        found = len(prompt_examples)
        raise PromptError(f"at most {MAX_EXAMPLES} examples are supported, not {found}")
    named = [] if instruction is None else [context.text(instruction), "\n"]
    segments: Segments = [Joined([BEGINNING, *named])]
    for example in prompt_examples:
        source, target = (context.encode(example[key]) for key in ("input_audio", "output_audio"))
        reply = SpokenReply(context.text(example["output_transcription"]), target.codes)
        segments += [source, "\n", reply, " \n\n"]
    return segments


def done_likewise(speech: Speech) -> Segments:
    """The end of `in_context_learning_s2s`: what is to be done as the examples show."""
    return [speech, "\n", "<|sostm|>"]
