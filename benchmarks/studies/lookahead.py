"""What look-ahead and norm statistics are worth to the codec's stream, on a trained vocoder.

    python -m benchmarks.studies.lookahead [FILE.json] [--replies 8] [--vocoder FILE]
        [--voices replies unheard] [--statistics own voice average estimated] [--few]

Replies of three held-out sentences each, in the voice of nano's replies and in one that training
never used, streamed by patches of 160 ms at each look-ahead and with the growing one, and compared
with one-shot decoding of the same codes: SNR and distance of mel spectra over the first 1, 3 and 10
patches and all of them, and the words that a recogniser hears in the first sentence. Norm
statistics are

    own        those of one-shot decoding itself, so that only the look-ahead differs
    voice      another reply's in the same voice
    average    the mean over nano's replies, which is what nano's checkpoint states
    estimated  none are given

The vocoder is `python -m training vocoder`'s, of the published depth and windows. It needs flite
and pocketsphinx.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.studies.common import Record, parser_of, write
from mimo_fast.audio.mel import mel_filters
from mimo_fast.bench.environment import environment
from mimo_fast.checkpoint.embedded import NANO
from mimo_fast.config import CodecConfig
from mimo_fast.runtime.codec.geometry import LOOKAHEAD, PATCH_FRAMES
from mimo_fast.runtime.codec.model import Codec
from mimo_fast.runtime.codec.state import NormStatistics
from training import data, domain
from training.codes import LEAD, TAIL
from training.listen import channel, recognise, word_errors
from training.synthesis import RATE, has_flite, synthesize
from training.vocoder import VOCODER, deep_codec

VOICES = {"replies": "unsaid", "unheard": "unheard"}
"""Name of a voice -> the part of the data that has held-out sentences in it."""

ELASTIC = "elastic"
EVERY: tuple[int | str, ...] = (*range(LOOKAHEAD + 1), ELASTIC)
SOME: tuple[int | str, ...] = (0, 1, 2, 3, 5, LOOKAHEAD, ELASTIC)
LOOKS = {"own": EVERY, "voice": SOME, "average": SOME, "estimated": EVERY}
HEARD: tuple[int | str, ...] = (0, 1, LOOKAHEAD, ELASTIC)
"""Look-aheads whose words are counted."""

FEW: tuple[int | str, ...] = (0, 1, 2, LOOKAHEAD, ELASTIC)

SENTENCES = 3
FIRST = 1, 3, 10
"""Patches over which the beginning is compared."""

WINDOW, HOP, BANDS, TOP = 1024, 240, 80, 8000.0
RANGE = 60.0
"""Decibels below the loudest band of the reference from which on spectra count as silent."""


@dataclass(frozen=True)
class Reply:
    """A recording [n] at 24 kHz, its first sentence and where that ends, its codes [n_q, T]."""

    wav: Tensor
    text: str
    first: int
    codes: Tensor


def replies(codec: Codec, part: str, count: int) -> Iterator[Reply]:
    """Held-out sentences, without the silence around them, as the language model says them."""
    for i in range(count):
        items = [data.item(part, SENTENCES * i + j) for j in range(SENTENCES)]
        spoken = [synthesize(domain.spoken(each.text), each.manner) for each in items]
        waves = [
            each.wav[max(0, each.starts[0] - round(LEAD * RATE)) : each.ends[-1]] for each in spoken
        ]
        hush = torch.zeros(round(TAIL * RATE))
        wav = torch.cat([part for each in waves for part in (each, hush)])
        codes = codec.encode(wav)
        whole = codes[:, : codes.shape[1] // PATCH_FRAMES * PATCH_FRAMES]
        yield Reply(wav, items[0].text, len(waves[0]) + len(hush), whole)


def streamed(
    codec: Codec, codes: Tensor, look: int | str, given: NormStatistics | None, weight: float | None
) -> Tensor:
    """Samples of a stream of patches at a look-ahead; weight: see `Codec.stream`, None its own."""
    options = {} if weight is None else {"weight": weight}
    stream = codec.stream(look, given, **options)
    parts = [stream.push(patch) for patch in codes.split(PATCH_FRAMES, dim=1)]
    return torch.cat([*parts, stream.finish()])


def snr_db(got: Tensor, want: Tensor) -> float:
    error = (got - want).double().square().sum().clamp(min=1e-20)
    return float(10 * torch.log10(want.double().square().sum() / error))


def mel_db(got: Tensor, want: Tensor) -> float:
    """Mean absolute difference of mel power spectra in dB, of waveforms [n] of one loudness."""
    ours, theirs = (_mel_power(wav) for wav in (got, want))
    floor = float(theirs.max()) * 10 ** (-RANGE / 10)
    a, b = (10 * power.clamp(min=floor).log10() for power in (ours, theirs))
    return float((a - b).abs().mean())


def _mel_power(wav: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(wav, WINDOW, HOP, window=window, return_complex=True)
    return spectrum.abs().square().T @ mel_filters(RATE, WINDOW, BANDS, 0.0, TOP)


def compare(
    codec: Codec, spoken: Sequence[Reply], kinds: Sequence[str], few: bool
) -> Iterator[Record]:
    """A row for each of these kinds of statistics and look-ahead, over replies in one voice.

    few: the look-aheads `FEW` alone.
    """
    samples = PATCH_FRAMES * codec.config.samples_per_frame
    wanted = [codec.decode(each.codes) for each in spoken]
    own = [codec.moments(each.codes) for each in spoken]
    known = {
        "own": own,
        "voice": [*own[1:], own[0]],
        "average": [average_statistics()] * len(spoken),
        "estimated": [None] * len(spoken),
    }
    understood(spoken, wanted, None)
    known_channel = channel()
    usual = understood(spoken, wanted, known_channel)
    yield {"statistics": "one-shot", "lookahead": None, **words(spoken, usual, usual)}
    recordings = [each.wav for each in spoken]
    understood(spoken, recordings, None)
    said = understood(spoken, recordings, channel())
    yield {"statistics": "recording", "lookahead": None, **words(spoken, said, usual)}
    for name in kinds:
        for look in tqdm(FEW if few else LOOKS[name], desc=name):
            pairs = zip(spoken, known[name], strict=True)
            # Else an elastic stream goes over to statistics of its own.
            weight = math.inf if name == "own" else None
            got = [streamed(codec, each.codes, look, given, weight) for each, given in pairs]
            row: Record = {"statistics": name, "lookahead": look}
            for patches in (*FIRST, None):
                end = None if patches is None else patches * samples
                cut = [(a[:end], b[:end]) for a, b in zip(got, wanted, strict=True)]
                row[f"first_{patches}" if patches else "whole"] = {
                    "snr_db": _summary([snr_db(a, b) for a, b in cut], min),
                    "mel_db": _summary([mel_db(a, b) for a, b in cut], max),
                }
            if look in HEARD:
                row |= words(spoken, understood(spoken, got, known_channel), usual)
            yield row


def average_statistics() -> NormStatistics:
    """Those that nano's checkpoint states: its decoder is this codec's."""
    stated = CodecConfig.from_dict(json.loads((NANO / "codec" / "config.json").read_text()))
    unpool, to_mel = torch.tensor(stated.moments)
    return NormStatistics((unpool[0], unpool[1]), (to_mel[0], to_mel[1]))


def understood(
    spoken: Sequence[Reply], got: Sequence[Tensor], known_channel: str | None
) -> list[str]:
    """What the recogniser hears in the first sentences."""
    pairs = zip(spoken, got, strict=True)
    return [recognise(wav[: each.first], RATE, known_channel) for each, wav in pairs]


def words(spoken: Sequence[Reply], heard: Sequence[str], usual: Sequence[str]) -> Record:
    """Words heard wrong, and sentences heard unlike `usual`, what is heard of one-shot decoding."""
    return {
        "words_wrong": sum(
            word_errors(text, each.text) for each, text in zip(spoken, heard, strict=True)
        ),
        "words": sum(len(each.text.split()) for each in spoken),
        "unlike": sum(a != b for a, b in zip(heard, usual, strict=True)),
        "sentences": len(heard),
    }


def _summary(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> Record:
    return {"mean": round(statistics.fmean(values), 2), "worst": round(worst(values), 2)}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--vocoder", type=Path, default=VOCODER, help="of `training vocoder`")
    parser.add_argument("--replies", type=int, default=8, help="in each voice")
    kinds = [*LOOKS]
    parser.add_argument("--statistics", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--voices", nargs="+", choices=[*VOICES], default=[*VOICES])
    parser.add_argument("--few", action="store_true", help="look-aheads: 0, 1, 2, 10, elastic")
    parser.add_argument("file", nargs="?", type=Path)
    args = parser.parse_args()
    if not has_flite():
        print("error: this needs flite (apt-get install flite)", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    codec = deep_codec(args.vocoder)
    rows: list[Record] = []
    found = {"environment": environment("cpu"), "replies": args.replies, "rows": rows}
    for voice in args.voices:
        spoken = [*replies(codec, VOICES[voice], args.replies)]
        found[f"seconds_{voice}"] = round(sum(len(each.wav) for each in spoken) / RATE, 1)
        for row in compare(codec, spoken, args.statistics, args.few):
            rows.append({"voice": voice, **row})
            write(args.file, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
