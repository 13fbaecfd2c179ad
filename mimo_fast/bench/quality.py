"""The loss of quality by quantized weights, teacher-forced on the same ids as the original's.

Sequences are the given recordings (their own codes are predicted), and the checkpoint's own replies
to them and to the given texts. At each predicted position:

    KL         from the checkpoint's distribution to the quantized one, in nats, at temperature 1
               and before top-k and top-p
    agreement  how often both prefer the same token

for the text head and each codebook, whose patch decoder is fed the true codes. The int8 codec is
compared with the full one: SNR and mel distance (mean absolute difference of the log-mel) of the
audio decoded from the recordings' codes, and the share of its own codes that are the same.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.audio.files import load_audio
from mimo_fast.audio.mel import log_mel
from mimo_fast.audio.paths import write_whole
from mimo_fast.bench.environment import environment
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.lm.model import LM
from mimo_fast.runtime.lm.teacher_forcing import code_logits

FORMATS = ("int8", "int4", "nf4")
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


@dataclass(frozen=True)
class CodecQuality:
    """Quality of a quantized codec against the full one."""

    snr_db: float
    mel_distance: float
    code_agreement: float


def quality(args: argparse.Namespace, load: Callable[[Any], MimoAudio]) -> int:
    """`mimo-fast bench --quality`: a table per format on stdout; load: quantization -> model."""
    formats = tuple(dict.fromkeys(args.format or FORMATS))
    wavs = [load_audio(path, 24000) for path in args.audio or ()]
    model = load(None)
    sequences = list(own_sequences(model, wavs, args.text or ()))
    reference = [teacher_forced(model.lm, sequence) for sequence in sequences]
    full = model.codec
    channels = model.lm.config.channels
    del model
    results: dict[str, list[Head]] = {}
    for name in formats:
        gc.collect()
        lm = load(name).lm
        results[name] = compare(reference, [teacher_forced(lm, sequence) for sequence in sequences])
        del lm
    codec = None
    if wavs:
        codec = compare_codec(full, load({"codec": "int8"}).codec, wavs, channels)
    for name, heads in results.items():
        print_table(name, heads)
    if codec is not None:
        print(
            f"codec in int8: SNR {codec.snr_db:.1f} dB, mel distance {codec.mel_distance:.4f}, "
            f"{100 * codec.code_agreement:.2f}% of its codes the same"
        )
    if args.json:
        record = {
            "kind": "quality",
            "model": str(args.model),
            "codec": str(args.codec),
            "environment": environment(full.device),
            "recordings": len(wavs),
            "texts": len(args.text or ()),
            "formats": {name: [asdict(head) for head in heads] for name, heads in results.items()},
            "codec_int8": None if codec is None else asdict(codec),
        }
        write_whole(args.json, (json.dumps(record, indent=1) + "\n").encode())
    return 0


def own_sequences(
    model: MimoAudio, wavs: Sequence[Tensor], texts: Sequence[str]
) -> Iterator[Lesson]:
    """Sequences to predict: the recordings, and the model's replies with its task's samplers."""
    count = 2 * len(wavs) + len(texts)
    with tqdm(total=count, desc="replies", delay=1, leave=False, disable=None) as bar:
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


def compare_codec(
    full: Codec, quantized: Codec, wavs: Sequence[Tensor], channels: int
) -> CodecQuality:
    """Compares the codecs over all recordings together."""
    signal = noise = distance = frames = same = codes_ = 0.0
    for wav in wavs:
        codes = full.encode(wav, channels)
        want, got = full.decode(codes).cpu(), quantized.decode(codes).cpu()
        signal += float(want.double().square().sum())
        noise += float((got.double() - want.double()).square().sum())
        difference = (log_mel(got, full.config) - log_mel(want, full.config)).abs()
        distance, frames = distance + float(difference.sum()), frames + difference.numel()
        own = quantized.encode(wav, channels)
        same, codes_ = same + float((own == codes).sum()), codes_ + codes.numel()
    snr = (
        10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float32, device="cpu")).item()
        if noise
        else float("inf")
    )
    return CodecQuality(snr, distance / frames, same / codes_)


def print_table(name: str, heads: Sequence[Head]) -> None:
    print(f"{name:<12}{'KL (nats)':>12}{'top-1 agreement':>18}{'predictions':>13}")
    for i, head in enumerate(heads):
        title = "text" if i == 0 else f"codebook {i - 1}"
        print(f"{title:<12}{head.kl:>12.5f}{100 * head.agreement:>17.2f}%{head.predictions:>13}")
    print(flush=True)
