"""Measures what a trained pair can do, on sentences and an input voice that training never had.

codec_quality   STOI and mel distance by number of codebooks, on the unheard voice
text_to_speech  words that an independent recogniser hears in the model's speech, beside what it
                hears in the synthesizer's own speech of the same sentences and in the codec's
                reconstruction of that speech
transcription   the model's transcriptions of the unheard voice, clean and in noise at 10 dB
                SNR, and of the synthesizer in the reply's voice
dialogue        spoken answers to the unheard voice, as the recogniser hears them and as text
examples        speech to speech by example: the unheard voice, repeated in the reply's voice
formats, streaming, sampling, pace
                see `comparisons`
"""

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.folder import write_json
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.sampling import GREEDY

from . import domain
from .augmentation import noise
from .data import UNHEARD_VOICE, Part
from .export import LEVEL
from .listen import recognise, word_error_rate
from .losses import mel_distance
from .synthesis import Manner, synthesize
from .tokenizer import S2S_INSTRUCTIONS

UNHEARD = Manner(UNHEARD_VOICE)
NOISE_DB = 10
LONGEST_REPLY = 200
"""Most groups of a reply (32 s): one that never ends has errors enough by then."""

SHOWN = 20
"""Number of wrong sentences that are kept."""

Results = dict[str, Any]
Load = Callable[[str | None], MimoAudio]
"""A format of `quantization`, None for none -> the pair in it."""

Parts = dict[str, Part]
Measure = Callable[[Load, Parts, int], Results]


def evaluate(
    load: Load, parts: Parts, count: int, measures: Iterable[Measure], target: Path | None = None
) -> Results:
    """Measures over at most `count` utterances each.

    Results are kept in `target`; existing ones are not measured again.
    """
    model = load(None)
    results: Results = {"weights": fingerprint(model), "utterances": count}
    if target is not None and target.exists():
        known = json.loads(target.read_text(encoding="utf-8"))
        if all(known.get(name) == value for name, value in results.items()):
            results = known
    results["environment"] = environment("cpu")
    for measure in measures:
        if measure.__name__ not in results:
            results[measure.__name__] = measure(load, parts, count)
            if target is not None:
                write_json(target, results)
    return results


def fingerprint(model: MimoAudio) -> str:
    """Fingerprint of both files of weights."""
    digest = hashlib.sha256()
    for directory in (model.path, model.mimo_audio_tokenizer_path):
        digest.update(Path(directory, "model.safetensors").read_bytes())
    return digest.hexdigest()


@torch.no_grad()
def codec_quality(load: Load, parts: Parts, count: int) -> Results:
    """Quality of the unheard voice's reconstruction from the first 1, 2, ... codebooks."""
    from pystoi import stoi

    codec, found = load(None).codec, dict[int, dict[str, list[float]]]()
    for wav in _waves(parts["unheard"], count, "codec"):
        codes = codec.encode(wav)
        for n in range(1, len(codes) + 1):
            got = codec.decode(codes[:n])[: len(wav)]
            scores = found.setdefault(n, {"stoi": [], "mel_distance": []})
            scores["stoi"].append(float(stoi(wav.numpy(), got.numpy(), codec.sample_rate)))
            scores["mel_distance"].append(float(mel_distance(got / LEVEL, wav, codec.sample_rate)))
    return {
        str(n): {name: round(statistics.fmean(values), 4) for name, values in scores.items()}
        for n, scores in found.items()
    }


@torch.no_grad()
def text_to_speech(load: Load, parts: Parts, count: int) -> Results:
    """Word error rates on held-out sentences."""
    model, texts = load(None), unsaid(parts, count)
    rate, codec = model.codec.sample_rate, model.codec
    waves = [parts["unsaid"][i].wav for i in range(len(texts))]
    heard = {
        "flite": [recognise(wav, rate) for wav in waves],
        "codec": [recognise(codec.decode(codec.encode(wav)), rate) for wav in waves],
        "model": heard_in(model, texts),
    }
    return {
        "word_error_rate": {name: rate_of(got, texts) for name, got in heard.items()},
        "word_error_rate_own_asr": rate_of(transcripts_of(model, speech_of(model, texts)), texts),
        "misheard": _wrong(texts, heard["model"]),
    }


def transcription(load: Load, parts: Parts, count: int) -> Results:
    """Word error rates of the model's own transcription."""
    model, results = load(None), Results()
    noisy = f"noise_{NOISE_DB}_db"
    own = ("own_voice", "unsaid", None)
    for name, part, level in (("clean", "unheard", None), (noisy, "unheard", NOISE_DB), own):
        texts = [parts[part].item(i).text for i in range(min(count, len(parts[part])))]
        waves = _waves(parts[part], count, f"asr {name}")
        if level is not None:
            waves = (_noisy(wav, level, random.Random(i)) for i, wav in enumerate(waves))
        got = transcripts_of(model, list(waves))
        results[name] = rate_of(got, texts)
        results[f"wrong_{name}"] = _wrong(texts, got)
    return results


