"""How much earlier is a reply heard with an elastic look-ahead, and what do its first patches cost?

    python -m benchmarks.studies.first_audio [--rounds 21] [FILE.json]

time     through `model.stream`, exact and elastic in turns, on the tiny preset (random weights that
         follow a schedule of patches alone) and on nano; medians of wall time. "known" is an
         elastic stream whose codec is calibrated on the reply before. The real-time factor is that
         of the whole reply, "decoded once" for `codec.again = 0`.
quality  nano's codec and the parity kit's: SNR in dB against one-shot decoding of the first patch
         that is heard, of the first four and of the whole, over sentences in one voice; for an
         elastic stream that knows nothing, the sentence before, the mean of the others, or what the
         checkpoint states, at several weights of what it knows.
ramp     a vocoder of the published depth and windows with random weights: SNR by patch of an
         elastic stream and of each fixed look-ahead, against one-shot decoding, its statistics
         given.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mimo_fast
from benchmarks.studies.common import Record, parser_of, write
from mimo_fast import MimoAudio
from mimo_fast.bench.environment import environment
from mimo_fast.bench.player import play
from mimo_fast.bench.schedule import ScheduledLM
from mimo_fast.bench.synthetic import random_codec
from mimo_fast.checkpoint.initialize import init_checkpoint
from mimo_fast.config import CodecConfig, read_json
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.state import NormStatistics

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tests" / "golden" / "checkpoint"
WORDS = ROOT / "tests" / "words"
PATCHES = 30
PATCH_SAMPLES = 3840
EDGE = 360
WEIGHTS = (25, 50, 100, math.inf)


def scheduled(folder: Path) -> MimoAudio:
    """The tiny preset, which says nothing but patches."""
    model = mimo_fast.load(folder / "lm", folder / "codec", device="cpu")
    special = model.tokenizer.special
    plan = [special.empty] * PATCHES + [special.eostm]
    model.lm = ScheduledLM.of(model.lm, len(plan))
    model.lm.follow(plan)
    return model


def one_reply(model: MimoAudio, text: str, lookahead: str, most: int | None) -> Record:
    arrivals, rate = [], model.codec.sample_rate
    first = None
    for i, chunk in enumerate(
        model.stream("tts", text, seed=1, lookahead=lookahead, max_new_tokens=most), start=1
    ):
        arrivals.append((chunk.timing.elapsed, len(chunk.audio)))
        if first is None and len(chunk.audio):
            first = i
    heard = play(arrivals, rate)
    share = arrivals[-1][0] / (sum(samples for _, samples in arrivals) / rate)
    return {"first": heard.first_audio, "patches": first, "silent": heard.stalled, "share": share}


def first_audio(model: MimoAudio, text: str, rounds: int, most: int | None) -> Record:
    """Exact, elastic, elastic with known statistics, and exact streams that decode nothing again.

    They take turns; one of each is not counted.
    """
    once = copy.copy(model)
    once.codec = copy.copy(model.codec)
    once.codec.again = 0
    known = copy.copy(model)
    known.codec = copy.copy(model.codec)
    recordings = sorted(WORDS.glob("s*.flac"))
    codes = [
        model.codec.encode(mimo_fast.load_audio(each, 24000), model.audio_channels)
        for each in recordings
    ]
    known.codec.calibrate(codes)
    ways = {"exact": (model, "exact"), "elastic": (model, "elastic"), "known": (known, "elastic")}
    ways["exact, decoded once"] = once, "exact"
    runs: dict[str, list[Record]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, (source, lookahead) in ways.items():
            record = one_reply(source, text, lookahead, most)
            if turn:
                runs[name].append(record)
    found = {}
    for name, records in runs.items():
        firsts = sorted(1e3 * record["first"] for record in records)
        found[name] = {
            "first_audio_ms": round(statistics.median(firsts), 2),
            "least_ms": round(firsts[0], 2),
            "most_ms": round(firsts[-1], 2),
            "groups_before_audio": records[0]["patches"],
            "real_time_factor": round(statistics.median(each["share"] for each in records), 4),
            "silent_ms": round(1e3 * max(record["silent"] for record in records), 2),
        }
    exact = found["exact"]["first_audio_ms"]
    found["share"] = {name: round(found[name]["first_audio_ms"] / exact, 3) for name in ways}
    return found


def snr(got: Tensor, want: Tensor) -> float:
    noise = (got.double() - want.double()).square().sum()
    return float(10 * torch.log10(want.double().square().sum() / noise))


def streamed(codec: Codec, codes: Tensor, *given: Any) -> Tensor:
    """By patches."""
    stream = codec.stream(*given)
    parts = [stream.push(chunk) for chunk in codes.split(PATCH_FRAMES, dim=1)]
    return torch.cat([*parts, stream.finish()])


def quality(codec: Codec) -> Iterator[tuple[str, Record]]:
    """Of each source and weight: mean and least SNR of the first patch, of four, of all."""
    files = sorted(WORDS.glob("*.flac"))
    codes = [codec.encode(mimo_fast.load_audio(file, 24000), 8) for file in files]
    measured, wanted = [codec.moments(each) for each in codes], [codec.decode(c) for c in codes]
    unstated = copy.copy(codec)
    unstated.stated_statistics = None
    unstated.config = replace(codec.config, moments=None)

    def others(i: int) -> NormStatistics:
        return unstated.calibrate(codes[:i] + codes[i + 1 :])

    def table(given: Callable[[int], Sequence[Any]]) -> Record:
        rows = []
        for i, (each, want) in enumerate(zip(codes, wanted, strict=True)):
            arguments = given(i)
            unstated.calibration = None
            wav = streamed(unstated, each, *arguments)
            ends = (PATCH_SAMPLES - EDGE, 4 * PATCH_SAMPLES - EDGE, len(want))
            rows.append([snr(wav[:end], want[:end]) for end in ends])
        columns = list(zip(*rows, strict=True))
        return {
            "mean": [round(statistics.mean(column), 1) for column in columns],
            "least": [round(min(column), 1) for column in columns],
        }

    yield "exact, nothing known", table(lambda i: ("exact",))
    yield "elastic, nothing known", table(lambda i: ("elastic",))
    stated = codec.stated_statistics
    if stated is not None:
        yield "exact, stated", table(lambda i: ("exact", stated))
    for weight in WEIGHTS:
        name = f"weight {weight}"
        yield f"sentence before, {name}", table(lambda i, w=weight: ("elastic", measured[i - 1], w))
        yield f"all others, {name}", table(lambda i, w=weight: ("elastic", others(i), w))
        if stated is not None:
            yield f"stated, {name}", table(lambda i, w=weight: ("elastic", stated, w))


def ramp() -> Record:
    """By patch, the first twelve; infinite where a stream is one-shot decoding to the last bit."""
    raw = read_json(KIT / "codec" / "config.json")
    raw |= {"vocoder_num_layers": 16, "vocoder_attn_window_size": [40, 10]}
    codec = random_codec(CodecConfig.from_dict(raw), None, torch.float32)
    draw = torch.Generator().manual_seed(0)
    sizes = codec.config.codebook_sizes[:8]
    codes = torch.stack([torch.randint(size, (120,), generator=draw) for size in sizes])
    want, moments = codec.decode(codes), codec.moments(codes)
    ways = [*range(LOOKAHEAD + 1), "elastic"]
    found = {}
    for way in ways:
        wav = streamed(codec, codes, way, moments, math.inf)
        cuts = [(i * PATCH_SAMPLES, (i + 1) * PATCH_SAMPLES - EDGE) for i in range(12)]
        found[str(way)] = [round(snr(wav[a:b], want[a:b]), 1) for a, b in cuts]
    return found


def run(rounds: int, time_only: bool = False) -> Record:
    torch.set_grad_enabled(False)
    record: Record = {
        "environment": environment(torch.device("cpu")),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        init_checkpoint(Path(folder) / "tiny", "tiny", progress=False)
        tiny = scheduled(Path(folder) / "tiny")
        record["time"] = {"tiny": first_audio(tiny, "It begins to speak.", rounds, None)}
    nano = mimo_fast.load(device="cpu")
    record["time"]["nano"] = first_audio(nano, "seven forty two", rounds, None)
    if time_only:
        return record
    kit = mimo_fast.load(KIT / "lm", KIT / "codec", device="cpu")
    record["quality"] = {"nano": dict(quality(nano.codec)), "kit": dict(quality(kit.codec))}
    record["ramp"] = ramp()
    return record


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--time-only", action="store_true", help="leave the quality out")
    args = parser.parse_args()
    record = run(args.rounds, args.time_only)
    for part in ("time", "quality", "ramp"):
        for name, found in record.get(part, {}).items():
            print(part, name)
            rows = found.items() if isinstance(found, dict) else [("", found)]
            for key, row in rows:
                print(f"    {key:<32}{row}")
    write(args.file, record)


if __name__ == "__main__":
    main()
