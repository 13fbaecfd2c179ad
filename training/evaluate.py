"""What a trained pair can do, measured on sentences, and for listening on a voice, that training never had.

    codec   STOI and mel distance by number of codebooks, on the unheard voice
    tts     words that an independent recogniser hears in what the model says, beside what it hears in the synthesizer's
            own speech of the same sentences and in the codec's reconstruction of that; pace and first audio
    asr     the model's own transcriptions of the unheard voice, clean and in noise 10 dB below it
    dialogue  spoken answers, by the recogniser and as text
"""

import random
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mimo_fast
from mimo_fast.checkpoint import write_json
from mimo_fast.machine import describe_machine

from . import domain
from .data import Part, noise
from .listen import recognise, word_error_rate
from .losses import mel_distance

NOISE_DB = 10
Results = dict[str, Any]


def evaluate(model: mimo_fast.MimoAudio, parts: dict[str, Part], count: int, target: Path | None = None) -> Results:
    """All of it over at most `count` utterances a measurement; written to `target` as JSON where it is given."""
    results: Results = {"machine": [*describe_machine()], "utterances": count, "threads": torch.get_num_threads()}
    for measure in (codec_quality, text_to_speech, transcription, dialogue):
        results[measure.__name__] = measure(model, parts, count)
        if target is not None:
            write_json(target, results)
    return results


@torch.no_grad()
def codec_quality(model: mimo_fast.MimoAudio, parts: dict[str, Part], count: int) -> Results:
    """STOI and mel distance of the unheard voice's reconstruction from the first 1, 2, ... codebooks."""
    from pystoi import stoi

    codec, found = model.codec, dict[int, dict[str, list[float]]]()
    for wav in _waves(parts["unheard"], count, "codec"):
        codes = codec.encode(wav)
        for n in range(1, len(codes) + 1):
            got = codec.decode(codes[:n])[: len(wav)]
            scores = found.setdefault(n, {"stoi": [], "mel_distance": []})
            scores["stoi"].append(float(stoi(wav.numpy(), got.numpy(), codec.sample_rate)))
            scores["mel_distance"].append(float(mel_distance(got, wav, codec.sample_rate)))
    return {str(n): {name: _mean(values) for name, values in scores.items()} for n, scores in found.items()}


@torch.no_grad()
def text_to_speech(model: mimo_fast.MimoAudio, parts: dict[str, Part], count: int) -> Results:
    """Word error rates of a recogniser that has nothing to do with the model, and how long speaking takes."""
    part, rate = parts["unsaid"], model.codec.sample_rate
    texts = [part.item(i).text for i in range(min(count, len(part)))]
    heard: dict[str, list[str]] = {"flite": [], "codec": [], "model": []}
    own, first_audio, factors = [], [], []
    for i, text in enumerate(tqdm(texts, desc="tts", unit="sentence")):
        wav = part[i].wav
        heard["flite"].append(recognise(wav, rate))
        heard["codec"].append(recognise(model.codec.decode(model.codec.encode(wav)), rate))
        chunks = list(model.stream("tts", text, seed=i, max_new_tokens=200))
        said, timing = torch.cat([chunk.audio for chunk in chunks]), chunks[-1].timing
        heard["model"].append(recognise(said, rate) if len(said) else "")
        own.append(model.asr_sft(said, seed=0, max_new_tokens=60) if len(said) else "")
        if timing.first_audio is not None:
            first_audio.append(1e3 * timing.first_audio)
            factors.append(timing.elapsed / timing.audio_seconds)
    return {
        "word_error_rate": {name: round(word_error_rate(got, texts), 4) for name, got in heard.items()},
        "word_error_rate_own_asr": round(word_error_rate(own, texts), 4),
        "first_audio_ms": _spread(first_audio), "real_time_factor": _spread(factors),
        "misheard": [list(pair) for pair in zip(texts, heard["model"], strict=True) if pair[0] != pair[1]][:20],
    }


def transcription(model: mimo_fast.MimoAudio, parts: dict[str, Part], count: int) -> Results:
    """Word error rates of the model's own transcription."""
    part, results = parts["unheard"], Results()
    texts = [part.item(i).text for i in range(min(count, len(part)))]
    for name, level in (("clean", None), (f"noise_{NOISE_DB}_db", NOISE_DB)):
        got = []
        for i, wav in enumerate(_waves(part, count, f"asr {name}")):
            heard = wav if level is None else _noisy(wav, level, random.Random(i))
            got.append(model.asr_sft(heard, seed=0, max_new_tokens=60))
        results[name] = round(word_error_rate(got, texts), 4)
        wrong = [list(pair) for pair in zip(texts, got, strict=True) if pair[0] != pair[1]]
        results[f"wrong_{name}"] = wrong[:20]
    return results


@torch.no_grad()
def dialogue(model: mimo_fast.MimoAudio, parts: dict[str, Part], count: int) -> Results:
    """Word error rates of spoken answers to questions, as the recogniser hears them and as the text beside them."""
    part, texts, heard, written = parts["questions"], [], [], []
    for i, wav in enumerate(_waves(part, min(count, len(domain.dialogue())), "dialogue")):
        texts.append(domain.dialogue()[part.item(i).text])
        chunks = list(model.stream("spoken_dialogue", wav, seed=i, max_new_tokens=200))
        said = torch.cat([chunk.audio for chunk in chunks])
        heard.append(recognise(said, model.codec.sample_rate) if len(said) else "")
        written.append("".join(chunk.text for chunk in chunks).strip())
    rates = {"heard": word_error_rate(heard, texts), "text": word_error_rate(written, texts)}
    return {name: round(value, 4) for name, value in rates.items()}


def _waves(part: Part, count: int, name: str) -> Iterator[Tensor]:
    for i in tqdm(range(min(count, len(part))), desc=name, unit="utterance"):
        yield part[i].wav


def _noisy(wav: Tensor, level: float, rng: random.Random) -> Tensor:
    """Speech with noise that has `level` decibels less power."""
    mixed = wav + noise(len(wav), rng) * wav.square().mean().sqrt() * 10 ** (-level / 20)
    return mixed / max(1.0, float(mixed.abs().max()))


def _mean(values: Iterable[float]) -> float:
    return round(statistics.fmean(values), 4)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "largest": round(max(values), 3)}