@torch.no_grad()
def dialogue(load: Load, _parts: Parts, count: int) -> Results:
    """Word error rates of spoken answers: of the sound, by the recogniser, and of the text."""
    model, heard, written = load(None), list[str](), list[str]()
    pairs = dict([*domain.dialogue().items()][:count])
    for i, question in enumerate(tqdm(pairs, desc="dialogue", unit="question")):
        asked = synthesize(domain.spoken(question), UNHEARD).wav
        answer = model.stream("spoken_dialogue", asked, seed=i, max_new_tokens=LONGEST_REPLY)
        wav, text = spoken(answer)
        heard.append(recognise(wav, model.codec.sample_rate))
        written.append(text)
    texts = [*pairs.values()]
    rates = {"heard": rate_of(heard, texts), "text": rate_of(written, texts)}
    return rates | {"misheard": _wrong(texts, heard)}


@torch.no_grad()
def examples(load: Load, parts: Parts, count: int) -> Results:
    """Word error rate, by the recogniser, of speech repeated after two examples."""
    model, answers, heard = load(None), parts["answers"], list[str]()
    texts = [answers.item(i).text for i in range(len(answers))]
    asked = [synthesize(domain.spoken(text), UNHEARD).wav for text in texts]
    shown = [
        {"input_audio": wav, "output_audio": answers[i].wav, "output_transcription": text}
        for i, (wav, text) in enumerate(zip(asked, texts, strict=True))
    ]
    for i in tqdm(range(min(count, len(texts))), desc="examples", unit="sentence"):
        others = [shown[(i + step) % len(texts)] for step in (1, 2)]
        request = ("in_context_learning_s2s", S2S_INSTRUCTIONS["echoes"], others, asked[i])
        wav, _ = spoken(model.stream(*request, seed=i, max_new_tokens=LONGEST_REPLY))
        heard.append(recognise(wav, model.codec.sample_rate))
    texts = texts[: len(heard)]
    return {"heard": rate_of(heard, texts), "misheard": _wrong(texts, heard)}


def unsaid(parts: Parts, count: int) -> tuple[str, ...]:
    """Held-out sentences."""
    return tuple(parts["unsaid"].item(i).text for i in range(min(count, len(parts["unsaid"]))))


@cache
def speech_of(model: MimoAudio, texts: tuple[str, ...], greedy: bool = False) -> tuple[Tensor, ...]:
    """Speech of the model for each text, streamed, with upstream's sampling or greedy."""
    bar, samplers = tqdm(texts, desc="tts", unit="sentence"), model.task_sampler_configs["tts"]
    if greedy:
        model.task_sampler_configs["tts"] = {"global": GREEDY, "local": GREEDY}
    limit = LONGEST_REPLY
    chunks = (model.stream("tts", text, seed=i, max_new_tokens=limit) for i, text in enumerate(bar))
    said = tuple(spoken(each)[0] for each in chunks)
    model.task_sampler_configs["tts"] = samplers
    return said


@cache
def heard_in(model: MimoAudio, texts: tuple[str, ...], greedy: bool = False) -> tuple[str, ...]:
    """The sentences that the recogniser hears."""
    return tuple(recognise(wav, model.codec.sample_rate) for wav in speech_of(model, texts, greedy))


def spoken(chunks: Iterable[Any]) -> tuple[Tensor, str]:
    """A streamed reply's audio [n], n > 0, and text."""
    taken = [*chunks]
    audio = torch.cat([chunk.audio for chunk in taken])
    return audio if len(audio) else torch.zeros(1), "".join(chunk.text for chunk in taken).strip()


def transcripts_of(model: MimoAudio, waves: Iterable[Tensor]) -> list[str]:
    return [model.asr_sft(wav, seed=0, max_new_tokens=60).strip() for wav in waves]


def rate_of(got: Sequence[str], want: Sequence[str]) -> float:
    return round(word_error_rate(got, want), 4)


def _wrong(texts: Sequence[str], got: Sequence[str]) -> list[list[str]]:
    return [[want, heard] for want, heard in zip(texts, got, strict=True) if want != heard][:SHOWN]


def _waves(part: Part, count: int, name: str) -> Iterator[Tensor]:
    for i in tqdm(range(min(count, len(part))), desc=name, unit="utterance"):
        yield part[i].wav


def _noisy(wav: Tensor, level: float, rng: random.Random) -> Tensor:
    """Speech with noise that has `level` decibels less power."""
    mixed = wav + noise(len(wav), rng) * wav.square().mean().sqrt() * 10 ** (-level / 20)
    return mixed / max(1.0, float(mixed.abs().max()))
