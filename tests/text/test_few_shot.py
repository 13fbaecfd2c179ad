"""Prompts of MiMo-Audio-Eval's tasks: their ids, made here by hand from the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dialogues import GROUP, arguments
from helpers import raising
from torch import Tensor

from mimo_fast import MimoAudio, PromptError
from mimo_fast.sampling import TASK_SAMPLERS
from mimo_fast.text import few_shot, tasks
from mimo_fast.text.context import PromptContext
from mimo_fast.text.few_shot import few_shots_qa, gen_speech, gen_text
from mimo_fast.text.prompt import Segments, Speech, UserText
from mimo_fast.text.tasks import TASKS, instruction_following

PROMPT = PromptContext()
THINK_FIRST = "You can think about the question briefly and then answer it."


def speech(first: int, patches: int) -> Speech:
    codes = torch.arange(first, first + patches * GROUP).expand(8, -1)
    return Speech(codes.clone())


HEARD, ANSWERED = speech(1, 2), speech(20, 3)


def by_hand(model: MimoAudio, parts: Sequence[str | Tensor | int]) -> Tensor:
    """Ids [C + 1, T G]: of a text its tokens, of codes their patches, of an id itself."""
    columns = list[Tensor]()
    empty = torch.tensor(model.lm.config.empty_codes)[:, None].expand(-1, GROUP)

    def group(token: int, codes: Tensor) -> None:
        channel = torch.full((1, GROUP), -100)
        channel[0, 0] = token
        columns.append(torch.cat((channel, codes)))

    for part in parts:
        if isinstance(part, Tensor):
            for i in range(0, part.shape[1], GROUP):
                group(model.empty_token, part[:, i : i + GROUP])
        else:
            for token in [part] if isinstance(part, int) else model.tokenizer.encode(part):
                group(token, empty)
    return torch.cat(columns, dim=1)


def heard(model: MimoAudio, recording: Speech) -> list[Tensor | int]:
    return [model.sosp_idx, recording.codes, model.eosp_idx]


def ids_of(model: MimoAudio, segments: Segments) -> Tensor:
    return model.pack(segments)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("text", ["<sound>Who?", "Listen.<sound>", "This:<sound> Who?"])
def test_an_instruction_about_a_recording(model, text, thinking):
    left, right = text.split("<sound>")
    asked = [THINK_FIRST] if thinking else []
    answer = "<think>\n" if thinking else "<think>\n\n</think>\n"
    want = [
        *("<|im_start|>user\n", left, *heard(model, HEARD), right, *asked),
        *("<|im_end|>\n", "<|im_start|>assistant\n", answer),
    ]
    found = ids_of(model, instruction_following(PROMPT, text, HEARD, thinking))
    assert torch.equal(found, by_hand(model, want))


def test_an_instruction_about_several_recordings(model):
    text = "The 1th: <sound>\nThe 2th: <sound>\nWhich?"
    want = [
        *("<|im_start|>user\n", "The 1th: ", *heard(model, HEARD), "\nThe 2th: "),
        *(*heard(model, ANSWERED), "\nWhich?", "<|im_end|>\n", "<|im_start|>assistant\n"),
        "<think>\n\n</think>\n",
    ]
    found = ids_of(model, instruction_following(PROMPT, text, [HEARD, ANSWERED]))
    assert torch.equal(found, by_hand(model, want))


@pytest.mark.parametrize("places", [0, 2])
def test_each_recording_has_one_place(places):
    with pytest.raises(PromptError, match=rf"has {places} places of <sound> for 1 recordings"):
        instruction_following(PROMPT, "<sound>" * places + "Who?", HEARD)


def test_thoughts_are_asked_for_in_a_segment_of_their_own():
    """Joined to the question they would have other tokens in the published vocabulary."""
    found = instruction_following(PROMPT, "<sound>Listed choices.", HEARD, True)
    assert found[1:4] == [HEARD, UserText("Listed choices."), THINK_FIRST]


def test_questions_by_example(model):
    examples = [
        {"audio": ANSWERED, "question": "Who?", "answer": "A fox."},
        {"audio": HEARD, "question": "", "answer": "unused"},
        {"audio": HEARD, "question": "What?"},
    ]
    want = [
        *("[Int]:", *heard(model, ANSWERED), "Question: Who?", "Answer: A fox.\n\n"),
        *(*heard(model, HEARD), *heard(model, HEARD), "Question: What?", "\nAnswer:"),
    ]
    assert torch.equal(ids_of(model, few_shots_qa(PROMPT, examples)), by_hand(model, want))


def test_a_question_without_an_example_is_the_last_one_alone(model):
    found = ids_of(model, few_shots_qa(PROMPT, [{"audio": HEARD, "question": "What?"}]))
    want = ["[Int]:", *heard(model, HEARD), "Question: What?", "\nAnswer:"]
    assert torch.equal(found, by_hand(model, want))


def said(model: MimoAudio, text: str, codes: Tensor) -> list[Any]:
    """A spoken reply: five tokens, five patches in turn; the end of text after the last token."""
    tokens, parts = model.tokenizer.encode(text), list[Any]()
    texts = [tokens[i : i + 5] for i in range(0, len(tokens), 5)]
    texts[-1] = [*texts[-1], model.eot_idx]
    patches = [codes[:, i : i + 5 * GROUP] for i in range(0, codes.shape[1], 5 * GROUP)]
    for i in range(max(len(texts), len(patches))):
        parts += texts[i] if i < len(texts) else []
        parts += [patches[i]] if i < len(patches) else []
    return [model.sostm_idx, *parts, model.eostm_idx]


BEGUN = "Questions about birds."
ANSWER = "The answer is option B, as the third bird cannot fly."


@pytest.mark.parametrize("task", [gen_text, gen_speech])
@pytest.mark.parametrize("mode", ["s2s", "s2t", "t2s", "t2t"])
def test_questions_and_answers_in_text_or_speech(model, mode, task: Callable[..., Segments]):
    """The four modes of SpeechMMLU: begin, a question, its answer, the question to answer."""
    spoken, long = speech(30, 3), speech(50, 12)
    question = {"speech": HEARD} if mode[0] == "s" else {"text": "Which bird?"}
    begin = {"speech": spoken} if mode[0] == "s" else {"text": BEGUN}
    answer = {"text": ANSWER, "speech": long} if mode[2] == "s" else {"text": ANSWER}
    if mode[0] == "s":
        opened, asked = heard(model, spoken), heard(model, HEARD)
    else:
        opened, asked = [BEGUN], ["Which bird?"]
    replied = said(model, ANSWER, long.codes) if mode[2] == "s" else [ANSWER]
    beginning = {"s2s": ["<Spe>:"], "t2t": []}.get(mode, ["[Int]:"])
    want = [*beginning, *opened, *asked, *replied, *asked]
    want += [model.sostm_idx] if task is gen_speech else []
    found = ids_of(model, task(PROMPT, [begin, question, answer, question]))
    assert torch.equal(found, by_hand(model, want))


def test_examples_without_an_instruction(model):
    """MiMo-Audio-Eval's prompts have none, nor the end of line after it."""
    example = {"input_audio": HEARD, "output_audio": ANSWERED, "output_transcription": "A fox."}
    found = ids_of(model, tasks.in_context_learning_s2s(PROMPT, None, [example], HEARD))
    want = [
        *("[Int]:", *heard(model, HEARD), "\n", *said(model, "A fox.", ANSWERED.codes), " \n\n"),
        *(*heard(model, HEARD), "\n", model.sostm_idx),
    ]
    assert torch.equal(found, by_hand(model, want))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: few_shots_qa(PROMPT, []), "needs a question"),
        (lambda: few_shots_qa(PROMPT, [{"audio": HEARD}]), "an example needs question as well"),
        (
            lambda: few_shots_qa(PROMPT, [{"audio": HEARD, "question": "?"}] * 2),
            "an example needs answer as well",
        ),
        (lambda: gen_text(PROMPT, []), "nothing to carry on with"),
        (lambda: gen_speech(PROMPT, [{"words": "?"}]), "an example needs text as well"),
    ],
)
def test_what_is_missing_is_named(call, problem):
    with pytest.raises(PromptError, match=problem):
        call()


