"""Calls of upstream's methods, and what they leave in the history."""

import copy
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mimo_fast import Chunk, MimoAudio
from mimo_fast.generation import unflatten_ids
from mimo_fast.text.tasks import TASKS

GROUP = 4

METHODS = tuple(name for name in TASKS if hasattr(MimoAudio, name))
"""Tasks with a method of `MimoAudio`, as upstream has them."""


def arguments(task: str, audio: list[Path]) -> list[Any]:
    """What upstream's method of that name needs, without an output."""
    user: dict[str, Any] = {"role": "user", "content": audio[1]}
    written = {"role": "assistant", "content": "Hi."}
    spoken = {"role": "assistant", "content": {"text": "Hi.", "audio": audio[0]}}
    example = {"input_audio": audio[1], "output_audio": audio[0], "output_transcription": "A fox."}
    answered = {"audio": audio[0], "question": "What is said?", "answer": "A fox."}
    given: dict[str, list[Any]] = {
        "tts_sft": ["The quick brown fox."],
        "audio_understanding_sft": [audio[1], "What is said?"],
        "spoken_dialogue_sft_multiturn": [[user, spoken, user]],
        "speech2text_dialogue_sft_multiturn": [[user, written, user]],
        "text_dialogue_sft": ["Hi."],
        "text_dialogue_sft_multiturn": [[{"role": "user", "content": "Hi."}]],
        "in_context_learning_s2s": ["Convert the voice.", [example], audio[1]],
        "instruction_following": ["Listen:<sound>What is said?", audio[1]],
        "few_shots_qa": [[answered, {"audio": audio[1], "question": "And here?"}]],
        "gen_text": [[{"text": "Q: 1? A: 1."}, {"speech": audio[1]}]],
        "gen_speech": [[{"text": "Q: 1?"}, {"text": "A: 1.", "speech": audio[0]}]],
    }
    return given.get(task, [audio[1]])


def own_dialogue(model: MimoAudio) -> MimoAudio:
    """A copy of a model that keeps a history of its own."""
    own = copy.copy(model)
    own.clear_history()
    return own


def limit_context(model: MimoAudio, groups: int) -> None:
    """Gives a copy of a model a language model with a context of so many groups."""
    model.lm = copy.copy(model.lm)
    model.lm.config = dataclasses.replace(model.lm.config, max_positions=groups)


async def collected(stream: AsyncIterator[Chunk]) -> list[Chunk]:
    return [chunk async for chunk in stream]


def same(chunks: list[Chunk], others: list[Chunk]) -> bool:
    """Equal but for the time they took."""
    pairs = [[(chunk.text, chunk.audio.tolist()) for chunk in each] for each in (chunks, others)]
    return pairs[0] == pairs[1]


def history(model: MimoAudio) -> Tensor:
    """Ids [C + 1, T G] of the last exchange."""
    assert model.history is not None
    assert model.history.shape[0] == 1
    return unflatten_ids(model.history[0], 8)


def last_reply(model: MimoAudio, groups: int) -> tuple[list[int], Tensor]:
    """Text ids and codes [C, n G] of so many last groups, without the one that ended the reply."""
    ids = history(model)[:, -groups * GROUP : -GROUP]
    return ids[0, ::GROUP].tolist(), ids[1:, ids[0] == model.empty_token]
