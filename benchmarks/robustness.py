"""Words wrong in recordings as they are: quiet, noisy, by telephone, in rooms, long.

    python -m benchmarks robustness --count 100 -o benchmarks/results/DATE-robustness.json

Sentences and voice are those that nano never had in training, made by flite (apt-get install
flite). Each row is `transcribe`, beside it upstream's one pass (`asr_sft`) where --one-pass asks
for it. Rates are word errors over words.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

import mimo_fast
from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.folder import write_json
from training import augmentation, domain
from training.augmentation import convolved, noise, room_response
from training.data import UNHEARD_VOICE
from training.listen import word_errors
from training.synthesis import Manner, has_flite, synthesize

RATE = 24_000

Change = Callable[[Tensor, random.Random], Tensor]


COMMAND = """
import sys
from pathlib import Path
from mimo_fast.cli.main import main
code = main(sys.argv[1:])
status = Path("/proc/self/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("VmHWM")))
sys.exit(code)
"""
"""The command, and then the most memory that its process had, without that of its parent."""


def silence(seconds: float) -> Tensor:
    return torch.zeros(round(seconds * RATE))


def padded(before: float, after: float) -> Change:
    return lambda wav, rng: torch.cat((silence(before), wav, silence(after)))


def gain(decibels: float) -> Change:
    """Of a 16-bit file."""
    return lambda wav, rng: (wav * 10 ** (decibels / 20) * 2**15).round() / 2**15


def clipped(decibels: float) -> Change:
    return lambda wav, rng: (wav / wav.abs().max() * 10 ** (decibels / 20)).clamp(-1, 1)


def offset(value: float) -> Change:
    return lambda wav, rng: wav * 0.5 + value


def hum(hertz: float, decibels: float) -> Change:
    def change(wav: Tensor, rng: random.Random) -> Tensor:
        places = torch.arange(len(wav)) * (2 * math.pi * hertz / RATE)
        tones = sum(torch.sin(k * places) / k for k in (1, 2, 3))
        return mixed(wav, tones, decibels)

    return change


def mixed(wav: Tensor, other: Tensor, decibels: float) -> Tensor:
    """Another sound, so many decibels below the speech."""
    power, against = wav.square().mean().sqrt(), other.square().mean().sqrt()
    return wav + other * power / against * 10 ** (-decibels / 20)


def noisy(decibels: float) -> Change:
    """Between white and pink."""
    return lambda wav, rng: mixed(wav, noise(len(wav), rng), decibels)


def talkers(count: int, decibels: float) -> Change:
    """Other sentences in trained voices at the same time."""

    def change(wav: Tensor, rng: random.Random) -> Tensor:
        babble = torch.zeros(len(wav))
        for voice in rng.choices(("slt", "awb", "kal16"), k=count):
            text = domain.spoken(domain.draw_sentence(rng))
            other = synthesize(text, Manner(voice, pitch=rng.uniform(0.9, 1.1))).wav
            babble += other.repeat(-(-len(wav) // len(other)))[: len(wav)]
        return mixed(wav, babble, decibels)

    return change


def room(seconds: float) -> Change:
    """Echoes that fall by 60 dB in so many seconds and are as loud as the direct sound."""

    def change(wav: Tensor, rng: random.Random) -> Tensor:
        wet = convolved(wav, room_response(seconds, 0, rng))
        return wet / wet.abs().max() * 0.5

    return change


def coded(form: str, subtype: str, rate: int) -> Change:
    """Through a codec of libsndfile at a sample rate."""
    return lambda wav, rng: augmentation.coded(wav, form, subtype, rate)


CONDITIONS: dict[str, Change] = {
    "clean": lambda wav, rng: wav,
    "1 s of silence before and after": padded(1, 1),
    "3 s of silence after": padded(0, 3),
    "10 s of silence before": padded(10, 0),
    "40 dB quieter": gain(-40),
    "50 dB quieter": gain(-50),
    "clipped by 6 dB": clipped(6),
    "clipped by 12 dB": clipped(12),
    "offset of a tenth of full scale": offset(0.1),
    "hum of 50 Hz, 10 dB below": hum(50, 10),
    "noise, 20 dB below": noisy(20),
    "noise, 10 dB below": noisy(10),
    "noise, 5 dB below": noisy(5),
    "4 talkers, 20 dB below": talkers(4, 20),
    "4 talkers, 10 dB below": talkers(4, 10),
    "room of 0.3 s": room(0.3),
    "room of 0.6 s": room(0.6),
    "telephone, mu-law": coded("WAV", "ULAW", 8000),
    "telephone, A-law": coded("WAV", "ALAW", 8000),
    "mobile telephone, GSM": coded("WAV", "GSM610", 8000),
    "Opus": coded("OGG", "OPUS", 24000),
    "MP3": coded("MP3", "MPEG_LAYER_III", 24000),
}

LONG = {"1 minute": 60, "5 minutes": 300, "20 minutes": 1200, "1 hour": 3600, "3 hours": 10800}
"""Recordings of so many seconds, each by the command in a process of its own."""

SOAK = "3 hours"
"""Measured where it is asked for: `make soak`."""


def sentences(count: int, seed: int) -> list[tuple[str, Tensor]]:
    """Text and speech [n] of sentences that training never had, in a voice that it never had."""
    rng, found = random.Random(seed), dict[str, Tensor]()
    while len(found) < count:
        text = domain.draw_sentence(rng, held_out=True)
        manner = Manner(UNHEARD_VOICE, stretch=rng.uniform(0.9, 1.15), pitch=rng.uniform(0.9, 1.1))
        found.setdefault(text, synthesize(domain.spoken(text), manner).wav)
    return list(found.items())


def write_talk(
    file: Path, seconds: float, spoken: list[tuple[str, Tensor]], rng: random.Random
) -> tuple[str, float]:
    """Sentences with pauses of half a second to two, as a WAV -> their text, and its seconds."""
    texts, samples = list[str](), 0
    with soundfile.SoundFile(file, "w", RATE, channels=1) as written:
        while samples < seconds * RATE:
            text, wav = rng.choice(spoken)
            texts.append(text)
            wav = torch.cat((wav, silence(rng.uniform(0.5, 2))))
            written.write(wav.numpy())
            samples += len(wav)
    return " ".join(texts), samples / RATE


def measure(
    model: mimo_fast.MimoAudio, cases: list[tuple[str, Tensor]], one_pass: bool
) -> dict[str, Any]:
    words = sum(len(text.split()) for text, _ in cases)
    began = time.perf_counter()
    found = [model.transcribe(wav, seed=i) for i, (_, wav) in enumerate(cases)]
    seconds = sum(len(wav) for _, wav in cases) / RATE
    errors = [word_errors(got.text, text) for got, (text, _) in zip(found, cases, strict=True)]
    record = {
        "words": words,
        "wrong": round(sum(errors) / words, 4),
        "real_time_factor": round((time.perf_counter() - began) / seconds, 4),
    }
    if one_pass:
        wrong = [
            word_errors(model.asr_sft(wav, seed=i), text) for i, (text, wav) in enumerate(cases)
        ]
        record["one_pass"] = round(sum(wrong) / words, 4)
    return record


def measure_command(
    length: float, spoken: list[tuple[str, Tensor]], rng: random.Random, arguments: list[str]
) -> dict[str, Any]:
    """What `mimo-fast asr` makes of a file: words, time and the most memory that it had."""
    with tempfile.TemporaryDirectory() as folder:
        file, target = Path(folder, "talk.wav"), Path(folder, "talk.txt")
        text, length = write_talk(file, length, spoken, rng)
        began = time.perf_counter()
        command = [sys.executable, "-c", COMMAND, "asr", str(file), "-o", str(target)]
        done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        found = target.read_text(encoding="utf-8")
    words = len(text.split())
    return {
        "words": words,
        "wrong": round(word_errors(found, text) / words, 4),
        "real_time_factor": round(seconds / length, 4),
        "peak_mb": round(int(done.stdout.split()[-2]) / 1e3),
    }


def add_options(option: Callable[..., Any]) -> None:
    option("--count", type=int, default=100, help="sentences of each condition")
    option("--seed", type=int, default=1)
    option("--only", nargs="+", metavar="WORDS", help="conditions whose names hold one of these")
    option("--one-pass", action="store_true", help="upstream's one pass too")
    option("--model", help="directory or hub id; by default nano")
    option("--codec", help="directory or hub id")
    option("-o", "--output", type=Path)


def model_options(args: argparse.Namespace) -> list[str]:
    given = {"--model": args.model, "--codec": args.codec}
    return [part for name, value in given.items() if value for part in (name, value)]


def run(args: argparse.Namespace) -> int:
    if not has_flite():
        raise mimo_fast.MimoFastError("the sentences are said by flite: apt-get install flite")
    spoken = sentences(args.count, args.seed)
    record: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    record |= {"count": args.count, "seed": args.seed, "conditions": {}}
    names = [
        name
        for name in [*CONDITIONS, *LONG]
        if (any(part in name for part in args.only) if args.only else name != SOAK)
    ]
    with mimo_fast.load(args.model, args.codec, max_batch=4) as model:
        for name in tqdm(names, disable=None):
            rng = random.Random(f"{args.seed} {name}")
            one_pass = args.one_pass and name not in LONG
            if name in LONG:
                found = measure_command(LONG[name], spoken, rng, model_options(args))
            else:
                cases = [(text, CONDITIONS[name](wav, rng)) for text, wav in spoken]
                found = measure(model, cases, one_pass)
            record["conditions"][name] = found
            beside = f"{found['one_pass']:9.1%}" if one_pass else ""
            print(f"{name:<36}{found['wrong']:7.1%}{beside}", flush=True)
            if args.output:
                write_json(args.output, record)
    return 0