TASKS_OF = {
    "instruction_following": ("audio_understanding", {"eos", "im_end"}, 0.3),
    "few_shots_qa": ("qa", {"eos", "sosp"}, None),
    "gen_text": ("mmlu", {"eos"}, None),
    "gen_speech": ("mmlu", {"eos", "eostm"}, None),
}


@pytest.mark.parametrize("name", TASKS_OF)
def test_samplers_and_ends_are_the_evaluations(model, name):
    """`task_sampler_configs` and the stoppers of `MimoAudioModel`; the base model is greedy."""
    sampler, ends, temperature = TASKS_OF[name]
    task, special = TASKS[name], model.tokenizer.special
    assert (task.sampler, set(task.stops)) == (sampler, ends)
    assert task.stop_ids(special) == {getattr(special, each) for each in ends}
    text, codes = TASK_SAMPLERS[sampler]["global"], TASK_SAMPLERS[sampler]["local"]
    assert (text.temperature if text.do_sample else None) == temperature
    assert (codes.do_sample, codes.temperature, codes.top_p) == (True, 0.9, 0.95)


@pytest.mark.parametrize("name", TASKS_OF)
def test_a_reply_streams_and_is_of_its_seed(model, audio, name):
    own, limits = copy.copy(model), {"seed": 3, "max_new_tokens": 12, "min_new_tokens": 12}
    replies = []
    for _ in range(2):
        chunks = list(own.stream(name, *arguments(name, audio), **limits))
        samples = torch.cat([chunk.audio for chunk in chunks])
        replies.append(("".join(chunk.text for chunk in chunks), samples.tolist()))
    assert replies[0] == replies[1]
    assert chunks[-1].timing.groups == 12
    assert bool(replies[0][1]) == TASKS[name].speaks


def test_an_architecture_without_the_tasks_refuses_them(model, monkeypatch):
    class Deaf:
        check_task = staticmethod(raising(PromptError, "not this one"))

    context = PromptContext(architecture=Deaf())  # type: ignore[arg-type]
    for task in (instruction_following, few_shot.few_shots_qa, gen_text, gen_speech):
        with pytest.raises(PromptError, match="not this one"):
            task(context, "x", HEARD) if task is instruction_following else task(context, [])
