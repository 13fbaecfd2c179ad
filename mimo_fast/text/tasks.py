"""What distinguishes upstream's tasks: prompt, sampler preset, stop tokens, whether the reply is
spoken."""

from dataclasses import dataclass

from mimo_fast.text.tokenizer import SpecialIds


@dataclass(frozen=True)
class Task:
    """One task of upstream's `MimoAudio`.

    Args:
        prompt: name of the method that builds its prompt.
        sampler: key of `TASK_SAMPLERS`; any other means upstream's default samplers.
        stops: the special tokens that end it.
        speaks: whether the reply has audio.
        shares: which of the general options (seed, add_history) the prompt depends on as well.
    """

    prompt: str
    sampler: str
    stops: tuple[str, ...]
    speaks: bool
    shares: tuple[str, ...] = ()

    def stop_ids(self, special: SpecialIds) -> frozenset[int]:
        return frozenset(getattr(special, name) for name in self.stops)


def _text(prompt: str, sampler: str, shares: tuple[str, ...] = ()) -> Task:
    return Task(prompt, sampler, ("eos", "im_end"), False, shares)


def _spoken(prompt: str, sampler: str, shares: tuple[str, ...] = ()) -> Task:
    return Task(prompt, sampler, ("eos", "eostm", "im_end"), True, shares)


TASKS: dict[str, Task] = {
    "asr_sft": _text("get_asr_sft_prompt", "asr", ("seed",)),
    "tts_sft": _spoken("get_tts_sft_prompt", "tts", ("seed",)),
    "audio_understanding_sft": _text("get_audio_understanding_sft_prompt", "audio_understanding"),
    "spoken_dialogue_sft": _spoken(
        "get_spoken_dialogue_sft_prompt", "spoken_dialogue", ("add_history",)
    ),
    "spoken_dialogue_sft_multiturn": _spoken(
        "get_spoken_dialogue_sft_multiturn_prompt", "spoken_dialogue"
    ),
    "speech2text_dialogue_sft": _text("get_s2t_dialogue_sft_prompt", "spoken_dialogue"),
    "speech2text_dialogue_sft_multiturn": _text(
        "get_s2t_dialogue_sft_multiturn_prompt", "spoken_dialogue"
    ),
    "text_dialogue_sft": _text("get_text_dialogue_sft_prompt", "text_chat"),
    "text_dialogue_sft_multiturn": _text("get_text_dialogue_sft_multiturn_prompt", "text_chat"),
    "in_context_learning_s2s": Task(
        "get_in_context_learning_s2s_prompt", "in_context_learning_s2s", ("eos", "eostm"), True
    ),
    "speech_continuation": Task(
        "get_speech_continuation_prompt", "speech_continuation", ("eos", "eosp"), True
    ),
}


def find_task(name: str) -> Task:
    """A task by upstream's name, or by the same without `_sft`.

    Raises:
        ValueError: no such task; the message lists them.
    """
    task = (
        TASKS.get(name)
        or TASKS.get(f"{name}_sft")
        or TASKS.get(name.replace("_multiturn", "_sft_multiturn"))
    )
    if task is None:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return task
