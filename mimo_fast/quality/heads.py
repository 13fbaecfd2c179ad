"""KL and agreement of every head, teacher-forced on the same ids as the checkpoint's.

Sequences are the given recordings (their own codes are predicted), and the checkpoint's own replies
to them and to the given texts. At each predicted position:

    KL         from the checkpoint's distribution to the quantized one, in nats, at temperature 1
               and before top-k and top-p
    agreement  how often both prefer the same token

for the text head and each codebook, whose patch decoder is fed the true codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.teacher_forcing import code_logits

REPLY_GROUPS = 48
"""Groups of each of the checkpoint's replies."""

LOGITS_AT_ONCE = 64
"""Positions scored at once; it bounds the memory of the vocabulary's scores."""


@dataclass(frozen=True)
class Lesson:
    """Ids [C + 1, T G], of which groups from `first` on are predicted."""

    ids: Tensor
    first: int


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the text head [P, V] and of each codebook [Q frames, size].

    float32, on the host.
    """

    text: Tensor
    codes: tuple[Tensor, ...]


@dataclass(frozen=True)
class Head:
    """Difference of one head from the checkpoint's, over so many predictions."""

    kl: float
    agreement: float
    predictions: int


def own_sequences(
    model: MimoAudio, wavs: Sequence[Tensor], texts: Sequence[str]
) -> Iterator[Lesson]:
    """Sequences to predict: the recordings, and the model's replies with its task's samplers.

    A model that does less than MiMo-Audio replies with transcripts of the recordings alone.
    """
    less = bool(model.lm.config.architecture.tasks)
    count = len(wavs) if less else 2 * len(wavs) + len(texts)
    with tqdm(total=count, desc="replies", delay=1, leave=False, disable=None) as bar:
        for wav in wavs if less else ():
            yield _reply(model, "asr", model.get_asr_sft_prompt(wav, template=0))
            bar.update(1)
        if less:
            return
        for wav in wavs:
            yield Lesson(model.get_speech_continuation_prompt(wav).cpu(), 2)
            bar.update(1)
            yield _reply(model, "spoken_dialogue", model.get_spoken_dialogue_sft_prompt(wav))
            bar.update(1)
        for text in texts:
            yield _reply(model, "tts", model.get_tts_sft_prompt(text, template=0))
            bar.update(1)


def _reply(model: MimoAudio, task: str, ids: Tensor) -> Lesson:
    sequence = model.conversation(seed=0)
    sequence.add(ids)
    for _ in model.decode(sequence, task, frozenset(), REPLY_GROUPS):
        pass
    return Lesson(sequence.ids, ids.shape[1] // model.group_size)


@torch.no_grad()
def teacher_forced(lm: LM, sequence: Lesson) -> Scores:
    """Predictions of a model for the groups of a sequence, each given all before it."""
    groups = sequence.ids.unflatten(1, (-1, lm.config.group_size))
    text, codes = groups[0, :, 0], groups[1:].transpose(0, 1)
    state = lm.new_state([0], len(text))
    hidden = torch.cat(list(lm.hidden_chunks(sequence.ids, state, 0)))[sequence.first - 1 : -1]
    parts = hidden.split(LOGITS_AT_ONCE)
    chunks = [lm.text_logits(part).float().log_softmax(-1).cpu() for part in parts]
    speech = text[sequence.first :] == lm.empty_id
    heard = hidden[speech.to(hidden.device)]
    return Scores(torch.cat(chunks), code_scores(lm, heard, codes[sequence.first :][speech]))


def code_scores(lm: LM, hidden: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities of each codebook's frames, given the true codes before them.

    hidden [N, D] of the backbone, codes [N, C, G] -> for each codebook [N G, size], the empty
    code's being -inf.
    """
    scores = []
    heads = code_logits(lm, hidden, codes.to(lm.device))
    for logits, empty in zip(heads, lm.config.empty_codes, strict=True):
        wide = logits.float()
        wide[..., empty] = -torch.inf
        scores.append(wide.log_softmax(-1).flatten(0, 1).cpu())
    return tuple(scores)


def compare(reference: Sequence[Scores], quantized: Sequence[Scores]) -> list[Head]:
    """Compares the text head, then each codebook."""
    ours, theirs = (
        [torch.cat(head) for head in zip(*((s.text, *s.codes) for s in side), strict=True)]
        for side in (reference, quantized)
    )
    return [head_quality(*pair) for pair in zip(ours, theirs, strict=True)]


def head_quality(reference: Tensor, quantized: Tensor) -> Head:
    """Log-probabilities [P, V] of both -> their difference; P may be 0."""
    if not len(reference):
        return Head(float("nan"), float("nan"), 0)
    weights = reference.double().exp()
    # Ids that both forbid have no weight; avoids NaN from -inf - -inf.
    differences = torch.where(weights > 0, reference.double() - quantized.double(), 0.0)
    agreement = (reference.argmax(-1) == quantized.argmax(-1)).double().mean()
    return Head(float((weights * differences).sum(-1).mean()), float(agreement), len(reference))
