"""Words wrong with and without a denoiser in front of `transcribe`: is one worth an extra?

    pip install noisereduce pyrnnoise
    python -m benchmarks.studies.denoiser [--count 60] [--out FILE.json]

Spectral gating (noisereduce, stationary) and RNNoise (pyrnnoise, whose wheel holds the weights), on
conditions of `benchmarks/robustness.py`.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mimo_fast
from benchmarks.robustness import CONDITIONS, RATE, measure, sentences
from benchmarks.studies.common import Record, collect, parser_of
from mimo_fast.audio.resample import resample
from mimo_fast.bench.environment import environment

CASES = (
    *("clean", "noise, 20 dB below", "noise, 10 dB below", "noise, 5 dB below"),
    *("hum of 50 Hz, 10 dB below", "4 talkers, 10 dB below", "room of 0.6 s"),
    *("telephone, mu-law", "clipped by 12 dB"),
)
SEED = 3


def spectral_gating(wav: Tensor) -> Tensor:
    from noisereduce import reduce_noise

    return torch.from_numpy(reduce_noise(wav.numpy(), RATE, stationary=True)).float()


def rnnoise(wav: Tensor) -> Tensor:
    """It works at 48 kHz, frame by frame, and answers two frames late."""
    from pyrnnoise import rnnoise as library

    samples = resample(wav, RATE, 48_000).clamp(-1, 1).numpy()
    size, state = library.FRAME_SIZE, library.create()
    samples = np.pad(samples, (0, -len(samples) % size + 2 * size))
    frames = [
        library.process_mono_frame(state, (frame * 32767).astype(np.int16))[0]
        for frame in samples.reshape(-1, size)
    ]
    library.destroy(state)
    found = torch.from_numpy(np.concatenate(frames).astype(np.float32) / 32768)
    return resample(found[2 * size :], 48_000, RATE)[: len(wav)]


DENOISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda wav: wav,
    "spectral gating": spectral_gating,
    "RNNoise": rnnoise,
}


def study(count: int) -> Iterator[Record]:
    spoken = sentences(count, SEED)
    with mimo_fast.load(max_batch=4) as model:
        for name in CASES:
            rng = random.Random(f"{SEED} {name}")
            cases = [(text, CONDITIONS[name](wav, rng)) for text, wav in spoken]
            row: Record = {"condition": name}
            for denoiser, clean in DENOISERS.items():
                heard = [(text, clean(wav)) for text, wav in cases]
                row[denoiser] = measure(model, heard, one_pass=False)["wrong"]
            yield row


def line(row: Record) -> str:
    wrong = "  ".join(f"{name} {row[name]:6.1%}" for name in DENOISERS)
    return f"{row['condition']:<30}{wrong}"


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=60)
    args = parser.parse_args()
    about: Record = {"environment": environment(torch.device("cpu")), "count": args.count}
    collect(study(args.count), line, about, args.out)
