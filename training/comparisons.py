"""One trained pair in several ways: quantized, streamed, greedy; and its speed.

formats    int8 and int4 against float32: words, and KL of every head on the same ids
streaming  the same replies streamed and decoded at once: words and SNR
sampling   upstream's settings against greedy: words
pace       real-time factor and first audio of text to speech, on this machine at present
"""

import math
import os
import statistics

import torch
from torch import Tensor
from tqdm import tqdm

from mimo_fast.bench.machine import useful_threads
from mimo_fast.mimo_audio import MimoAudio
from mimo_fast.quality.heads import compare, own_sequences, teacher_forced
from mimo_fast.sampling import MiMoStopper
from mimo_fast.text.tasks import TASKS

from .evaluate import (
    LONGEST_REPLY,
    Load,
    Parts,
    Results,
    heard_in,
    rate_of,
    speech_of,
    transcripts_of,
    unsaid,
)
from .listen import recognise

FORMATS = ("int8", "int4")
KL_SENTENCES = 40
"""Number of texts and of recordings on whose replies the heads are compared."""

PACED = 20


@torch.no_grad()
def formats(load: Load, parts: Parts, count: int) -> Results:
    texts, heard = unsaid(parts, count), parts["unheard"]
    waves = [heard[i].wav for i in range(min(count, len(heard)))]
    wanted, full = [heard.item(i).text for i in range(len(waves))], load(None)
    lessons = [*own_sequences(full, waves[:KL_SENTENCES], texts[:KL_SENTENCES])]
    reference, results = [teacher_forced(full.lm, lesson) for lesson in lessons], Results()
    for name in FORMATS:
        model = load(name)
        heads = compare(reference, [teacher_forced(model.lm, lesson) for lesson in lessons])
        own = transcripts_of(model, speech_of(model, texts))
        results[name] = {
            "word_error_rate": rate_of(heard_in(model, texts), texts),
            "word_error_rate_own_asr": rate_of(own, texts),
            "transcription": rate_of(transcripts_of(model, waves), wanted),
            "kl": {_head(i): round(head.kl, 5) for i, head in enumerate(heads)},
            "agreement": {_head(i): round(head.agreement, 4) for i, head in enumerate(heads)},
        }
    return results


def _head(index: int) -> str:
    return f"codebook_{index - 1}" if index else "text"


@torch.no_grad()
def streaming(load: Load, parts: Parts, count: int) -> Results:
    model, texts = load(None), unsaid(parts, count)
    streamed = speech_of(model, texts)
    whole = [_at_once(model, text, i) for i, text in enumerate(texts)]
    signal = sum(float(wav.double().square().sum()) for wav in whole)
    pairs = zip(streamed, whole, strict=True)
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    heard = {
        "streamed": heard_in(model, texts),
        "at_once": [recognise(wav, model.codec.sample_rate) for wav in whole],
    }
    snr = 10 * math.log10(signal / difference) if difference else None
    return {
        "word_error_rate": {name: rate_of(each, texts) for name, each in heard.items()},
        "snr_db": snr and round(snr, 2),
    }


def _at_once(model: MimoAudio, text: str, seed: int) -> Tensor:
    """Speech [n] of a text, all codes decoded together."""
    stops = TASKS["tts_sft"].stop_ids(model.tokenizer.special)
    stopper = MiMoStopper(model.group_size, model.audio_channels, stops)
    ids = model.get_tts_sft_prompt(text, seed=seed)
    limits = {"stopping_criteria": [stopper], "max_new_tokens": LONGEST_REPLY}
    return model.forward(ids, return_audio=True, task_name="tts", seed=seed, **limits).flatten()


@torch.no_grad()
def sampling(load: Load, parts: Parts, count: int) -> Results:
    model, texts = load(None), unsaid(parts, count)
    heard = {"sampled": heard_in(model, texts), "greedy": heard_in(model, texts, greedy=True)}
    return {name: rate_of(each, texts) for name, each in heard.items()}


def pace(load: Load, parts: Parts, count: int) -> Results:
    """Speed by format: median and largest of some sentences, after one that is not counted."""
    texts, results, before = unsaid(parts, min(count, PACED)), Results(), torch.get_num_threads()
    for name in (None, *FORMATS):
        model = load(name)
        torch.set_num_threads(useful_threads(model.lm.config))
        timings = []
        bar = tqdm([texts[0], *texts], desc=f"pace {name or 'float32'}", unit="sentence")
        for i, text in enumerate(bar):
            *_, last = model.stream("tts", text, seed=i, max_new_tokens=LONGEST_REPLY)
            timings.append(last.timing)
        said = [timing for timing in timings[1:] if timing.first_audio is not None]
        results[name or "float32"] = {
            "threads": torch.get_num_threads(),
            "real_time_factor": _spread([timing.elapsed / timing.audio_seconds for timing in said]),
            "first_audio_ms": _spread([1e3 * (timing.first_audio or 0.0) for timing in said]),
        }
    torch.set_num_threads(before)
    return results | {"load_before_and_cores": [os.getloadavg()[0], os.cpu_count()]}


def _spread(values: list[float]) -> dict[str, float]:
    if values:
        return {"median": round(statistics.median(values), 3), "largest": round(max(values), 3)}
    return {}
